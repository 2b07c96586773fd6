"""All-reduce fused with what follows a row-parallel product, by ranks that share out the rows: a rank adds up, adds to
its residual stream, normalizes and quantizes its own rows only, and hands the result to all.

What travels the second time is the result, in 8 bits where it is quantized, instead of sums in 16; and a norm is made
once instead of by every rank. In return the residual stream is *dealt out*: rank r has rows r, r + size, r + 2 size, …
of it, and what it holds of others is stale (`dealt_rows`, `whole_rows`). That is sequence parallelism of Korthikanti et
al., "Reducing Activation Recomputation in Large Transformer Models" (2022), section 4.2.2: reduce-scatter in front of
the norm, all-gather behind it.

Protocol and memory are those of `all_reduce_push.py`: numbers are their own flags. What travels has no minus zero of 16
bits: neither sums' parts nor results have one; and of 8-bit results no byte is 0x80, which is minus zero in FP8 and not
used in int8. A program (slot) takes groups of `size` rows that follow each other, one row of each rank, so that slots
of the same number exchange rows only among each other, as there. All that two programs exchange goes by way of a row's
owner, who needs all: so that a rank has come to the next call tells those who hear of it, if not from itself then from
the owner, that it has ended this one.

Sums and streams have the bits of all other own kernels; results too, but for the sign of zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.all_reduce import ALL_STEPS, MAX_ROW, SIZES
from appliance.kernels.all_reduce_norm import normed_row
from appliance.kernels.all_reduce_push import BUFFERS, DTYPES, MISSING, PushSpace, buffer_of, received, sendable
from appliance.kernels.deferred_scale import Product, apply_scales
from appliance.kernels.dependent_launch import launch_options
from appliance.kernels.row_quantization import FP8, SMALLEST_AMAX, quantized_rows, rounding

_MAX_GROUP = 65536  # numbers of a group of rows: what a program receives at once
_ALIGNMENT = 16  # bytes of the widest load, of every rank's share of a row
_SCALE_BYTES = 4


def shared_rows_fit(x: Product, space: PushSpace) -> bool:
    """Whether the kernels here take x: enough rows for all ranks, not too many for the memory."""
    rows, columns = x.shape
    row_bytes = columns * x.dtype.itemsize
    whole = columns % space.size == 0 and (row_bytes // space.size) % (2 * _ALIGNMENT) == 0
    narrow = columns <= MAX_ROW and columns * space.size <= _MAX_GROUP
    groups = -(-rows // (space.size * space.slots))
    used = groups * space.size * (2 * row_bytes + _SCALE_BYTES)
    return x.dtype in DTYPES and whole and narrow and rows >= space.size and used <= space.region_bytes


def dealt_rows(stream: Tensor, rank: int, size: int) -> Tensor:
    """A rank's own rows of the residual stream [n, hidden]: a view of every size-th row; the last ranks may have one
    less than the first."""
    return stream[rank::size]


def whole_rows(shares: Tensor, rows: int) -> Tensor:
    """The residual stream [rows, hidden] of all ranks' own rows: shares [size, most rows of a rank, hidden], of which
    those that a rank does not have count for nothing."""
    return shares.transpose(0, 1).flatten(0, 1)[:rows]


@triton.jit
def _scaled_row(
    x_ptr,
    row_scales_ptr,
    column_scales_ptr,
    bias_ptr,
    row,
    n,
    x_stride,
    column,
    there,
    DEFERRED: tl.constexpr,
    BIASED: tl.constexpr,
):
    x = tl.load(x_ptr + row * x_stride + column, mask=there, other=0)
    if DEFERRED:
        scale = tl.load(row_scales_ptr + row, mask=row < n, other=0.0)
        x = apply_scales(x.to(tl.float32), scale, column_scales_ptr, bias_ptr, column, there, BIASED)
    return x


@triton.jit
def _result_bits(y, like_ptr):
    """Rounded to the result's dtype, of 8 or 16 bits, as bits, and none of them what says that nothing has come."""
    y = y.to(like_ptr.dtype.element_ty)
    if like_ptr.dtype.element_ty.primitive_bitwidth == 8:
        bits = y.to(tl.int8, bitcast=True)
        bits = tl.where(bits == -128, 0, bits).to(tl.int8)
    else:
        bits = y.to(tl.int16, bitcast=True)
        bits = tl.where(bits == -32768, 0, bits).to(tl.int16)
    return bits


@triton.jit(do_not_specialize=["rank", "n"])
def _shared_rows_kernel(
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
    state_ptr,
    stopped_ptr,
    rank,
    slots,
    region_bytes,
    n,
    x_stride,
    residual_stride,
    size,
    share,
    words,
    eps,
    DEFERRED: tl.constexpr,
    BIASED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    WHOLE: tl.constexpr,
    STATIC: tl.constexpr,
    PART: tl.constexpr,
    WORDS: tl.constexpr,
    RANKS: tl.constexpr,
    BUFFERS: tl.constexpr,
    MISSING: tl.constexpr,
    STEPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: whole groups of RANKS rows. A row that is added up lies in registers as [RANKS, PART], of which PART
    holds share = size / RANKS numbers; results that come as [RANKS, WORDS], 32 bits each, a line for a row's `words`.
    A region: per group all ranks' numbers of this rank's row, [RANKS, size]; behind all groups the results of each,
    [RANKS, words], and behind these the results' scales, [RANKS] of 32 bits per group."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.program_id(0)
    stride = tl.num_programs(0)
    groups = tl.cdiv(n, RANKS)
    groups_here = tl.cdiv(groups, stride)
    part = tl.arange(0, PART)
    line = tl.arange(0, RANKS)
    column = line[:, None] * share + part[None, :]
    there = (line[:, None] < RANKS) & (part[None, :] < share)
    before = tl.load(state_ptr + 2 * slot)
    buffer = (before + 1) % BUFFERS
    own = buffer_of(addresses_ptr, rank, buffer, slots, region_bytes)
    results = groups_here * RANKS * size  # where they begin
    factors = results + groups_here * RANKS * words * 2
    if STEPS & 1:
        for group in range(slot, groups, stride):
            peer = (rank + 1) % RANKS
            row = group * RANKS + peer
            sent = there & (row < n)
            x = _scaled_row(
                x_ptr, row_scales_ptr, column_scales_ptr, bias_ptr, row, n, x_stride, column, sent, DEFERRED, BIASED
            )
            for step in tl.static_range(1, RANKS):
                place = buffer_of(addresses_ptr, peer, buffer, slots, region_bytes)
                at = ((group // stride) * RANKS + rank) * size + column
                bits, sent_now = sendable(x, residual_ptr), sent
                if step + 1 < RANKS:  # read the next row while this one is on its way
                    peer = (rank + step + 1) % RANKS  # ranks write to different ones at a time
                    row = group * RANKS + peer
                    sent = there & (row < n)
                    x = _scaled_row(
                        x_ptr,
                        row_scales_ptr,
                        column_scales_ptr,
                        bias_ptr,
                        row,
                        n,
                        x_stride,
                        column,
                        sent,
                        DEFERRED,
                        BIASED,
                    )
                tl.store(place + at, bits, mask=sent_now)
        tl.debug_barrier()  # sent before anything is waited for
    if STEPS & 2:
        if tl.load(stopped_ptr) == 0:
            used = tl.load(state_ptr + 2 * slot + 1)
            old = buffer_of(addresses_ptr, rank, before, slots, region_bytes).to(tl.pointer_type(tl.int32))
            for first in range(0, used // 2, RANKS * PART):
                word = first + tl.arange(0, RANKS * PART)
                tl.store(old + word, tl.full((RANKS * PART,), MISSING, tl.int32), mask=word < used // 2)
        weight = tl.load(weight_ptr + column, mask=there, other=0.0).to(tl.float32)
        for group in range(slot, groups, stride):
            row = group * RANKS + rank
            if row < n:
                stream = residual_ptr + row * residual_stride + column
                residual = tl.load(stream, mask=there, other=0.0).to(tl.float32)
                x = _scaled_row(
                    x_ptr,
                    row_scales_ptr,
                    column_scales_ptr,
                    bias_ptr,
                    row,
                    n,
                    x_stride,
                    column,
                    there,
                    DEFERRED,
                    BIASED,
                )
                mine = received(sendable(x, residual_ptr), residual_ptr)
                total = tl.zeros((RANKS, PART), dtype=tl.float32)
                missing = 1
                while missing > 0:
                    total = tl.zeros((RANKS, PART), dtype=tl.float32)
                    absent = tl.zeros((RANKS, PART), dtype=tl.int32)
                    for peer in tl.static_range(RANKS):
                        at = ((group // stride) * RANKS + peer) * size + column
                        bits = tl.load(own + at, mask=there & (rank != peer), other=0, volatile=True)
                        absent |= (bits == -32768).to(tl.int32)
                        total += tl.where(rank == peer, mine, received(bits, residual_ptr))
                    missing = tl.max(tl.max(absent, 1), 0)
                y, scale = normed_row(
                    total.to(residual_ptr.dtype.element_ty),
                    residual,
                    weight,
                    stream,
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
                result = _result_bits(y, out_ptr)
                index = (group // stride) * RANKS + rank
                for step in tl.static_range(1, RANKS):
                    peer = (rank + step) % RANKS
                    place = buffer_of(addresses_ptr, peer, buffer, slots, region_bytes)
                    there_ptr = (place + results + index * words * 2).to(tl.pointer_type(result.dtype))
                    tl.store(tl.multiple_of(there_ptr, 16) + column, result, mask=there)
                    if QUANTIZE:
                        factor = (place + factors + index * 2).to(tl.pointer_type(tl.int32))
                        tl.store(factor, scale.to(tl.int32, bitcast=True))
                tl.store(out_ptr.to(tl.pointer_type(result.dtype)) + row * size + column, result, mask=there)
                if QUANTIZE:
                    tl.store(scales_ptr + row, scale)
        tl.debug_barrier()
    if STEPS & 4:
        word = tl.arange(0, WORDS)
        for group in range(slot, groups, stride):
            row = group * RANKS + line
            wanted = (row < n) & (line != rank)
            mask = wanted[:, None] & (word[None, :] < words)
            index = (group // stride) * RANKS + line
            come = tl.multiple_of((own + results).to(tl.pointer_type(tl.int32)), 16)
            come = come + (index[:, None] * words + word[None, :])
            factor = (own + factors).to(tl.pointer_type(tl.int32)) + index
            bits = tl.zeros((RANKS, WORDS), dtype=tl.int32)
            scale_bits = tl.zeros((RANKS,), dtype=tl.int32)
            missing = 1
            while missing > 0:
                bits = tl.load(come, mask=mask, other=0, volatile=True)
                missing = tl.max(tl.max((bits == MISSING).to(tl.int32), 1), 0)
                if QUANTIZE:
                    scale_bits = tl.load(factor, mask=wanted, other=0, volatile=True)
                    missing = tl.maximum(missing, tl.max((scale_bits == MISSING).to(tl.int32), 0))
            tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + (row[:, None] * words + word[None, :]), bits, mask=mask)
            if QUANTIZE:
                tl.store(scales_ptr + row, scale_bits.to(tl.float32, bitcast=True), mask=wanted)
        tl.store(state_ptr + 2 * slot, buffer)
        tl.store(state_ptr + 2 * slot + 1, factors + groups_here * RANKS * 2)


def shared_rows_rms_norm(
    x: Product, residual: Tensor, weight: Tensor, eps: float, space: PushSpace
) -> tuple[Tensor, Tensor]:
    """`all_reduce_norm.all_reduce_rms_norm`, whose reference is this one's, but that of `residual` only `dealt_rows`
    are read and written. `shared_rows_fit` x, whose dtype is that of the residual stream."""
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_shared_rows(x, residual, weight, eps, space, result, None)
    return result, residual


def shared_rows_rms_norm_quantize(
    x: Product,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    space: PushSpace,
    dtype: torch.dtype = FP8,
    scale: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """`all_reduce_norm.all_reduce_rms_norm_quantize`, likewise."""
    values, scales = quantized_rows(x.shape, dtype, x.device)
    launch_shared_rows(x, residual, weight, eps, space, values, scales, dtype, scale)
    return (values, scales), residual


def launch_shared_rows(
    x: Product,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    space: PushSpace,
    result: Tensor,
    scales: Tensor | None,
    dtype: torch.dtype = FP8,
    scale: Tensor | None = None,
    *,
    steps: int = ALL_STEPS,
) -> None:
    """Writes `result` [n, size] and, where it is to be quantized, `scales`; of several calls with some of the `steps`
    each, the last has written all of it."""
    n, size = x.shape
    assert shared_rows_fit(x, space) and space.size in SIZES and x.dtype == residual.dtype
    assert result.is_contiguous() and result.element_size() in (1, 2)
    deferred = None if isinstance(x, Tensor) else x
    values = x if isinstance(x, Tensor) else x.values
    assert values.stride(-1) == 1 and residual.stride(-1) == 1
    part = triton.next_power_of_2(size // space.size)
    words = size * result.element_size() // 4
    bias = None if deferred is None else deferred.bias
    _shared_rows_kernel[(min(-(-n // space.size), space.slots),)](
        values,
        None if deferred is None else deferred.row_scales,
        None if deferred is None else deferred.column_scales,
        bias,
        residual,
        weight,
        scale,
        result,
        scales,
        space.addresses,
        space.state,
        space.stopped,
        space.rank,
        space.slots,
        space.region_bytes,
        n,
        values.stride(0),
        residual.stride(0),
        size,
        size // space.size,
        words,
        eps,
        DEFERRED=deferred is not None,
        BIASED=bias is not None,
        QUANTIZE=scales is not None,
        SMALLEST_AMAX=SMALLEST_AMAX,
        STATIC=scale is not None,
        **rounding(dtype),
        PART=part,
        WORDS=triton.next_power_of_2(words),
        RANKS=space.size,
        BUFFERS=BUFFERS,
        MISSING=MISSING,
        STEPS=steps,
        num_warps=min(max(part * space.size // 512, 4), 16),
        **launch_options(x.device),
    )
