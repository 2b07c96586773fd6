"""What ranks hand each other besides sums: all-gather and all-to-all of small tensors, by an own kernel over the
workspace of `all_reduce.py`, whose protocol it follows. `sharded_draw.py` has another such kernel.

A program writes what it has for the others straight into their regions, so that one wait is all: a slot's region of
rank r holds, one after the other, what every rank wrote for r. That a buffer may be overwritten two all-reduces (or
exchanges) later holds for writers elsewhere too: who was told of epoch e by all knows that all have ended epoch e - 1.

Knows the workspace and tensors; which exchange of what size goes this way is `all_reduce_group.py`'s choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.all_reduce import ALL_STEPS, SIZES, Workspace, launch_arguments, meet, region

_MAX_PART = 2048  # numbers for one rank that a program moves at once

# ---------------------------------------------------------------- references


def all_gather_reference(parts: Sequence[Tensor]) -> Tensor:
    """What every rank gets of the ranks' tensors: [size, ...]."""
    return torch.stack(list(parts))


def all_to_all_reference(parts: Sequence[Tensor]) -> list[Tensor]:
    """What each rank gets of the ranks' tensors [size, ...], part r of which is for rank r: [size, ...], by sender."""
    return [torch.stack([part[rank] for part in parts]) for rank in range(len(parts))]


# ---------------------------------------------------------------- Triton


@triton.jit(do_not_specialize=["rank"])
def _exchange_kernel(
    x_ptr,
    out_ptr,
    addresses_ptr,
    epochs_ptr,
    rank,
    slots,
    region_bytes,
    count,
    TO_EACH: tl.constexpr,
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
    """Program: tiles of PART numbers for each rank. x: `count` numbers for all, or so many for each (TO_EACH); out
    [RANKS, count]."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.program_id(0)
    stride = tl.num_programs(0)
    column = tl.arange(0, PART)
    epoch = tl.load(epochs_ptr + slot) + 1
    tiles = tl.cdiv(count, PART)
    if STEPS & 1:
        for tile in range(slot, tiles, stride):
            index = tile * PART + column
            at = ((tile // stride) * RANKS + rank) * PART + column
            for step in tl.static_range(RANKS):
                peer = (rank + step) % RANKS  # ranks write to different ones at a time
                first = (peer * count).to(tl.int64) if TO_EACH else 0
                x = tl.load(x_ptr + first + index, mask=index < count)
                theirs = region(addresses_ptr, peer, epoch, slots, region_bytes, x_ptr, FIRST)
                tl.store(theirs + at, x, mask=index < count)
    if SYNC:
        meet(addresses_ptr, rank, epoch, 0, RANKS, SLOTS, STRIDE, ASSEMBLY)
    if STEPS & 4:
        own = region(addresses_ptr, rank, epoch, slots, region_bytes, x_ptr, FIRST)
        for tile in range(slot, tiles, stride):
            index = tile * PART + column
            for peer in range(RANKS):
                at = ((tile // stride) * RANKS + peer) * PART + column
                x = tl.load(own + at, mask=index < count)
                tl.store(out_ptr + (peer * count).to(tl.int64) + index, x, mask=index < count)
        tl.store(epochs_ptr + slot, epoch)


def exchange_fits(bytes_for_each: int, workspace: Workspace) -> bool:
    """Whether `exchange` takes so many bytes for each rank."""
    return 0 < bytes_for_each * workspace.size <= workspace.capacity // 2


def exchange(x: Tensor, workspace: Workspace, *, to_each: bool, steps: int = ALL_STEPS) -> Tensor:
    """All-gather, [size, *x.shape], or with `to_each` all-to-all of x [size, ...]. x contiguous, `exchange_fits` what
    is for each rank; any dtype. Enqueues one kernel, capturable in CUDA graphs."""
    size = workspace.size
    assert x.is_contiguous() and size in SIZES and (not to_each or x.shape[0] == size)
    out = torch.empty_like(x) if to_each else torch.empty((size, *x.shape), dtype=x.dtype, device=x.device)
    count, itemsize = out.numel() // size, x.dtype.itemsize
    assert exchange_fits(count * itemsize, workspace)
    part = min(max(triton.next_power_of_2(-(-count // workspace.slots)), 256), _MAX_PART)
    while part * size * itemsize > workspace.region_bytes:
        part //= 2
    programs = min(triton.cdiv(count, part), workspace.slots)
    assert triton.cdiv(triton.cdiv(count, part), programs) * part * size * itemsize <= workspace.region_bytes
    _exchange_kernel[(programs,)](
        x,
        out,
        workspace.addresses,
        workspace.epochs,
        workspace.rank,
        workspace.slots,
        workspace.region_bytes,
        count,
        TO_EACH=to_each,
        PART=part,
        num_warps=4,
        **launch_arguments(workspace, steps, x.device),
    )
    return out
