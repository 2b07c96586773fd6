"""Profile and GPU-facts files, names and ids, overrides, GPU matching, and the arithmetic of prediction."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from selection_cases import BUILTIN, FACTS, GIB, LLAMA_8B, LLAMA_70B, PROFILES, QWEN_2KV, linear_bytes, machine

from appliance import registry
from appliance.errors import ProfileError, SettingsError
from appliance.profiles import capabilities, facts_of, load_gpu_facts, load_profiles, predict
from appliance.profiles.names import Candidate, Named, candidates, resolve
from appliance.profiles.overrides import Overrides, normalize
from appliance.types import Gpu

PROFILE = """
name: mine
description: A test.
precision: bf16
backend: cuda
priority: {default: 1}
batching:
  throughput: {max_num_seqs: 8, max_num_batched_tokens: 64}
  latency: {max_num_seqs: 8, max_num_batched_tokens: 64}
"""
FACT = """
name: mine
match: {compute_capability: "9.0", pci_ids: ["10de:2330"]}
memory_gib: 80
memory_bandwidth_gbs: 3000
tflops: {bf16: 900}
precisions: [bf16]
"""


def directory(tmp_path: Path, profile: str = PROFILE, fact: str = FACT) -> Path:
    (tmp_path / "gpus").mkdir()
    (tmp_path / "mine.yaml").write_text(profile)
    (tmp_path / "gpus" / "mine.yaml").write_text(fact)
    return tmp_path


def test_a_profile_file_is_read(tmp_path: Path):
    (mine,) = load_profiles(directory(tmp_path))
    assert (mine.name, mine.precision, mine.backend, mine.tp_sizes, mine.kv_cache) == (
        "mine",
        "bf16",
        "cuda",
        (1,),
        "auto",
    )
    assert mine.batching["latency"].max_num_seqs == 8
    (fact,) = load_gpu_facts(tmp_path)
    assert (fact.memory_bandwidth_gbs, fact.generic) == (3000, False)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("precision: bf16", "precison: bf16", "did you mean 'precision'"),
        ("precision: bf16", "precision: fp7", "fp7"),
        ("priority: {default: 1}", "priority: {hopper: 1, default: 1}", "'hopper' is not a compute capability"),
        ("priority: {default: 1}", 'priority: {"9.0": 1}', "lacks the key 'default'"),
        ("max_num_seqs: 8,", "max_num_seq: 8,", "did you mean 'max_num_seqs'"),
        ("max_num_seqs: 8,", "max_num_seqs: 0,", "above 0"),
        ("  latency: {max_num_seqs: 8, max_num_batched_tokens: 64}\n", "", "batching lacks latency"),
        ("  latency:", "  latencies:", "latencies"),
        ("backend: cuda", "backend: cuda\ntp_sizes: []", "tp_sizes is empty"),
        ("backend: cuda", "backend: cuda\ntp_sizes: [0]", "above 0"),
        ("backend: cuda", "backend: cuda\nrequires: {compute_capabilty: '8.0'}", "did you mean 'compute_capability'"),
        ("backend: cuda", "backend: cuda\nrequires: {compute_capability: '8'}", "not a compute capability"),
        ("name: mine\n", "", "name"),
        ("name: mine", "name: [", "not valid YAML"),
        ("name: mine", "name: mine\nbackend: cpu", "the key 'backend' is given twice"),
    ],
)
def test_a_wrong_profile_names_file_and_key(old: str, new: str, words: str, tmp_path: Path):
    assert old in PROFILE
    with pytest.raises(SettingsError) as caught:
        load_profiles(directory(tmp_path, profile=PROFILE.replace(old, new)))
    assert words in str(caught.value) and "mine.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("pci_ids", "pci_id", "did you mean 'pci_ids'"),
        ("memory_bandwidth_gbs", "bandwidth_gbs", "did you mean 'memory_bandwidth_gbs'"),
        ("3000", "-1", "above 0"),
        ("{bf16: 900}", "{fp8: 900}", "fp16 or bf16"),
        ('"9.0"', "hopper", "not a compute capability"),
    ],
)
def test_wrong_facts_name_file_and_key(old: str, new: str, words: str, tmp_path: Path):
    assert old in FACT
    with pytest.raises(SettingsError) as caught:
        load_gpu_facts(directory(tmp_path, fact=FACT.replace(old, new)))
    assert words in str(caught.value) and "mine.yaml" in str(caught.value)


def test_duplicate_names_and_empty_directories_are_errors(tmp_path: Path):
    directory(tmp_path)
    (tmp_path / "other.yaml").write_text(PROFILE)
    with pytest.raises(SettingsError, match="another one is named 'mine'"):
        load_profiles(tmp_path)
    with pytest.raises(SettingsError, match="no profile files"):
        load_profiles(tmp_path / "absent")


def test_the_policy_stands_in_the_project_profiles():
    gpu = {p.precision: p for p in PROFILES if p.backend == "cuda"}
    for cc in ((7, 5), (8, 0), (8, 6), (8, 9), (10, 0), (12, 0), (12, 1), (13, 0)):
        assert max(gpu.values(), key=lambda p: p.priority_on(cc)).precision == "int4", cc
    assert max(gpu.values(), key=lambda p: p.priority_on((9, 0))).precision == "fp8"
    cpu = [p for p in PROFILES if p.backend == "cpu"]
    assert max(cpu, key=lambda p: p.priority_on(None)).precision == "bf16", "the CPU widens quantized weights"
    for cc in ((8, 0), (9, 0)):
        assert gpu["bf16"].priority_on(cc) > gpu["fp16"].priority_on(cc) > gpu["fp32"].priority_on(cc)


def test_priority_keys_from_exact_to_default():
    profile = msgspec.structs.replace(PROFILES[0], priority={"default": 1, "9": 2, "9.1": 3, "cpu": 4})
    on = [profile.priority_on(cc) for cc in ((8, 0), (9, 0), (9, 1), None)]
    assert on == [1, 2, 3, 4]


# ---------------------------------------------------------------- names


def test_every_printed_name_and_id_is_accepted_back():
    for candidate in candidates(PROFILES, 3, 2):
        named = Named(candidate.profile.name, candidate.tp_size, candidate.pp_size)
        for text in (
            candidate.name,
            candidate.name.upper(),
            candidate.id,
            candidate.id[:8].upper(),
            f" {candidate.id} ",
        ):
            assert resolve(text, PROFILES) == named


def test_a_bare_profile_name_leaves_the_size_open():
    assert resolve("FP8", PROFILES) == Named("fp8")
    assert resolve("bf16-cpu", PROFILES) == Named("bf16-cpu")


@pytest.mark.parametrize(
    ("text", "near"),
    [("fp8-pt1", "fp8-tp1"), ("pf8", "fp8"), ("bf16-tp99", "bf16-tp"), ("int4_tp2", "int4-tp2")],
)
def test_a_miss_names_the_nearest(text: str, near: str):
    with pytest.raises(ProfileError) as caught:
        resolve(text, PROFILES)
    assert re.search(f"did you mean '{near}", str(caught.value)), str(caught.value)


def test_a_short_or_wrong_id_is_a_miss():
    identifier = candidates(PROFILES, None, None)[0].id
    for text in (identifier[:7], "0" * 64, ""):
        with pytest.raises(ProfileError, match="there is no profile"):
            resolve(text, PROFILES)


def test_ids_are_stable_and_unique():
    fp8 = next(p for p in PROFILES if p.name == "fp8")
    one = Candidate(fp8, 1)
    assert one.id == "8312f589022aebd3bc7d14db35458d31848db2dd244d3f46ce4d72a76bfb785f"  # printed by earlier versions
    retuned = msgspec.structs.replace(fp8, priority={"default": 7}, description="other")
    assert Candidate(retuned, 1).id == one.id != Candidate(fp8, 2).id
    found = [c.id for c in candidates(PROFILES, None, None)]
    assert len(set(found)) == len(found)


# ---------------------------------------------------------------- overrides


def check(**overrides: object) -> Overrides:
    return normalize(Overrides(**overrides), PROFILES, LLAMA_8B, ("cuda", "cpu"))[0]  # type: ignore[arg-type]


def test_tags_are_merged():
    assert check(tags="precision=FP8, tp=2,kv_cache=bf16") == Overrides(
        precision="fp8", tp_size=2, kv_cache_dtype="bf16"
    )
    assert check(tags="tp=2", tp_size=2).tp_size == 2
    assert check(tags="profile=fp8,backend=cuda,pp=1").pp_size == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"tags": "precison=fp8"}, "did you mean 'precision'"),
        ({"tags": "precision"}, "unknown tag"),
        ({"tags": "tp=two"}, "whole number"),
        ({"tags": "tp=2", "tp_size": 4}, "contradicts tp_size 4"),
        ({"tags": "tp=2,tp=4"}, "contradicts"),
        ({"tags": "precision=fp7"}, "precision is 'fp7'"),
        ({"precision": "fp9"}, "did you mean"),
        ({"kv_cache_dtype": "int3"}, "kv_cache_dtype is 'int3'"),
        ({"backend": "cud"}, "did you mean 'cuda'"),
        ({"tp_size": 0}, "tp_size is 0"),
        ({"max_num_seqs": -1}, "max_num_seqs is -1"),
        ({"memory_fraction": 0.0}, "memory_fraction is 0"),
        ({"memory_fraction": 1.5}, "memory_fraction is 1.5"),
        ({"max_model_len": 131073}, "more than the model's limit of 131072"),
    ],
)
def test_wrong_overrides_are_settings_errors(overrides: dict[str, object], words: str):
    with pytest.raises(SettingsError) as caught:
        check(**overrides)
    assert words in str(caught.value)


# ---------------------------------------------------------------- GPU facts


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("h100-x1", "H100 SXM"),
        ("h100-pcie-x2", "H100 PCIe"),
        ("h200-x1", "H200 SXM"),
        ("a100-40gb", "A100 SXM 40 GB"),
        ("a100-80gb-x1", "A100 SXM 80 GB"),
        ("l40s", "L40S"),
        ("a10", "A10"),
        ("l4", "L4"),
        ("t4", "T4"),
        ("rtx-4090", "RTX 4090"),
        ("rtx-5090", "RTX 5090"),
        ("rtx-pro-6000", "RTX PRO 6000 Blackwell"),
        ("b200-x8", "B200"),
        ("gb10", "GB10"),
        ("future-gpu", "generic Blackwell"),
        ("h100-mig-3g.40gb", "H100 SXM MIG 3g.40gb"),
    ],
)
def test_recorded_gpus_find_their_facts(name: str, facts: str):
    assert facts_of(machine(name).gpus[0], FACTS).name == facts


def gpu(cc: tuple[int, int], pci: str = "10de:ffff", name: str = "X", gib: int = 80) -> Gpu:
    return Gpu(0, name, "GPU-0", pci, cc, gib * GIB, gib * GIB)


def test_the_marketing_name_is_never_matched():
    assert facts_of(gpu((9, 0), "10de:2330", "GeForce MX150"), FACTS).name == "H100 SXM"
    assert facts_of(gpu((9, 0), "10de:ffff", "NVIDIA H100 80GB HBM3"), FACTS).name == "generic Hopper"


@pytest.mark.parametrize(
    ("cc", "name"),
    [
        ((7, 0), "generic Turing"),
        ((7, 5), "generic Turing"),
        ((8, 7), "generic Ampere"),
        ((8, 9), "generic Ada"),
        ((9, 0), "generic Hopper"),
        ((10, 3), "generic Blackwell, data center"),
        ((11, 0), "generic Blackwell, data center"),
        ((12, 1), "generic Blackwell"),
        ((99, 9), "generic Blackwell"),
    ],
)
def test_unknown_gpus_fall_to_their_generation(cc: tuple[int, int], name: str):
    assert facts_of(gpu(cc), FACTS).name == name


def test_memory_decides_where_a_file_says_so():
    a100 = [f for f in FACTS if f.name == "A100 SXM 40 GB"]
    generic = [f for f in FACTS if f.generic]
    assert facts_of(gpu((8, 0), "10de:20b0", gib=40), [*a100, *generic]).name == "A100 SXM 40 GB"
    assert facts_of(gpu((8, 0), "10de:20b0", gib=64), [*a100, *generic]).name == "generic Ampere"


def test_of_two_matching_files_the_one_with_more_conditions_wins():
    h100 = next(f for f in FACTS if f.name == "H100 SXM")
    only_80 = msgspec.structs.replace(
        h100, name="A first by name", match=msgspec.structs.replace(h100.match, memory_gib=(70, 90))
    )
    assert facts_of(gpu((9, 0), "10de:2330"), [h100, only_80]).name == "A first by name"
    assert facts_of(gpu((9, 0), "10de:2330", gib=64), [h100, only_80]).name == "H100 SXM"


def test_a_mig_slice_has_its_share():
    whole = facts_of(machine("h100-x1").gpus[0], FACTS)
    part = facts_of(machine("h100-mig-3g.40gb").gpus[0], FACTS)
    assert 0.45 < part.memory_bandwidth_gbs / whole.memory_bandwidth_gbs < 0.55
    assert part.tflops["fp8"] == pytest.approx(whole.tflops["fp8"] * 3 / 7) and part.nvlink_gbs == 0


# ---------------------------------------------------------------- prediction


def test_weight_bytes_of_8b():
    """15.0 GB in bf16 read per token, 7.5 GB all-FP8."""

    def size(stored: predict.Stored) -> int:
        return linear_bytes(LLAMA_8B, stored, 1)

    assert size(BF16) == pytest.approx(15.0e9, rel=0.01)
    assert size(predict.Stored("fp8")) == pytest.approx(7.5e9, rel=0.01)
    assert size(predict.Stored("int4")) == pytest.approx(3.75e9 * 1.0625, rel=0.01)
    head = LLAMA_8B.vocab_size * LLAMA_8B.hidden_size
    for kind, width in (("fp8", 1), ("bf16", 2)):
        assert size(predict.Stored("int4", kind)) == pytest.approx(3.49e9 * 1.0625 + width * head, rel=0.01)
    for model in (LLAMA_8B, LLAMA_70B, QWEN_2KV, BUILTIN):
        assert linear_bytes(model, BF16, 2) >= linear_bytes(model, BF16, 1) / 2


def test_how_weights_lie_in_memory():
    assert predict.stored_as("int4", on_cpu=False, head="fp8") == predict.Stored("int4", "fp8")
    assert predict.stored_as("fp8", on_cpu=False) == predict.Stored("fp8")
    assert predict.stored_as("int4", on_cpu=True, head="bf16") == predict.Stored("fp32", "fp32", "fp32")
    packed = predict.stored_as("int4", on_cpu=True, head="bf16", packed=("int4",))
    assert packed == predict.Stored("int4", "fp32", "fp32")


@pytest.mark.parametrize("scheme", ["int4_awq", "int4_gptq", "int8_smoothquant", "fp8", "none"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_predicted_bytes_are_those_of_a_ranks_engine(scheme: str, capability: tuple[int, int], tp_size: int):
    """Linear layers as the scheme stores them, its head on that GPU included; KV heads are repeated from 4 ranks on,
    and the vocabulary is padded."""
    import torch

    from appliance.builder.shards import plan_tensors
    from appliance.engines import parameters_of

    plugin = registry.plugins("quantization")[scheme]
    made = registry.load("quantization", scheme).Scheme(parameters_of(plugin, capability))
    model = msgspec.structs.replace(LLAMA_8B, num_key_value_heads=2, vocab_size=128261)
    specs = registry.load("models", "llama").weight_specs(model)
    plan = plan_tensors([spec for spec in specs if spec.kind == "linear"], made, torch.bfloat16, tp_size)
    facts = capabilities().named[scheme]
    precision = "bf16" if scheme == "none" else plugin.facts["precisions"][0]
    stored = predict.stored_as(precision, on_cpu=False, head=facts.head_on(capability))
    assert linear_bytes(model, stored, tp_size) == sum(tensor.nbytes for tensor in plan)


BF16 = predict.Stored("bf16")


def need(model=LLAMA_8B, precision="bf16", tp=1, kv="bf16", on_cpu=False) -> predict.Memory:
    return predict.memory(
        model,
        stored=predict.stored_as(precision, on_cpu=on_cpu),
        kv_cache=kv,
        tp_size=tp,
        pp_size=1,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        on_cpu=on_cpu,
    )


def test_memory_of_a_rank():
    assert need().kv_per_token == 2 * 32 * 8 * 128 * 2  # both of K and V, layers, KV heads, head size, bytes
    assert need(kv="fp8").kv_per_token == need().kv_per_token // 2
    assert need(tp=8).kv_per_token == need().kv_per_token // 8
    assert need(QWEN_2KV, tp=4).kv_per_token == need(QWEN_2KV, tp=2).kv_per_token  # KV heads are repeated, not split
    assert need().weights >= LLAMA_8B.num_parameters * 2
    assert need(tp=2).weights < need().weights
    assert need(tp=2).overhead == need(tp=8).overhead > need().overhead  # what ranks need to reach each other
    assert need(precision="fp8").weights < need().weights * 0.6
    assert need(kv="fp32", on_cpu=True).weights >= LLAMA_8B.num_parameters * 4  # widened to float32


def test_tied_embeddings_still_have_an_output_projection():
    untied = msgspec.structs.replace(BUILTIN, tie_word_embeddings=False)
    assert need(BUILTIN).weights == need(untied).weights


@given(
    st.integers(0, 200 * GIB),
    st.integers(0, 10**6),
    st.floats(0.05, 1.0),
    st.booleans(),
    st.sampled_from([LLAMA_8B, LLAMA_70B, BUILTIN, QWEN_2KV]),
)
def test_required_and_kv_tokens_are_inverse(free: int, tokens: int, fraction: float, on_cpu: bool, model):
    memory = need(model, on_cpu=on_cpu)
    most = memory.kv_tokens(free, fraction)
    if most:
        assert memory.required(most, fraction) <= free
        assert memory.required(most + 2, fraction) > free
    else:
        assert memory.required(2, fraction) > free
    assert memory.required(tokens + 1, fraction) >= memory.required(tokens, fraction) >= memory.fixed


def test_capabilities_come_from_the_plugins():
    found = capabilities()
    assert {"cuda", "cpu"} <= found.backends.keys() and {"bf16", "fp16", "fp32", "fp8"} <= found.schemes.keys()
    assert found.backends["cuda"].device == "gpu" and found.backends["cpu"].device == "cpu"
    assert found.schemes["fp8"].min_compute_capability == (8, 9) and found.schemes["fp8"].dimension_multiple == 16
