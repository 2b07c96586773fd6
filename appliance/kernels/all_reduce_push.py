"""All-reduce fused with what follows a row-parallel product, in as few trips between GPUs as can be: numbers are pushed
into the peers' memory, and are their own flags.

`all_reduce_norm.py` publishes numbers, tells the others, waits to be told, and reads theirs: a local write, a fence, a
flag and a remote read one after the other. Here a rank writes its numbers where the others look for them, and these
look until everything has come, in two shots: a rank gets all ranks' numbers of its share of a row, adds them up and
writes the sums to all. No fence, no flag. (In one shot, every rank's row to all others, it is slower than reading: with
1 to 8 rows on two and four H200s, and by far with more.) The idea is that of Lamport ("Concurrent Reading and
Writing", 1977), as TensorRT-LLM uses it for all-reduces and NCCL, with explicit flags, as its protocol LL.

What has not come yet is a number that nobody sends: minus zero, of 16 bits; a sender's are made zeros, which changes no
sum, as these begin with zero. A slot (program) of every rank has three buffers in turn. In a call, a program uses the
next one and fills the one of the call before with minus zeros. No peer writes there too early: that happens two calls
later, and needs what this program sends in the next one, after this kernel. Which buffer it is, and how much of the one
before was used, lies in device memory, so replays of CUDA graphs count on. Numbers are read with volatile loads (PTX
ISA: relaxed, of system scope), which see each number whole.

Sums have the bits of all other own kernels: float32, in the order of ranks, rounded once. All ranks must launch the
same kernels in the same order. Knows nothing of how the memory came to be (`all_reduce_group.py`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.all_reduce import ALL_STEPS, MAX_ROW, SIZES
from appliance.kernels.all_reduce_norm import finish_row, fused_arguments
from appliance.kernels.deferred_scale import Product, apply_scales
from appliance.kernels.row_quantization import FP8, quantized_rows
from appliance.kernels.weight_prefetch import Ahead, launch, prefetch_ahead

BUFFERS = 3
MISSING = 0x80008000 - (1 << 32)  # two numbers that have not come, as an int32
_DTYPES = (torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes of the widest load
_CLEARING_SECONDS = 0.01  # a program that has just begun to clear a buffer is done after it


@dataclass(frozen=True)
class PushSpace:
    """One rank's end of the memory that ranks push numbers into."""

    rank: int
    size: int  # ranks: one of SIZES
    # int64 [size]: where this rank sees every rank's memory, `push_bytes` each, filled with MISSING at first
    addresses: Tensor
    state: Tensor  # int32 [slots, 2], zeros at first: the buffer in use, and how many numbers of it are
    stopped: Tensor  # int32 [1], 0: set to let programs that wait go on, see `stop`
    region_bytes: int  # of a slot in one of the buffers
    memory: Tensor  # uint8: this rank's
    owner: Any = None  # keeps it

    @property
    def slots(self) -> int:
        return self.state.shape[0]

    def stop(self) -> None:
        """Let programs that wait for ranks that are gone go on, with rubbish, now and from now on. From any thread."""
        device = self.memory.device
        with torch.cuda.device(device):
            stream = torch.cuda.Stream(device)
            with torch.cuda.stream(stream):
                self.stopped.fill_(1)
                stream.synchronize()
                time.sleep(_CLEARING_SECONDS)
                self.memory.zero_()

    def fits(self, x: Product) -> bool:
        """Whether the kernels here take x."""
        rows, columns = x.shape
        row_bytes = columns * x.dtype.itemsize
        whole = columns % self.size == 0 and (row_bytes // self.size) % _ALIGNMENT == 0
        used = -(-rows // self.slots) * row_bytes * 2
        return x.dtype in _DTYPES and whole and columns <= MAX_ROW and 0 < used <= self.region_bytes


def push_bytes(slots: int, region_bytes: int) -> int:
    """Memory of a rank that the others write to."""
    return BUFFERS * slots * region_bytes


@triton.jit
def _buffer(addresses_ptr, ranks, buffer, slots, region_bytes):
    """Addresses of this slot's region in a buffer of `ranks`: one or several."""
    place = (buffer * slots + tl.program_id(0)).to(tl.int64)
    address = tl.load(addresses_ptr + ranks) + place * region_bytes
    return tl.multiple_of(address.to(tl.pointer_type(tl.int16)), 16)


@triton.jit
def _sendable(x, like_ptr):
    """Rounded to the dtype that travels, as bits, and none of them minus zero."""
    bits = x.to(like_ptr.dtype.element_ty).to(tl.int16, bitcast=True)
    return tl.where(bits == -32768, 0, bits).to(tl.int16)


@triton.jit
def _received(bits, like_ptr):
    return bits.to(like_ptr.dtype.element_ty, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["rank", "n"])
def _push_rms_norm_kernel(
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
    eps,
    ahead_ptr,
    ahead_rows,
    ahead_row_bytes,
    ahead_piece,
    ahead_behind,
    DEFERRED: tl.constexpr,
    BIASED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    WHOLE: tl.constexpr,
    STATIC: tl.constexpr,
    PART: tl.constexpr,
    RANKS: tl.constexpr,
    BUFFERS: tl.constexpr,
    MISSING: tl.constexpr,
    STEPS: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: whole rows, each in registers as [RANKS, PART], a line for the share of a rank; PART holds share = size
    / RANKS numbers. A region: per row all ranks' numbers of this rank's share, [RANKS, share], and behind all rows the
    sums of each row, [size]."""
    stride = tl.num_programs(0)
    if AHEAD:
        stride = ahead_behind
        if tl.program_id(0) >= ahead_behind:
            prefetch_ahead(ahead_ptr, ahead_rows, ahead_row_bytes, ahead_piece, ahead_behind)
            return
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.program_id(0)
    rows_here = tl.cdiv(n, stride)
    part = tl.arange(0, PART)
    line = tl.arange(0, RANKS)
    part_there = part < share
    column = line[:, None] * share + part[None, :]
    there = (line[:, None] < RANKS) & part_there[None, :]
    before = tl.load(state_ptr + 2 * slot)
    buffer = (before + 1) % BUFFERS
    own = _buffer(addresses_ptr, rank, buffer, slots, region_bytes)
    everyone = _buffer(addresses_ptr, line, buffer, slots, region_bytes)[:, None]
    sums = rows_here * size  # where they begin
    if STEPS & 1:
        for row in range(slot, n, stride):
            x = tl.load(x_ptr + row * x_stride + column, mask=there, other=0)
            if DEFERRED:
                x = x.to(tl.float32)
                x = apply_scales(x, tl.load(row_scales_ptr + row), column_scales_ptr, bias_ptr, column, there, BIASED)
            bits = _sendable(x, residual_ptr)
            tl.store(everyone + ((row // stride) * RANKS + rank) * share + part[None, :], bits, mask=there)
        tl.debug_barrier()  # sent before anything is waited for
    if STEPS & 2:
        for row in range(slot, n, stride):
            at = (row // stride) * size + part
            mine = tl.zeros((PART,), dtype=tl.float32)
            missing = 1
            while missing > 0:
                mine = tl.zeros((PART,), dtype=tl.float32)
                absent = tl.zeros((PART,), dtype=tl.int32)
                for peer in tl.static_range(RANKS):
                    bits = tl.load(own + at + peer * share, mask=part_there, other=0, volatile=True)
                    absent |= (bits == -32768).to(tl.int32)
                    mine += _received(bits, residual_ptr)
                missing = tl.max(absent, 0)
            bits = tl.broadcast_to(_sendable(mine, residual_ptr)[None, :], (RANKS, PART))
            tl.store(everyone + sums + (row // stride) * size + rank * share + part[None, :], bits, mask=there)
        tl.debug_barrier()
    if STEPS & 4:
        if tl.load(stopped_ptr) == 0:
            used = tl.load(state_ptr + 2 * slot + 1)
            old = _buffer(addresses_ptr, rank, before, slots, region_bytes).to(tl.pointer_type(tl.int32))
            for first in range(0, used // 2, RANKS * PART):
                word = first + tl.arange(0, RANKS * PART)
                tl.store(old + word, tl.full((RANKS * PART,), MISSING, tl.int32), mask=word < used // 2)
        for row in range(slot, n, stride):
            stream = residual_ptr + row * residual_stride + column
            residual = tl.load(stream, mask=there, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + column, mask=there, other=0.0).to(tl.float32)
            total = tl.zeros((RANKS, PART), dtype=tl.float32)
            missing = 1
            while missing > 0:
                bits = tl.load(own + sums + (row // stride) * size + column, mask=there, other=0, volatile=True)
                missing = tl.max(tl.max((bits == -32768).to(tl.int32), 1), 0)
                total = _received(bits, residual_ptr)
            finish_row(
                total.to(residual_ptr.dtype.element_ty),
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
        tl.store(state_ptr + 2 * slot, buffer)
        tl.store(state_ptr + 2 * slot + 1, rows_here * size * 2)


def push_rms_norm(
    x: Product, residual: Tensor, weight: Tensor, eps: float, space: PushSpace, ahead: Ahead | None = None
) -> tuple[Tensor, Tensor]:
    """`all_reduce_norm.all_reduce_rms_norm`, and its reference is this one's. `PushSpace.fits` x, whose dtype is that
    of the residual stream."""
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_push(x, residual, weight, eps, space, result, None, ahead=ahead)
    return result, residual


def push_rms_norm_quantize(
    x: Product,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    space: PushSpace,
    dtype: torch.dtype = FP8,
    scale: Tensor | None = None,
    ahead: Ahead | None = None,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """`all_reduce_norm.all_reduce_rms_norm_quantize`, likewise."""
    values, scales = quantized_rows(x.shape, dtype, x.device)
    launch_push(x, residual, weight, eps, space, values, scales, dtype, scale, ahead)
    return (values, scales), residual


def launch_push(
    x: Product,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    space: PushSpace,
    result: Tensor,
    scales: Tensor | None,
    dtype: torch.dtype = FP8,
    scale: Tensor | None = None,
    ahead: Ahead | None = None,
    *,
    steps: int = ALL_STEPS,
) -> None:
    """Writes `result` [n, size] and, where it is to be quantized, `scales`; of several calls with some of the `steps`
    each, the last does."""
    assert space.fits(x) and space.size in SIZES
    tensors, numbers, options = fused_arguments(x, residual, weight, eps, space.size, result, scales, dtype, scale)
    grid, launching = launch(ahead, (min(x.shape[0], space.slots),), x.device)
    _push_rms_norm_kernel[grid](
        *tensors,
        space.addresses,
        space.state,
        space.stopped,
        space.rank,
        space.slots,
        space.region_bytes,
        *numbers,
        **options,
        RANKS=space.size,
        BUFFERS=BUFFERS,
        MISSING=MISSING,
        STEPS=steps,
        **launching,
    )
