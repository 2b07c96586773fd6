"""What ranks hand each other besides sums: small tensors, and the best token of each. Own kernels over the workspace of
`all_reduce.py`, whose protocol they follow.

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
_LOWEST_TOKEN = 0x7FFFFFFF  # of a key: the lower 31 bits of a token, reversed
_KEY_BYTES = 8

# ---------------------------------------------------------------- references


def all_gather_reference(parts: Sequence[Tensor]) -> Tensor:
    """What every rank gets of the ranks' tensors: [size, ...]."""
    return torch.stack(list(parts))


def all_to_all_reference(parts: Sequence[Tensor]) -> list[Tensor]:
    """What each rank gets of the ranks' tensors [size, ...], part r of which is for rank r: [size, ...], by sender."""
    return [torch.stack([part[rank] for part in parts]) for rank in range(len(parts))]


def best_token_keys(scores: Tensor, tokens: Tensor) -> Tensor:
    """int64 [m], in the order of a row's largest score, the lower token being the larger of equals. scores float32
    [m, b], not NaN; tokens int64 [m, b], ascending, below 2^31."""
    at = scores.argmax(1, keepdim=True)
    bits = (scores.gather(1, at) + 0.0).view(torch.int32).long()  # + 0.0: both zeros are one
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return ((ordered << 32) | (_LOWEST_TOKEN - tokens.gather(1, at)))[:, 0]


def best_token_of_keys(keys: Tensor) -> Tensor:
    """Token ids, int64 [m], of the ranks' keys [size, m]."""
    return _LOWEST_TOKEN - (keys.amax(0) & 0xFFFFFFFF)


def best_tokens_reference(scores: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
    """`best_tokens` of all ranks' scores in plain torch."""
    return best_token_of_keys(torch.stack([best_token_keys(s, t) for s, t in zip(scores, tokens, strict=True)]))


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


@triton.jit(do_not_specialize=["rank", "m"])
def _best_tokens_kernel(
    scores_ptr,
    tokens_ptr,
    keys_ptr,
    out_ptr,
    addresses_ptr,
    epochs_ptr,
    rank,
    slots,
    region_bytes,
    m,
    blocks,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
    STEPS: tl.constexpr,
    SYNC: tl.constexpr,
    FIRST: tl.constexpr,
    SLOTS: tl.constexpr,
    STRIDE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: rows. scores and tokens [m, blocks]; BLOCK: `blocks` as a power of two. A key is that of
    `best_token_keys`; of keys_ptr only the type counts."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.program_id(0)
    stride = tl.num_programs(0)
    block = tl.arange(0, BLOCK)
    peers = tl.arange(0, RANKS)
    epoch = tl.load(epochs_ptr + slot) + 1
    if STEPS & 1:
        everyone = region(addresses_ptr, peers, epoch, slots, region_bytes, keys_ptr, FIRST)
        for row in range(slot, m, stride):
            there = block < blocks
            score = tl.load(scores_ptr + row * blocks + block, mask=there, other=float("-inf"))
            best, index = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
            token = tl.load(tokens_ptr + row * blocks + index)
            bits = (best + 0.0).to(tl.int32, bitcast=True)
            ordered = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)
            key = (ordered << 32) | (0x7FFFFFFF - token)
            at = (row // stride) * RANKS + rank
            tl.store(everyone + at, tl.zeros((RANKS,), tl.int64) + key)
    if SYNC:
        meet(addresses_ptr, rank, epoch, 0, RANKS, SLOTS, STRIDE, ASSEMBLY)
    if STEPS & 4:
        own = region(addresses_ptr, rank, epoch, slots, region_bytes, keys_ptr, FIRST)
        for row in range(slot, m, stride):
            keys = tl.load(own + (row // stride) * RANKS + peers)
            key = tl.max(keys, 0)
            tl.store(out_ptr + row, 0x7FFFFFFF - (key & 0xFFFFFFFF))
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


def best_tokens_fit(rows: int, workspace: Workspace) -> bool:
    """Whether `best_tokens` takes so many rows."""
    return 0 < -(-rows // workspace.slots) * workspace.size * _KEY_BYTES <= workspace.region_bytes


def best_tokens(scores: Tensor, tokens: Tensor, workspace: Workspace, *, steps: int = ALL_STEPS) -> Tensor:
    """Token ids, int64 [m], of the largest of all ranks' scores in each row, the lowest of equals: the same on every
    rank. scores float32 [m, b], no NaN; tokens int64 [m, b], ascending, those of a rank all lower than the next's,
    below 2^31; b may differ between ranks. `best_tokens_fit` m. Enqueues one kernel, capturable in CUDA graphs."""
    m, blocks = scores.shape
    assert best_tokens_fit(m, workspace) and workspace.size in SIZES
    assert scores.is_contiguous() and tokens.is_contiguous() and scores.shape == tokens.shape
    out = torch.empty(m, dtype=torch.int64, device=scores.device)
    _best_tokens_kernel[(min(m, workspace.slots),)](
        scores,
        tokens,
        out,
        out,
        workspace.addresses,
        workspace.epochs,
        workspace.rank,
        workspace.slots,
        workspace.region_bytes,
        m,
        blocks,
        BLOCK=triton.next_power_of_2(blocks),
        num_warps=1,
        **launch_arguments(workspace, steps, scores.device),
    )
    return out
