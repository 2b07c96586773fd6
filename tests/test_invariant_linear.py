"""Products whose rows are the same bits in every batch: against the reference, and rows alone against rows together."""

from __future__ import annotations

import pytest
import torch
from quantized_helpers import DEVICE, needs_fp8, randn

from appliance.kernels.fp8_linear import quantize_rows_reference
from appliance.kernels.invariant_linear import invariant_linear, invariant_linear_reference

# The interpreter multiplies the bit patterns of bfloat16 matrices (triton 3.6 to 3.9).
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 16), (5, 200, 70), (70, 128, 130)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_agrees_with_the_reference(dtype: torch.dtype, m: int, k: int, n: int, with_bias: bool) -> None:
    x, weight = randn(m, 2 * k, dtype=dtype)[:, :k], randn(n, k, dtype=dtype, seed=1)
    bias = randn(n, dtype=dtype, seed=2) if with_bias else None
    got = invariant_linear(x, weight, bias, dtype)
    expected = invariant_linear_reference(x, weight, bias, dtype)
    assert got.dtype == dtype
    limit = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(got, expected, rtol=limit, atol=limit * k**0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_agrees_with_the_reference(dtype: torch.dtype) -> None:
    needs_fp8()
    x, scales = quantize_rows_reference(randn(9, 256, dtype=dtype))
    weight, weight_scales = quantize_rows_reference(randn(48, 256, dtype=dtype, seed=1))
    bias = randn(48, dtype=dtype, seed=2)
    got = invariant_linear(x, weight, bias, dtype, scales, weight_scales)
    expected = invariant_linear_reference(x, weight, bias, dtype, scales, weight_scales)
    torch.testing.assert_close(got, expected, rtol=1.6e-2, atol=2e-2 * 16)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("k", "n"), [(4096, 6144), (14336, 4096), (200, 72)])
def test_a_row_is_the_same_bits_in_every_batch(fp8: bool, k: int, n: int) -> None:
    x, weight = randn(777, k, dtype=torch.bfloat16), randn(n, k, dtype=torch.bfloat16, seed=1)
    scales = weight_scales = None
    if fp8:
        needs_fp8()
        (x, scales), (weight, weight_scales) = quantize_rows_reference(x), quantize_rows_reference(weight)
    whole = invariant_linear(x, weight, None, torch.bfloat16, scales, weight_scales)
    for begin, end in ((0, 1), (13, 14), (5, 69), (100, 101), (300, 777)):
        part_scales = None if scales is None else scales[begin:end].contiguous()
        part = invariant_linear(x[begin:end], weight, None, torch.bfloat16, part_scales, weight_scales)
        assert torch.equal(part, whole[begin:end]), (begin, end)
