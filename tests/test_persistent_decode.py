"""The persistent decode kernel against the layers it stands for: the same step over the same cache."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from appliance.batching.step import NewSequence, ScheduledSequence, StepPlan
from appliance.kernels.attention import KvScales, ReferenceAttention
from appliance.kernels.fp8_linear import FP8
from appliance.kernels.paged_attention import TritonAttention
from appliance.kernels.persistent.kernel import DecodeShape
from appliance.layers.attention import Attention
from appliance.layers.decoder import Decoder
from appliance.layers.linear import Linear
from appliance.quantization.int4_storage import from_stored
from appliance.runtime.cuda_graphs import capture
from appliance.runtime.loading import build_model
from appliance.runtime.model_runner import ModelRunner, RunnerLimits
from appliance.runtime.persistent_decode import PersistentDecode, refusal, scale_tiles
from appliance.types import ModelConfig, SamplingParams

PAGE = 16
BASE = {
    "architecture": "LlamaForCausalLM",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "one-query-per-kv": {"num_key_value_heads": 8},
    "seven-queries-per-kv": {"num_attention_heads": 14, "hidden_size": 896, "intermediate_size": 4864},
    "wide-heads": {"head_dim": 128, "hidden_size": 1024},
    "biases": {"attention_bias": True, "output_bias": True, "mlp_bias": True},
    "head-norms": {"qk_norm": True},
    "window": {"sliding_window": 40},
    "large": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 2,
        "vocab_size": 32000,
    },
}


def random_model(scheme: str, parameters: dict[str, Any] | None = None, **shape: object) -> Decoder:
    """A decoder on the GPU whose activations keep a sensible size. `parameters`: of the scheme."""
    config = ModelConfig(**(BASE | shape))  # type: ignore[arg-type]
    model = build_model(config, scheme, torch.bfloat16, parameters)
    generator = torch.Generator("cuda").manual_seed(3)
    plain = build_model(config, "none", torch.bfloat16)
    schemes = {name: module.scheme for name, module in model.named_modules() if isinstance(module, Linear)}
    tensors = []
    for name, parameter in plain.named_parameters():
        value = torch.randn(parameter.shape, generator=generator, device="cuda")
        if name.endswith("norm.weight"):
            value = 1 + 0.1 * value
        elif value.dim() == 2 and "embedding" not in name:
            value *= value.shape[1] ** -0.5
        value = value.to(torch.bfloat16)
        if value.dim() == 2 and "embedding" not in name:
            stem = name.removesuffix("weight")
            stored = schemes[stem.removesuffix(".")].quantize(value)
            tensors += [(stem + suffix, tensor) for suffix, tensor in stored.items()]
        else:
            tensors.append((name, value))
    model.load(tensors, "cuda")
    model.prepare(config.max_position_embeddings)
    return model


class Step:
    """One decode step of sequences of given lengths, over caches with random numbers in them."""

    def __init__(self, model: Decoder, lengths: list[int], kv_dtype: torch.dtype = torch.bfloat16) -> None:
        self.model = model
        config = model.config
        pages = [-(-length // PAGE) for length in lengths]
        generator = torch.Generator("cuda").manual_seed(4)
        shape = (sum(pages) + 1, 2, PAGE, config.num_key_value_heads, config.head_dim)
        self.caches = [
            torch.randn(shape, generator=generator, device="cuda").to(kv_dtype) for _ in range(config.num_hidden_layers)
        ]
        for attention in (m for m in model.modules() if isinstance(m, Attention)):
            attention.kv_scales = KvScales(k=0.5, v=2.0) if kv_dtype == FP8 else KvScales()
        self.limits = RunnerLimits(
            max_num_seqs=16,
            max_model_len=8192,
            max_num_batched_tokens=8192,
            page_size=PAGE,
            vocab_size=config.vocab_size,
        )
        self.runner = ModelRunner(model, self.caches, TritonAttention(), self.limits, torch.device("cuda"))
        plan, first = StepPlan(step_id=0), 1
        for slot, (length, count) in enumerate(zip(lengths, pages, strict=True)):
            ids = [(7 * i + slot) % config.vocab_size for i in range(length)]
            order = list(range(first, first + count))[::-1]
            plan.new.append(NewSequence(slot, ids, length, SamplingParams(), 0, (), order))
            plan.scheduled.append(ScheduledSequence(slot, length - 1, 1, [], samples=True))
            first += count
        self.plan = plan
        self.runner._batch.apply(plan)

    def inputs(self, rows: int):  # type: ignore[no-untyped-def]
        return self.runner._batch.step_inputs(self.plan.scheduled, rows)

    @torch.inference_mode()
    def by_layers(self, rows: int) -> torch.Tensor:
        inputs = self.inputs(rows)
        self.runner._attention.plan(inputs.metadata)
        return self.model.logits(self.runner._hidden(inputs)).float()

    @torch.inference_mode()
    def persistent(self, rows: int) -> PersistentDecode:
        assert refusal(self.model, self.caches) is None
        return PersistentDecode(self.model, self.caches, self.runner._batch, [rows])


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def dequantized(linear: Linear) -> torch.Tensor:
    tensors = linear.prepared
    if "scale_zero" in tensors:
        return from_stored(tensors).dequantize()
    value = tensors["weight"].float()
    return value * tensors["weight_scale"].view(-1, 1) if "weight_scale" in tensors else value


def exact(step: Step, rows: int) -> torch.Tensor:
    """The step in float32, with the weights that the engine's numbers stand for and no rounding of activations."""
    config = step.model.config
    model = build_model(config, "none", torch.float32)
    linears = {name: module for name, module in step.model.named_modules() if isinstance(module, Linear)}
    plain = dict(step.model.named_parameters())
    tensors = []
    for name, _ in model.named_parameters():
        linear = linears.get(name.removesuffix(".weight"))
        if linear is None:
            tensors.append((name, plain[name].float()))
            continue
        tensors.append((name, dequantized(linear)[: linear.out_features]))
    model.load(tensors, "cuda")
    model.prepare(config.max_position_embeddings)
    attention = [module for module in step.model.modules() if isinstance(module, Attention)]
    caches = [cache.float() for cache in step.caches]
    for cache, of in zip(caches, attention, strict=True):
        cache[:, 0] *= of.kv_scales.k
        cache[:, 1] *= of.kv_scales.v
    runner = ModelRunner(model, caches, ReferenceAttention(), step.limits, torch.device("cuda"))
    with torch.inference_mode():
        runner._batch.apply(step.plan)
        inputs = runner._batch.step_inputs(step.plan.scheduled, rows)
        return model.logits(runner._hidden(inputs))


def check(step: Step, rows: int) -> None:
    """The kernel is as near to the exact result as the layers are, and writes the same K and V."""
    n = len(step.plan.scheduled)
    truth = exact(step, rows)[:n]
    expected = step.by_layers(rows)[:n]
    written = [cache.float().clone() for cache in step.caches]
    actual = step.persistent(rows).logits(step.inputs(rows))[:n]
    torch.cuda.synchronize()
    assert torch.isfinite(actual).all()
    assert error(actual, truth) < 1.2 * error(expected, truth) + 1e-3
    for cache, by_layers in zip(step.caches, written, strict=True):
        assert error(cache, by_layers) < (
            0.03 if cache.dtype == FP8 else 0.01
        )  # the new token's K and V; everything else is untouched


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("scheme", ["fp8", "none"])
def test_agrees_with_the_layers(name: str, scheme: str) -> None:
    model = random_model(scheme, **SHAPES[name])
    for rows, lengths in ((1, [300]), (4, [1, 33, 1000])):
        check(Step(model, lengths), rows)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("head", ["fp8", "bf16"])
def test_int4_agrees_with_the_layers(name: str, head: str) -> None:
    model = random_model("int4_awq", {"head": head}, **SHAPES[name])
    for rows, lengths in ((1, [300]), (2, [64, 65]), (4, [1, 33, 1000])):
        check(Step(model, lengths), rows)


@pytest.mark.gpu
def test_an_unquantized_head_beside_fp8_layers() -> None:
    model = random_model("fp8", {"unquantized": ["lm_head"]})
    for rows, lengths in ((1, [300]), (4, [1, 33, 1000])):
        check(Step(model, lengths), rows)


@pytest.mark.gpu
def test_int4_weights_that_the_kernel_does_not_take() -> None:
    for parameters, words in (({"group_size": 64}, "groups of 128"), ({"act_order": True}, "groups of 128")):
        model = random_model("int4_awq", parameters)
        reason = refusal(model, Step(model, [5]).caches)
        assert reason is not None and words in reason


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[1], [16, 17], [4000], [5, 700, 31, 32, 33, 1, 8000, 64]], ids=str)
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
def test_lengths_and_cache_formats(lengths: list[int], kv_dtype: torch.dtype) -> None:
    model = random_model("fp8", **SHAPES["wide-heads"])
    check(Step(model, lengths, kv_dtype), 8 if len(lengths) > 2 else len(lengths))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["fp8", "int4_awq"])
def test_repeats_bit_for_bit_and_from_a_graph(scheme: str) -> None:
    model = random_model(scheme, **SHAPES["large"])
    step = Step(model, [2000, 3, 77])
    decode = step.persistent(4)
    with torch.inference_mode():
        inputs = step.inputs(4)
        first = decode.logits(inputs).clone()
        graph, logits = capture(lambda: decode.logits(inputs))
        for _ in range(20):
            logits.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(logits[:3], first[:3])


@pytest.mark.gpu
def test_rows_do_not_depend_on_each_other() -> None:
    model = random_model("fp8", **SHAPES["wide-heads"])
    alone = Step(model, [200])
    with torch.inference_mode():
        expected = alone.persistent(1).logits(alone.inputs(1))[0].clone()
        beside = Step(model, [200, 500, 3, 40])
        for mine, theirs in zip(beside.caches, alone.caches, strict=True):
            mine[1 : theirs.shape[0]] = theirs[1:]
        actual = beside.persistent(4).logits(beside.inputs(4))[0]
    assert error(actual, expected) < 0.02  # attention is cut otherwise, so sums round otherwise


def shape(**changes: Any) -> DecodeShape:
    llama = DecodeShape(
        rows=1,
        weights="fp8",
        head="fp8",
        kv_fp8=False,
        layers=32,
        hidden=4096,
        ffn=14336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab=128256,
        page_size=16,
        eps=1e-5,
        blocks=132,
    )
    return dataclasses.replace(llama, **changes)


def test_shapes_that_fit() -> None:
    for rows in (1, 2, 4, 8, 16):
        assert shape(rows=rows).refused() is None
        assert shape(rows=rows, weights="bf16", head="bf16").refused() is None
        assert shape(rows=rows, head="bf16").refused() is None
        assert shape(rows=rows).slots >= 3
    for rows in (1, 2, 4):
        assert shape(rows=rows, weights="int4").refused() is None
        assert shape(rows=rows, weights="int4", head="bf16").slots >= 4
    assert shape(layers=64, hidden=5120, ffn=27648, heads=40).refused() is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": 17}, "1 to 16"),
        ({"head_dim": 256}, "heads of size 256"),
        ({"hidden": 4000}, "multiples of 64"),
        ({"ffn": 14320}, "multiples of 64"),
        ({"hidden": 16384}, "up to 8192"),
        ({"rows": 6}, "powers of two"),
        ({"layers": 1200}, "too little shared memory"),
        ({"weights": "int4", "rows": 8}, "1 to 4 with int4"),
        ({"weights": "int4", "hidden": 4032}, "multiples of 128"),
        ({"weights": "int4", "head": "int4"}, "head in int4"),
        ({"weights": "int4", "head": "bf16", "hidden": 16384}, "up to 8192"),
    ],
)
def test_shapes_that_do_not_fit_say_why(changes: dict[str, object], words: str) -> None:
    refused = shape(**changes).refused()
    assert refused is not None and words in refused


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("out", [64, 48, 40])
def test_scales_stand_in_the_order_of_tiles(halves: bool, out: int) -> None:
    groups = 3
    scale_zero = torch.arange(1, out * groups * 2 + 1).view(out, groups, 2).to(torch.float16)
    tiles = scale_tiles(scale_zero, halves=halves)
    assert tiles.is_contiguous()
    assert tiles.shape == (-(-out // 16), groups, 8, 2, 2)
    seen = 0
    for tile, group, row, half in itertools.product(*(range(size) for size in tiles.shape[:4])):
        # As decode.cu finds a weight row: gate and up rows of the same index share a tile.
        of_half = tile * 8 + row if halves else tile * 16 + half * 8 + row
        end = out // 2 if halves else out
        weight_row = of_half + half * end if halves else of_half
        expected = scale_zero[weight_row, group] if of_half < end else torch.zeros(2)
        assert torch.equal(tiles[tile, group, row, half].float(), expected.float())
        seen += int(of_half < end)
    assert seen == out * groups
