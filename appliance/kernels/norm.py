"""RMS norm fused with the residual add in front of it and, where wanted, the 8-bit quantization behind it.

The input may be a product whose scales are still to be applied (`kernels/deferred_scale.py`): they are, first.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). All arithmetic is float32; the residual stream is
rounded to its own dtype before it is normalized, so that fused and separate operations agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.deferred_scale import DeferredScale, Product, apply_scales, materialize_reference
from appliance.kernels.dependent_launch import launch_options
from appliance.kernels.partial_sum import PartialSum
from appliance.kernels.row_quantization import (
    FP8,
    SMALLEST_AMAX,
    in_range,
    quantize_rows_reference,
    quantized_rows,
    rounding,
)


def rms_norm(x: Product, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [n, size], rows may be strided; residual [n, size] or None; weight [size]. Returns the normalized sum in x's
    dtype and the sum itself: `residual`, overwritten, or x where there was none (of a deferred product its values,
    overwritten with the scaled ones). A `PartialSum` is added up over the ranks first, perhaps by the same kernel."""
    if isinstance(x, PartialSum):
        if residual is not None:
            return x.rms_norm(residual, weight, eps)
        x = x.materialize(x.dtype)
    if x.is_cuda:
        return rms_norm_triton(x, residual, weight, eps)
    return rms_norm_reference(x, residual, weight, eps)


def rms_norm_quantize(
    x: Product,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype = FP8,
    scale: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Like `rms_norm`, with the result quantized per row: ((`dtype` [n, size], float32 [n, 1]), sum). `dtype` and
    `scale` as in `row_quantization.quantize_rows`."""
    if isinstance(x, PartialSum):
        if residual is not None:
            return x.rms_norm_quantize(residual, weight, eps, dtype, scale)
        x = x.materialize(x.dtype)
    if x.is_cuda:
        return rms_norm_quantize_triton(x, residual, weight, eps, dtype, scale)
    return rms_norm_quantize_reference(x, residual, weight, eps, dtype, scale)


def qk_rms_norm_(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    v: Tensor | None = None,
    deferred: DeferredScale | None = None,
) -> None:
    """RMS norm over the last dimension of q [n, heads, dim] and k [n, kv_heads, dim], in place. Both may be views of a
    fused product; their last dimension is contiguous.

    `deferred`: the fused product that q, k and v [n, kv_heads, dim] are the heads of, in this order. Its scales are
    applied first, to v too, so that all three are plain numbers afterwards; without it v is left alone."""
    if q.is_cuda:
        qk_rms_norm_triton_(q, k, q_weight, k_weight, eps, v, deferred)
    else:
        qk_rms_norm_reference_(q, k, q_weight, k_weight, eps, v, deferred)


# ---------------------------------------------------------------- references


def rms_norm_reference(x: Product, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` in plain torch, any device."""
    total = _add_reference(x, residual)
    return _normalize(total, weight, eps).to(x.dtype), total


def rms_norm_quantize_reference(
    x: Product,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype = FP8,
    scale: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """`rms_norm_quantize` in plain torch, any device."""
    total = _add_reference(x, residual)
    return quantize_rows_reference(_normalize(total, weight, eps), dtype, scale), total


def _add_reference(x: Product, residual: Tensor | None) -> Tensor:
    if isinstance(x, Tensor):
        return x if residual is None else residual.add_(x)
    return materialize_reference(x, x.dtype) if residual is None else residual.copy_(residual.float() + x.scaled())


def qk_rms_norm_reference_(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    v: Tensor | None = None,
    deferred: DeferredScale | None = None,
) -> None:
    """`qk_rms_norm_` in plain torch, any device."""
    scaled_q, scaled_k = q, k
    if deferred is not None and v is not None:
        heads = deferred.scaled().unflatten(-1, (-1, q.shape[-1]))
        scaled_q, scaled_k, scaled_v = heads.split((q.shape[1], k.shape[1], v.shape[1]), dim=1)
        v.copy_(scaled_v)
    q.copy_(_normalize(scaled_q, q_weight, eps))
    k.copy_(_normalize(scaled_k, k_weight, eps))


def _normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float32, over the last dimension."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


# ---------------------------------------------------------------- Triton


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    row_scales_ptr,
    column_scales_ptr,
    bias_ptr,
    residual_ptr,
    weight_ptr,
    static_scale_ptr,
    out_ptr,
    scales_ptr,
    x_stride,
    residual_stride,
    size,
    eps,
    DEFERRED: tl.constexpr,
    BIASED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    QUANTIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    WHOLE: tl.constexpr,
    STATIC: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one row, held in registers."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < size
    x_at = x_ptr + row * x_stride + column
    x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if DEFERRED:
        x = apply_scales(x, tl.load(row_scales_ptr + row), column_scales_ptr, bias_ptr, column, mask, BIASED)
    if HAS_RESIDUAL:
        stream = residual_ptr + row * residual_stride + column
        x += tl.load(stream, mask=mask, other=0.0).to(tl.float32)
        total = x.to(residual_ptr.dtype.element_ty)
        tl.store(stream, total, mask=mask)
        x = total.to(tl.float32)
    elif DEFERRED:
        total = x.to(x_ptr.dtype.element_ty)
        tl.store(x_at, total, mask=mask)
        x = total.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps) * weight
    if QUANTIZE:
        if STATIC:
            scale = tl.load(static_scale_ptr)
        else:
            scale = tl.maximum(tl.max(tl.abs(y), axis=0), SMALLEST_AMAX) / LARGEST
        tl.store(scales_ptr + row, scale)
        y = in_range(y, scale, LARGEST, WHOLE)
    tl.store(out_ptr + row * size + column, y.to(out_ptr.dtype.element_ty), mask=mask)


def _launch_rms_norm(
    product: Product,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    scales: Tensor | None = None,
    dtype: torch.dtype = FP8,
    static_scale: Tensor | None = None,
) -> Tensor:
    """Returns the sum. With `scales` the result is rounded to `dtype`."""
    if isinstance(product, DeferredScale) and residual is None and not product.in_place:
        product = product.materialize(product.dtype)  # the sum begins with it, so it needs a place of its own
    deferred = None if isinstance(product, Tensor) else product
    x = product if isinstance(product, Tensor) else product.values
    size = x.shape[-1]
    assert x.stride(-1) == 1 and (residual is None or residual.stride(-1) == 1)
    bias = None if deferred is None else deferred.bias
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(x.shape[0],)](
        x,
        None if deferred is None else deferred.row_scales,
        None if deferred is None else deferred.column_scales,
        bias,
        residual,
        weight,
        static_scale,
        out,
        scales,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        size,
        eps,
        DEFERRED=deferred is not None,
        BIASED=bias is not None,
        HAS_RESIDUAL=residual is not None,
        QUANTIZE=scales is not None,
        SMALLEST_AMAX=SMALLEST_AMAX,
        STATIC=static_scale is not None,
        **rounding(dtype),
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
        **launch_options(x.device),
    )
    return x if residual is None else residual


def rms_norm_triton(x: Product, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` as one kernel."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out, _launch_rms_norm(x, residual, weight, eps, out)


def rms_norm_quantize_triton(
    x: Product,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype = FP8,
    scale: Tensor | None = None,
    values_dtype: torch.dtype | None = None,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """`rms_norm_quantize` as one kernel; `values_dtype` as in `row_quantization.quantize_rows_triton`."""
    values, scales = quantized_rows(x.shape, values_dtype or dtype, x.device)
    return (values, scales), _launch_rms_norm(x, residual, weight, eps, values, scales, dtype, scale)


@triton.jit
def _qk_rms_norm_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    row_scales_ptr,
    column_scales_ptr,
    bias_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    num_heads,
    num_kv_heads,
    eps,
    DEFERRED: tl.constexpr,
    BIASED: tl.constexpr,
    head_dim: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one head of one token; heads of q first, then those of k and, if scales are deferred, of v."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    mask = column < head_dim
    if head < num_heads:
        place = q_ptr + token * q_stride + head * q_head_stride + column
        weight = tl.load(q_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    elif head < num_heads + num_kv_heads:
        place = k_ptr + token * k_stride + (head - num_heads) * k_head_stride + column
        weight = tl.load(k_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    else:
        place = v_ptr + token * v_stride + (head - num_heads - num_kv_heads) * v_head_stride + column
        weight = tl.zeros((BLOCK,), dtype=tl.float32)  # not used
    y = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if DEFERRED:
        at = head * head_dim + column
        y = apply_scales(y, tl.load(row_scales_ptr + token), column_scales_ptr, bias_ptr, at, mask, BIASED)
    if head < num_heads + num_kv_heads:
        y = y * tl.rsqrt(tl.sum(y * y, axis=0) / head_dim + eps) * weight
    tl.store(place, y.to(q_ptr.dtype.element_ty), mask=mask)


def qk_rms_norm_triton_(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    v: Tensor | None = None,
    deferred: DeferredScale | None = None,
) -> None:
    """`qk_rms_norm_` as one kernel."""
    n, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    assert deferred is None or v is not None
    v = k if v is None else v  # not touched
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and q.dtype == k.dtype == v.dtype
    bias = None if deferred is None else deferred.bias
    _qk_rms_norm_kernel[(n, num_heads + num_kv_heads * (1 if deferred is None else 2))](
        q,
        k,
        v,
        None if deferred is None else deferred.row_scales,
        None if deferred is None else deferred.column_scales,
        bias,
        q_weight,
        k_weight,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        num_heads,
        num_kv_heads,
        eps,
        DEFERRED=deferred is not None,
        BIASED=bias is not None,
        head_dim=head_dim,
        BLOCK=triton.next_power_of_2(head_dim),
        num_warps=1,
        **launch_options(q.device),
    )
