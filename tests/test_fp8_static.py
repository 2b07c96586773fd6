"""FP8 with static scales of activations: what is stored, where the scale is used, a whole model, tactics on a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import PagedRunner, PagedSequence, load_model, make_checkpoint
from quantized_helpers import needs_fp8, randn
from torch import Tensor
from transformers import LlamaConfig

from appliance.errors import EngineBuildError
from appliance.kernels import activation, norm
from appliance.kernels.deferred_scale import materialize
from appliance.kernels.fp8_linear import fp8_linear_reference
from appliance.kernels.row_quantization import FP8, FP8_MAX, quantize_rows_reference
from appliance.kernels.tactics import TABLE, row_bucket
from appliance.quantization.fp8 import Scheme
from appliance.quantization.weights import Fp8Weight, round_to_nearest_fp8

SCALE = 0.01  # reaches 4.48: cuts the largest activations off


class Static(Scheme):
    """As of a checkpoint whose layers all have the same scale."""

    def __init__(self) -> None:
        super().__init__({"static_input": True})

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return self.store(replace(round_to_nearest_fp8(weight), input_scale=torch.tensor([SCALE])))


def test_what_is_stored() -> None:
    weight = round_to_nearest_fp8(torch.randn(48, 32))
    scale = torch.tensor([0.5])
    stored = Scheme({"static_input": True}).store(replace(weight, input_scale=scale))
    announced = Scheme({"static_input": True}).tensors(48, 32, torch.bfloat16)
    assert {suffix: (tuple(t.shape), t.dtype) for suffix, t in stored.items()} == announced
    assert torch.equal(stored["input_scale"], scale)
    with pytest.raises(EngineBuildError, match="with a scale of its input does not fit"):
        Scheme().store(replace(weight, input_scale=scale))
    with pytest.raises(EngineBuildError, match="without a scale of its input does not fit"):
        Scheme({"static_input": True}).quantize(torch.randn(48, 32))


def test_every_way_into_a_product_uses_the_given_scale() -> None:
    scheme = Static()
    prepared = scheme.prepare(scheme.quantize(torch.randn(24, 64)))
    x, residual, weight = torch.randn(5, 64), torch.randn(5, 64), torch.rand(64)
    normed, _ = scheme.rms_norm(x, residual.clone(), weight, 1e-5, prepared)
    gated = scheme.silu_mul(torch.cat([x, residual], 1), prepared)
    plain = norm.rms_norm_reference(x, residual.clone(), weight, 1e-5)[0]
    product = activation.silu_mul_reference(torch.cat([x, residual], 1))
    for got, expected in ((normed, plain), (gated, product)):
        assert isinstance(got, tuple)
        values, scales = quantize_rows_reference(expected, FP8, torch.tensor([SCALE]))
        assert torch.equal(got[0].float(), values.float()) and torch.equal(got[1], scales)
        direct = scheme.apply(prepared, expected, None, torch.float32)
        assert torch.equal(scheme.apply(prepared, got, None, torch.float32), direct)
        torch.testing.assert_close(direct, (values.float() * SCALE) @ prepared["weight"].T)
    without = scheme.silu_mul(torch.cat([x, residual], 1))
    assert isinstance(without, tuple) and not torch.equal(without[1], gated[1]), "unknown layer behind: on the fly"


CONFIG = LlamaConfig(
    vocab_size=120,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
PROMPT = torch.randint(3, 120, (60,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.no_grad()
def hugging_face_with_static_products(hf_model: Any, tokens: list[int]) -> Tensor:
    def quantized(x: Tensor, scale: Tensor | None) -> Tensor:
        values, scales = quantize_rows_reference(x.flatten(0, -2), FP8, scale)
        return (values.float() * scales).view(x.shape)

    for module in hf_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(quantized(module.weight, None))
            module.register_forward_pre_hook(lambda _, inputs: (quantized(inputs[0], torch.tensor([SCALE])),))
    return hf_model(torch.tensor([tokens])).logits[0]


def test_model_on_the_cpu(tmp_path: Path) -> None:
    """Equal to `transformers` with every input of a product rounded by the given scale, as rounding by other scales
    would not be."""
    hf_model = make_checkpoint(tmp_path, CONFIG)
    got = PagedRunner(load_model(tmp_path, scheme=Static())).step([(PagedSequence(), PROMPT)])[0]
    expected = hugging_face_with_static_products(hf_model, PROMPT)
    assert (got - expected).norm() / expected.norm() < 0.02
    dynamic = PagedRunner(load_model(tmp_path, scheme="fp8")).step([(PagedSequence(), PROMPT)])[0]
    assert (got - expected).norm() < 0.5 * (dynamic - expected).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 64, 65, 300])
def test_every_tactic_on_a_gpu(rows: int) -> None:
    needs_fp8()
    scheme, bias = Scheme({"static_input": True}), randn(512, dtype=torch.bfloat16, seed=2)
    scale = torch.tensor([4.0 / FP8_MAX], device="cuda")
    weight = round_to_nearest_fp8(randn(512, 1024, dtype=torch.bfloat16, seed=1))
    prepared = scheme.prepare(scheme.store(Fp8Weight(weight.values, weight.scales, scale)))
    x = randn(rows, 1024, dtype=torch.bfloat16)
    quantized = quantize_rows_reference(x, FP8, scale)
    want = fp8_linear_reference(*quantized, prepared["weight"], prepared["weight_scale"], bias, torch.float32)
    bucket = row_bucket(rows)
    assert bucket is not None
    try:
        for name in scheme.tactics(512, 1024, bucket, x.device):
            TABLE.choose("fp8", 512, 1024, bucket, name)
            got = materialize(scheme.apply_deferred(prepared, x, bias, torch.bfloat16), torch.float32)
            assert (got - want).norm() / want.norm() < 1e-2, name
    finally:
        TABLE.clear()
    normed, _ = scheme.rms_norm(x, None, torch.ones(1024, dtype=torch.bfloat16, device="cuda"), 1e-5, prepared)
    gated = scheme.silu_mul(x, prepared)
    assert isinstance(normed, tuple) and isinstance(gated, tuple)
    for values, scales in (normed, gated):
        assert values.dtype == FP8 and torch.equal(scales, scale.expand(rows, 1))
    want_gated = quantize_rows_reference(activation.silu_mul_reference(x.float()), FP8, scale)[0]
    assert (gated[0].float() - want_gated.float()).norm() < 0.01 * want_gated.float().norm()
