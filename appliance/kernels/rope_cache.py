"""Rotary position embedding fused with the write of new keys and values into the paged KV cache.

Knows the cache layout of `kernels/attention.py` and the rotate-half (NeoX) pairing; knows nothing of how the cosines
were scaled (`layers/rotary.py` prepares the table) or of which pages belong to whom (the slot mapping says where).
"""

from __future__ import annotations

import torch
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.attention import UNIT_SCALES, KvScales, store_kv
from appliance.kernels.deferred_scale import DeferredScale, apply_scales
from appliance.kernels.dependent_launch import launch_options
from appliance.kernels.fp8_linear import FP8, FP8_MAX


def rope_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_scales: KvScales = UNIT_SCALES,
    deferred: DeferredScale | None = None,
) -> Tensor:
    """Rotates q, in place if it keeps its dtype, and returns it; writes rotated k and plain v to the cache.

    q [n, heads, d], k and v [n, kv_heads, d], any strides with a contiguous last dimension (views of one fused qkv
    tensor); k and v keep their values. positions int64 [n], rows of cos_sin. cos_sin float32 [max_pos, d]: cosines
    of the d/2 frequencies, then sines. kv_cache [pages, 2, page_size, kv_heads, d], any float dtype (converted); FP8 is
    written as kernels/attention.py says, with `kv_scales`. slot_mapping int64 [n]: page * page_size + offset, -1: token
    is not written. Slots of a call are distinct. `deferred`: the fused product that q, k and v are the heads of, in
    this order, if its scales are still to be applied: they are, first, and q gets the dtype of the result. Rotation as
    in Su et al., "RoFormer" (2021), §3.4.2, in float32.
    """
    if q.is_cuda:
        return rope_and_write_triton(q, k, v, positions, cos_sin, kv_cache, slot_mapping, kv_scales, deferred)
    return rope_and_write_reference(q, k, v, positions, cos_sin, kv_cache, slot_mapping, kv_scales, deferred)


def rope_and_write_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_scales: KvScales = UNIT_SCALES,
    deferred: DeferredScale | None = None,
) -> Tensor:
    """`rope_and_write` in plain torch, any device."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # each [n, 1, d/2]
    given_q, q = q, _room(q, deferred)
    if deferred is not None:
        heads = deferred.scaled().unflatten(-1, (-1, q.shape[-1]))
        given_q, k, v = heads.split((q.shape[1], k.shape[1], v.shape[1]), dim=1)
    q.copy_(_rotate(given_q, cos, sin))
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    page, offset = slots // kv_cache.shape[2], slots % kv_cache.shape[2]
    kv_cache[page, 0, offset] = store_kv(_rotate(k, cos, sin)[written], kv_scales.k, kv_cache.dtype)
    kv_cache[page, 1, offset] = store_kv(v[written], kv_scales.v, kv_cache.dtype)
    return q


def _room(q: Tensor, deferred: DeferredScale | None) -> Tensor:
    """Where the rotated q goes."""
    if deferred is None or deferred.in_place:
        return q
    return torch.empty(q.shape, dtype=deferred.dtype, device=q.device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [n, heads, d], cos and sin float32 [n, 1, d/2]; returns float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@triton.jit
def _stored(x, inverse_scale, dtype: tl.constexpr, SCALED: tl.constexpr, LARGEST: tl.constexpr):
    """x as the cache keeps it; SCALED: as an FP8 cache."""
    if SCALED:
        x = tl.clamp(x.to(tl.float32) * inverse_scale, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    cos_sin_ptr,
    cache_ptr,
    slots_ptr,
    row_scales_ptr,
    column_scales_ptr,
    bias_ptr,
    rotated_ptr,
    inverse_k_scale,
    inverse_v_scale,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    rotated_token_stride,
    rotated_head_stride,
    cache_page_stride,
    cache_kv_stride,
    cache_token_stride,
    cache_head_stride,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    page_size: tl.constexpr,
    q_blocks: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    SCALED: tl.constexpr,
    LARGEST: tl.constexpr,
    DEFERRED: tl.constexpr,
    BIASED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one token, HEADS query heads (program_id(1) < q_blocks) or HEADS key/value heads (the rest)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    half: tl.constexpr = head_dim // 2
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    lane = tl.arange(0, HALF)
    in_half = lane < half
    row = cos_sin_ptr + tl.load(positions_ptr + token) * head_dim
    cos = tl.load(row + lane, mask=in_half, other=0.0)[None, :]
    sin = tl.load(row + half + lane, mask=in_half, other=0.0)[None, :]
    row_scale = 1.0
    if DEFERRED:
        row_scale = tl.load(row_scales_ptr + token)
    if block < q_blocks:
        head = block * HEADS + tl.arange(0, HEADS)
        mask = (head < num_heads)[:, None] & in_half[None, :]
        first = q_ptr + token * q_token_stride + head[:, None] * q_head_stride + lane[None, :]
        x1 = tl.load(first, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(first + half, mask=mask, other=0.0).to(tl.float32)
        if DEFERRED:
            at = head[:, None] * head_dim + lane[None, :]
            x1 = apply_scales(x1, row_scale, column_scales_ptr, bias_ptr, at, mask, BIASED)
            x2 = apply_scales(x2, row_scale, column_scales_ptr, bias_ptr, at + half, mask, BIASED)
        rotated = rotated_ptr + token * rotated_token_stride + head[:, None] * rotated_head_stride + lane[None, :]
        tl.store(rotated, (x1 * cos - x2 * sin).to(rotated_ptr.dtype.element_ty), mask=mask)
        tl.store(rotated + half, (x2 * cos + x1 * sin).to(rotated_ptr.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slots_ptr + token)
        head = (block - q_blocks) * HEADS + tl.arange(0, HEADS)
        mask = (head < tl.where(slot >= 0, num_kv_heads, 0))[:, None] & in_half[None, :]
        key = k_ptr + token * k_token_stride + head[:, None] * k_head_stride + lane[None, :]
        value = v_ptr + token * v_token_stride + head[:, None] * v_head_stride + lane[None, :]
        x1 = tl.load(key, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(key + half, mask=mask, other=0.0).to(tl.float32)
        v1 = tl.load(value, mask=mask, other=0.0)
        v2 = tl.load(value + half, mask=mask, other=0.0)
        if DEFERRED:
            at = (num_heads + head)[:, None] * head_dim + lane[None, :]
            x1 = apply_scales(x1, row_scale, column_scales_ptr, bias_ptr, at, mask, BIASED)
            x2 = apply_scales(x2, row_scale, column_scales_ptr, bias_ptr, at + half, mask, BIASED)
            at += num_kv_heads * head_dim
            v1 = apply_scales(v1.to(tl.float32), row_scale, column_scales_ptr, bias_ptr, at, mask, BIASED)
            v2 = apply_scales(v2.to(tl.float32), row_scale, column_scales_ptr, bias_ptr, at + half, mask, BIASED)
        place = (slot // page_size) * cache_page_stride + (slot % page_size) * cache_token_stride
        out = cache_ptr + place + head[:, None] * cache_head_stride + lane[None, :]
        dtype = cache_ptr.dtype.element_ty
        k1 = _stored(x1 * cos - x2 * sin, inverse_k_scale, dtype, SCALED, LARGEST)
        k2 = _stored(x2 * cos + x1 * sin, inverse_k_scale, dtype, SCALED, LARGEST)
        tl.store(out, k1, mask=mask)
        tl.store(out + half, k2, mask=mask)
        out += cache_kv_stride
        tl.store(out, _stored(v1, inverse_v_scale, dtype, SCALED, LARGEST), mask=mask)
        tl.store(out + half, _stored(v2, inverse_v_scale, dtype, SCALED, LARGEST), mask=mask)


def rope_and_write_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_scales: KvScales = UNIT_SCALES,
    deferred: DeferredScale | None = None,
) -> Tensor:
    """`rope_and_write` as one Triton kernel; launches only, so it can be captured in a CUDA graph."""
    n, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    rotated = _room(q, deferred)
    if n == 0:
        return rotated
    # Few tokens: many small programs, for latency. Many tokens: larger ones, for bandwidth.
    heads_per_program = 4 if n <= 64 else 8
    q_blocks = triton.cdiv(num_heads, heads_per_program)
    bias = None if deferred is None else deferred.bias
    grid = (n, q_blocks + triton.cdiv(num_kv_heads, heads_per_program))
    _rope_kernel[grid](
        q,
        k,
        v,
        positions,
        cos_sin,
        kv_cache,
        slot_mapping,
        None if deferred is None else deferred.row_scales,
        None if deferred is None else deferred.column_scales,
        bias,
        rotated,
        1.0 / kv_scales.k,
        1.0 / kv_scales.v,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        rotated.stride(0),
        rotated.stride(1),
        *kv_cache.stride()[:4],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=kv_cache.shape[2],
        q_blocks=q_blocks,
        HEADS=heads_per_program,
        HALF=triton.next_power_of_2(head_dim // 2),
        SCALED=kv_cache.dtype == FP8,
        LARGEST=FP8_MAX,
        DEFERRED=deferred is not None,
        BIASED=bias is not None,
        num_warps=2 if heads_per_program == 4 else 4,
        **launch_options(q.device),
    )
    return rotated
