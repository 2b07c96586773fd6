"""The speed model against measurements: steps, prompts and full load of an 8B on one H200, all-reduces on two and four,
and, for plausibility only, another engine's 70B. A figure that is measured later and missed by 20% fails here."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
from selection_cases import BUILTIN, FACTS, LLAMA_8B, LLAMA_70B, machine

from appliance.profiles import facts_of, predict, speed
from appliance.types import ModelConfig

MAX_ERROR = 0.20
H200 = facts_of(machine("h200-x1").gpus[0], FACTS)


def ranks(
    model: ModelConfig = LLAMA_8B,
    precision: str = "fp8",
    kv: str = "bf16",
    tp: int = 1,
    pp: int = 1,
    link: str = "nvlink",
    facts=H200,
    capability: tuple[int, int] = (9, 0),
) -> speed.Ranks:
    stored = predict.stored_as(precision, on_cpu=False)
    memory = predict.memory(
        model,
        stored=stored,
        kv_cache=kv,
        tp_size=tp,
        pp_size=pp,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        on_cpu=False,
    )
    device = speed.gpu_device(facts, precision, link, tp, capability)
    return speed.Ranks(model, stored, memory.kv_per_token, device, tp, pp)


class Engine(NamedTuple):
    """What was measured; ranks are GPUs with NVLink."""

    model: str = "8b"
    precision: str = "fp8"
    kv: str = "bf16"
    tp: int = 1
    pp: int = 1

    @property
    def ranks(self) -> speed.Ranks:
        model = {"8b": LLAMA_8B, "70b": LLAMA_70B}[self.model]
        return ranks(model, self.precision, self.kv, self.tp, self.pp)


FP8, FP8_KV8, BF16 = Engine(), Engine(kv="fp8"), Engine(precision="bf16")
# Own measurements on H200s: appliance/bench/RESULTS.md, "The CUDA engine, second round" ("now"; bf16 at 32, 128 and 256
# from "The baseline of issue 2"). Each figure stands in a row of `bench offline`, beside "predicted".
# Engine, sequences, prompt tokens, ms of a decode step. The bench gives each 128 tokens, so contexts are 64 longer than
# prompts on average.
STEPS = [
    *((FP8, n, 128, ms) for n, ms in ((1, 1e3 / 432), (2, 2.62), (4, 2.74), (8, 2.99), (32, 3.25), (64, 3.85))),
    *((FP8, n, 128, ms) for n, ms in ((128, 4.65), (256, 7.13))),
    *((FP8, n, 1024, ms) for n, ms in ((64, 5.53), (256, 13.88))),
    *((FP8_KV8, n, 1024, ms) for n, ms in ((64, 4.55), (256, 9.64))),
    *((BF16, n, 128, ms) for n, ms in ((1, 3.89), (2, 3.97), (4, 4.07), (8, 4.48), (32, 5.31), (64, 5.60))),
    *((BF16, n, 128, ms) for n, ms in ((128, 6.83), (256, 10.20))),
]
# Engine, prompts, tokens of each, prompt tokens/s.
PROMPTS = [(FP8, 8, 4096, 67643), (FP8, 64, 512, 71524), (BF16, 8, 4096, 40830), (BF16, 64, 512, 44044)]
# Engine, requests at once, prompt and output tokens of each, output tokens/s.
LOADS = [
    (FP8, 256, 1024, 1024, 12315),
    (BF16, 256, 1024, 1024, 9912),
    (FP8_KV8, 1024, 1000, 1000, 17403),
    (FP8, 1024, 128, 128, 24802),
]
# All-reduces of rows × 8192 in bf16 on H200s (NV18), the best of NCCL, one-shot and two-shot: ranks, rows, µs.
ALL_REDUCES = [
    *((2, n, us) for n, us in ((1, 6.5), (8, 7.4), (32, 7.9), (64, 10.0), (256, 20.3), (1024, 58.5), (4096, 212.1))),
    *((4, n, us) for n, us in ((1, 6.8), (8, 8.9), (32, 9.7), (64, 13.0), (256, 28.3), (1024, 91.5), (4096, 326.3))),
]


@pytest.mark.parametrize(("engine", "num_seqs", "prompt", "measured"), STEPS)
def test_decode_steps_on_h200s(engine: Engine, num_seqs: int, prompt: int, measured: float) -> None:
    predicted = 1e3 * speed.decode_seconds(engine.ranks, math.ceil(num_seqs / engine.pp), prompt + 64)
    assert abs(predicted / measured - 1) < MAX_ERROR, predicted


@pytest.mark.parametrize(("engine", "count", "length", "measured"), PROMPTS)
def test_prompts_on_h200s(engine: Engine, count: int, length: int, measured: float) -> None:
    predicted = speed.prompt_tokens_per_second(engine.ranks, min(count * length, 8192), length)
    assert abs(predicted / measured - 1) < MAX_ERROR, predicted


@pytest.mark.parametrize(("engine", "num_seqs", "prompt", "output", "measured"), LOADS)
def test_full_load_on_h200s(engine: Engine, num_seqs: int, prompt: int, output: int, measured: float) -> None:
    predicted = speed.tokens_per_second(engine.ranks, num_seqs, 8192, prompt_tokens=prompt, output_tokens=output)
    assert abs(predicted / measured - 1) < MAX_ERROR, predicted


@pytest.mark.parametrize(("tp", "rows", "measured"), ALL_REDUCES)
def test_all_reduces_over_nvlink(tp: int, rows: int, measured: float) -> None:
    device = speed.gpu_device(H200, "fp8", "nvlink", tp)
    predicted = 1e6 * speed.all_reduce_seconds(device, tp, rows * 8192 * 2)
    assert abs(predicted / measured - 1) < MAX_ERROR, predicted


# vLLM 0.26 with a 70B in FP8 on four H200s: not this engine, so only a range; issue 6 asks for about 0.7 of each step.
@pytest.mark.parametrize(
    ("num_seqs", "prompt", "theirs"),
    [(1, 128, 8.97), (8, 128, 9.30), (64, 128, 11.17), (256, 128, 20.28), (64, 1024, 12.37), (256, 1024, 23.55)],
)
def test_a_70b_on_four_h200s_is_plausible(num_seqs: int, prompt: int, theirs: float) -> None:
    predicted = 1e3 * speed.decode_seconds(ranks(LLAMA_70B, tp=4), num_seqs, prompt + 64)
    assert 0.6 * theirs < predicted < 1.1 * theirs, predicted


def test_full_load_of_a_70b_on_four_h200s_is_plausible() -> None:
    many = ranks(LLAMA_70B, tp=4)
    assert 0.9 * 6732 < speed.tokens_per_second(many, 256, 8192) < 1.5 * 6732
    assert 0.9 * 21243 < speed.prompt_tokens_per_second(many, 8192, 4096) < 1.5 * 21243


# Published for TensorRT-LLM, FP8 weights and K/V where the GPU has them: not this engine, but GPUs and numbers of ranks
# that nothing was measured on here. 1.0 ("Overview", all requests at once): machine, GiB, model, ranks, and by prompt
# and output the output tokens/s of all ranks.
LLAMA_405B = ModelConfig("LlamaForCausalLM", 128256, 16384, 53248, 126, 128, 8, 128, 131072)
LOADED = [
    (
        "h100-x1",
        79,
        LLAMA_8B,
        1,
        {(128, 128): 28312, (128, 2048): 22714, (1000, 1000): 15220, (2048, 128): 3450, (5000, 500): 3459},
    ),
    ("h200-x1", 139, LLAMA_8B, 1, {(128, 128): 27911, (128, 4096): 18027, (1000, 1000): 17744, (2048, 128): 3538}),
    ("h200-x1", 139, LLAMA_70B, 1, {(128, 128): 3803, (128, 2048): 4336, (1000, 1000): 2909, (2048, 2048): 2003}),
    ("h100-x1", 79, LLAMA_70B, 2, {(128, 128): 6378, (500, 2000): 5222, (1000, 1000): 4205, (2048, 128): 762}),
    ("h200-x1", 139, LLAMA_405B, 8, {(128, 128): 3814, (128, 2048): 5348, (1000, 1000): 3330, (2048, 128): 456}),
    ("h100-x1", 79, LLAMA_405B, 8, {(128, 128): 3627, (1000, 1000): 2919, (2048, 2048): 2296, (5000, 500): 610}),
]
# 0.6.1 (A100, FP16) and 0.5 (L40S) with a batch of its own; their 70B with long outputs is left out, for the later
# version is twice as fast there: machine, ranks, requests, prompt, output, output tokens/s of all ranks.
LLAMA_2_7B = ModelConfig("LlamaForCausalLM", 32000, 4096, 11008, 32, 32, 32, 128, 4096)
BATCHES = [
    ("a100-80gb-x8", "fp16", 1, 384, 128, 128, 5586),
    ("a100-80gb-x8", "fp16", 1, 60, 128, 2048, 1928),
    ("a100-80gb-x8", "fp16", 1, 52, 2048, 128, 591),
    ("a100-80gb-x8", "fp16", 2, 64, 2048, 2048, 2 * 782),
    *(("l40s", "fp8", 1, *case) for case in ((64, 128, 128, 3240), (64, 128, 2048, 1622), (32, 2048, 128, 581))),
]
MAX_DISTANCE = 0.27  # a plausibility


@pytest.mark.parametrize(("name", "gib", "model", "tp", "published"), LOADED)
def test_full_load_is_plausible_on_gpus_that_are_not_here(name: str, gib: int, model, tp: int, published) -> None:
    facts = facts_of(machine(name).gpus[0], FACTS)
    many = ranks(model, kv="fp8", tp=tp, facts=facts)
    weights = predict.linear_bytes(model, many.stored, tp) + 2 * model.vocab_size * model.hidden_size
    free = gib * 2**30 * 0.9 - weights - 3 * 2**30
    for (prompt, output), measured in published.items():
        num_seqs = min(1024, int(free / many.kv_per_token / (prompt + output // 2)))
        predicted = speed.tokens_per_second(many, num_seqs, 8192, prompt_tokens=prompt, output_tokens=output)
        assert abs(predicted / measured - 1) < MAX_DISTANCE, (prompt, output, measured, predicted)


@pytest.mark.parametrize(("name", "kv", "tp", "num_seqs", "prompt", "output", "published"), BATCHES)
def test_batches_are_plausible_on_gpus_that_are_not_here(
    name: str, kv: str, tp: int, num_seqs: int, prompt: int, output: int, published: float
) -> None:
    gpu = machine(name).gpus[0]
    facts, capability = facts_of(gpu, FACTS), gpu.compute_capability
    some = ranks(LLAMA_2_7B, "fp8" if kv == "fp8" else "fp16", kv, tp=tp, facts=facts, capability=capability)
    predicted = speed.tokens_per_second(some, num_seqs, 8192, prompt_tokens=prompt, output_tokens=output)
    assert abs(predicted / published - 1) < MAX_DISTANCE, predicted


def test_links_batch_and_ranks_cost_time() -> None:
    l40s = facts_of(machine("l40s").gpus[0], FACTS)

    def ms(tp: int, link: str, num_seqs: int = 1, facts=l40s) -> float:
        return 1e3 * speed.decode_seconds(ranks(tp=tp, link=link, facts=facts, capability=(8, 9)), num_seqs)

    assert ms(2, "pcie") < ms(2, "none") and ms(4, "pcie", 64) < ms(4, "none", 64)
    assert ms(2, "pcie", 64) > ms(2, "pcie", 1)
    assert ms(2, "nvlink") == ms(2, "pcie"), "facts without NVLink: a link that is called so is no quicker"
    assert ms(2, "nvlink", facts=H200) < ms(2, "pcie", facts=H200)
    assert ms(4, "nvlink", facts=H200) < ms(2, "nvlink", facts=H200)


def test_eight_ranks_are_extrapolated_from_what_two_and_four_show() -> None:
    two, four, eight = (
        speed.all_reduce_seconds(speed.gpu_device(H200, "fp8", "nvlink", n), n, 16384) for n in (2, 4, 8)
    )
    assert two < four < eight < 1.2 * four
    assert speed.all_reduce_seconds(speed.gpu_device(H200, "fp8", "nvlink", 1), 1, 16384) == 0


def test_a_gpu_that_nobody_measured_has_the_h200s_share_of_its_data_sheet() -> None:
    a100 = facts_of(machine("a100-80gb-x8").gpus[0], FACTS)
    assert a100.measured is None and H200.measured is not None
    share = H200.reached_bandwidth / (H200.memory_bandwidth_gbs * 1e9)
    assert a100.reached_bandwidth == pytest.approx(share * 2039e9)
    assert a100.reached_flops("bf16") == pytest.approx(312e12 * H200.reached_flops("bf16") / 989e12, rel=0.01)
    assert a100.reached_flops("int4") == a100.reached_flops("bf16") == 8 * a100.reached_flops("fp32")
    assert a100.reached_nvlink == pytest.approx(300e9 * H200.reached_nvlink / 450e9, rel=0.01)
    slice_facts = facts_of(machine("h100-mig-3g.40gb").gpus[0], FACTS)
    assert slice_facts.reached_nvlink == 0 and slice_facts.reached_bandwidth < 0.6 * 3350e9


def test_pipeline_stages_add_up_for_one_request_and_overlap_for_many() -> None:
    whole, staged = ranks(LLAMA_70B), ranks(LLAMA_70B, pp=2)
    assert speed.decode_seconds(staged, 1) == pytest.approx(speed.decode_seconds(whole, 1), rel=0.15)
    assert 1.4 < speed.tokens_per_second(staged, 256, 8192) / speed.tokens_per_second(whole, 256, 8192) < 2.1


def test_the_fixed_costs_decide_for_a_tiny_model() -> None:
    assert speed.decode_seconds(ranks(BUILTIN, "bf16"), 1) < speed.decode_seconds(ranks(BUILTIN, "bf16", tp=2), 1)
