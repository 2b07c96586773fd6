"""The library's FP8 product against its reference."""

from __future__ import annotations

import pytest
import torch
from quantized_helpers import needs_fp8, randn

from appliance.kernels import fp8_linear as fp8


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
