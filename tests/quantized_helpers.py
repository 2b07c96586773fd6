"""Comparing what Triton kernels write with their references, on a GPU and in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from appliance.kernels.fp8_linear import FP8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cannot round to FP8; there, kernels write what they would have rounded.
KERNEL_FP8 = FP8 if DEVICE == "cuda" else torch.float32


def kernel_dtype(target: torch.dtype) -> torch.dtype:
    """What kernels that round to `target` are asked to write."""
    return KERNEL_FP8 if target == FP8 else target


def needs_fp8(target: torch.dtype = FP8) -> None:
    """Skips where kernels cannot round to `target`."""
    if target == FP8 and DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8 arithmetic")


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def strided(x: Tensor) -> Tensor:
    """The same values as rows of a wider tensor."""
    wide = torch.full((x.shape[0], x.shape[1] + 24), 9.0, dtype=x.dtype, device=x.device)
    wide[:, 8 : 8 + x.shape[1]] = x
    return wide[:, 8 : 8 + x.shape[1]]


def ulp(dtype: torch.dtype) -> float:
    """Relative tolerance of one rounding to `dtype`; the interpreter truncates to bfloat16."""
    return {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]


def assert_same_quantized(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], rtol: float = 1e-5) -> None:
    """Scales equal; values equal but for neighbours where the last bits before rounding decide."""
    values, scales = got
    assert values.dtype == kernel_dtype(expected[0].dtype) and scales.dtype == torch.float32
    assert values.shape == expected[0].shape and scales.shape == (len(values), 1)
    torch.testing.assert_close(scales, expected[1], rtol=rtol, atol=0)
    steps = _steps(values.to(expected[0].dtype)) - _steps(expected[0])
    assert steps.abs().max() <= 1
    assert (steps != 0).float().mean() < 0.01


def _steps(values: Tensor) -> Tensor:
    """8-bit numbers in ascending order as integers, 0 for zero."""
    if values.dtype == torch.int8:
        return values.int()
    bits = values.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)
