"""Products whose scales the next operation applies: each kernel against its reference, references against the plain
operation on scaled numbers, and whole models that defer on the CPU against the same models that do not.

Kernels run in Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import PagedRunner, PagedSequence, load_model, make_checkpoint
from quantized_helpers import DEVICE, KERNEL_FP8, assert_same_quantized, needs_fp8, randn, strided, ulp
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from appliance import registry
from appliance.distributed import TensorParallel
from appliance.kernels import activation, deferred_scale, dependent_launch, norm, rope_cache, sampling
from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.deferred_scale import DeferredScale, materialize
from appliance.kernels.fp8_linear import (
    fp8_linear_deferred,
    fp8_linear_deferred_reference,
    fp8_linear_reference,
    quantize_rows_reference,
)
from appliance.kernels.skinny_linear import multiprocessors
from appliance.kernels.tactics import TABLE, row_bucket
from appliance.layers.linear import Linear, RowParallelLinear

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5
fp8 = registry.load("quantization", "fp8")


def deferred(n: int, size: int, dtype: torch.dtype, with_bias: bool, seed: int = 0) -> DeferredScale:
    """Unscaled numbers of the size that FP8 products have, rows strided, every scale another one."""
    values = strided(randn(n, size, dtype=torch.float32, seed=seed) * 1e5).to(dtype)
    row_scales = (randn(n, 1, dtype=torch.float32, seed=seed + 1).abs() + 0.5) * 1e-2
    column_scales = (randn(1, size, dtype=torch.float32, seed=seed + 2).abs() + 0.5) * 1e-3
    bias = randn(size, dtype=dtype, seed=seed + 3) if with_bias else None
    return DeferredScale(values, row_scales, column_scales, bias)


def copy_of(product: DeferredScale) -> DeferredScale:
    return DeferredScale(product.values.clone(), product.row_scales, product.column_scales, product.bias)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got, want, rtol=2 * ulp(dtype), atol=1e-5)


# ---------------------------------------------------------------- materializing


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "size"), [(1, 40), (5, 1100)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_materialize(dtype: torch.dtype, out: torch.dtype, n: int, size: int, with_bias: bool) -> None:
    product = deferred(n, size, dtype, with_bias)
    ours = copy_of(product)
    expected = product.values.double() * product.row_scales.double() * product.column_scales.double()
    expected = expected if product.bias is None else expected + product.bias.double()
    got = deferred_scale.materialize_triton(ours, out)
    assert got.dtype == out
    assert (got.data_ptr() == ours.values.data_ptr()) == (out == dtype), "in place where nothing speaks against it"
    close(got.double(), expected, out)
    close(deferred_scale.materialize_reference(product, out).double(), expected, out)


@needs_triton
def test_first_columns_and_no_rows() -> None:
    product = deferred(3, 64, torch.bfloat16, with_bias=True)
    whole = materialize(copy_of(product), torch.float32)
    cut = product.first_columns(50)
    assert cut.shape == (3, 50)
    torch.testing.assert_close(materialize(cut, torch.float32), whole[:, :50])
    none = DeferredScale(product.values[:0], product.row_scales[:0], product.column_scales, product.bias)
    assert deferred_scale.materialize_triton(none, torch.float32).shape == (0, 64)


# ---------------------------------------------------------------- consumers


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_rms_norm(dtype: torch.dtype, with_bias: bool, with_residual: bool) -> None:
    product = deferred(4, 200, dtype, with_bias)
    weight = randn(200, dtype=dtype, seed=7)
    residual = randn(4, 200, dtype=dtype, seed=8) if with_residual else None
    scaled = product.scaled()
    total = scaled if residual is None else scaled + residual.float()
    want = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * weight.float()
    for norm_of in (norm.rms_norm_triton, norm.rms_norm_reference):
        stream = None if residual is None else strided(residual)
        given = copy_of(product)
        got, got_stream = norm_of(given, stream, weight, EPS)
        close(got_stream, total.to(dtype), dtype)
        close(got, want.to(dtype), dtype)
        expected_place = given.values if stream is None else stream
        assert got_stream.data_ptr() == expected_place.data_ptr() and got.dtype == dtype


@needs_triton
@pytest.mark.parametrize("with_bias", [True, False])
def test_rms_norm_quantize(with_bias: bool) -> None:
    needs_fp8()
    product, weight = deferred(4, 200, torch.float32, with_bias), randn(200, dtype=torch.float32, seed=7)
    residual = randn(4, 200, dtype=torch.float32, seed=8)
    want, want_stream = norm.rms_norm_quantize_reference(product.scaled(), residual.clone(), weight, EPS)
    reference, _ = norm.rms_norm_quantize_reference(copy_of(product), residual.clone(), weight, EPS)
    got, stream = norm.rms_norm_quantize_triton(copy_of(product), residual, weight, EPS, values_dtype=KERNEL_FP8)
    close(stream, want_stream, torch.float32)
    assert_same_quantized(got, want)
    assert torch.equal(reference[1], want[1]) and torch.equal(reference[0].float(), want[0].float())


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_silu_mul(dtype: torch.dtype, with_bias: bool) -> None:
    product = deferred(3, 2 * 1500, dtype, with_bias)
    want = activation.silu_mul_reference(product.scaled())
    close(activation.silu_mul_triton(product), want.to(dtype), dtype)
    close(activation.silu_mul_reference(product), want.to(dtype), dtype)


@needs_triton
@pytest.mark.parametrize(("size", "crowded"), [(96, False), (5000, True), (20000, False), (30000, False)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_silu_mul_quantize(size: int, crowded: bool, with_bias: bool) -> None:
    needs_fp8()
    rows = multiprocessors(torch.device(DEVICE)) + 1 if crowded else 3
    product = deferred(rows, 2 * size, torch.float32, with_bias)
    want = activation.silu_mul_quantize_reference(product.scaled())
    assert_same_quantized(activation.silu_mul_quantize_triton(product, values_dtype=KERNEL_FP8), want)
    assert_same_quantized_exactly(activation.silu_mul_quantize_reference(product), want)


def assert_same_quantized_exactly(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[1], want[1]) and torch.equal(got[0].float(), want[0].float())


HEADS, KV_HEADS, DIM = 3, 2, 24


def heads_of(product: Tensor) -> tuple[Tensor, ...]:
    return product.unflatten(-1, (-1, DIM)).split((HEADS, KV_HEADS, KV_HEADS), dim=1)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_norm_of_heads_scales_values_too(dtype: torch.dtype, with_bias: bool) -> None:
    product = deferred(5, (HEADS + 2 * KV_HEADS) * DIM, dtype, with_bias)
    weights = randn(DIM, dtype=dtype, seed=5), randn(DIM, dtype=dtype, seed=6)
    q, k, v = heads_of(product.scaled())
    norm.qk_rms_norm_reference_(q, k, *weights, EPS)
    for norm_of in (norm.qk_rms_norm_triton_, norm.qk_rms_norm_reference_):
        given = copy_of(product)
        got = heads_of(given.values)
        norm_of(got[0], got[1], *weights, EPS, got[2], given)
        for mine, want in zip(got, (q, k, v), strict=True):
            close(mine, want.to(dtype), dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_rotation_and_cache_write(dtype: torch.dtype, with_bias: bool) -> None:
    n, page_size = 5, 4
    product = deferred(n, (HEADS + 2 * KV_HEADS) * DIM, dtype, with_bias)
    angles = torch.rand(16, DIM // 2, generator=torch.Generator().manual_seed(3)) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(DEVICE)
    positions = torch.tensor([3, 0, 15, 7, 1], device=DEVICE)
    slots = torch.tensor([6, 1, -1, 11, 0], device=DEVICE)

    def cache() -> Tensor:
        return torch.zeros(3, 2, page_size, KV_HEADS, DIM, dtype=dtype, device=DEVICE)

    want_q, want_k, want_v = heads_of(product.scaled())
    want_cache = cache().float()
    rope_cache.rope_and_write_reference(want_q, want_k, want_v, positions, cos_sin, want_cache, slots)
    for write in (rope_cache.rope_and_write_triton, rope_cache.rope_and_write_reference):
        given, got_cache = copy_of(product), cache()
        q, k, v = heads_of(given.values)
        got = write(q, k, v, positions, cos_sin, got_cache, slots, deferred=given)
        assert got.data_ptr() == given.values.data_ptr()
        torch.testing.assert_close(got.float(), want_q, rtol=2 * ulp(dtype), atol=10 * ulp(dtype))
        torch.testing.assert_close(got_cache.float(), want_cache, rtol=2 * ulp(dtype), atol=10 * ulp(dtype))
        assert torch.equal(k, heads_of(product.values)[1]), "k is an input and keeps its values"


# ---------------------------------------------------------------- models


class Deferring(fp8.Scheme):
    """FP8 whose products defer wherever they may, in plain torch; weights padded as on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.deferred = 0

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight, scales = tensors["weight"].float(), tensors["weight_scale"]
        padding = -len(weight) % 16
        padded = torch.cat((weight, torch.full((padding, weight.shape[1]), 7.0)))
        return {"weight": padded, "weight_scale": torch.cat((scales, torch.ones(padding, 1))).view(1, -1)}

    def apply_deferred(self, tensors: Any, x: Any, bias: Tensor | None, dtype: torch.dtype) -> DeferredScale:
        self.deferred += 1
        x = quantize_rows_reference(x) if isinstance(x, Tensor) else x
        if bias is not None:
            bias = torch.nn.functional.pad(bias, (0, len(tensors["weight"]) - len(bias)))
        return fp8_linear_deferred_reference(*x, tensors["weight"], tensors["weight_scale"], bias, dtype)

    def apply(self, tensors: Any, x: Any, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        raise AssertionError("every layer of these models may defer")


SHAPE: dict[str, Any] = {
    "vocab_size": 120,  # no multiple of 16
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MODELS = {
    "llama": LlamaConfig(**SHAPE),
    "llama-biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SHAPE),  # bias of q, k and v
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),  # norm of heads
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_defer_compute_the_same(name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, MODELS[name])
    prompt = torch.randint(3, 120, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    want = PagedRunner(load_model(tmp_path, scheme="fp8")).step([(PagedSequence(), prompt)])[0]
    scheme = Deferring()
    got = PagedRunner(load_model(tmp_path, scheme=scheme)).step([(PagedSequence(), prompt)])[0]
    assert scheme.deferred == 2 * 4 + 1, "qkv, o, gate and up, down of two layers, and the logits"
    assert got.dtype == torch.float32 and got.shape == (40, 120)
    # Now and then the last bit of a float32 sum decides an FP8 rounding.
    assert (got - want).norm() / want.norm() < 0.02
    assert (got - want).abs().median() < 1e-4


def test_ranks_that_add_up_do_not_defer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorParallel, "all_reduce", lambda self, x: x)

    class Both(Deferring):
        def apply(self, tensors: Any, x: Any, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
            return materialize(self.apply_deferred(tensors, x, bias, dtype), dtype)

    options = {"bias": False, "scheme": Both(), "dtype": torch.float32, "defer": True}
    layers = [
        Linear(32, 16, **options),
        RowParallelLinear(32, 16, tp=TensorParallel(), **options),
        RowParallelLinear(32, 16, tp=TensorParallel(0, 2), **options),
    ]
    for layer, deferring in zip(layers, (True, True, False), strict=True):
        layer.load_state_dict(fp8.Scheme().quantize(torch.ones(16, 32)))
        layer.prepare()
        assert isinstance(layer(torch.ones(2, 32)), DeferredScale) == deferring


# ---------------------------------------------------------------- on a GPU


def operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, scales = quantize_rows_reference(randn(m, k, dtype=torch.bfloat16))
    weight, weight_scales = quantize_rows_reference(randn(n, k, dtype=torch.bfloat16, seed=1))
    return values, scales, weight, weight_scales.view(1, -1)


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (0, 64, 256),
        (1, 64, 256),
        (17, 528, 512),
        pytest.param(64, 528, 4096, marks=pytest.mark.gpu),
        pytest.param(300, 528, 4096, marks=pytest.mark.gpu),
    ],
)
def test_product(m: int, n: int, k: int) -> None:
    needs_fp8()
    arguments = *operands(m, n, k), randn(n, dtype=torch.bfloat16, seed=2)
    got = fp8_linear_deferred(*arguments)
    assert got.dtype == torch.bfloat16
    want = fp8_linear_reference(*arguments, torch.float32)
    torch.testing.assert_close(got.scaled(), want, rtol=1e-2, atol=1e-2 * k**0.5)
    torch.testing.assert_close(fp8_linear_deferred_reference(*arguments, torch.float32).scaled(), want)
    torch.testing.assert_close(materialize(got, torch.float16), want.half(), rtol=1e-2, atol=1e-2 * k**0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 512])
def test_every_tactic_computes_the_product(rows: int) -> None:
    needs_fp8()
    scheme, bias = fp8.Scheme(), randn(512, dtype=torch.bfloat16, seed=2)
    x = randn(rows, 1024, dtype=torch.bfloat16)
    weight = randn(512, 1024, dtype=torch.bfloat16, seed=1)
    prepared = scheme.prepare(scheme.quantize(weight))
    want = fp8_linear_reference(
        *scheme.tactic_input(x), prepared["weight"], prepared["weight_scale"], bias, torch.float32
    )
    bucket = row_bucket(rows)
    assert bucket is not None
    tactics = scheme.tactics(512, 1024, bucket, x.device)
    first = next(iter(tactics))
    assert first.startswith("skinny" if rows <= 16 else "deferred")
    assert {"deferred", "rowwise"} < set(tactics) if rows <= 64 else {"deferred", "rowwise"} == set(tactics)
    try:
        for name in tactics:
            TABLE.choose("fp8", 512, 1024, bucket, name)
            for apply in (scheme.apply, scheme.apply_deferred):
                got = apply(prepared, x, bias, torch.bfloat16)
                assert isinstance(got, DeferredScale) == (name == "deferred" and apply == scheme.apply_deferred)
                got = materialize(got, torch.float32)
                assert (got - want).norm() / want.norm() < 1e-2, name
    finally:
        TABLE.clear()


@pytest.mark.gpu
def test_dependent_launches_change_nothing() -> None:
    """A chain of kernels, each reading what the one before wrote, many times over in a graph; with and without."""
    needs_fp8()
    layers, n, size = 12, 33, 512
    scheme = fp8.Scheme()
    weights = [scheme.prepare(scheme.quantize(randn(size, size, dtype=torch.bfloat16, seed=i))) for i in range(layers)]
    norm_weight = torch.ones(size, dtype=torch.bfloat16, device="cuda")
    start = randn(n, size, dtype=torch.bfloat16)

    def chain() -> Tensor:
        x: Any = start
        residual: Tensor | None = None
        for prepared in weights:
            normed, residual = scheme.rms_norm(x, residual, norm_weight, EPS)
            x = scheme.apply_deferred(prepared, normed, None, torch.bfloat16)
        return norm.rms_norm(x, residual, norm_weight, EPS)[0]

    results = []
    for launched in (contextlib.nullcontext, dependent_launch.disabled):
        with launched():
            keep = start.clone()
            eager = chain().clone()
            start.copy_(keep)  # the first norm starts the stream in place
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = chain()
            for _ in range(50):
                start.copy_(keep)
                graph.replay()
            results += [eager, out.clone()]
            start.copy_(keep)
    assert all(torch.equal(result, results[0]) for result in results[1:])
    assert results[0].isfinite().all() and results[0].float().std() > 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("padded", [False, True])
def test_graphs_keep_deferred_logits(rows: int, padded: bool) -> None:
    """As the runner has them: captured deferred or in bfloat16, cut to the vocabulary, read after a replay."""
    needs_fp8()
    from appliance.runtime.cuda_graphs import DecodeGraphs

    vocab = 504 if padded else 512
    scheme = fp8.Scheme()
    head = Linear(256, vocab, bias=False, scheme=scheme, dtype=torch.bfloat16, defer=True)
    head.load_state_dict(scheme.quantize(randn(vocab, 256, dtype=torch.bfloat16, seed=1)))
    head.cuda().prepare()
    x = randn(40, 256, dtype=torch.bfloat16)
    graphs = DecodeGraphs(lambda size: head(x[:size]), lambda size: size)  # type: ignore[arg-type,return-value,index]
    with torch.inference_mode():
        for size in (40, rows):
            graphs.capture(size)
        x.normal_()
        logits = graphs.replay(rows)
        want = head(x[:rows])
        assert isinstance(logits, DeferredScale) == isinstance(want, DeferredScale) == (rows > 16)
        assert logits.shape == (rows, vocab)
        assert torch.equal(sampling.argmax(logits), sampling.argmax(want))
        first = deferred_scale.first_rows(logits, 1)
        assert torch.equal(materialize(first, torch.float32), materialize(want, torch.float32)[:1])


def test_no_dependent_launch_without_a_gpu() -> None:
    assert dependent_launch.launch_options(torch.device("cpu")) == {"PDL": False}
