"""Precision schemes as plug-ins: what they store, what they compute, and a whole model in FP8 on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_helpers import PagedRunner, PagedSequence, load_model, make_checkpoint
from transformers import Qwen2Config

from appliance import registry
from appliance.kernels.row_quantization import FP8, quantize_rows_reference
from appliance.layers.linear import Linear
from appliance.quantization.scheme import PrecisionScheme

SCHEMES = sorted(registry.plugins("quantization"))
DEVICE = "cuda" if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9) else "cpu"
# fp32 arithmetic where it is exact, the model's usual dtype where the product runs in FP8
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def scheme(name: str) -> PrecisionScheme:
    """With groups that fit small layers."""
    parameters = {"group_size": 32} if name.startswith("int4") else {}
    made = registry.load("quantization", name).Scheme(parameters)
    assert isinstance(made, PrecisionScheme)
    return made


def make_linear(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    layer = Linear(weight.shape[1], weight.shape[0], bias=bias is not None, scheme=scheme(name), dtype=weight.dtype)
    state = scheme(name).quantize(weight) | ({} if bias is None else {"bias": bias})
    layer.load_state_dict(state)
    layer.to(weight.device).prepare()
    return layer


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantize_gives_what_tensors_announces(name: str, dtype: torch.dtype) -> None:
    stored = scheme(name).quantize(torch.randn(48, 64).to(dtype))
    announced = scheme(name).tensors(48, 64, dtype)
    assert {suffix: (tuple(t.shape), t.dtype) for suffix, t in stored.items()} == announced


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_quantize_independently(name: str) -> None:
    """Fusing q, k and v before or after quantizing, or splitting rows over ranks, gives the same engine."""
    weight = torch.randn(48, 64)
    whole, top, bottom = (scheme(name).quantize(part) for part in (weight, weight[:16], weight[16:]))
    for suffix, tensor in whole.items():
        assert torch.equal(tensor.float(), torch.cat([top[suffix], bottom[suffix]]).float())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("out", [48, 50])  # 50: needs padding in FP8 on a GPU
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_is_close_to_the_plain_product(name: str, out: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, 64, generator=generator).to(DEVICE, DTYPE)
    weight[3] = 0
    x = torch.randn(7, 64, generator=generator).to(DEVICE, DTYPE)
    x[2] = 0
    bias = torch.randn(out, generator=generator).to(DEVICE, DTYPE) if with_bias else None
    got = make_linear(name, weight, bias)(x)
    expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert got.shape == (7, out) and got.dtype == DTYPE
    error = (got.float() - expected).norm() / expected.norm()
    assert error < {"none": 1e-2, "fp8": 0.05, "int8_smoothquant": 0.03}.get(name, 0.15)
    assert (got[2].float() == (0 if bias is None else bias.float())).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_fused_producers_feed_the_product_as_separate_steps_do(name: str) -> None:
    """norm -> product and silu * up -> product, against plain operations and the same product."""
    x, residual = (torch.randn(5, 64).to(DEVICE, DTYPE) for _ in range(2))
    norm_weight = torch.rand(64).to(DEVICE, DTYPE)
    layer = make_linear(name, torch.randn(32, 64).to(DEVICE, DTYPE), None)
    normed, stream = scheme(name).rms_norm(x, residual.clone(), norm_weight, 1e-5)
    total = x + residual
    torch.testing.assert_close(stream, total)
    plain = F.rms_norm(total.float(), (64,), norm_weight.float(), 1e-5).to(DTYPE)
    tolerance = {"rtol": 2e-2, "atol": 0.5} if DEVICE == "cuda" else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(layer(normed), layer(plain), **tolerance)

    gate_up = torch.randn(5, 128).to(DEVICE, DTYPE)
    gate, up = gate_up.float().chunk(2, dim=-1)
    torch.testing.assert_close(layer(scheme(name).silu_mul(gate_up)), layer((F.silu(gate) * up).to(DTYPE)), **tolerance)


def test_fp8_linear_on_the_cpu_computes_with_quantized_values() -> None:
    weight, x = torch.randn(24, 32), torch.randn(5, 32)
    values, scales = quantize_rows_reference(x)
    weight_values, weight_scales = quantize_rows_reference(weight)
    expected = (values.float() * scales) @ (weight_values.float() * weight_scales).T
    torch.testing.assert_close(make_linear("fp8", weight, None)(x), expected, rtol=1e-5, atol=1e-5)


CONFIG = Qwen2Config(
    vocab_size=120,  # no multiple of 16
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
PROMPT = torch.randint(3, 120, (60,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.no_grad()
def hugging_face_with_quantized_products(hf_model: Any, tokens: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Logits of the `transformers` model with each product's weight and input replaced by quantized ones; but for the
    last product if `dtype` is int8, whose scheme stores the head plain."""

    def quantized(x: torch.Tensor) -> torch.Tensor:
        values, scales = quantize_rows_reference(x.flatten(0, -2), dtype)
        return (values.float() * scales).view(x.shape)

    for name, module in hf_model.named_modules():
        if isinstance(module, torch.nn.Linear) and (dtype == FP8 or name != "lm_head"):
            module.weight = torch.nn.Parameter(quantized(module.weight))
            module.register_forward_pre_hook(lambda _, inputs: (quantized(inputs[0]), *inputs[1:]))
    return hf_model(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize(("name", "dtype"), [("fp8", FP8), ("int8_smoothquant", torch.int8)])
def test_model_in_eight_bits_on_the_cpu(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Equal to `transformers` with quantized products, and near the float32 model."""
    hf_model = make_checkpoint(tmp_path, CONFIG)
    runner = PagedRunner(load_model(tmp_path, scheme=name))
    got = runner.step([(PagedSequence(), PROMPT)])[0]
    exact = PagedRunner(load_model(tmp_path)).step([(PagedSequence(), PROMPT)])[0]
    expected = hugging_face_with_quantized_products(hf_model, PROMPT, dtype)
    # Now and then the last bit of a float32 sum decides a rounding, so single logits may differ a little.
    assert (got - expected).norm() / expected.norm() < 0.02
    assert 0.002 < (got - exact).norm() / exact.norm() < 0.3
    assert (got.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEMES)
def test_model_on_the_gpu_is_near_the_cpu_reference(name: str, tmp_path: Path) -> None:
    if DEVICE == "cpu" and name == "fp8":
        pytest.skip("this GPU has no FP8 arithmetic")
    make_checkpoint(tmp_path, CONFIG)
    on_gpu = load_model(tmp_path, scheme=scheme(name), dtype=torch.bfloat16, device="cuda")
    on_cpu = load_model(tmp_path, scheme=scheme(name), stored_dtype=torch.bfloat16)
    got = PagedRunner(on_gpu).step([(PagedSequence(), PROMPT)])[0].cpu()
    expected = PagedRunner(on_cpu).step([(PagedSequence(), PROMPT)])[0]
    assert (got - expected).norm() / expected.norm() < {"fp8": 0.15, "int8_smoothquant": 0.1}.get(name, 0.05)
