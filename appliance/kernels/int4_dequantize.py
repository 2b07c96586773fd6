"""Packed 4-bit weights as numbers of 16 bits, by own CUDA C++ (`int4/dequantize.cu`), for products of many rows.

Compute capability 8.0 and newer; `int4_triton.py` has the same for others, `int4_linear.py` the plain reference.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from appliance.kernels.dependent_launch import launch_options
from appliance.kernels.int4_layout import PER_WORD
from appliance.kernels.int4_native import unavailable
from appliance.kernels.native_kernel import Kernel, load, read_sources

_THREADS = 256  # as in the kernel
_BLOCK_WORDS = _THREADS * 4


def takes(group: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights in groups of that size can be made numbers of that type on `device`."""
    if device.type != "cuda" or group % PER_WORD or dtype not in (torch.bfloat16, torch.float16):
        return False
    return unavailable(device.index or 0) is None


def dequantize_native(weight: Tensor, scale_zero: Tensor, dtype: torch.dtype) -> Tensor:
    """`int4_linear.dequantize_reference` in bfloat16 or float16, the same bits. weight int32 [n, k // 8] and scale_zero
    float16 [n, groups, 2], contiguous. Does not synchronize; capturable after one call outside."""
    n, words = weight.shape
    group = words * PER_WORD // scale_zero.shape[1]
    assert weight.is_contiguous() and scale_zero.is_contiguous() and group * scale_zero.shape[1] == words * PER_WORD
    assert n * words < 2**32 - _BLOCK_WORDS  # the kernel's index
    out = torch.empty((n, words * PER_WORD), dtype=dtype, device=weight.device)
    kernel = _kernel(group, dtype, weight.device.index or 0)
    pointers = (weight.data_ptr(), scale_zero.data_ptr(), out.data_ptr())
    dependent = bool(launch_options(weight.device)["PDL"])
    kernel.launch(-(-n * words // _BLOCK_WORDS), dependent, (*pointers, n * words))
    return out


def macros(group: int, dtype: torch.dtype) -> dict[str, int]:
    """The kernel's compile-time constants."""
    return {"BF16": int(dtype == torch.bfloat16), "GROUP": group}


@functools.cache
def source() -> str:
    return read_sources("dependent_launch.cuh", "int4/primitives.cuh", "int4/dequantize.cu")


@functools.cache
def _kernel(group: int, dtype: torch.dtype, index: int) -> Kernel:
    return load("int4", source(), macros(group, dtype), _THREADS, 0, index, "int4_dequantize")
