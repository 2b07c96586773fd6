"""Brings a part of the next product's weight into the L2 cache while kernels run that leave memory idle.

In a decode step sums over ranks and norms take a sixth of a layer and read next to nothing, and products then wait for
their weights. Kernels launched in front of a product take an optional `Ahead`: what of its weight to bring into L2.
Programs that do nothing else are added to their grid, behind those that do the work (few rows leave most
multiprocessors without). They do not wait for what runs in front of them, so they work beside it if it lets its
successor start (`dependent_launch.py`): they read weights, which nothing in the stream writes, and no number changes.
A kernel that takes it begins with

    if AHEAD:
        if tl.program_id(0) >= ahead_behind:
            prefetch_ahead(ahead_ptr, ahead_rows, ahead_row_bytes, ahead_piece, ahead_behind)
            return

and is launched with `launch`'s grid and arguments. Of every cache line one word is loaded, with the hint that the
others will be wanted. Instructions that only prefetch would let a program end at once, but on an H200 products behind
them (prefetch.global.L2, cp.async.bulk.prefetch) gained a tenth to a third of what they gain here.

What a product gains is less than what memory would take: 0.1 µs a MiB on an H200, where reading it takes 0.24, since
multiprocessors take in numbers from L2 not twice as fast. What there is no time for delays the kernel that brings it,
and so everything behind: in front of attention or between two products nothing is won. On GPUs before Hopper,
elsewhere, and where dependent launches are disabled, nothing is brought. Knows shapes and bytes; nothing of layers. How
much pays is found out by timing: `TABLE` has it, by the shape of the product, as it has the ways to compute that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.dependent_launch import launch_options
from appliance.kernels.tactics import TABLE

KEY = "ahead"  # of `TABLE`, in place of a scheme
_PROGRAMS = 128  # that bring something: about one for each multiprocessor
_LINE = 128  # bytes of a cache line


@dataclass(frozen=True, slots=True)
class Ahead:
    """What to bring: of each row of a weight the first `piece` bytes, since products go through all rows at once, from
    front to back."""

    weight: Tensor  # [rows, …] of any dtype, contiguous
    piece: int  # bytes, whole cache lines

    @property
    def row_bytes(self) -> int:
        return self.weight.shape[1] * self.weight.element_size()


def beginning(weight: Tensor, wanted: int) -> Ahead | None:
    """About `wanted` bytes of a weight; None: there is nothing to bring, or rows are not whole cache lines."""
    if weight.dim() != 2 or not weight.is_contiguous() or weight.numel() == 0:
        return None
    row_bytes = weight.shape[1] * weight.element_size()
    lines = min(wanted // weight.shape[0], row_bytes) // _LINE
    if lines == 0 or row_bytes % _LINE or weight.data_ptr() % _LINE:
        return None
    return Ahead(weight, lines * _LINE)


def chosen(weight: Tensor, out_features: int, in_features: int, rows: int) -> Ahead | None:
    """What `TABLE` says of a product with `rows` rows, which reads `weight`."""
    size = TABLE.chosen(KEY, out_features, in_features, rows)
    return beginning(weight, int(size.split()[0]) << 20) if size is not None else None


def name_of(mebibytes: int) -> str:
    """What `TABLE` calls a choice: how much is brought."""
    return f"{mebibytes} MiB"


def launch(ahead: Ahead | None, grid: tuple[int, ...], device: torch.device) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The grid of a kernel that without `ahead` has `grid`, and keyword arguments of its launch: those named ahead_…,
    AHEAD, and those of `dependent_launch.launch_options`. The programs that bring something have the numbers from
    grid[0] on along the first axis."""
    options = launch_options(device)
    if ahead is None or not options["PDL"] or 0 in grid:  # somebody must wait for what is in front
        names = ("ahead_ptr", "ahead_rows", "ahead_row_bytes", "ahead_piece", "ahead_behind")
        return grid, options | dict.fromkeys(names) | {"AHEAD": False}
    others = 1
    for count in grid[1:]:
        others *= count
    return (grid[0] + -(-_PROGRAMS // others), *grid[1:]), options | {
        "ahead_ptr": ahead.weight.view(torch.uint8),
        "ahead_rows": ahead.weight.shape[0],
        "ahead_row_bytes": ahead.row_bytes,
        "ahead_piece": ahead.piece,
        "ahead_behind": grid[0],
        "AHEAD": True,
    }


@triton.jit
def lines_of(first, LANES: tl.constexpr, ahead_ptr, rows, row_bytes, piece, behind):
    """Where the cache lines begin that this program brings `first` and at once with it, int64 addresses [LANES], and
    whether there are as many."""
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * (tl.num_programs(0) - behind)
    program += tl.program_id(0) - behind
    lines = piece // 128
    line = program * LANES + first + tl.arange(0, LANES)
    at = ahead_ptr + (line // lines).to(tl.int64) * row_bytes + (line % lines) * 128
    return at.to(tl.int64, bitcast=True), line < rows * lines


@triton.jit
def prefetch_ahead(ahead_ptr, rows, row_bytes, piece, behind):
    """This program's share; of programs whose number along the first axis is `behind` or more."""
    LANES: tl.constexpr = 512  # as many threads as a program has at most
    at_once = (tl.num_programs(0) - behind) * tl.num_programs(1) * tl.num_programs(2) * LANES
    seen = tl.zeros((LANES,), dtype=tl.int32)
    for first in range(0, rows * (piece // 128), at_once):
        at, there = lines_of(first, LANES, ahead_ptr, rows, row_bytes, piece, behind)
        seen ^= tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.L2::128B.b32 $0, [$1]; }",
            "=&r,l,r",
            [at, there.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    # Somebody must want what was loaded, or the compiler leaves the loads out.
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.eq.s32 p, $1, 0x5f3759df; @p nanosleep.u32 1; mov.b32 $0, 0; }",
        "=r,r",
        [seen],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
