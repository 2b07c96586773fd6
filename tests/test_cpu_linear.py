"""Products of quantized weights on the CPU against the dequantized reference, alone and in whole models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_helpers import PagedRunner, PagedSequence, load_model, make_checkpoint
from torch import Tensor
from transformers import LlamaConfig

from appliance import registry
from appliance.kernels import cpu_linear
from appliance.kernels.int8_linear import int8_linear_reference
from appliance.kernels.row_quantization import quantize_rows_reference
from appliance.quantization.weights import round_to_nearest

needs_int8 = pytest.mark.skipif(not cpu_linear.has_int8(), reason="this CPU has no exact INT8 products")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_int8
@pytest.mark.parametrize("rows", [0, 1, 5, 130])
@pytest.mark.parametrize(("out", "size"), [(48, 64), (50, 96), (768, 256)])
def test_int8_sums_are_exact(rows: int, out: int, size: int) -> None:
    """Scales of 1 give the sums themselves; float32 holds them up to 2^24."""
    generator = torch.Generator().manual_seed(rows)
    values = torch.randint(-127, 128, (rows, size), generator=generator, dtype=torch.int8)
    weight = torch.randint(-127, 128, (out, size), generator=generator, dtype=torch.int8)
    got = cpu_linear.int8_linear(cpu_linear.pack_int8(weight, torch.ones(out, 1)), values, torch.ones(rows, 1), None)
    assert got.dtype == torch.float32 and torch.equal(got.double(), values.double() @ weight.double().T)


@needs_int8
@pytest.mark.parametrize("with_bias", [True, False])
def test_int8_scales_and_bias(with_bias: bool) -> None:
    values, scales = quantize_rows_reference(randn(7, 96), torch.int8)
    weight, weight_scales = quantize_rows_reference(randn(50, 96, seed=1), torch.int8)
    bias = randn(50, seed=2).bfloat16() if with_bias else None
    wide = F.pad(values, (8, 8))[:, 8:-8]  # rows of a wider tensor
    got = cpu_linear.int8_linear(cpu_linear.pack_int8(weight, weight_scales), wide, scales, bias)
    expected = int8_linear_reference(values, scales, weight, weight_scales.view(1, -1), bias, torch.float32)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 5, 130, 260])
@pytest.mark.parametrize(("out", "size", "group"), [(48, 64, 32), (64, 256, 128), (208, 256, 256), (32, 768, 768)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_int4(rows: int, out: int, size: int, group: int, with_bias: bool) -> None:
    weight = round_to_nearest(randn(out, size, seed=1), group)
    assert cpu_linear.fits_int4(out, size, size // group)
    x, bias = randn(rows, size), randn(out, seed=2) if with_bias else None
    got = cpu_linear.int4_linear(cpu_linear.pack_int4(weight.values, weight.scales, weight.zeros), x, bias)
    expected = F.linear(x, weight.dequantize(), bias)
    assert got.dtype == torch.float32 and got.shape == (rows, out)
    # Activations, scales and the result are rounded to bfloat16; of many rows, scales only.
    assert (got - expected).norm() <= 6e-3 * expected.norm()


@pytest.mark.parametrize("width", [64, 32])
def test_int4_of_many_rows_is_the_product_with_the_same_scales(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu_linear._block_width() != width:
        pytest.skip(f"torch packs weights in blocks of {cpu_linear._block_width()} rows here")
    weight = round_to_nearest(randn(192, 256, seed=1), 64)
    tensors = cpu_linear.pack_int4(weight.values, weight.scales, weight.zeros)
    x = randn(300, 256).bfloat16().float()
    widened = cpu_linear.int4_linear(tensors, x, None)
    monkeypatch.setattr(cpu_linear, "_WIDENED_ROWS", 1000)
    # Of numbers that are bfloat16 already, torch's own product rounds the result only.
    torch.testing.assert_close(cpu_linear.int4_linear(tensors, x, None), widened, rtol=2**-7, atol=2e-2)


@pytest.mark.parametrize(("out", "size", "groups"), [(50, 128, 1), (64, 48, 1), (64, 96, 2)])
def test_what_torch_has_no_int4_product_for_is_left_to_the_reference(out: int, size: int, groups: int) -> None:
    assert not cpu_linear.fits_int4(out, size, groups)
    scheme = registry.load("quantization", "int4_awq").Scheme({"group_size": size // groups})
    with cpu_linear.packed():
        prepared = scheme.prepare(scheme.quantize(randn(out, size)))
    assert set(prepared) == {"weight"} and prepared["weight"].dtype == torch.float32


CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    attention_bias=True,
)
PROMPT = torch.randint(3, 120, (60,), generator=torch.Generator().manual_seed(1)).tolist()
PARAMETERS = {"int8_smoothquant": {}, "int4_awq": {"head": "bf16"}, "int4_gptq": {"head": "bf16", "act_order": True}}


@pytest.mark.parametrize("name", PARAMETERS)
def test_packed_models_are_near_the_reference(name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, CONFIG)
    scheme = registry.load("quantization", name).Scheme(PARAMETERS[name])
    reference = load_model(tmp_path, scheme=scheme)
    with cpu_linear.packed():
        packed = load_model(tmp_path, scheme=scheme)
    assert not cpu_linear.packing()
    quick = name != "int8_smoothquant" or cpu_linear.has_int8()
    for model, is_packed in ((reference, False), (packed, quick)):
        assert all(("packed" in layer.mlp.down.prepared) == is_packed for layer in model.layers)
    got, expected = (PagedRunner(model).step([(PagedSequence(), PROMPT)])[0] for model in (packed, reference))
    # INT8: the same numbers, but for a rounding now and then that the last bit of a float32 sum decides. INT4:
    # activations in bfloat16. Both are far less than what the weights lost.
    exact = PagedRunner(load_model(tmp_path)).step([(PagedSequence(), PROMPT)])[0]
    error = (got - expected).norm() / expected.norm()
    assert error < 0.02 and error < 0.5 * (expected - exact).norm() / exact.norm()


def test_a_cpu_without_exact_products_is_found_out() -> None:
    """oneDNN kept from instructions newer than AVX2: products may saturate; either way the answer must be right."""
    program = (
        "import torch\n"
        "from appliance.kernels import cpu_linear as c\n"
        "if c.has_int8():\n"
        "    w, x = (torch.full((32, 512), v, dtype=torch.int8) for v in (127, -127))\n"
        "    got = c.int8_linear(c.pack_int8(w, torch.ones(32, 1)), x, torch.ones(32, 1), None)\n"
        "    assert (got == -127 * 127 * 512).all(), got[0, 0]\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
