"""Rounding rows of numbers to 8 bits, FP8 (e4m3) or whole numbers, with one scale per row or a scale given beforehand.

A row r is stored as round(r / scale), symmetric around zero, with scale = max|r| / largest in float32. `largest` is 448
for e4m3 (Micikevicius et al., "FP8 Formats for Deep Learning", 2022) and 127 for int8, whose -128 stays unused. The
same serves weights (a row is an output channel) and activations (a row is a token, scaled on the fly). A checkpoint may
bring one static scale for all activations in front of a product instead; then nothing is measured. Knows nothing of
products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.dependent_launch import launch_options

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
INT8_MAX = 127.0
SMALLEST_AMAX = 1e-12  # a row of zeros gets a scale above zero, and zeros as values
LARGEST = {FP8: FP8_MAX, torch.int8: INT8_MAX}  # the dtypes that rows are rounded to


def quantize_rows(x: Tensor, dtype: torch.dtype = FP8, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [n, size], rows may be strided -> (`dtype` [n, size], float32 [n, 1]) with x ≈ values * scales. `dtype`: FP8 or
    torch.int8. `scale` float32 [1]: the scale of every row; what it cannot reach becomes the largest number."""
    return quantize_rows_triton(x, dtype, scale) if x.is_cuda else quantize_rows_reference(x, dtype, scale)


def quantize_rows_reference(x: Tensor, dtype: torch.dtype = FP8, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_rows` in plain torch, any device."""
    x, largest = x.float(), LARGEST[dtype]
    if scale is None:
        scales = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_AMAX) * (1.0 / largest)
    else:
        scales = scale.float().reshape(1, 1).expand(x.shape[0], 1).contiguous()
    values = (x / scales).clamp_(-largest, largest)
    return (values.round_() if dtype == torch.int8 else values).to(dtype), scales


def row_block(size: int) -> tuple[int, int]:
    """(BLOCK, num_warps) for kernels with one program per row: the whole row in registers up to 16384 numbers."""
    block = min(triton.next_power_of_2(size), 16384)
    return block, min(max(block // 512, 1), 16)


def quantized_rows(
    shape: tuple[int, int] | torch.Size, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Room for what a kernel rounds: values and scales."""
    values = torch.empty(shape, dtype=dtype, device=device)
    return values, torch.empty((shape[0], 1), dtype=torch.float32, device=device)


def rounding(dtype: torch.dtype) -> dict[str, float | bool]:
    """Compile-time arguments of every kernel that rounds rows to `dtype`: see `in_range`."""
    return {"LARGEST": LARGEST[dtype], "WHOLE": dtype == torch.int8}


@triton.jit
def in_range(y, scale, LARGEST: tl.constexpr, WHOLE: tl.constexpr):
    """float32 numbers over their scale, within the range; rounded if the format has whole numbers only, halves to even
    as torch does: 1.5 * 2^23, added and taken away again, leaves no fraction to a number below 2^22."""
    y = tl.clamp(y / scale, -LARGEST, LARGEST)
    if WHOLE:
        y = (y + 12582912.0) - 12582912.0
    return y


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    static_scale_ptr,
    out_ptr,
    scales_ptr,
    x_stride,
    size,
    LARGEST: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    WHOLE: tl.constexpr,
    STATIC: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one row; held in registers (WHOLE_ROW), or read twice, the second time from the L2 cache."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + column, mask=column < size, other=0.0).to(tl.float32)
    if STATIC:
        scale = tl.load(static_scale_ptr)
    else:
        largest = tl.max(tl.abs(x), axis=0)
        if not WHOLE_ROW:
            for start in range(BLOCK, size, BLOCK):
                at = start + column
                part = tl.load(x_ptr + row * x_stride + at, mask=at < size, other=0.0).to(tl.float32)
                largest = tl.maximum(largest, tl.max(tl.abs(part), axis=0))
        scale = tl.maximum(largest, SMALLEST_AMAX) / LARGEST
    tl.store(scales_ptr + row, scale)
    y = in_range(x, scale, LARGEST, WHOLE)
    tl.store(out_ptr + row * size + column, y.to(out_ptr.dtype.element_ty), mask=column < size)
    if not WHOLE_ROW:
        for start in range(BLOCK, size, BLOCK):
            at = start + column
            part = tl.load(x_ptr + row * x_stride + at, mask=at < size, other=0.0).to(tl.float32)
            y = in_range(part, scale, LARGEST, WHOLE)
            tl.store(out_ptr + row * size + at, y.to(out_ptr.dtype.element_ty), mask=at < size)


def quantize_rows_triton(
    x: Tensor, dtype: torch.dtype = FP8, scale: Tensor | None = None, values_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`quantize_rows` as one kernel. With float32 as `values_dtype` values are scaled and stored as they are, which
    tests ask for where there is no GPU: Triton's interpreter rounds to FP8 wrongly."""
    assert x.stride(-1) == 1
    n, size = x.shape
    values, scales = quantized_rows(x.shape, values_dtype or dtype, x.device)
    block, num_warps = row_block(size)
    _quantize_rows_kernel[(n,)](
        x,
        scale,
        values,
        scales,
        x.stride(0),
        size,
        SMALLEST_AMAX=SMALLEST_AMAX,
        STATIC=scale is not None,
        **rounding(dtype),
        BLOCK=block,
        WHOLE_ROW=size <= block,
        num_warps=num_warps,
        **launch_options(x.device),
    )
    return values, scales
