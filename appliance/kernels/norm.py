"""RMS norm fused with the residual add in front of it and, where wanted, the FP8 quantization behind it.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). All arithmetic is float32; the residual stream is
rounded to its own dtype before it is normalized, so that fused and separate operations agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.fp8_linear import FP8, FP8_MAX, SMALLEST_AMAX, quantize_rows_reference


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [n, size], rows may be strided; residual [n, size] or None; weight [size]. Returns the normalized sum in x's
    dtype and the sum itself: `residual`, overwritten, or x where there was none."""
    if x.is_cuda:
        return rms_norm_triton(x, residual, weight, eps)
    return rms_norm_reference(x, residual, weight, eps)


def rms_norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Like `rms_norm`, with the result quantized per row: ((float8_e4m3fn [n, size], float32 [n, 1]), sum)."""
    if x.is_cuda:
        return rms_norm_quantize_triton(x, residual, weight, eps)
    return rms_norm_quantize_reference(x, residual, weight, eps)


def qk_rms_norm_(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> None:
    """RMS norm over the last dimension of q [n, heads, dim] and k [n, kv_heads, dim], in place. Both may be views of a
    fused product; their last dimension is contiguous."""
    if q.is_cuda:
        qk_rms_norm_triton_(q, k, q_weight, k_weight, eps)
    else:
        qk_rms_norm_reference_(q, k, q_weight, k_weight, eps)


# ---------------------------------------------------------------- references


def rms_norm_reference(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` in plain torch, any device."""
    total = x if residual is None else residual.add_(x)
    return _normalize(total, weight, eps).to(x.dtype), total


def rms_norm_quantize_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """`rms_norm_quantize` in plain torch, any device."""
    total = x if residual is None else residual.add_(x)
    return quantize_rows_reference(_normalize(total, weight, eps)), total


def qk_rms_norm_reference_(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> None:
    """`qk_rms_norm_` in plain torch, any device."""
    q.copy_(_normalize(q, q_weight, eps))
    k.copy_(_normalize(k, k_weight, eps))


def _normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float32, over the last dimension."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


# ---------------------------------------------------------------- Triton


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    scales_ptr,
    x_stride,
    residual_stride,
    size,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    QUANTIZE: tl.constexpr,
    FP8_MAX: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one row, held in registers."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < size
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        stream = residual_ptr + row * residual_stride + column
        x += tl.load(stream, mask=mask, other=0.0).to(tl.float32)
        total = x.to(residual_ptr.dtype.element_ty)
        tl.store(stream, total, mask=mask)
        x = total.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps) * weight
    if QUANTIZE:
        scale = tl.maximum(tl.max(tl.abs(y), axis=0), SMALLEST_AMAX) / FP8_MAX
        tl.store(scales_ptr + row, scale)
        y = tl.clamp(y / scale, -FP8_MAX, FP8_MAX)
    tl.store(out_ptr + row * size + column, y.to(out_ptr.dtype.element_ty), mask=mask)


def _launch_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, scales: Tensor | None
) -> None:
    size = x.shape[-1]
    assert x.stride(-1) == 1 and (residual is None or residual.stride(-1) == 1)
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(x.shape[0],)](
        x,
        residual,
        weight,
        out,
        scales,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        size,
        eps,
        HAS_RESIDUAL=residual is not None,
        QUANTIZE=scales is not None,
        FP8_MAX=FP8_MAX,
        SMALLEST_AMAX=SMALLEST_AMAX,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )


def rms_norm_triton(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` as one kernel."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rms_norm(x, residual, weight, eps, out, None)
    return out, x if residual is None else residual


def rms_norm_quantize_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, values_dtype: torch.dtype = FP8
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """`rms_norm_quantize` as one kernel; `values_dtype` as in `fp8_linear.quantize_rows_triton`."""
    values = torch.empty(x.shape, dtype=values_dtype, device=x.device)
    scales = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
    _launch_rms_norm(x, residual, weight, eps, values, scales)
    return (values, scales), x if residual is None else residual


@triton.jit
def _qk_rms_norm_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    num_heads,
    eps,
    head_dim: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one head of one token; heads of q first, then those of k."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    mask = column < head_dim
    if head < num_heads:
        place = q_ptr + token * q_stride + head * q_head_stride + column
        weight = tl.load(q_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    else:
        place = k_ptr + token * k_stride + (head - num_heads) * k_head_stride + column
        weight = tl.load(k_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / head_dim + eps) * weight
    tl.store(place, y.to(q_ptr.dtype.element_ty), mask=mask)


def qk_rms_norm_triton_(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> None:
    """`qk_rms_norm_` as one kernel."""
    n, num_heads, head_dim = q.shape
    assert q.stride(-1) == 1 and k.stride(-1) == 1 and q.dtype == k.dtype
    _qk_rms_norm_kernel[(n, num_heads + k.shape[1])](
        q,
        k,
        q_weight,
        k_weight,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        num_heads,
        eps,
        head_dim=head_dim,
        BLOCK=triton.next_power_of_2(head_dim),
        num_warps=1,
    )
