"""silu(gate) * up over the fused gate-and-up product, plain or quantized to 8 bits for the product behind it.

Arithmetic is float32, rounded once at the end. Scales of the product that are still to be applied
(`kernels/deferred_scale.py`) are applied first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.deferred_scale import Product, apply_scales, as_float
from appliance.kernels.dependent_launch import launch_options
from appliance.kernels.row_quantization import (
    FP8,
    SMALLEST_AMAX,
    in_range,
    quantize_rows_reference,
    quantized_rows,
    rounding,
    row_block,
)
from appliance.kernels.skinny_linear import multiprocessors


def silu_mul(gate_up: Product) -> Tensor:
    """gate_up [n, 2 * size], gate first, rows may be strided -> [n, size], same dtype."""
    return silu_mul_triton(gate_up) if gate_up.is_cuda else silu_mul_reference(gate_up)


def silu_mul_quantize(gate_up: Product, dtype: torch.dtype = FP8, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Like `silu_mul`, quantized per row: `dtype` [n, size] and float32 [n, 1]; `dtype` and `scale` as in
    `row_quantization.quantize_rows`."""
    quantize = silu_mul_quantize_triton if gate_up.is_cuda else silu_mul_quantize_reference
    return quantize(gate_up, dtype, scale)


# ---------------------------------------------------------------- references


def silu_mul_reference(gate_up: Product) -> Tensor:
    """`silu_mul` in plain torch, any device."""
    gate, up = as_float(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def silu_mul_quantize_reference(
    gate_up: Product, dtype: torch.dtype = FP8, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`silu_mul_quantize` in plain torch, any device."""
    gate, up = as_float(gate_up).chunk(2, dim=-1)
    return quantize_rows_reference(F.silu(gate) * up, dtype, scale)


# ---------------------------------------------------------------- Triton


@triton.jit
def _silu_mul_block(
    row_ptr,
    row_scale,
    column_scales_ptr,
    bias_ptr,
    column,
    size,
    DEFERRED: tl.constexpr,
    BIASED: tl.constexpr,
):
    """silu(gate) * up of some columns of a row, float32, 0 outside."""
    mask = column < size
    gate = tl.load(row_ptr + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(row_ptr + size + column, mask=mask, other=0.0).to(tl.float32)
    if DEFERRED:
        gate = apply_scales(gate, row_scale, column_scales_ptr, bias_ptr, column, mask, BIASED)
        up = apply_scales(up, row_scale, column_scales_ptr, bias_ptr, size + column, mask, BIASED)
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _silu_mul_kernel(
    x_ptr,
    row_scales_ptr,
    column_scales_ptr,
    bias_ptr,
    static_scale_ptr,
    out_ptr,
    scales_ptr,
    x_stride,
    size,
    DEFERRED: tl.constexpr,
    BIASED: tl.constexpr,
    STATIC: tl.constexpr,
    LARGEST: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: BLOCK columns of one row; STATIC: quantized with a scale given beforehand."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_scale = 1.0
    if DEFERRED:
        row_scale = tl.load(row_scales_ptr + row)
    y = _silu_mul_block(x_ptr + row * x_stride, row_scale, column_scales_ptr, bias_ptr, column, size, DEFERRED, BIASED)
    if STATIC:
        scale = tl.load(static_scale_ptr)
        if tl.program_id(1) == 0:
            tl.store(scales_ptr + row, scale)
        y = in_range(y, scale, LARGEST, WHOLE)
    tl.store(out_ptr + row * size + column, y.to(out_ptr.dtype.element_ty), mask=column < size)


@triton.jit
def _silu_mul_quantize_kernel(
    x_ptr,
    row_scales_ptr,
    column_scales_ptr,
    bias_ptr,
    out_ptr,
    scales_ptr,
    x_stride,
    size,
    DEFERRED: tl.constexpr,
    BIASED: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one row; held in registers, PARTS times BLOCK numbers (WHOLE_ROW), or read and computed twice."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * x_stride
    column = tl.arange(0, BLOCK)
    row_scale = 1.0
    if DEFERRED:
        row_scale = tl.load(row_scales_ptr + row)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    parts = ()
    for part in tl.static_range(PARTS):
        at = part * BLOCK + column
        y = _silu_mul_block(row_ptr, row_scale, column_scales_ptr, bias_ptr, at, size, DEFERRED, BIASED)
        largest = tl.maximum(largest, tl.abs(y))
        parts = parts + (y,)  # type: ignore[assignment]  # noqa: RUF005
    if not WHOLE_ROW:
        for start in range(PARTS * BLOCK, size, BLOCK):
            at = start + column
            y = _silu_mul_block(row_ptr, row_scale, column_scales_ptr, bias_ptr, at, size, DEFERRED, BIASED)
            largest = tl.maximum(largest, tl.abs(y))
    scale = tl.maximum(tl.max(largest, axis=0), SMALLEST_AMAX) / LARGEST
    tl.store(scales_ptr + row, scale)
    for part in tl.static_range(PARTS):
        at = part * BLOCK + column
        y = in_range(parts[part], scale, LARGEST, WHOLE)
        tl.store(out_ptr + row * size + at, y.to(out_ptr.dtype.element_ty), mask=at < size)
    if not WHOLE_ROW:
        for start in range(PARTS * BLOCK, size, BLOCK):
            at = start + column
            y = _silu_mul_block(row_ptr, row_scale, column_scales_ptr, bias_ptr, at, size, DEFERRED, BIASED)
            y = in_range(y, scale, LARGEST, WHOLE)
            tl.store(out_ptr + row * size + at, y.to(out_ptr.dtype.element_ty), mask=at < size)


def _row_parts(size: int, rows: int, device: torch.device) -> tuple[int, int, int]:
    """(BLOCK, PARTS, num_warps), as many numbers as 65536 registers hold. While every row has a multiprocessor to
    itself, as many threads as can be; with more rows, fewer threads that hold no more than the row (14336 is no power
    of two), so that two or three rows are on a multiprocessor and one loads while another stores."""
    block, num_warps = row_block(size)
    if size <= 4096 or (size <= 16384 and rows <= multiprocessors(device)):
        return block, 1, num_warps
    if size <= 14336:
        return 2048, triton.cdiv(size, 2048), 8
    if size <= 28672:
        return 4096, triton.cdiv(size, 4096), 16
    return 8192, 1, 16


def _operands(gate_up: Product) -> tuple[Tensor, tuple[Tensor | None, ...], dict[str, bool]]:
    """Values; scales of rows and columns, bias; and the constants that say what there is of the latter."""
    if isinstance(gate_up, Tensor):
        assert gate_up.stride(-1) == 1
        return gate_up, (None, None, None), {"DEFERRED": False, "BIASED": False}
    assert gate_up.values.stride(-1) == 1
    scales = gate_up.row_scales, gate_up.column_scales, gate_up.bias
    return gate_up.values, scales, {"DEFERRED": True, "BIASED": gate_up.bias is not None}


def silu_mul_triton(gate_up: Product) -> Tensor:
    """`silu_mul` as one kernel."""
    out = torch.empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=gate_up.dtype, device=gate_up.device)
    _launch_by_blocks(gate_up, out)
    return out


def _launch_by_blocks(
    gate_up: Product,
    out: Tensor,
    scales: Tensor | None = None,
    dtype: torch.dtype = FP8,
    static_scale: Tensor | None = None,
) -> None:
    """With `static_scale`, rounded to `dtype`: nothing about a row has to be known, so blocks are independent."""
    x, scaling, flags = _operands(gate_up)
    n, size = out.shape
    block = min(triton.next_power_of_2(size), 1024)
    _silu_mul_kernel[(n, triton.cdiv(size, block))](
        x,
        *scaling,
        static_scale,
        out,
        scales,
        x.stride(0),
        size,
        STATIC=static_scale is not None,
        **rounding(dtype),
        BLOCK=block,
        num_warps=4,
        **flags,
        **launch_options(x.device),
    )


def silu_mul_quantize_triton(
    gate_up: Product,
    dtype: torch.dtype = FP8,
    scale: Tensor | None = None,
    values_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`silu_mul_quantize` as one kernel; `values_dtype` as in `row_quantization.quantize_rows_triton`."""
    x, scaling, flags = _operands(gate_up)
    n, size = x.shape[0], x.shape[1] // 2
    values, scales = quantized_rows((n, size), values_dtype or dtype, x.device)
    if scale is not None:
        _launch_by_blocks(gate_up, values, scales, dtype, scale)
        return values, scales
    block, parts, num_warps = _row_parts(size, n, x.device)
    _silu_mul_quantize_kernel[(n,)](
        x,
        *scaling,
        values,
        scales,
        x.stride(0),
        size,
        SMALLEST_AMAX=SMALLEST_AMAX,
        **rounding(dtype),
        BLOCK=block,
        PARTS=parts,
        WHOLE_ROW=size <= parts * block,
        num_warps=num_warps,
        **flags,
        **launch_options(x.device),
    )
    return values, scales
