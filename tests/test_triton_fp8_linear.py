"""Row quantization and the FP8 product against their references: compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import pytest
import torch
from quantized_helpers import DEVICE, KERNEL_FP8, assert_same_quantized, needs_fp8, randn, strided

from appliance.kernels import fp8_linear as fp8
from appliance.kernels._triton import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "size"), [(1, 64), (5, 200), (2, 9000), (2, 40000)])
def test_quantize_rows(dtype: torch.dtype, n: int, size: int) -> None:
    needs_fp8()
    x = strided(randn(n, size, dtype=dtype))
    x[-1] *= 100  # rows have scales of their own
    assert_same_quantized(fp8.quantize_rows_triton(x, KERNEL_FP8), fp8.quantize_rows_reference(x))


@needs_triton
def test_quantize_rows_of_zeros_and_of_none() -> None:
    needs_fp8()
    x = torch.zeros(3, 32, dtype=torch.bfloat16, device=DEVICE)
    values, scales = fp8.quantize_rows_triton(x, KERNEL_FP8)
    assert (values.float() == 0).all() and (scales > 0).all()
    assert fp8.quantize_rows_triton(x[:0])[0].shape == (0, 32)


def test_reference_uses_the_whole_range_and_recovers_values() -> None:
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(3))
    x[5] = 0
    values, scales = fp8.quantize_rows_reference(x)
    largest = values.float().abs().amax(-1)
    assert (largest[torch.arange(8) != 5] == 448).all() and largest[5] == 0
    error = (values.float() * scales - x).abs()
    # Half a step: 2^-4 of the value, and below the smallest normal number half of 2^-9 scaled.
    assert (error <= x.abs() * 2**-4 + scales * 2**-10).all()


def operands(n: int, size: int, out: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    values, scales = fp8.quantize_rows_reference(randn(n, size, dtype=dtype))
    weight, weight_scales = fp8.quantize_rows_reference(randn(out, size, dtype=dtype, seed=1))
    return values, scales, weight, weight_scales.view(1, -1), randn(out, dtype=dtype, seed=2)


def test_product_reference_is_the_product_of_what_was_quantized() -> None:
    values, scales, weight, weight_scales, bias = operands(4, 64, 48, torch.float32)
    expected = (values.double() * scales.double()) @ (weight.double() * weight_scales.double().T).T + bias.double()
    got = fp8.fp8_linear_reference(values, scales, weight, weight_scales, bias, torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [0, 1, 7, 64, 333])
@pytest.mark.parametrize(("size", "out"), [(64, 16), (256, 4096), (4096, 528)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_product(dtype: torch.dtype, n: int, size: int, out: int, with_bias: bool) -> None:
    needs_fp8()
    values, scales, weight, weight_scales, bias = operands(n, size, out, dtype)
    arguments = values, scales, weight, weight_scales, bias if with_bias else None, dtype
    got, expected = fp8.fp8_linear(*arguments), fp8.fp8_linear_reference(*arguments)
    assert got.dtype == dtype and got.shape == (n, out)
    # bfloat16 rounding, before and after the bias, of sums of `size` products of order 1.
    torch.testing.assert_close(got, expected, rtol=1.6e-2, atol=2e-2 * size**0.5)


@pytest.mark.gpu
def test_quantize_and_product_in_a_cuda_graph() -> None:
    needs_fp8()
    x = randn(5, 256, dtype=torch.bfloat16)
    _, _, weight, weight_scales, bias = operands(1, 256, 64, torch.bfloat16)

    def run() -> torch.Tensor:
        return fp8.fp8_linear(*fp8.quantize_rows(x), weight, weight_scales, bias, torch.bfloat16)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    x.copy_(randn(5, 256, dtype=torch.bfloat16, seed=9))
    graph.replay()
    assert torch.equal(out, run())
