"""Rounding of rows to 8 bits against its reference: compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import pytest
import torch
from quantized_helpers import DEVICE, assert_same_quantized, kernel_dtype, needs_fp8, randn, strided

from appliance.kernels import row_quantization as rows
from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.row_quantization import FP8, LARGEST

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TARGETS = [FP8, torch.int8]


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "size"), [(1, 64), (5, 200), (2, 9000), (2, 40000)])
def test_quantize_rows(dtype: torch.dtype, n: int, size: int, target: torch.dtype) -> None:
    needs_fp8(target)
    x = strided(randn(n, size, dtype=dtype))
    x[-1] *= 100  # rows have scales of their own
    got = rows.quantize_rows_triton(x, target, values_dtype=kernel_dtype(target))
    assert_same_quantized(got, rows.quantize_rows_reference(x, target))


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", [200, 20000])
def test_a_given_scale_serves_all_rows_and_what_it_cannot_reach_is_cut(target: torch.dtype, size: int) -> None:
    needs_fp8(target)
    x = strided(randn(3, size, dtype=torch.float32))
    x[1, 5], x[2, 7] = 1e6, -1e6
    scale = torch.tensor([0.02], device=DEVICE)
    got = rows.quantize_rows_triton(x, target, scale, values_dtype=kernel_dtype(target))
    expected = rows.quantize_rows_reference(x, target, scale)
    assert_same_quantized(got, expected)
    assert torch.equal(got[1], scale.expand(3, 1))
    largest = LARGEST[target]
    assert expected[0][1, 5].float() == largest and expected[0][2, 7].float() == -largest
    assert got[0][1, 5].float() == largest and got[0][2, 7].float() == -largest


@needs_triton
def test_whole_numbers_are_rounded_as_torch_does() -> None:
    """Halves to even, either sign, all of the range."""
    halves = torch.arange(-254, 255, device=DEVICE).float()[None] / 2
    got = rows.quantize_rows_triton(halves, torch.int8, torch.ones(1, device=DEVICE))[0]
    assert torch.equal(got.float(), halves.round())


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
def test_quantize_rows_of_zeros_and_of_none(target: torch.dtype) -> None:
    needs_fp8(target)
    x = torch.zeros(3, 32, dtype=torch.bfloat16, device=DEVICE)
    values, scales = rows.quantize_rows_triton(x, target, values_dtype=kernel_dtype(target))
    assert (values.float() == 0).all() and (scales > 0).all()
    assert rows.quantize_rows_triton(x[:0], target)[0].shape == (0, 32)


def test_reference_uses_the_whole_range_and_recovers_values() -> None:
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(3))
    x[5] = 0
    for target, step in ((FP8, x.abs() * 2**-4), (torch.int8, torch.zeros(()))):
        values, scales = rows.quantize_rows_reference(x, target)
        largest = values.float().abs().amax(-1)
        assert (largest[torch.arange(8) != 5] == LARGEST[target]).all() and largest[5] == 0
        error = (values.float() * scales - x).abs()
        # Half a step. Of e4m3: 2^-4 of the value, and below the smallest normal number half of 2^-9, scaled.
        assert (error <= step + scales * (2**-10 if target == FP8 else 0.5001)).all()


@pytest.mark.gpu
def test_dispatch_takes_the_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(rows, "quantize_rows_triton", lambda *args: calls.append(args[1:]))
    rows.quantize_rows(torch.ones(1, 64, device="cuda"), torch.int8)
    assert calls == [(torch.int8, None)]
