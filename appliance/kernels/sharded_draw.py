"""The draw from logits of which every rank has some columns: each finds the best token of its own, and the best of
these, exchanged as one number a row, is what a single rank would have drawn.

That is exact because a token's score (its logit, or logit / T and the noise of its own) knows nothing of the other
tokens: see `sampling.py`. Filters and log probabilities need whole rows and are not for here. The kernel follows the
protocol of `all_reduce.py`, as `exchange.py` does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.all_reduce import ALL_STEPS, SIZES, Workspace, launch_arguments, meet, region
from appliance.kernels.deferred_scale import DeferredScale, Product
from appliance.kernels.sampling import draw_scores, score_blocks

_LOWEST_TOKEN = 0x7FFFFFFF  # of a key: the lower 31 bits of a token, reversed
_KEY_BYTES = 8

Randomness = tuple[Tensor, Tensor, Tensor]  # temperature, seeds and positions, as `sampling.draw` takes them


def shard_scores(logits: Product, randomness: Randomness | None, first_token: int, count: int) -> tuple[Tensor, Tensor]:
    """What a rank's logits [m, columns] have to offer: scores float32 [m, b] and their tokens, int64 [m, b], ascending;
    the best of all ranks' is the token that `sampling.draw` gives for the whole rows. The first `count` columns are
    those of tokens from `first_token` on, the others padding. randomness None: all rows are greedy."""
    if logits.is_cuda:
        temperature, seeds, positions = randomness if randomness is not None else (None, None, None)
        return score_blocks(logits, temperature, seeds, positions, None, first_token, count)
    return shard_scores_reference(logits, randomness, first_token, count)


def shard_scores_reference(
    logits: Product, randomness: Randomness | None, first_token: int, count: int
) -> tuple[Tensor, Tensor]:
    """`shard_scores` in plain torch, any device, b = 1."""
    if count == 0:
        scores = torch.full((logits.shape[0], 1), float("-inf"), device=logits.device)
        return scores, torch.full_like(scores, first_token, dtype=torch.int64)
    columns = logits.first_columns(count) if isinstance(logits, DeferredScale) else logits[:, :count]
    temperature, seeds, positions = randomness if randomness is not None else (None, None, None)
    scores = draw_scores(columns, temperature, seeds, positions, None, first_token)
    at = scores.argmax(1, keepdim=True)
    return scores.gather(1, at), at + first_token


# ---------------------------------------------------------------- the best of all ranks


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
