"""All-reduce between GPUs that read each other's memory: one-shot and two-shot. `all_reduce_norm.py` fuses it with what
follows: residual add, RMS norm, quantization.

One-shot: every rank reads all ranks' numbers and adds them up. Two-shot: a rank adds up its share of the numbers, then
reads the other shares: two waits, but (size - 1) / size of the traffic twice instead of size - 1 times. The schemes
are those of TensorRT-LLM's and vLLM's custom all-reduce kernels; NVLink multicast is not used.

Sums are in float32, in the order of ranks, rounded once to the numbers' dtype: the same bits on every rank, whichever
kernel makes them. The fused kernels round there too, so fused and separate operations agree.

**Protocol.** Each rank has a *workspace* that the others can read and write: flags, and two buffers cut into one region
per slot. A program is a slot: it copies its part of the input into its own region, tells the same slot of every other
rank, waits until these have told it, and reads their regions. No program waits for another slot, and there are at most
as many slots as multiprocessors, so all run at once and none waits for one that cannot start.

- A flag is a number in the reader's workspace that only one writer writes: [phase, slot, writer]. It holds the epoch
  of the writer, the slot's count of all-reduces, which is in device memory so that replays of CUDA graphs count on.
- Writer: `bar.sync`, then `st.release.sys` of the epoch by one thread per reader. Reader: `ld.acquire.sys` by one
  thread per writer until the flag is not behind its own epoch, then `bar.sync`. A release is cumulative over what the
  barrier made visible to the thread, and the barrier behind the acquire passes it on (PTX ISA, "Memory Consistency
  Model": causality order). Epochs are compared by their difference, so they may wrap around.
- Buffers alternate with the epoch, so the wait for the next all-reduce is also the one in front of overwriting: a rank
  that was told of epoch e by all knows that they have ended epoch e - 1, and may write the buffer of e - 1 in e + 1.
- The second wait of a two-shot has flags of its own (phase 1). A rank's sums replace its own numbers in its own share,
  which nobody else reads in the first phase.

All ranks must launch the same kernels in the same order. Knows nothing of how the workspace came to be
(`all_reduce_group.py`), nor which kernel is the fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.deferred_scale import Product
from appliance.kernels.dependent_launch import launch_options

SIZES = (2, 4, 8)  # numbers of ranks that the kernels are made for
MAX_SLOTS = 128
_PHASES = 2
_BUFFERS = 2
_MAX_RANKS = max(SIZES)
FLAG_BYTES = _PHASES * MAX_SLOTS * _MAX_RANKS * 4
_ALIGNMENT = 16  # bytes of the widest load
_MAX_PART = 4096  # numbers that a program adds up at once
MAX_ROW = 16384  # numbers of a row that the fused kernels hold in registers

# What a launch does: all of it on GPUs. Tests without any run the steps of all "ranks" one after the other.
PUBLISH, REDUCE, GATHER = 1, 2, 4
ALL_STEPS = PUBLISH | REDUCE | GATHER


@dataclass(frozen=True)
class Workspace:
    """One rank's end of the memory that all ranks of a group see."""

    rank: int
    size: int  # ranks: one of SIZES
    # int64 [size]: where this rank sees every rank's workspace, `workspace_bytes` each, zeros at first
    addresses: Tensor
    epochs: Tensor  # int32 [slots], zeros at first: all-reduces that a slot has done
    region_bytes: int  # of a slot in one of the two buffers
    owner: Any = None  # keeps the memory

    @property
    def slots(self) -> int:
        return self.epochs.shape[0]

    @property
    def capacity(self) -> int:
        """Bytes of the largest message."""
        return self.slots * self.region_bytes

    def fits(self, x: Product) -> bool:
        """Whether `all_reduce_` takes x."""
        return 0 < x.shape[0] * x.shape[1] * x.dtype.itemsize <= self.capacity

    def fits_fused(self, x: Product) -> bool:
        """Whether `all_reduce_rms_norm` takes x."""
        rows, columns = x.shape
        row_bytes = columns * x.dtype.itemsize
        whole = columns % self.size == 0 and (row_bytes // self.size) % _ALIGNMENT == 0
        return whole and columns <= MAX_ROW and 0 < -(-rows // self.slots) * row_bytes <= self.region_bytes


def workspace_bytes(slots: int, region_bytes: int) -> int:
    """Memory of a rank that the others see."""
    return FLAG_BYTES + _BUFFERS * slots * region_bytes


# ---------------------------------------------------------------- references


def all_reduce_reference(partials: Sequence[Tensor]) -> Tensor:
    """The sum of the ranks' numbers, each [n, k], in float32 and in their order, rounded once."""
    total = partials[0].float()
    for partial in partials[1:]:
        total = total + partial.float()
    return total.to(partials[0].dtype)


# ---------------------------------------------------------------- Triton

# $1 addresses of the workspaces, $2 byte offset of this slot's flags of one phase, $3 rank, $4 epoch, $5 ranks.
_MEET: Any = """
{
    .reg .pred p;
    .reg .b32 peer, flag;
    .reg .b64 at, offset;
    mov.u32 peer, %tid.x;
    setp.ge.u32 p, peer, $5;
    @p bra MET;
    mul.wide.u32 offset, peer, 8;
    add.u64 at, $1, offset;
    ld.global.u64 at, [at];
    add.u64 at, at, $2;
    mul.wide.u32 offset, $3, 4;
    add.u64 at, at, offset;
    st.release.sys.global.u32 [at], $4;
    mul.wide.u32 offset, $3, 8;
    add.u64 at, $1, offset;
    ld.global.u64 at, [at];
    add.u64 at, at, $2;
    mul.wide.u32 offset, peer, 4;
    add.u64 at, at, offset;
WAIT:
    ld.acquire.sys.global.u32 flag, [at];
    sub.s32 flag, flag, $4;
    setp.lt.s32 p, flag, 0;
    @p bra WAIT;
MET:
    mov.u32 $0, 0;
}
"""


@triton.jit
def meet(
    addresses_ptr,
    rank,
    epoch,
    PHASE: tl.constexpr,
    RANKS: tl.constexpr,
    SLOTS: tl.constexpr,
    STRIDE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Tell this slot of all ranks that this one is in `epoch`, and wait until all of them are. Flags: [2, SLOTS,
    STRIDE]."""
    flags = ((PHASE * SLOTS + tl.program_id(0)) * STRIDE * 4).to(tl.int64)
    ranks = tl.full((), RANKS, tl.int32)
    addresses = addresses_ptr.to(tl.int64, bitcast=True)
    tl.debug_barrier()  # all threads have written before one of them says so
    tl.inline_asm_elementwise(
        ASSEMBLY, "=r,l,l,r,r,r", [addresses, flags, rank, epoch, ranks], dtype=tl.int32, is_pure=False, pack=1
    )
    tl.debug_barrier()  # nobody reads before all flags were seen


@triton.jit
def region(addresses_ptr, ranks, epoch, slots, region_bytes, like_ptr, FIRST: tl.constexpr):
    """Addresses of this slot's region in the buffer of `epoch`, in the workspaces of `ranks`: one or several."""
    place = ((epoch & 1) * slots + tl.program_id(0)).to(tl.int64)
    address = tl.load(addresses_ptr + ranks) + (FIRST + place * region_bytes)
    return tl.multiple_of(address.to(like_ptr.dtype), 16)


@triton.jit(do_not_specialize=["rank"])  # count is to be known as a multiple of 16, so that loads are wide
def _all_reduce_kernel(
    x_ptr,
    addresses_ptr,
    epochs_ptr,
    rank,
    slots,
    region_bytes,
    count,
    TWO_SHOT: tl.constexpr,
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
    """Program: tiles of PART numbers, or of PART per rank (TWO_SHOT), of x, which is overwritten."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    PARTS: tl.constexpr = RANKS if TWO_SHOT else 1
    slot = tl.program_id(0)
    column = tl.arange(0, PART)
    epoch = tl.load(epochs_ptr + slot) + 1
    own = region(addresses_ptr, rank, epoch, slots, region_bytes, x_ptr, FIRST)
    tiles = tl.cdiv(count, PART * PARTS)
    stride = tl.num_programs(0)
    if STEPS & 1:
        for tile in range(slot, tiles, stride):
            at = (tile // stride) * (PART * PARTS) + column
            for part in tl.static_range(PARTS):
                index = (tile * PARTS + part) * PART + column
                x = tl.load(x_ptr + index, mask=index < count)
                tl.store(own + at + part * PART, x, mask=index < count)
    if SYNC:
        meet(addresses_ptr, rank, epoch, 0, RANKS, SLOTS, STRIDE, ASSEMBLY)
    if STEPS & 2:
        mine = rank if TWO_SHOT else 0
        for tile in range(slot, tiles, stride):
            at = (tile // stride) * (PART * PARTS) + mine * PART + column
            index = (tile * PARTS + mine) * PART + column
            total = tl.zeros((PART,), dtype=tl.float32)
            for peer in tl.static_range(RANKS):
                theirs = region(addresses_ptr, peer, epoch, slots, region_bytes, x_ptr, FIRST)
                total += tl.load(theirs + at, mask=index < count, other=0.0).to(tl.float32)
            total = total.to(x_ptr.dtype.element_ty)
            tl.store(x_ptr + index, total, mask=index < count)
            if TWO_SHOT:
                tl.store(own + at, total, mask=index < count)
    if TWO_SHOT and SYNC:
        meet(addresses_ptr, rank, epoch, 1, RANKS, SLOTS, STRIDE, ASSEMBLY)
    if STEPS & 4:
        if TWO_SHOT:
            for tile in range(slot, tiles, stride):
                for step in tl.static_range(1, RANKS):
                    peer = (rank + step) % RANKS  # ranks read from different ones at a time
                    theirs = region(addresses_ptr, peer, epoch, slots, region_bytes, x_ptr, FIRST)
                    at = (tile // stride) * (PART * PARTS) + peer * PART + column
                    index = (tile * PARTS + peer) * PART + column
                    total = tl.load(theirs + at, mask=index < count)
                    tl.store(x_ptr + index, total, mask=index < count)
        tl.store(epochs_ptr + slot, epoch)


def launch_arguments(workspace: Workspace, steps: int, device: torch.device) -> dict[str, Any]:
    """Compile-time arguments of every kernel that uses a workspace."""
    return {
        "RANKS": workspace.size,
        "STEPS": steps,
        "SYNC": device.type == "cuda",
        "FIRST": FLAG_BYTES,
        "SLOTS": MAX_SLOTS,
        "STRIDE": _MAX_RANKS,
        "ASSEMBLY": _MEET,
        **launch_options(device),
    }


def all_reduce_(x: Tensor, workspace: Workspace, *, two_shot: bool, steps: int = ALL_STEPS) -> Tensor:
    """x [n, k], contiguous, in place: the sum over the ranks. `Workspace.fits` it. Any float dtype; enqueues one
    kernel, capturable in CUDA graphs. `steps`: see `ALL_STEPS`."""
    assert x.is_contiguous() and workspace.fits(x) and workspace.size in SIZES
    count, itemsize = x.numel(), x.dtype.itemsize
    parts = workspace.size if two_shot else 1
    # As many programs as there are slots, if each gets something to do, and 16 bytes for each of its threads.
    part = min(max(triton.next_power_of_2(-(-count // (workspace.slots * parts))), 1024), _MAX_PART)
    while part * parts * itemsize > workspace.region_bytes:
        part //= 2
    programs = min(triton.cdiv(count, part * parts), workspace.slots)
    assert triton.cdiv(triton.cdiv(count, part * parts), programs) * part * parts * itemsize <= workspace.region_bytes
    _all_reduce_kernel[(programs,)](
        x,
        workspace.addresses,
        workspace.epochs,
        workspace.rank,
        workspace.slots,
        workspace.region_bytes,
        count,
        TWO_SHOT=two_shot,
        PART=part,
        num_warps=max(part // 256, 1),
        **launch_arguments(workspace, steps, x.device),
    )
    return x
