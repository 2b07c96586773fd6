"""The choice of size on recorded machines, with everything built: how many ranks, how many replicas, on which GPUs, and
what is said of it."""

from __future__ import annotations

import json
import re

import msgspec
import pytest
from selection_cases import (
    ALL,
    FIRST,
    FULL,
    GIB,
    LLAMA_8B,
    LLAMA_70B,
    choose,
    machine,
    names,
)

from appliance.errors import ProfileError
from appliance.profiles import Outcome, Selection, engine_values, explain_json, explain_text, reasons, require
from appliance.types import Gpu, Hardware

# machine, model: (profile and size, GPUs of each replica) for throughput; (the same) for latency
SIZES = [
    ("h200-x4", LLAMA_8B, ("fp8-tp1", "0 1 2 3"), ("fp8-tp4", "0+1+2+3")),
    ("h200-x4", LLAMA_70B, ("fp8-tp1", "0 1 2 3"), ("fp8-tp4", "0+1+2+3")),
    ("h200-x8", LLAMA_70B, ("fp8-tp1", "0 1 2 3 4 5 6 7"), ("fp8-tp8", "0+1+2+3+4+5+6+7")),
    ("h100-x8", LLAMA_70B, ("fp8-tp2", "0+1 2+3 4+5 6+7"), ("fp8-tp8", "0+1+2+3+4+5+6+7")),
    ("a100-80gb-x8", LLAMA_8B, ("int4-tp1", "0 1 2 3 4 5 6 7"), ("int4-tp8", "0+1+2+3+4+5+6+7")),
    ("a100-80gb-x8", LLAMA_70B, ("int4-tp1", "0 1 2 3 4 5 6 7"), ("int4-tp8", "0+1+2+3+4+5+6+7")),
    ("l40s-x2", LLAMA_8B, ("int4-tp1", "0 1"), ("int4-tp2", "0+1")),
    ("l40s-x2", LLAMA_70B, ("int4-tp2", "0+1"), ("int4-tp2", "0+1")),
    ("l40s-x4", LLAMA_8B, ("int4-tp1", "0 1 2 3"), ("int4-tp4", "0+1+2+3")),
    ("l40s-x4", LLAMA_70B, ("int4-tp2", "0+2 1+3"), ("int4-tp4", "0+1+2+3")),
    ("rtx-4090-x4", LLAMA_70B, ("int4-tp4", "0+1+2+3"), ("int4-tp4", "0+1+2+3")),
    ("rtx-4090-x2", LLAMA_8B, ("int4-tp1", "0 1"), ("int4-tp1", "0")),  # without peer access TP2 gains next to nothing
    ("rtx-4090-x2", LLAMA_70B, (None, ""), (None, "")),
    ("mixed-hopper-ada", LLAMA_8B, ("fp8-tp1", "0 1"), ("fp8-tp1", "0")),
    ("mixed-hopper-ada", LLAMA_70B, ("fp8-tp2", "0+1"), ("fp8-tp2", "0+1")),
    ("h100-x4-pairs", LLAMA_70B, ("fp8-tp2", "0+2 1+3"), ("fp8-tp4", "0+1+2+3")),
    ("h100-x4-pairs", LLAMA_8B, ("fp8-tp1", "0 1 2 3"), ("fp8-tp2", "0+2")),  # TP4 would cross the bridges
    ("busy-node", LLAMA_8B, ("fp8-tp1", "1 2 3"), ("fp8-tp2", "1+2")),
    ("busy-node", LLAMA_70B, ("fp8-tp2", "1+2"), ("fp8-tp2", "1+2")),
    ("h100-mig-3g.40gb", LLAMA_8B, ("fp8-tp1", "0 0"), ("fp8-tp1", "0")),  # two slices of GPU 0
    ("h100-mig-3g.40gb", LLAMA_70B, (None, ""), (None, "")),
]


# machine, model, objective: words of the first reason, and of another line
WHY = [
    (
        "h200-x2",
        LLAMA_8B,
        "throughput",
        "2 replicas of fp8-tp1 on GPUs 0, 1 ",
        "tokens/s per GPU at full load, against",
    ),
    ("h200-x2", LLAMA_70B, "latency", "whose time per token is within 10% of the best", "over NVLink"),
    (
        "h200-x4",
        LLAMA_70B,
        "auto",
        "quickest size for one request whose output is within 20% of the best",
        "TP4: predicted",
    ),
    ("h200-x4", LLAMA_8B, "auto", "2 replicas of fp8-tp2 on GPUs 0+1, 2+3 ", "2 replicas of TP2: predicted"),
    ("h200-x8", LLAMA_70B, "throughput", "smallest group of GPUs that fits", "8 replicas of TP1: predicted"),
    ("a100-80gb-x8", LLAMA_70B, "latency", "int4-tp8 on GPUs 0, 1, 2, 3, 4, 5, 6, 7", "over NVLink"),
    ("l40s-x4", LLAMA_70B, "throughput", "2 replicas of int4-tp2 on GPUs 0+2, 1+3 ", "PCIe, inside one NUMA node"),
    ("l40s-x4", LLAMA_70B, "latency", "int4-tp4 on GPUs 0, 1, 2, 3", "PCIe, from socket to socket"),
    ("rtx-4090-x2", LLAMA_8B, "latency", "no larger group that can run is 10% faster", "1 of 2 GPUs stays idle (1)"),
    ("rtx-4090-x4", LLAMA_70B, "throughput", "smallest group of GPUs that fits", "NCCL adds up through host memory"),
    ("mixed-hopper-ada", LLAMA_70B, "throughput", "fp8-tp2 on GPUs 0, 1 ", "idle: 1 × NVIDIA L4"),
    (
        "busy-node",
        LLAMA_8B,
        "throughput",
        "3 replicas of fp8-tp1 on GPUs 1, 2, 3 ",
        "GPU 0 is busy: 2.1 GiB of 79.6 GiB are",
    ),
    ("h100-mig-3g.40gb", LLAMA_8B, "throughput", "2 replicas of fp8-tp1 on 2 slices of GPU 0 ", "MIG slices cannot"),
]


@pytest.mark.parametrize(("name", "model", "objective", "first", "other"), WHY)
def test_why(name: str, model, objective, first: str, other: str) -> None:
    lines = reasons(choose(name, model, objective, ALL))
    assert first in lines[0], lines[0]
    assert any(other in line for line in lines[1:]), lines


def groups(selection: Selection) -> str:
    if selection.selected is None:
        return ""
    return " ".join("+".join(map(str, group)) for group in selection.selected.gpu_groups)


@pytest.mark.parametrize(("name", "model", "throughput", "latency"), SIZES)
def test_sizes_and_replicas(name: str, model, throughput: tuple[str, str], latency: tuple[str, str]) -> None:
    many, quick = choose(name, model, "throughput", ALL), choose(name, model, "latency", ALL)
    assert (names(many)[0], groups(many)) == throughput
    assert (names(quick)[0], groups(quick)) == latency


@pytest.mark.parametrize(("name", "model"), [case[:2] for case in SIZES])
def test_without_a_launcher_for_replicas_there_is_one(name: str, model) -> None:
    for build in (FIRST, FULL):
        for objective in ("throughput", "latency"):
            selection = choose(name, model, objective, build)  # type: ignore[arg-type]
            assert {o.replicas for o in selection.outcomes} == {1}
            if selection.selected is not None:
                assert selection.selected.device_groups == (selection.selected.devices,)
            data = explain_json(selection)
            assert data["replicas"] == (0 if selection.selected is None else 1)


def changed(name: str, **of_gpu: dict[str, object]) -> Hardware:
    """A recorded machine with changes of its GPUs: `gpu3={"utilization": 90}`."""
    hardware = machine(name)
    changes = {int(key.removeprefix("gpu")): value for key, value in of_gpu.items()}
    gpus = tuple(msgspec.structs.replace(gpu, **changes.get(gpu.index, {})) for gpu in hardware.gpus)
    return msgspec.structs.replace(hardware, gpus=gpus)


def by_name(selection: Selection, name: str) -> Outcome:
    return next(outcome for outcome in selection.outcomes if outcome.name == name)


# ---------------------------------------------------------------- GPUs that are left out


def test_the_fullest_gpu_decides_or_is_left_out() -> None:
    """80 GB each; what another program took of GPU 2 leaves it room, or not enough."""
    some, much = (choose(changed("h100-x4", gpu2={"free_memory": gib * GIB}), build=ALL) for gib in (60, 12))
    assert groups(some) == "0 1 3 2" and groups(much) == "0 1 3"
    whole = choose("h100-x4", build=ALL)
    assert require(some).kv_cache_tokens < require(whole).kv_cache_tokens == require(much).kv_cache_tokens
    lines = reasons(much)
    assert "GPU 2 is busy: 12.0 GiB of 79.6 GiB are free" in lines
    assert "1 of 4 GPUs stays idle (2): too little is free there for another replica" in lines
    # Room for 50 thousand tokens is enough, unless the others take contexts of 131072.
    tight = changed("h100-x4", gpu2={"free_memory": 20 * GIB})
    assert groups(choose(tight, build=ALL)) == "0 1 3"
    assert groups(choose(tight, build=ALL, max_model_len=4096)) == "0 1 3 2"
    tp4 = by_name(some, "fp8-tp4")
    assert tp4.kv_cache_tokens < by_name(whole, "fp8-tp4").kv_cache_tokens, "the free memory of the fullest counts"


def test_a_gpu_that_somebody_computes_on_is_left_out() -> None:
    selection = choose(changed("h200-x4", gpu1={"utilization": 95}), build=ALL)
    assert groups(selection) == "0 2 3"
    assert "GPU 1 is left out: somebody computes on it (utilization 95%)" in reasons(selection)
    asked = choose(changed("h200-x4", gpu1={"utilization": 95}), build=ALL, replicas=4)
    assert groups(asked) == "0 2 3 1", "but not if so many are asked for"


def test_a_count_that_the_size_does_not_divide_leaves_gpus_idle() -> None:
    three = machine("h100-x4")
    three = msgspec.structs.replace(three, gpus=three.gpus[:3])
    selection = choose(three, LLAMA_70B, build=ALL)
    assert (names(selection)[0], groups(selection)) == ("fp8-tp2", "0+1")
    line = "1 of 3 GPUs stays idle (2): a replica of TP2 takes 2, with as much free memory as the first has"
    assert line in reasons(selection)
    quick = choose("h100-x4-pairs", objective="latency", build=ALL)
    assert "2 of 4 GPUs stay idle (1, 3): --replicas=2 or --objective=throughput would use them" in reasons(quick)
    asked = choose("h100-x4-pairs", objective="latency", build=ALL, replicas=2)
    assert (names(asked)[0], groups(asked)) == ("fp8-tp2", "0+2 1+3")


def test_other_types_of_gpu_are_left_out_with_a_line() -> None:
    line = (
        "the machine is mixed: 2 × NVIDIA H100 80GB HBM3 is the group in use, idle: 1 × NVIDIA L4 "
        "(ranks need identical GPUs)"
    )
    assert line in reasons(choose("mixed-hopper-ada", build=ALL))
    three = choose("mixed-hopper-ada", build=ALL, replicas=3)
    assert three.selected is None
    with pytest.raises(ProfileError, match="3 replicas of 1 GPU need 3 identical GPUs, and 2 can be used"):
        require(three)


def test_mig_slices_serve_replicas_but_no_ranks() -> None:
    selection = choose("h100-mig-3g.40gb", build=ALL)
    assert require(selection).replicas == 2
    assert [group[0][:4] for group in require(selection).device_groups] == ["MIG-", "MIG-"]
    assert "TP2: MIG slices cannot be joined: one slice serves one rank" in reasons(selection)
    with pytest.raises(ProfileError, match="MIG slices cannot be joined"):
        require(choose("h100-mig-3g.40gb", build=ALL, tp_size=2))


# ---------------------------------------------------------------- links and models


def test_a_missing_link_makes_a_size_slow_and_not_forbidden() -> None:
    joined, apart = (
        by_name(choose(msgspec.structs.replace(machine("h100-x2"), gpus=linked(link)), build=ALL), "fp8-tp2")
        for link in ("nvlink", "none")
    )
    assert joined.status == apart.status == "runnable"
    assert apart.decode_ms > 1.5 * joined.decode_ms
    assert apart.tokens_per_second_per_gpu < 0.6 * joined.tokens_per_second_per_gpu
    assert names(choose("rtx-4090-x2", build=ALL, tp_size=2))[0] == "int4-tp2", "whoever asks gets it"


def linked(link: str) -> tuple[Gpu, ...]:
    return tuple(msgspec.structs.replace(gpu, links={1 - gpu.index: link}) for gpu in machine("h100-x2").gpus)


def test_a_vocabulary_that_ranks_do_not_divide_is_padded() -> None:
    odd = msgspec.structs.replace(LLAMA_8B, vocab_size=128257)
    tp4 = by_name(choose("h200-x4", odd, "latency", ALL), "fp8-tp4")
    even = by_name(choose("h200-x4", msgspec.structs.replace(odd, vocab_size=128260), "latency", ALL), "fp8-tp4")
    assert tp4.status == "runnable" and tp4.memory is not None and even.memory is not None
    embeddings = 3 * 4096 * 2  # whole on every rank, without the three rows of padding
    assert even.memory.weights - tp4.memory.weights == embeddings, "the head has as many rows as the padded one"


def test_fewer_kv_heads_than_ranks_repeat_them() -> None:
    few = msgspec.structs.replace(LLAMA_8B, num_key_value_heads=4)
    selection = choose("h200-x8", few, build=ALL)
    four, eight = by_name(selection, "fp8-tp4"), by_name(selection, "fp8-tp8")
    assert four.status == eight.status == "runnable"
    assert four.memory is not None and eight.memory is not None
    assert four.memory.kv_per_token == eight.memory.kv_per_token


def test_weights_that_leave_no_room_for_requests_are_shared() -> None:
    """14B in BF16 on L40S of 45 GB: alone 33 requests at once, over two GPUs 159."""
    model = msgspec.structs.replace(LLAMA_8B, hidden_size=5120, num_hidden_layers=48, num_attention_heads=40)
    hardware = machine("l40s-x2")
    selection = choose(hardware, model, build=ALL, precision="bf16")
    one, two = by_name(selection, "bf16-tp1"), by_name(selection, "bf16-tp2")
    assert one.roomy and one.replicas == 2 and one.score is not None and two.score is not None
    assert two.score > 1.3 * one.score and names(selection)[0] == "bf16-tp2"
    assert "smallest group of GPUs whose predicted output is within 30% of the best" in reasons(selection)[0]
    # Not where the number of replicas is given, or none can be served.
    assert names(choose(hardware, model, build=ALL, precision="bf16", replicas=1))[0] == "bf16-tp1"
    assert names(choose(hardware, model, build=FULL, precision="bf16"))[0] == "bf16-tp1"


# ---------------------------------------------------------------- what a user asks for


@pytest.mark.parametrize(
    ("name", "model", "asked", "expected"),
    [
        ("h200-x8", LLAMA_70B, {"tp_size": 4}, ("fp8-tp4", "0+1+2+3 4+5+6+7")),
        ("h200-x8", LLAMA_70B, {"tp_size": 4, "replicas": 1}, ("fp8-tp4", "0+1+2+3")),
        ("h200-x8", LLAMA_70B, {"replicas": 2}, ("fp8-tp1", "0 1")),
        ("h200-x8", LLAMA_8B, {"tp_size": 2, "replicas": 3}, ("fp8-tp2", "0+1 2+3 4+5")),
        ("h200-x8", LLAMA_8B, {"tp_size": 2, "pp_size": 2}, ("fp8-tp2-pp2", "0+1+2+3 4+5+6+7")),
    ],
)
def test_sizes_and_replicas_that_are_asked_for(name: str, model, asked: dict[str, int], expected) -> None:
    selection = choose(name, model, build=ALL, **asked)
    assert (names(selection)[0], groups(selection)) == expected


@pytest.mark.parametrize(
    ("name", "model", "asked", "words"),
    [
        (
            "h200-x4",
            LLAMA_8B,
            {"replicas": 3, "tp_size": 2},
            r"^3 replicas of 2 GPUs need 6 identical GPUs, and 4 can be used "
            r"\(choose 2 or less for --replicas, or serve where there are 6\)$",
        ),
        ("h200-x4", LLAMA_8B, {"replicas": 5}, r"5 replicas of 1 GPU need 5 identical GPUs.*choose 4 or less"),
        ("busy-node", LLAMA_8B, {"replicas": 4}, r"needs .* free per GPU .*, and it has 2\.1 GiB|fullest of them"),
        ("none", LLAMA_8B, {"replicas": 4, "precision": "bf16"}, r"needs .* free .*and there are"),
    ],
)
def test_replicas_that_do_not_go_are_refused(name: str, model, asked: dict[str, object], words: str) -> None:
    with pytest.raises(ProfileError) as caught:
        require(choose(name, model, build=ALL, **asked))
    assert re.search(words, str(caught.value)), str(caught.value)


def test_replicas_and_ranks_on_a_cpu_share_its_memory() -> None:
    from selection_cases import BUILTIN

    two = require(choose("none", BUILTIN, build=ALL, replicas=2))
    assert (two.name, two.replicas, two.device_groups) == ("bf16-cpu-tp1", 2, ((), ()))
    assert two.kv_cache_tokens < require(choose("none", BUILTIN, build=ALL)).kv_cache_tokens
    with pytest.raises(ProfileError, match="the CPU backend serves on one device"):
        require(choose("none", BUILTIN, build=ALL, tp_size=2))
    cpu = msgspec.structs.replace(ALL.backends["cpu"], max_tp=8)
    build = msgspec.structs.replace(ALL, backends={**ALL.backends, "cpu": cpu})
    assert require(choose("none", BUILTIN, build=build, tp_size=2)).name == "bf16-cpu-tp2"
    assert require(choose("none", BUILTIN, build=build)).name == "bf16-cpu-tp1", "only who asks gets ranks on a CPU"


# ---------------------------------------------------------------- explanations


def test_every_size_has_a_line_and_replicas_are_compared() -> None:
    selection = choose("h200-x4", build=ALL)
    lines = reasons(selection)
    tp1, tp4 = by_name(selection, "fp8-tp1"), by_name(selection, "fp8-tp4")
    assert lines[0].startswith("4 replicas of fp8-tp1 on GPUs 0, 1, 2, 3 (NVIDIA H200): ")
    assert (
        f"4 replicas of TP1: predicted {tp1.tokens_per_second_per_gpu:,.0f} tokens/s per GPU at full load, against "
        f"{tp4.tokens_per_second_per_gpu:,.0f} with TP4"
    ) in lines
    for size in (1, 2, 4):
        outcome = by_name(selection, f"fp8-tp{size}")
        (line,) = (line for line in lines if line.startswith(f"TP{size}: "))
        assert f"predicted {outcome.decode_ms:.2f} ms per token of one request" in line
        assert f"{outcome.tokens_per_second_per_gpu:,.0f} tokens/s per GPU at full load (256 requests at once)" in line
        assert "per rank with its KV cache" in line
    assert "TP8: needs 8 identical GPUs, and 4 can be used" in lines
    assert "GPUs 0+1, 2+3, 4+5, 6+7 (NVIDIA H100" in reasons(choose("h100-x8", LLAMA_70B, build=ALL))[0]
    assert not any(line.startswith("TP1: ") for line in reasons(choose("h200-x1", build=ALL))), "no choice, no lines"
    assert not any("asked for" in line for line in reasons(choose("h200-x4", build=ALL, tp_size=2)))
    (today,) = (line for line in reasons(choose("h200-x4")) if line.startswith("TP2: "))
    assert today.endswith("; tensor parallelism over 2 is not built yet: cuda serves on one device")


def test_predictions_in_json() -> None:
    data = json.loads(json.dumps(explain_json(choose("h200-x4", LLAMA_70B, build=ALL))))
    assert data["replicas"] == 4 and len(data["device_groups"]) == 4
    assert data["devices"] == data["device_groups"][0]
    values = engine_values(choose("h100-x8", LLAMA_70B, build=ALL))
    assert values["replicas"] == 4 and len(set(values["devices"])) == 8
    of = {entry["name"]: entry for entry in data["profiles"]}
    assert data["predicted"] == of["fp8-tp1"]["predicted"]
    for size in (1, 2, 4):
        entry = of[f"fp8-tp{size}"]
        predicted, memory = entry["predicted"], entry["memory"]
        assert predicted["ms_per_token"] == entry["decode_ms"] > 0
        fixed = memory["weights"] + memory["activations"] + memory["overhead"]
        cache = predicted["kv_cache_tokens"] * memory["kv_per_token"]
        assert predicted["bytes_per_rank"] == fixed + cache < 0.9 * 143156 * 2**20
        assert entry["score"] == pytest.approx(4 * predicted["tokens_per_second_per_gpu"], rel=1e-3), "on all four GPUs"
        assert 1 <= predicted["full_batch"] <= entry["max_num_seqs"]
    assert of["fp8-tp8"]["predicted"] is None and of["fp8-tp2"]["replicas"] == 2
    assert "selected  fp8-tp1" in explain_text(choose("h200-x4", LLAMA_70B, build=ALL))


def test_more_ranks_are_quicker_and_cost_throughput() -> None:
    """On H200s over NVLink, beyond what TP1's persistent kernel gains."""
    for model in (LLAMA_8B, LLAMA_70B):
        outcomes = [by_name(choose("h200-x8", model, build=ALL), f"fp8-tp{size}") for size in (2, 4, 8)]
        times = [o.decode_ms for o in outcomes]
        rates = [o.tokens_per_second_per_gpu for o in outcomes]
        assert times == sorted(times, reverse=True) and rates == sorted(rates, reverse=True)
