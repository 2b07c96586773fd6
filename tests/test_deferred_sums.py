"""Exact int32 sums with their scales deferred: whoever takes them gives the model's dtype, in a place of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import PagedRunner, PagedSequence, load_model, make_checkpoint
from quantized_helpers import DEVICE, randn, ulp
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

from appliance.kernels import activation, norm, rope_cache, sampling
from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.deferred_scale import DeferredScale, materialize, materialize_reference, materialize_triton
from appliance.kernels.int8_linear import int8_sums_reference
from appliance.kernels.row_quantization import quantize_rows_reference
from appliance.quantization import int8_smoothquant

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter truncates to bfloat16
CLOSE = {"rtol": 2 * ulp(DTYPE), "atol": 1e-3}


def sums(rows: int, size: int, *, bias: bool = False) -> DeferredScale:
    """Sums far beyond what 16 bits hold, of results around 1."""
    values = (randn(rows, size, dtype=torch.float32) * 3e7).to(torch.int32)
    scales = torch.rand(rows, 1, device=DEVICE) * 1e-4 + 1e-5, torch.rand(1, size, device=DEVICE) * 1e-3 + 1e-4
    return DeferredScale(values, *scales, randn(size, dtype=DTYPE, seed=3) if bias else None, DTYPE)


@pytest.mark.parametrize("bias", [True, False])
def test_materialize(bias: bool) -> None:
    product = sums(3, 1500, bias=bias)
    assert product.dtype == DTYPE and not product.in_place
    for dtype in (DTYPE, torch.float32):
        for found in (materialize_triton(product, dtype), materialize_reference(product, dtype)):
            assert found.dtype == dtype
            torch.testing.assert_close(found, product.scaled().to(dtype), rtol=ulp(dtype), atol=1e-6)
    narrow = product.first_rows(2).first_columns(700)
    assert narrow.shape == (2, 700) and narrow.dtype == DTYPE
    torch.testing.assert_close(materialize(narrow, torch.float32), product.scaled()[:2, :700], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("with_residual", [True, False])
def test_rms_norm(with_residual: bool) -> None:
    product, weight = sums(4, 200, bias=True), randn(200, dtype=DTYPE, seed=7)
    residual = randn(4, 200, dtype=DTYPE, seed=8) if with_residual else None
    plain = product.scaled().to(DTYPE if residual is None else torch.float32)
    stream = None if residual is None else residual.float()
    want, want_sum = norm.rms_norm_reference(plain, stream, weight, 1e-5)
    before = product.values.clone()
    for norm_of in (norm.rms_norm_triton, norm.rms_norm_reference):
        got, got_sum = norm_of(product, None if residual is None else residual.clone(), weight, 1e-5)
        assert got.dtype == got_sum.dtype == DTYPE and torch.equal(product.values, before)
        torch.testing.assert_close(got, want.to(DTYPE), **CLOSE)
        torch.testing.assert_close(got_sum, want_sum.to(DTYPE), **CLOSE)


def test_silu_mul_plain_and_quantized() -> None:
    product = sums(3, 2 * 1100, bias=True)
    want = activation.silu_mul_reference(product.scaled())
    for got in (activation.silu_mul_triton(product), activation.silu_mul_reference(product)):
        assert got.dtype == DTYPE
        torch.testing.assert_close(got, want.to(DTYPE), **CLOSE)
    values, scales = activation.silu_mul_quantize_triton(product, torch.int8)
    want_values, want_scales = activation.silu_mul_quantize_reference(product.scaled(), torch.int8)
    torch.testing.assert_close(scales, want_scales, rtol=1e-5, atol=0)
    assert (values.int() - want_values.int()).abs().max() <= 1


def test_rotation_gives_queries_a_place_of_their_own() -> None:
    heads, kv_heads, dim = 3, 2, 24
    product = sums(5, (heads + 2 * kv_heads) * dim)
    before = product.values.clone()

    def parts(values: Tensor) -> tuple[Tensor, ...]:
        return values.unflatten(-1, (-1, dim)).split((heads, kv_heads, kv_heads), dim=1)

    cos_sin = torch.rand(16, dim, device=DEVICE)
    positions = torch.tensor([3, 0, 15, 7, 1], device=DEVICE)
    slots = torch.tensor([6, 1, -1, 11, 0], device=DEVICE)
    want_cache = torch.zeros(3, 2, 4, kv_heads, dim, device=DEVICE)
    want = rope_cache.rope_and_write_reference(*parts(product.scaled()), positions, cos_sin, want_cache, slots)
    for write in (rope_cache.rope_and_write_triton, rope_cache.rope_and_write_reference):
        cache = torch.zeros_like(want_cache, dtype=DTYPE)
        got = write(*parts(product.values), positions, cos_sin, cache, slots, deferred=product)
        assert got.dtype == DTYPE and got.shape == (5, heads, dim) and torch.equal(product.values, before)
        torch.testing.assert_close(got.float(), want, **CLOSE)
        torch.testing.assert_close(cache.float(), want_cache, **CLOSE)


def test_greedy_choice() -> None:
    logits = sums(4, 3000)
    assert torch.equal(sampling.argmax(logits), logits.scaled().argmax(-1))


# ---------------------------------------------------------------- models


class Deferring(int8_smoothquant.Scheme):
    """INT8 whose products defer exact sums wherever they may, in plain torch; weights padded as on a GPU."""

    def __init__(self) -> None:
        super().__init__({"head": "int8"})
        self.deferred = 0

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        padding = -len(tensors["weight"]) % 16
        weight = torch.nn.functional.pad(tensors["weight"], (0, 0, 0, padding), value=7)
        return {"weight": weight, "weight_scale": torch.nn.functional.pad(tensors["weight_scale"].T, (0, padding))}

    def apply_deferred(self, tensors: Any, x: Any, bias: Tensor | None, dtype: torch.dtype) -> DeferredScale:
        self.deferred += 1
        values, scales = quantize_rows_reference(x, torch.int8) if isinstance(x, Tensor) else x
        if bias is not None:
            bias = torch.nn.functional.pad(bias, (0, len(tensors["weight"]) - len(bias)))
        found = int8_sums_reference(values, tensors["weight"])
        return DeferredScale(found, scales, tensors["weight_scale"], bias, dtype)


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
    "llama-biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),  # norm of heads
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_defer_sums_compute_the_same(name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, MODELS[name])
    prompt = torch.randint(3, 120, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    plain = int8_smoothquant.Scheme({"head": "int8"})
    want = PagedRunner(load_model(tmp_path, scheme=plain)).step([(PagedSequence(), prompt)])[0]
    scheme = Deferring()
    got = PagedRunner(load_model(tmp_path, scheme=scheme)).step([(PagedSequence(), prompt)])[0]
    assert scheme.deferred == 2 * 4 + 1, "qkv, o, gate and up, down of two layers, and the logits"
    assert got.dtype == torch.float32 and got.shape == (40, 120)
    # Now and then the last bit of a float32 sum decides a rounding.
    assert (got - want).norm() / want.norm() < 0.02
