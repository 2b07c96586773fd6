"""silu(gate) * up over the fused gate-and-up product, plain or quantized to FP8 for the product behind it.

Arithmetic is float32, rounded once at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.fp8_linear import FP8, FP8_MAX, SMALLEST_AMAX, quantize_rows_reference, row_block


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [n, 2 * size], gate first, rows may be strided -> [n, size], same dtype."""
    return silu_mul_triton(gate_up) if gate_up.is_cuda else silu_mul_reference(gate_up)


def silu_mul_quantize(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Like `silu_mul`, quantized per row: float8_e4m3fn [n, size] and float32 [n, 1]."""
    return silu_mul_quantize_triton(gate_up) if gate_up.is_cuda else silu_mul_quantize_reference(gate_up)


# ---------------------------------------------------------------- references


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """`silu_mul` in plain torch, any device."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def silu_mul_quantize_reference(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`silu_mul_quantize` in plain torch, any device."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return quantize_rows_reference(F.silu(gate) * up)


# ---------------------------------------------------------------- Triton


@triton.jit
def _silu_mul_block(row_ptr, column, size):
    """silu(gate) * up of some columns of a row, float32, 0 outside."""
    mask = column < size
    gate = tl.load(row_ptr + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(row_ptr + size + column, mask=mask, other=0.0).to(tl.float32)
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, x_stride, size, BLOCK: tl.constexpr):
    """One program: BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = _silu_mul_block(x_ptr + row * x_stride, column, size)
    tl.store(out_ptr + row * size + column, y.to(out_ptr.dtype.element_ty), mask=column < size)


@triton.jit
def _silu_mul_quantize_kernel(
    x_ptr,
    out_ptr,
    scales_ptr,
    x_stride,
    size,
    FP8_MAX: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):
    """One program: one row; held in registers (WHOLE_ROW), or read and computed twice."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * x_stride
    column = tl.arange(0, BLOCK)
    y = _silu_mul_block(row_ptr, column, size)
    largest = tl.max(tl.abs(y), axis=0)
    if not WHOLE_ROW:
        for start in range(BLOCK, size, BLOCK):
            part = _silu_mul_block(row_ptr, start + column, size)
            largest = tl.maximum(largest, tl.max(tl.abs(part), axis=0))
    scale = tl.maximum(largest, SMALLEST_AMAX) / FP8_MAX
    tl.store(scales_ptr + row, scale)
    y = tl.clamp(y / scale, -FP8_MAX, FP8_MAX)
    tl.store(out_ptr + row * size + column, y.to(out_ptr.dtype.element_ty), mask=column < size)
    if not WHOLE_ROW:
        for start in range(BLOCK, size, BLOCK):
            at = start + column
            part = tl.clamp(_silu_mul_block(row_ptr, at, size) / scale, -FP8_MAX, FP8_MAX)
            tl.store(out_ptr + row * size + at, part.to(out_ptr.dtype.element_ty), mask=at < size)


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """`silu_mul` as one kernel."""
    assert gate_up.stride(-1) == 1
    n, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((n, size), dtype=gate_up.dtype, device=gate_up.device)
    block = min(triton.next_power_of_2(size), 1024)
    _silu_mul_kernel[(n, triton.cdiv(size, block))](gate_up, out, gate_up.stride(0), size, BLOCK=block, num_warps=4)
    return out


def silu_mul_quantize_triton(gate_up: Tensor, values_dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    """`silu_mul_quantize` as one kernel; `values_dtype` as in `fp8_linear.quantize_rows_triton`."""
    assert gate_up.stride(-1) == 1
    n, size = gate_up.shape[0], gate_up.shape[1] // 2
    values = torch.empty((n, size), dtype=values_dtype, device=gate_up.device)
    scales = torch.empty((n, 1), dtype=torch.float32, device=gate_up.device)
    block, num_warps = row_block(size)
    _silu_mul_quantize_kernel[(n,)](
        gate_up,
        values,
        scales,
        gate_up.stride(0),
        size,
        FP8_MAX=FP8_MAX,
        SMALLEST_AMAX=SMALLEST_AMAX,
        BLOCK=block,
        WHOLE_ROW=size <= block,
        num_warps=num_warps,
    )
    return values, scales
