"""Several GPUs on recorded machines, with everything built: links, peer access, nearness, stages, nodes, auto."""

from __future__ import annotations

import json

import msgspec
import pytest
from selection_cases import ALL, BUILTIN, FULL, GIB, LLAMA_8B, LLAMA_70B, LLAMA_405B, choose, machine, names

from appliance.errors import ProfileError, SettingsError
from appliance.profiles import Capabilities, Outcome, Selection, explain_json, explain_text, reasons, require
from appliance.types import Hardware, ModelConfig

STAGES = msgspec.structs.replace(
    ALL, backends={**ALL.backends, "cuda": msgspec.structs.replace(ALL.backends["cuda"], max_pp=8)}
)
# 14 heads: of the tensor-parallel sizes 1, 2, 4 and 8 only 1 and 2 divide them. Some 70 GB in FP8.
ODD_70B = msgspec.structs.replace(LLAMA_70B, num_attention_heads=14, num_key_value_heads=14, head_dim=512)


def groups(selection: Selection) -> str:
    chosen = require(selection)
    return " ".join("+".join(map(str, group)) for group in chosen.gpu_groups)


def by_name(selection: Selection, name: str) -> Outcome:
    return next(outcome for outcome in selection.outcomes if outcome.name == name)


def said(selection: Selection, words: str) -> bool:
    return any(words in line for line in reasons(selection))


def first_gpus(name: str, count: int, **changes: object) -> Hardware:
    hardware = machine(name)
    return msgspec.structs.replace(
        hardware, gpus=tuple(msgspec.structs.replace(gpu, **changes) for gpu in hardware.gpus[:count])
    )


# ---------------------------------------------------------------- peer access


def test_sums_through_host_memory_only_where_nothing_else_fits() -> None:
    """Four 4090 without peer access: 8B never shares them; 70B in INT4 fits in no other way, and that is said."""
    for objective in ("throughput", "latency", "auto"):
        small = choose("rtx-4090-x4", LLAMA_8B, objective, STAGES)  # type: ignore[arg-type]
        assert require(small).tp_size == 1 and not said(small, "peer access")
        large = choose("rtx-4090-x4", LLAMA_70B, objective, STAGES)  # type: ignore[arg-type]
        assert (names(large)[0], groups(large)) == ("int4-tp4", "0+1+2+3")
        assert said(large, "there is no peer access between its GPUs: NCCL adds up through host memory, which is slow")


def test_another_precision_goes_before_sums_through_host_memory() -> None:
    """70B on two H100 that cannot read each other's memory: INT4 on each of them, not FP8 over both."""
    apart = msgspec.structs.replace(
        machine("h100-x2"),
        gpus=tuple(msgspec.structs.replace(g, links={1 - g.index: "none"}) for g in machine("h100-x2").gpus),
    )
    joined, split = choose("h100-x2", LLAMA_70B, build=STAGES), choose(apart, LLAMA_70B, build=STAGES)
    assert (names(joined)[0], groups(joined)) == ("fp8-tp2", "0+1")
    assert (names(split)[0], groups(split)) == ("int4-tp1", "0 1")
    assert by_name(split, "fp8-tp2").status == "runnable"
    (line,) = (line for line in reasons(split) if line.startswith("not fp8-tp2, fp8-kv8-tp2"))
    assert line.endswith(": runs only with sums through host memory, as there is no peer access")
    asked = choose(apart, LLAMA_70B, build=STAGES, profile="fp8")
    assert names(asked)[0] == "fp8-tp2" and said(asked, "or where it is asked for")


def test_the_group_with_peer_access_goes_before_a_larger_one_without() -> None:
    cards, single = machine("rtx-4090-x4").gpus, machine("h100-x1").gpus[0]
    both = msgspec.structs.replace(
        machine("rtx-4090-x4"), gpus=(*cards, msgspec.structs.replace(single, index=4, uuid="GPU-4"))
    )
    selection = choose(both, LLAMA_70B, build=STAGES)
    assert (names(selection)[0], groups(selection)) == ("int4-tp1", "4")
    assert said(selection, "idle: 4 × NVIDIA GeForce RTX 4090")


def test_mig_slices_are_never_joined() -> None:
    for asked in ({"tp_size": 2}, {"pp_size": 2}):
        with pytest.raises(ProfileError, match="MIG slices cannot be joined"):
            require(choose("h100-mig-3g.40gb", LLAMA_8B, build=STAGES, **asked))
    assert choose("h100-mig-3g.40gb", LLAMA_70B, build=STAGES).selected is None, "no stages over slices either"
    two = choose("h100-mig-3g.40gb", LLAMA_8B, build=STAGES)
    assert reasons(two)[0].startswith("2 replicas of fp8-tp1 on 2 slices of GPU 0 (NVIDIA H100 80GB HBM3 MIG 3g.40gb)")


# ---------------------------------------------------------------- nearness


def test_gpus_of_one_numa_node_go_together() -> None:
    """L40S 0 and 2 are on one socket, 1 and 3 on the other."""
    pair = choose("l40s-x4", LLAMA_70B, build=STAGES, tp_size=2)
    assert groups(pair) == "0+2 1+3"
    assert said(pair, "its GPUs reach each other's memory over PCIe, inside one NUMA node")
    whole = choose("l40s-x4", LLAMA_70B, "latency", STAGES)
    assert groups(whole) == "0+2 1+3" or names(whole)[0] == "int4-tp4"
    four = choose("l40s-x4", LLAMA_70B, build=STAGES, tp_size=4)
    assert said(four, "over PCIe, from socket to socket")


def test_links_then_idleness_then_nearness_decide() -> None:
    hardware = machine("l40s-x4")
    busy = [msgspec.structs.replace(g, utilization=90 if g.index == 2 else 0) for g in hardware.gpus]
    at_work = choose(msgspec.structs.replace(hardware, gpus=tuple(busy)), LLAMA_70B, build=STAGES, tp_size=2)
    assert groups(at_work) == "1+3", "not the GPU that somebody computes on; the other pair is near too"
    bridged = [msgspec.structs.replace(g, links={**g.links, g.index ^ 1: "nvlink"}) for g in hardware.gpus]
    linked = choose(msgspec.structs.replace(hardware, gpus=tuple(bridged)), LLAMA_70B, build=STAGES, tp_size=2)
    assert groups(linked) == "0+1 2+3", "a bridge between sockets is better than a way inside one"
    unknown = [msgspec.structs.replace(g, paths={}) for g in hardware.gpus]
    plain = choose(msgspec.structs.replace(hardware, gpus=tuple(unknown)), LLAMA_70B, build=STAGES, tp_size=2)
    assert groups(plain) == "0+1 2+3" and said(plain, "its GPUs reach each other's memory over PCIe")


def test_the_link_is_named() -> None:
    assert said(choose("h200-x4", LLAMA_70B, "latency", STAGES), "over NVLink")
    assert not said(choose("h200-x4", LLAMA_8B, build=STAGES), "over NVLink"), "one GPU each"


# ---------------------------------------------------------------- stages inside a node


def test_stages_inside_a_node_where_no_tensor_parallel_size_fits() -> None:
    selection = choose("h100-x4", ODD_70B, build=STAGES, precision="bf16")
    chosen = require(selection)
    assert (chosen.name, groups(selection)) == ("bf16-tp2-pp2", "0+1+2+3")
    assert said(selection, "in several stages, as no tensor-parallel size alone fits")
    assert "do not divide the model's heads (14)" in (by_name(selection, "bf16-tp4").reason or "")
    assert require(choose("h100-x4", ODD_70B, build=STAGES)).pp_size == 1, "not where another precision fits"
    three = choose(first_gpus("h100-x4", 3), LLAMA_70B, build=STAGES, precision="bf16")
    assert (names(three)[0], groups(three)) == ("bf16-tp1-pp3", "0+1+2")
    assert not [o for o in choose("h100-x4", LLAMA_8B, build=STAGES).outcomes if o.pp_size > 1], "nobody needs them"


def test_stages_that_are_not_built_are_wanted() -> None:
    selection = choose(first_gpus("h100-x4", 3), ODD_70B, build=FULL, precision="bf16", tp_size=1)
    assert names(selection) == (None, "bf16-tp1-pp3")
    with pytest.raises(ProfileError, match="bf16-tp1-pp3 would fit, but pipeline parallelism over 3 is not built yet"):
        require(selection)


def test_a_stage_holds_its_layers_and_the_ends_their_extras() -> None:
    """70B in FP8: the first stage has the embedding (2.1 GB), the last the head (1.1 GB); K/V of its layers only."""
    selection = choose("h200-x4", LLAMA_70B, build=STAGES, pp_size=2, tp_size=1)
    two, one = by_name(selection, "fp8-tp1-pp2"), choose("h200-x4", LLAMA_70B, build=STAGES)
    whole = by_name(one, "fp8-tp1")
    assert two.memory is not None and whole.memory is not None
    most = max(len(LLAMA_70B.layers_of_stage(stage, 2)) for stage in range(2))
    assert two.memory.kv_per_token * 80 == whole.memory.kv_per_token * most
    halves = whole.memory.weights / 2
    assert halves < two.memory.weights < halves + 2.5e9, "the heavier half, without the other's embedding or head"


def test_a_pipeline_is_no_quicker_but_gives_nearly_as_much() -> None:
    """Bubbles: a token passes all stages, of which each has a part of the sequences in hand."""
    one = by_name(choose("h200-x4", LLAMA_70B, build=STAGES), "fp8-tp1")
    two = by_name(choose("h200-x4", LLAMA_70B, build=STAGES, pp_size=2, tp_size=1), "fp8-tp1-pp2")
    four = by_name(choose("h200-x4", LLAMA_70B, build=STAGES, pp_size=4, tp_size=1), "fp8-tp1-pp4")
    assert one.decode_ms is not None and two.decode_ms is not None and four.decode_ms is not None
    assert one.decode_ms < two.decode_ms < four.decode_ms < 1.15 * one.decode_ms
    assert one.tokens_per_second_per_gpu is not None and four.tokens_per_second_per_gpu is not None
    assert four.tokens_per_second_per_gpu < two.tokens_per_second_per_gpu < 1.3 * one.tokens_per_second_per_gpu


# ---------------------------------------------------------------- nodes


def test_several_nodes_have_a_stage_each() -> None:
    """405B on two nodes of four H100: TP inside, PP across; the GPUs are those of this node."""
    selection = choose("h100-x4", LLAMA_405B, build=STAGES, nodes=2)
    chosen = require(selection)
    assert (chosen.name, chosen.gpu_groups, chosen.replicas) == ("fp8-tp4-pp2", ((0, 1, 2, 3),), 1)
    assert reasons(selection)[0].startswith("fp8-tp4-pp2 on GPUs 0, 1, 2, 3 (NVIDIA H100 80GB HBM3) of each of 2 nodes")
    assert {o.pp_size for o in selection.outcomes} == {2}
    data = explain_json(selection)
    assert data["selected"]["pp_size"] == data["nodes"] == 2
    assert {entry["name"]: entry["link"] for entry in data["profiles"]}["fp8-tp4-pp2"] == "nvlink"
    assert choose("h100-x4", LLAMA_405B, build=STAGES, precision="fp8").selected is None, "one node is not enough"
    four = choose("h100-x4", LLAMA_405B, build=STAGES, nodes=2, pp_size=4)
    assert (names(four)[0], groups(four)) == ("fp8-tp2-pp4", "0+1+2+3")


def test_nodes_are_no_replicas_and_have_whole_stages() -> None:
    small = choose("h200-x4", LLAMA_8B, build=STAGES, nodes=2, tp_size=1)
    assert (names(small)[0], groups(small)) == ("fp8-tp1-pp2", "0")
    assert said(small, "3 of 4 GPUs stay idle (1, 2, 3): each node has 1 rank")
    assert require(choose("h200-x4", LLAMA_70B, build=STAGES, nodes=2)).tp_size == 4, "else they do what they can"
    with pytest.raises(SettingsError, match="3 pipeline stages cannot be spread over 2 nodes"):
        choose("h200-x4", build=STAGES, nodes=2, pp_size=3)
    with pytest.raises(SettingsError, match="3 pipeline stages cannot be spread over 2 nodes"):
        choose("h200-x4", build=STAGES, nodes=2, profile="fp8-tp1-pp3")
    with pytest.raises(SettingsError, match="2 replicas on 2 nodes are not supported"):
        choose("h200-x4", build=STAGES, nodes=2, replicas=2)
    with pytest.raises(ProfileError, match="needs 8 identical GPUs on each node, and 4 can be used"):
        require(choose("h200-x4", build=STAGES, nodes=2, tp_size=8))


def test_nodes_that_are_not_built_are_refused_with_what_to_leave_out() -> None:
    with pytest.raises(ProfileError, match=r"pipeline parallelism over 3 is not built yet \(leave --nnodes out\)"):
        require(choose("h200-x4", LLAMA_8B, build=FULL, nodes=3))


def test_a_network_costs_more_than_a_link() -> None:
    inside = by_name(choose("h100-x8", LLAMA_70B, build=STAGES, tp_size=4, pp_size=2), "fp8-tp4-pp2")
    across = by_name(choose("h100-x8", LLAMA_70B, build=STAGES, tp_size=4, nodes=2), "fp8-tp4-pp2")
    assert inside.decode_ms is not None and across.decode_ms is not None and inside.decode_ms < across.decode_ms


# ---------------------------------------------------------------- objectives


def test_auto_is_quick_where_that_costs_little() -> None:
    """H200s: TP4 gives 70B its tokens in a third of the time, and a sixth fewer in all than TP2; TP2 gives 8B its
    tokens in two thirds, and an eighth fewer in all. Over PCIe that is too dear."""
    large, small = choose("h200-x4", LLAMA_70B, "auto", STAGES), choose("h200-x4", LLAMA_8B, "auto", STAGES)
    assert (names(large)[0], groups(large)) == ("fp8-tp4", "0+1+2+3")
    assert (names(small)[0], groups(small)) == ("fp8-tp2", "0+1 2+3")
    assert names(choose("h100-pcie-x2", LLAMA_8B, "auto", STAGES))[0] == "fp8-tp1"
    assert said(large, "quickest size for one request whose output is within 20% of the best")
    chosen, best = require(large), max(o.score or 0 for o in large.outcomes if o.profile == "fp8")
    assert (chosen.score or 0) >= 0.8 * best
    assert chosen.max_num_seqs == require(choose("h200-x4", LLAMA_70B, build=STAGES)).max_num_seqs


@pytest.mark.parametrize(
    ("name", "selected"),
    [("h100-x1", "int4-tp1"), ("h100-x2", "fp8-tp2"), ("h100-x4", "fp8-tp2"), ("h100-x8", "fp8-tp2")],
)
def test_70b_on_h100s(name: str, selected: str) -> None:
    selection = choose(name, LLAMA_70B, build=STAGES)
    assert names(selection)[0] == selected
    assert require(selection).replicas == max(1, len(machine(name).gpus) // require(selection).tp_size)


def test_what_would_be_quicker_is_said_to_who_wants_latency() -> None:
    selection = choose("h100-x1", LLAMA_70B, "latency", STAGES)
    int4 = by_name(selection, "int4-tp1")
    assert names(selection)[0] == "fp8-kv8-tp1"
    assert said(
        selection,
        f"int4-tp1 is predicted to be quicker ({int4.decode_ms:.2f} ms per token of one request), but the precision "
        "comes first: its priority is 20, that of fp8-kv8 90; --profile=int4 takes it",
    )
    assert not said(choose("h100-x1", LLAMA_70B, build=STAGES), "quicker")
    assert not said(choose("a100-80gb-x1", LLAMA_70B, "latency", STAGES), "quicker"), "INT4 serves there"


# ---------------------------------------------------------------- nothing fits


@pytest.mark.parametrize(
    ("name", "wanted", "words"),
    [
        ("h100-x1", "fp8-tp8", "on 8 × NVIDIA H100 80GB HBM3 it would run as fp8-tp8"),
        ("a10g-x4", "int4-tp8-pp2", "on 16 × NVIDIA A10G it would run as int4-tp8-pp2, in 2 stages of 8"),
        ("rtx-4090-x2", "int4-tp8-pp2", "on 16 × NVIDIA GeForce RTX 4090 it would run as int4-tp8-pp2"),
    ],
)
def test_what_is_too_large_is_refused_with_what_would_do(name: str, wanted: str, words: str) -> None:
    selection = choose(name, LLAMA_405B, build=STAGES)
    assert names(selection) == (None, wanted)
    with pytest.raises(ProfileError) as caught:
        require(selection)
    assert words in str(caught.value) and "the least is int4-tp" in str(caught.value)
    assert wanted in json.dumps(explain_json(selection)["wanted"]) and wanted in explain_text(selection)


def test_405b_where_it_fits() -> None:
    expected = {"h200-x4": "fp8-tp4", "h200-x8": "fp8-tp4", "a100-80gb-x8": "int4-tp4", "h100-x8": "fp8-tp8"}
    assert {name: names(choose(name, LLAMA_405B, build=STAGES))[0] for name in expected} == expected


def test_profiles_that_lack_alike_share_a_line_with_their_best_size() -> None:
    lines = reasons(choose("h200-x2", LLAMA_405B, build=STAGES))
    assert any(line.startswith("not fp8-tp2, int8-tp2: needs ") for line in lines)
    assert not any(line.startswith("not fp8-tp1") for line in lines), "TP2 lacks less"


# ---------------------------------------------------------------- the CPU


def test_replicas_and_ranks_on_a_cpu_share_its_cores() -> None:
    def chosen(**asked: object) -> Outcome:
        cpu = msgspec.structs.replace(STAGES.backends["cpu"], max_tp=8)
        build: Capabilities = msgspec.structs.replace(STAGES, backends={**STAGES.backends, "cpu": cpu})
        return require(choose("none", model_on_cpu, build=build, precision="bf16", **asked))

    model_on_cpu: ModelConfig = msgspec.structs.replace(
        BUILTIN, hidden_size=2048, intermediate_size=8192, vocab_size=32000
    )
    one, two, ranks = chosen(), chosen(replicas=2), chosen(tp_size=2)
    assert one.score is not None and two.score is not None and ranks.score is not None
    assert two.decode_ms is not None and one.decode_ms is not None
    assert two.decode_ms == pytest.approx(2 * one.decode_ms, rel=0.15), "half of the cores each"
    assert two.score < 1.1 * one.score and ranks.score < 1.1 * one.score, "no more cores than there are"
    assert require(choose("none", BUILTIN, build=STAGES)).requires_bytes_per_gpu < 4 * GIB
