"""All-reduce fused with what follows a row-parallel product: residual add, RMS norm and, where wanted, the 8-bit
quantization of the result; scales that the product left behind (`deferred_scale.py`) are applied in front of the sum.

One kernel instead of two or three, and the sum never goes to memory. Protocol and workspace are those of
`all_reduce.py`; arithmetic behind the sum is that of `norm.py`. A row is one program's, so few rows are read by few
multiprocessors: where this pays is found out by timing (`all_reduce_group.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from appliance.kernels import norm
from appliance.kernels._triton import tl, triton
from appliance.kernels.all_reduce import (
    ALL_STEPS,
    SIZES,
    Workspace,
    all_reduce_reference,
    launch_arguments,
    meet,
    region,
)
from appliance.kernels.deferred_scale import Product, apply_scales
from appliance.kernels.row_quantization import FP8, SMALLEST_AMAX, in_range, quantized_rows, rounding


def all_reduce_rms_norm_reference(
    partials: Sequence[Product],
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor]:
    """`all_reduce_rms_norm` of all ranks' products in plain torch."""
    total = all_reduce_reference([p if isinstance(p, Tensor) else p.scaled().to(p.dtype) for p in partials])
    if dtype is None:
        return norm.rms_norm_reference(total, residual, weight, eps)
    return norm.rms_norm_quantize_reference(total, residual, weight, eps, dtype, scale)


@triton.jit
def finish_row(
    total,
    residual,
    weight,
    stream,
    out,
    scales_ptr,
    row,
    static_scale_ptr,
    there,
    size,
    eps,
    QUANTIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    WHOLE: tl.constexpr,
    STATIC: tl.constexpr,
):
    """What follows the sum of a row, total [lines, numbers] in the residual stream's dtype: residual and weight are its
    numbers in float32; `stream` and `out` are where the new stream and the result go."""
    total = (total.to(tl.float32) + residual).to(stream.dtype.element_ty)
    tl.store(stream, total, mask=there)
    x = total.to(tl.float32)
    square = tl.sum(tl.sum(x * x, axis=1), axis=0)
    y = x * tl.rsqrt(square / size + eps) * weight
    if QUANTIZE:
        if STATIC:
            scale = tl.load(static_scale_ptr)
        else:
            largest = tl.max(tl.max(tl.abs(y), axis=1), axis=0)
            scale = tl.maximum(largest, SMALLEST_AMAX) / LARGEST
        tl.store(scales_ptr + row, scale)
        y = in_range(y, scale, LARGEST, WHOLE)
    tl.store(out, y.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rank", "n"])
def _all_reduce_rms_norm_kernel(
    x_ptr,
    row_scales_ptr,
    column_scales_ptr,
    bias_ptr,
    residual_ptr,
    weight_ptr,
    static_scale_ptr,
    out_ptr,
    scales_ptr,
    addresses_ptr,
    epochs_ptr,
    rank,
    slots,
    region_bytes,
    n,
    x_stride,
    residual_stride,
    size,
    share,
    eps,
    TWO_SHOT: tl.constexpr,
    DEFERRED: tl.constexpr,
    BIASED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    WHOLE: tl.constexpr,
    STATIC: tl.constexpr,
    PART: tl.constexpr,
    RANKS: tl.constexpr,
    STEPS: tl.constexpr,
    SYNC: tl.constexpr,
    FIRST: tl.constexpr,
    SLOTS: tl.constexpr,
    STRIDE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: whole rows. A row lies in registers as [RANKS, PART], of which a rank adds up one line (TWO_SHOT) or
    all; PART holds share = size / RANKS numbers. Numbers travel in the residual stream's dtype."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.program_id(0)
    stride = tl.num_programs(0)
    part = tl.arange(0, PART)
    part_there = part < share
    line = tl.arange(0, RANKS)
    column = line[:, None] * share + part[None, :]
    there = (line[:, None] < RANKS) & part_there[None, :]
    epoch = tl.load(epochs_ptr + slot) + 1
    own = region(addresses_ptr, rank, epoch, slots, region_bytes, residual_ptr, FIRST)
    if STEPS & 1:
        for row in range(slot, n, stride):
            at = (row // stride) * size
            x = tl.load(x_ptr + row * x_stride + column, mask=there, other=0)
            if DEFERRED:
                x = x.to(tl.float32)
                x = apply_scales(x, tl.load(row_scales_ptr + row), column_scales_ptr, bias_ptr, column, there, BIASED)
            tl.store(own + at + column, x.to(residual_ptr.dtype.element_ty), mask=there)
    if SYNC:
        meet(addresses_ptr, rank, epoch, 0, RANKS, SLOTS, STRIDE, ASSEMBLY)
    if TWO_SHOT:
        if STEPS & 2:
            for row in range(slot, n, stride):
                at = (row // stride) * size + rank * share + part
                mine = tl.zeros((PART,), dtype=tl.float32)
                for peer in tl.static_range(RANKS):
                    theirs = region(addresses_ptr, peer, epoch, slots, region_bytes, residual_ptr, FIRST)
                    mine += tl.load(theirs + at, mask=part_there, other=0.0).to(tl.float32)
                tl.store(own + at, mine.to(residual_ptr.dtype.element_ty), mask=part_there)
        if SYNC:
            meet(addresses_ptr, rank, epoch, 1, RANKS, SLOTS, STRIDE, ASSEMBLY)
    if STEPS & 4:
        weight = tl.load(weight_ptr + column, mask=there, other=0.0).to(tl.float32)
        for row in range(slot, n, stride):
            at = (row // stride) * size
            stream = residual_ptr + row * residual_stride + column
            residual = tl.load(stream, mask=there, other=0.0).to(tl.float32)
            if TWO_SHOT:
                everyone = region(addresses_ptr, line, epoch, slots, region_bytes, residual_ptr, FIRST)
                total = tl.load(everyone[:, None] + (at + column), mask=there, other=0.0)
            else:
                total = tl.zeros((RANKS, PART), dtype=tl.float32)
                for peer in tl.static_range(RANKS):
                    theirs = region(addresses_ptr, peer, epoch, slots, region_bytes, residual_ptr, FIRST)
                    total += tl.load(theirs + (at + column), mask=there, other=0.0).to(tl.float32)
                total = total.to(residual_ptr.dtype.element_ty)
            finish_row(
                total,
                residual,
                weight,
                stream,
                out_ptr + row * size + column,
                scales_ptr,
                row,
                static_scale_ptr,
                there,
                size,
                eps,
                QUANTIZE,
                LARGEST,
                SMALLEST_AMAX,
                WHOLE,
                STATIC,
            )
        tl.store(epochs_ptr + slot, epoch)


def all_reduce_rms_norm(
    x: Product, residual: Tensor, weight: Tensor, eps: float, workspace: Workspace, *, two_shot: bool
) -> tuple[Tensor, Tensor]:
    """The sum over the ranks of x [n, size] is added to residual [n, size], which is overwritten, and normalized with
    weight [size]: one kernel for `all_reduce_` and `norm.rms_norm`, with what that returns. x's scales, if it has any,
    are applied in front of the sum. `Workspace.fits_fused` x, whose dtype is that of the residual stream."""
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_fused(x, residual, weight, eps, workspace, result, None, two_shot=two_shot)
    return result, residual


def all_reduce_rms_norm_quantize(
    x: Product,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    workspace: Workspace,
    dtype: torch.dtype = FP8,
    scale: Tensor | None = None,
    *,
    two_shot: bool,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Like `all_reduce_rms_norm`, with `norm.rms_norm_quantize` behind; `dtype` and `scale` as there."""
    values, scales = quantized_rows(x.shape, dtype, x.device)
    launch_fused(x, residual, weight, eps, workspace, values, scales, dtype, scale, two_shot=two_shot)
    return (values, scales), residual


def fused_arguments(
    x: Product,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    ranks: int,
    result: Tensor,
    scales: Tensor | None,
    dtype: torch.dtype,
    scale: Tensor | None,
) -> tuple[tuple[Tensor | None, ...], tuple[int | float, ...], dict[str, Any]]:
    """Of every kernel that adds up over ranks and norms: its tensors, which come first; its sizes, after what
    it knows of the other ranks; what is known at compile time."""
    n, size = x.shape
    assert x.dtype == residual.dtype
    deferred = None if isinstance(x, Tensor) else x
    values = x if isinstance(x, Tensor) else x.values
    assert values.stride(-1) == 1 and residual.stride(-1) == 1
    part = triton.next_power_of_2(size // ranks)
    row_scales, column_scales, bias = (
        (None, None, None) if deferred is None else (deferred.row_scales, deferred.column_scales, deferred.bias)
    )
    return (
        (values, row_scales, column_scales, bias, residual, weight, scale, result, scales),
        (n, values.stride(0), residual.stride(0), size, size // ranks, eps),
        {
            "DEFERRED": deferred is not None,
            "BIASED": bias is not None,
            "QUANTIZE": scales is not None,
            "SMALLEST_AMAX": SMALLEST_AMAX,
            "STATIC": scale is not None,
            **rounding(dtype),
            "PART": part,
            "num_warps": min(max(part * ranks // 512, 4), 16),
        },
    )


def launch_fused(
    x: Product,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    workspace: Workspace,
    result: Tensor,
    scales: Tensor | None,
    dtype: torch.dtype = FP8,
    scale: Tensor | None = None,
    *,
    two_shot: bool,
    steps: int = ALL_STEPS,
) -> None:
    """Writes `result` [n, size] and, where it is to be quantized, `scales`; of several calls with some of the `steps`
    each, the last does."""
    assert workspace.fits_fused(x) and workspace.size in SIZES
    tensors, numbers, options = fused_arguments(x, residual, weight, eps, workspace.size, result, scales, dtype, scale)
    _all_reduce_rms_norm_kernel[(min(x.shape[0], workspace.slots),)](
        *tensors,
        workspace.addresses,
        workspace.epochs,
        workspace.rank,
        workspace.slots,
        workspace.region_bytes,
        *numbers,
        TWO_SHOT=two_shot,
        **options,
        **launch_arguments(workspace, steps, x.device),
    )
