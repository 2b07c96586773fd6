"""`select` on recorded machines: a table of machine × model, overrides, and explanations."""

from __future__ import annotations

import json
import re

import msgspec
import pytest
from selection_cases import (
    BUILTIN,
    FACTS,
    FULL,
    GIB,
    LLAMA_8B,
    LLAMA_70B,
    ODD,
    PROFILES,
    QWEN_2KV,
    choose,
    machine,
    names,
)

from appliance.errors import ProfileError, SettingsError
from appliance.profiles import (
    engine_values,
    explain_json,
    explain_text,
    list_profiles_text,
    reasons,
    require,
    select,
)
from appliance.types import Hardware

HOPPER = ("fp8-tp1", "fp8-tp1")
OTHER = ("bf16-tp1", "int4-tp1")
CPU = ("bf16-cpu-tp1", "bf16-cpu-tp1")

# machine: (selected, wanted) of the 8B, the 70B, the builtin and the Qwen-like model, in the first release
TABLE = {
    "h100-x1": (HOPPER, (None, "int4-tp1"), HOPPER, HOPPER),
    "h100-x2": (HOPPER, (None, "fp8-tp2"), HOPPER, HOPPER),
    "h100-x4": (HOPPER, (None, "fp8-tp2"), HOPPER, HOPPER),
    "h100-x8": (HOPPER, (None, "fp8-tp2"), HOPPER, HOPPER),
    "h100-pcie-x2": (HOPPER, (None, "fp8-tp2"), HOPPER, HOPPER),
    "h200-x1": (HOPPER, HOPPER, HOPPER, HOPPER),
    "h200-x2": (HOPPER, HOPPER, HOPPER, HOPPER),
    "h200-x4": (HOPPER, HOPPER, HOPPER, HOPPER),
    "h200-x8": (HOPPER, HOPPER, HOPPER, HOPPER),
    "h100-mig-3g.40gb": (HOPPER, (None, "fp8-tp1"), HOPPER, HOPPER),
    "a100-40gb": (OTHER, (None, "int4-tp2"), OTHER, OTHER),
    "a100-80gb-x1": (OTHER, (None, "int4-tp1"), OTHER, OTHER),
    "a100-80gb-x2": (OTHER, (None, "int4-tp1"), OTHER, OTHER),
    "a100-80gb-x4": (OTHER, (None, "int4-tp1"), OTHER, OTHER),
    "a100-80gb-x8": (OTHER, (None, "int4-tp1"), OTHER, OTHER),
    "l40s": (OTHER, (None, "int4-tp2"), OTHER, OTHER),
    "a10": (OTHER, (None, "int4-tp4"), OTHER, OTHER),
    "a10g-x4": (OTHER, (None, "int4-tp4"), OTHER, OTHER),
    "l4": (OTHER, (None, "int4-tp4"), OTHER, OTHER),
    "t4": ((None, "int4-tp1"), (None, "int4-tp8"), ("fp16-tp1", "int4-tp1"), ("fp16-tp1", "int4-tp1")),
    "rtx-4090": (OTHER, (None, "int4-tp4"), OTHER, OTHER),
    "rtx-4090-desktop": (OTHER, (None, "int4-tp4"), OTHER, OTHER),
    "rtx-5090": (OTHER, (None, "int4-tp2"), OTHER, OTHER),
    "rtx-pro-6000": (OTHER, ("fp8-tp1", "int4-tp1"), OTHER, OTHER),
    "b200-x8": (OTHER, OTHER, OTHER, OTHER),
    "gb10": (OTHER, ("fp8-tp1", "int4-tp1"), OTHER, OTHER),
    "future-gpu": (OTHER, OTHER, OTHER, OTHER),
    "mixed": (OTHER, (None, "int4-tp4"), OTHER, OTHER),
    "mixed-volta": (OTHER, (None, "int4-tp4"), OTHER, OTHER),
    "busy-node": (HOPPER, (None, "fp8-tp2"), HOPPER, HOPPER),
    "busy-all": ((None, "fp8-tp1"), (None, "fp8-tp2"), HOPPER, HOPPER),
    "unhealthy": (HOPPER, (None, "int4-tp1"), HOPPER, HOPPER),
    "v100": (CPU, (None, "bf16-cpu-tp1"), CPU, CPU),
    "driver-too-old": (CPU, (None, "bf16-cpu-tp1"), CPU, CPU),
    "driver-failing": (CPU, (None, "bf16-cpu-tp1"), CPU, CPU),
    "none": ((None, "bf16-cpu-tp1"), (None, "bf16-cpu-tp1"), CPU, CPU),
    "none-small": (*[(None, "bf16-cpu-tp1")] * 2, CPU, (None, "bf16-cpu-tp1")),
}
MODELS = {"8b": LLAMA_8B, "70b": LLAMA_70B, "builtin": BUILTIN, "qwen": QWEN_2KV}


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name: str):
    assert tuple(names(choose(name, model)) for model in MODELS.values()) == TABLE[name]


# What the policy chooses when everything is built: (throughput, latency).
WHEN_BUILT = [
    ("h100-x8", LLAMA_70B, "fp8-tp2", "fp8-tp8"),
    ("h200-x4", LLAMA_70B, "fp8-tp1", "fp8-tp4"),
    ("h100-x4", LLAMA_8B, "fp8-tp1", "fp8-tp4"),
    ("h100-pcie-x2", LLAMA_8B, "fp8-tp1", "fp8-tp1"),  # all-reduces over PCIe cost more than a second GPU brings
    ("h100-x8", BUILTIN, "fp8-tp1", "fp8-tp1"),
    ("a10g-x4", LLAMA_70B, "int4-tp4", "int4-tp4"),
    ("a100-80gb-x8", LLAMA_70B, "int4-tp1", "int4-tp8"),
    ("none", LLAMA_8B, "int4-cpu-tp1", "int4-cpu-tp1"),
    ("t4", LLAMA_8B, "int4-tp1", "int4-tp1"),
]


@pytest.mark.parametrize(("name", "model", "throughput", "latency"), WHEN_BUILT)
def test_objectives_when_everything_is_built(name: str, model, throughput: str, latency: str):
    assert names(choose(name, model, "throughput", FULL)) == (throughput, throughput)
    assert names(choose(name, model, "latency", FULL)) == (latency, latency)


def test_the_first_builds_batching_limits_follow_the_objective():
    throughput, latency = choose("h100-x1").selected, choose("h100-x1", objective="latency").selected
    assert throughput is not None and latency is not None
    assert latency.max_num_seqs < throughput.max_num_seqs


def test_room_for_several_users_is_worth_a_second_gpu():
    one = choose("h100-x1", LLAMA_70B, build=FULL, precision="fp8", memory_fraction=0.98)
    assert require(one).name == "fp8-tp1" and not require(one).roomy
    two = choose("h100-x2", LLAMA_70B, build=FULL, precision="fp8", memory_fraction=0.98)
    assert require(two).name == "fp8-tp2" and by_name(two, "fp8-tp1").status == "runnable"


def test_the_facts_say_which_precisions_a_gpu_can_work_with():
    lacking = [msgspec.structs.replace(f, precisions=("fp32", "fp16", "bf16")) for f in FACTS]
    selection = select(machine("h100-x1"), LLAMA_8B, PROFILES, capabilities=FULL, gpu_facts=lacking)
    assert names(selection) == ("bf16-tp1", "bf16-tp1")
    assert by_name(selection, "fp8-tp1").reason == "NVIDIA H100 80GB HBM3 cannot work with fp8"


def by_name(selection, name: str):
    return next(outcome for outcome in selection.outcomes if outcome.name == name)


# ---------------------------------------------------------------- the model decides


def test_bf16_where_the_scheme_cannot_work_on_the_model():
    selection = choose("h100-x1", ODD, build=FULL)
    assert names(selection) == ("bf16-tp1", "bf16-tp1")
    assert "multiples of 16, and the model's hidden_size is 200" in by_name(selection, "fp8-tp1").reason
    assert any("not fp8-tp1" in line and "multiples of 16" in line for line in reasons(selection))


def test_heads_limit_tensor_parallelism():
    selection = choose("h100-x8", QWEN_2KV, build=FULL)  # 12 heads, 2 KV heads
    assert "do not divide the model's heads (12)" in by_name(selection, "fp8-tp8").reason
    assert by_name(selection, "fp8-tp4").status == "runnable"  # KV heads repeated
    three = msgspec.structs.replace(LLAMA_8B, num_key_value_heads=3)
    assert "3 KV heads do not divide" in by_name(choose("h100-x8", three, build=FULL), "bf16-tp2").reason


# ---------------------------------------------------------------- the machine decides


def test_free_memory_counts_and_not_total():
    hardware = machine("h100-x1")
    full = [msgspec.structs.replace(gpu, free_memory=10 * GIB) for gpu in hardware.gpus]
    selection = choose(msgspec.structs.replace(hardware, gpus=tuple(full)))
    assert selection.selected is None and by_name(selection, "fp8-tp1").status in ("low_memory", "incompatible")


def test_a_desktops_two_gigabytes_leave_everything_runnable():
    idle, desktop = choose("rtx-4090"), choose("rtx-4090-desktop")
    assert names(idle) == names(desktop) == OTHER
    assert not [o for o in desktop.outcomes if o.status == "low_memory"]


def test_a_busy_gpu_is_left_out_with_a_line():
    selection = choose("busy-node", build=FULL, objective="latency")
    assert selection.selected is not None and 0 not in selection.selected.gpu_indices
    assert any("GPU 0 is busy" in line for line in reasons(selection))
    assert by_name(selection, "fp8-tp4").status == "incompatible"


def test_an_idle_gpu_is_taken_before_a_working_one():
    hardware = machine("h100-x2")
    working = msgspec.structs.replace(hardware.gpus[0], utilization=90)
    selection = choose(msgspec.structs.replace(hardware, gpus=(working, hardware.gpus[1])))
    assert require(selection).gpu_indices == (1,)


def test_an_unhealthy_gpu_is_left_out_with_its_reason():
    selection = choose("unhealthy", build=FULL)
    assert require(selection).gpu_indices == (1,)
    assert any("GPU 0" in line and "remapped" in line for line in reasons(selection))
    assert "needs 2 identical GPUs, and 1 can be used" in by_name(selection, "fp8-tp2").reason


def test_a_mixed_machine_uses_its_largest_group_and_says_so():
    selection = choose("mixed", build=FULL, objective="latency")
    assert require(selection).gpu_indices[0] in (0, 1)
    assert any("mixed" in line and "RTX A6000" in line and "T4" in line for line in reasons(selection))
    volta = choose("mixed-volta")
    assert require(volta).gpu_indices == (2,)
    assert sum("V100" in line and "7.0 is older" in line for line in reasons(volta)) == 2


def test_another_group_serves_when_the_largest_cannot():
    hardware = machine("mixed")
    full = tuple(msgspec.structs.replace(g, free_memory=GIB) if g.index < 2 else g for g in hardware.gpus)
    assert require(choose(msgspec.structs.replace(hardware, gpus=full))).gpu_indices == (2,)


def test_linked_gpus_are_taken_together():
    pairs = {0: {1: "nvlink", 2: "pcie", 3: "pcie"}, 1: {0: "nvlink", 2: "pcie", 3: "pcie"}}
    pairs |= {2: {3: "nvlink", 0: "pcie", 1: "pcie"}, 3: {2: "nvlink", 0: "pcie", 1: "pcie"}}
    gpus = [msgspec.structs.replace(g, links=pairs[g.index]) for g in machine("h100-x4").gpus]
    gpus[0] = msgspec.structs.replace(gpus[0], free_memory=2 * GIB)
    selection = choose(Hardware(tuple(gpus), 8, 64 * GIB, 60 * GIB), LLAMA_70B, build=FULL, tp_size=2)
    assert require(selection).gpu_indices == (2, 3)


def test_mig_slices_are_not_joined():
    selection = choose("h100-mig-3g.40gb", build=FULL)
    assert require(selection).devices[0].startswith("MIG-")
    assert "MIG slices cannot be joined" in by_name(selection, "fp8-tp2").reason


def test_idle_gpus_are_mentioned():
    assert any(line.startswith("7 of 8 GPUs stay idle") for line in reasons(choose("h100-x8")))
    assert not any("stay idle" in line for line in reasons(choose("h100-x1")))


def test_the_cpu_serves_loudly_when_no_gpu_can():
    for name, words in (("none", "no NVIDIA driver"), ("v100", "7.0 is older"), ("driver-too-old", "CUDA 12.2")):
        first = reasons(choose(name, BUILTIN))[0]
        assert first.startswith("the CPU serves: ") and words in first
    assert "there is a GPU" in by_name(choose("h100-x1"), "bf16-cpu-tp1").reason


@pytest.mark.parametrize("asked", [{"backend": "cpu"}, {"profile": "bf16-cpu"}, {"tags": "backend=cpu"}])
def test_the_cpu_serves_on_request_beside_a_gpu(asked: dict[str, object]):
    selection = choose("h100-x1", BUILTIN, **asked)
    assert require(selection).name == "bf16-cpu-tp1" and require(selection).devices == ()
    assert reasons(selection)[0] == "the CPU serves, as asked"


def test_unknown_gpus_are_served_with_generic_facts_and_a_line():
    assert any("generic Blackwell is assumed" in line for line in reasons(choose("future-gpu")))


# ---------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"precision": "bf16"}, "bf16-tp1"),
        ({"tags": "precision=fp16,tp=1"}, "fp16-tp1"),
        ({"profile": "fp32-tp1"}, "fp32-tp1"),
        ({"profile": "BF16"}, "bf16-tp1"),
        ({"backend": "cuda"}, "fp8-tp1"),
        ({"tp_size": 2}, "fp8-tp2"),
        ({"tp_size": 2, "precision": "bf16"}, "bf16-tp2"),
        ({"pp_size": 2, "tp_size": 1}, "fp8-tp1-pp2"),
        ({"profile": "fp8-tp4-pp2", "tp_size": 4}, "fp8-tp4-pp2"),
    ],
)
def test_overrides_choose(asked: dict[str, object], name: str):
    assert names(choose("h100-x8", build=FULL, **asked))[0] == name


def test_a_size_that_no_profile_lists_can_be_asked_for():
    hardware = machine("h100-x8")
    model = msgspec.structs.replace(LLAMA_8B, num_attention_heads=24, num_key_value_heads=6, intermediate_size=14400)
    selection = choose(hardware, model, build=FULL, tp_size=3)
    assert names(selection)[0] == "fp8-tp3" and len(require(selection).devices) == 3


def test_an_override_never_falls_back_silently():
    selection = choose("h100-x1", precision="int4")
    assert names(selection) == (None, "int4-tp1")
    with pytest.raises(ProfileError, match="int4 is not built yet"):
        require(selection)
    with pytest.raises(ProfileError, match="tensor parallelism over 2 is not built yet"):
        require(choose("h100-x2", tp_size=2))
    with pytest.raises(ProfileError, match="pipeline parallelism over 2 is not built yet"):
        require(choose("h100-x2", pp_size=2))
    with pytest.raises(ProfileError, match="fp8 KV cache is not built yet"):
        require(choose("h100-x1", kv_cache_dtype="fp8"))
    with pytest.raises(ProfileError, match=r"8\.9, and NVIDIA A100"):
        require(choose("a100-80gb-x1", precision="fp8"))
    with pytest.raises(ProfileError, match="no profile agrees"):
        require(choose("h100-x1", precision="bf16", profile="fp8"))
    with pytest.raises(ProfileError, match="did you mean 'fp8-tp1'"):
        choose("h100-x1", profile="fp8-pt1")
    with pytest.raises(SettingsError, match="unknown tag"):
        choose("h100-x1", tags="precison=fp8")


def test_kv_cache_precision_follows_the_device():
    assert [require(choose(m, BUILTIN)).kv_cache for m in ("h100-x1", "t4", "none")] == ["bf16", "fp16", "fp32"]
    assert require(choose("h100-x1", precision="fp32")).kv_cache == "fp32"
    halved = choose("h100-x1", build=FULL, kv_cache_dtype="fp8")
    assert require(halved).kv_cache == "fp8"
    assert require(halved).requires_bytes_per_gpu < require(choose("h100-x1", build=FULL)).requires_bytes_per_gpu


def test_an_fp8_kv_cache_only_where_it_is_asked_for_and_can_be():
    plain, named = choose("h200-x1", build=FULL), choose("h200-x1", build=FULL, profile="fp8-kv8")
    assert (require(plain).name, require(plain).kv_cache) == ("fp8-tp1", "bf16")
    assert (require(named).name, require(named).kv_cache) == ("fp8-kv8-tp1", "fp8")
    assert require(named).kv_cache_tokens == pytest.approx(2 * require(plain).kv_cache_tokens, rel=0.01)
    assert explain_json(named)["selected"]["kv_cache"] == engine_values(named)["kv_cache_dtype"] == "fp8"
    asked = choose("h200-x1", build=FULL, kv_cache_dtype="bf16")
    assert "asked for: kv_cache_dtype bf16" in by_name(asked, "fp8-kv8-tp1").reason
    assert require(choose("none", build=FULL, kv_cache_dtype="fp8")).kv_cache == "fp8"
    unbuilt = choose("h200-x1", profile="fp8-kv8")
    assert names(unbuilt) == (None, "fp8-kv8-tp1") and "a fp8 KV cache is not built yet" in unbuilt.wanted.reason


def test_fp8_keys_and_values_serve_where_only_they_fit():
    """Between the memory that FP8 weights need with FP8 K/V and that with BF16 K/V."""
    where = machine("h100-x1")
    with_kv8, with_bf16 = (
        by_name(choose(where, build=FULL), name).requires_bytes_per_gpu for name in ("fp8-kv8-tp1", "fp8-tp1")
    )
    assert with_kv8 < with_bf16
    free = (with_kv8 + with_bf16) // 2
    tight = msgspec.structs.replace(where, gpus=(msgspec.structs.replace(where.gpus[0], free_memory=free),))
    assert require(choose(tight, build=FULL)).name == "fp8-kv8-tp1"


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        ("a100-80gb-x1", {"kv_cache_dtype": "fp8"}, r"in fp8 needs compute capability 8\.9, and NVIDIA A100.* has"),
        ("a100-80gb-x1", {"profile": "fp8-kv8"}, r"needs compute capability 8\.9, and NVIDIA A100.* has 8\.0"),
        ("h100-x1", {"precision": "bf16", "kv_cache_dtype": "fp32"}, "fp32 KV cache does not go: only bf16 or fp8"),
        ("t4", {"kv_cache_dtype": "bf16"}, r"bf16 KV cache does not go: only fp16 or fp8 \(leave --kv-cache-dtype "),
    ],
)
def test_a_kv_cache_that_the_gpu_cannot_have_is_refused_first(name: str, asked: dict[str, object], words: str):
    with pytest.raises(ProfileError, match=words):
        require(choose(name, BUILTIN, build=FULL, **asked))


def test_limits_are_passed_on_to_the_engine():
    selection = choose("h100-x1", max_num_seqs=7, max_num_batched_tokens=512, memory_fraction=0.5, max_model_len=4096)
    assert engine_values(selection) == {
        "backend": "cuda",
        "devices": (selection.hardware.gpus[0].uuid,),
        "replicas": 1,
        "kv_cache_dtype": "bf16",
        "max_model_len": 4096,
        "max_num_seqs": 7,
        "max_num_batched_tokens": 512,
        "memory_fraction": 0.5,
    }
    assert engine_values(choose("h100-x1"))["max_model_len"] == 0  # the engine takes what really fits


def test_low_memory_names_a_context_that_fits():
    selection = choose("h100-x1", LLAMA_70B)
    low = by_name(selection, "fp8-tp1")
    assert low.status == "low_memory" and low.suggested_max_model_len >= 256
    with pytest.raises(ProfileError, match=f"--max-model-len={low.suggested_max_model_len}"):
        require(selection)
    again = choose("h100-x1", LLAMA_70B, max_model_len=low.suggested_max_model_len)
    assert require(again).name == "fp8-tp1"
    assert require(again).requires_bytes_per_gpu == low.suggested_bytes_per_gpu
    assert any("small KV cache" in line for line in reasons(again))


# ---------------------------------------------------------------- explanations


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_profile_has_a_score_or_a_reason_and_everything_can_be_printed(name: str, model):
    selection = choose(name, model)
    data = json.loads(json.dumps(explain_json(selection)))
    assert {"selected", "wanted", "profiles", "hardware", "model", "reasons"} <= data.keys()
    choice = {"name", "precision", "kv_cache", "tp_size", "pp_size", "backend"}
    assert choice <= data["wanted"].keys() and (data["selected"] is None or choice <= data["selected"].keys())
    assert data["wanted"]["name"] in {entry["name"] for entry in data["profiles"]}
    assert {entry["name"] for entry in data["profiles"]} == {
        f"{p.name}-tp{size}" for p in PROFILES for size in p.tp_sizes
    }
    for entry in data["profiles"]:
        runnable = entry["status"] == "runnable"
        assert (entry["score"] is not None and entry["reason"] is None) if runnable else entry["reason"]
        assert "\n" not in (entry["reason"] or "")
    if data["selected"] is None:
        with pytest.raises(ProfileError):
            require(selection)
        assert data["reasons"][0].startswith("nothing can serve")
    else:
        assert data["selected"]["name"] in {p["name"] for p in data["profiles"] if p["status"] == "runnable"}
    text, listing = explain_text(selection), list_profiles_text(selection)
    for outcome in selection.outcomes:
        assert outcome.name in text and f"{outcome.id} ({outcome.name})" in listing


def test_where_nothing_fits_the_policy_wants_more_of_the_same_gpus():
    for name, size in (("a100-40gb", 2), ("l40s", 2), ("t4", 8)):
        selection = choose(name, LLAMA_70B)
        lacks = f"the policy wants int4-tp{size}, but it needs {size} identical GPUs, and 1 can be used"
        assert reasons(selection)[1] == lacks and selection.wanted.status == "incompatible"
        more = machine(name)
        gpus = [msgspec.structs.replace(more.gpus[0], index=i, uuid=f"GPU-{i}") for i in range(size)]
        enough = choose(msgspec.structs.replace(more, gpus=tuple(gpus)), LLAMA_70B, build=FULL)
        assert require(enough).name == selection.wanted.name, "with so many of them it would be chosen"
    busy = choose("busy-all", LLAMA_8B)
    assert any("wants fp8-tp1, but it needs" in line and "and it has" in line for line in reasons(busy))
    assert choose("h100-x1", precision="bf16", profile="fp8").wanted.name in ("bf16-tp1", "fp8-tp1")


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        ("none", {"tp_size": 2}, r"^the CPU backend serves on one device \(leave --tp-size .*out"),
        (
            "none",
            {"precision": "int4"},
            r"int4 is not built yet \(leave --precision .*or choose fp32 or fp16 or bf16 or",
        ),
        ("h100-x1", {"profile": "int8"}, r"int8 is not built yet \(leave --profile out, or name another one\)"),
        ("t4", {"profile": "fp8"}, r"Tesla T4 has 7\.5 \(leave --profile out, or name another one\)"),
        ("t4", {"profile": "fp8-tp1", "precision": "fp8"}, r"has 7\.5 \(leave --precision out, or choose another\)"),
        ("h100-x1", {"profile": "fp8-tp2"}, r"\(leave --profile out, or name another one, or serve where there are 2"),
        ("none", {"profile": "int8"}, r"no NVIDIA driver .*serve where there is a GPU, or leave out .* precision"),
        ("h100-x1", {"tp_size": 2}, r"^needs 2 identical GPUs, and 1 can be used \(leave --tp-size .* there are 2\)"),
        ("h100-x2", {"tp_size": 2}, r"serves on one device \(leave --tp-size \(or its profile\) out, or choose 1\)"),
        ("h100-x2", {"pp_size": 2}, r"not built yet \(leave --pp-size"),
        ("h100-x1", {"kv_cache_dtype": "fp8"}, r"\(leave --kv-cache-dtype .* or choose bf16 or fp16 or fp32\)"),
        ("a100-80gb-x1", {"precision": "fp8"}, r"has 8\.0 \(leave --precision out, or choose another\)"),
        ("h100-x8", {"tp_size": 3}, r"3 ranks do not divide .* \(leave --tp-size out, or choose 1, 2, 4 or 8\)"),
    ],
)
def test_the_hint_fits_the_rule_that_rejects(name: str, asked: dict[str, object], words: str):
    with pytest.raises(ProfileError) as caught:
        require(choose(name, BUILTIN, **asked))
    assert re.search(words, str(caught.value)), str(caught.value)
    assert "smaller model" not in str(caught.value)


def test_the_policys_wish_is_explained():
    lines = reasons(choose("a10"))
    assert "the policy wants int4-tp1, but int4 is not built yet; bf16-tp1 serves instead" in lines
    lines = reasons(choose("h100-x2", LLAMA_70B))
    assert any("wants fp8-tp2, but tensor parallelism over 2 is not built yet" in line for line in lines)


def test_the_listing_has_the_known_shape():
    lines = list_profiles_text(choose("h200-x1")).splitlines()
    assert lines[:3] == ["SYSTEM INFO", "- Free GPUs:", "  -  [2335:10de] (0) NVIDIA H200 [current utilization: 0%]"]
    assert "MODEL PROFILES" in lines
    runnable = lines[lines.index("- Compatible with system and runnable:") + 1]
    identifier, name, *_ = runnable.removeprefix("  - ").split()
    assert name == "(fp8-tp1)" and "[requires >=" in runnable and runnable.endswith("GB/gpu]")
    assert require(choose("h200-x1", profile=identifier)).name == "fp8-tp1"
    low = list_profiles_text(choose("h100-x1", LLAMA_70B))
    assert "low memory:\n" in low and "try --max-model-len=" in low and "to reduce to >=" in low
    assert "- Free GPUs: <None>" in list_profiles_text(choose("none"))


def test_a_scheme_that_this_build_lacks_is_named():
    from msgspec.structs import replace

    lacking = replace(FULL, named={"int4_awq": FULL.schemes["int4"]})
    with pytest.raises(ProfileError, match="int4-gptq-tp1 would fit, but the scheme int4_gptq is not built yet"):
        require(choose("a10", build=lacking, profile="int4-gptq"))
    chosen = choose("a10", build=FULL, profile="int4-gptq")
    assert require(chosen).scheme == "int4_gptq" and require(choose("a10", build=FULL)).scheme == "int4_awq"
    assert {p["name"]: p["scheme"] for p in explain_json(chosen)["profiles"]}["bf16-tp1"] is None


def test_replicas_that_this_build_lacks_are_refused():
    assert names(choose("h200-x4", replicas=1))[0] == "fp8-tp1"
    with pytest.raises(ProfileError, match="2 replicas behind one endpoint are not built yet") as caught:
        require(choose("h200-x4", replicas=2))
    assert "leave --replicas (or its profile) out, or choose 1" in str(caught.value)
    with pytest.raises(SettingsError, match="replicas is 0, and must be 1 or more"):
        choose("h200-x4", replicas=0)
