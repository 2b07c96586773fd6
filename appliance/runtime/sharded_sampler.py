"""Sampling where every rank has the logits of its own part of the vocabulary, without gathering them.

Rows that need nothing but each token's own logit and noise (greedy ones, and draws by temperature alone) are sampled by
columns: each rank finds the best of its tokens, and one number per row and rank tells which of these it is
(`kernels/sharded_draw.py`). Rows that need all of their logits (filters, penalties, log probabilities) are shared out:
every rank gets some of them whole, one all-to-all instead of an all-gather, samples them as a single rank would, and
the results are gathered. Either way a row's token and log probabilities have the bits of a single rank's.

Who does what follows from the parameters of the slots alone, which all ranks know, so all call the same operations.
Knows `Sampler` and the group; the model has padded its vocabulary until each rank has as many columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from appliance.distributed import TensorParallel
from appliance.kernels.deferred_scale import Product, materialize
from appliance.kernels.sharded_draw import best_token_keys, best_token_of_keys, shard_scores
from appliance.runtime.sampler import Sampler, SamplerOutput, SamplingBatch
from appliance.types import SamplingParams


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Rows of a batch that are sampled by one rank each, `per_rank` by each rank."""

    count: int
    rows: Tensor  # int64 [size * per_rank], on the device, in the order of ranks; filled up with the last one
    mine: np.ndarray  # int64 [per_rank]: those of this rank


@dataclass(frozen=True, slots=True)
class ShardedBatch:
    """What the rows of one `sample` call need. Made by `ShardedSampler.prepare`; valid as a `SamplingBatch` is."""

    num_rows: int
    logprobs: tuple[int | None, ...]  # per row, as in SamplingParams
    by_columns: bool  # some row is sampled by columns
    all_greedy: bool  # all of those are greedy
    shared: SharedRows | None
    alone: SamplingBatch | None  # of this rank's part of the shared rows


class ShardedSampler:
    """`Sampler` of one rank of several; call order and uploads as there. All ranks make the same calls."""

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        max_model_len: int,
        device: torch.device | str,
        tp: TensorParallel,
    ) -> None:
        self._sampler = Sampler(max_num_seqs, vocab_size, max_model_len, device)
        self._tp = tp
        self._vocab_size = vocab_size
        share = tp.padded_share(vocab_size)
        self._first = tp.rank * share
        self._count = max(0, min(share, vocab_size - self._first))  # tokens of this rank; further columns are padding
        self._last: tuple[bytes, ShardedBatch] | None = None

    def set_slot(
        self,
        slot: int,
        params: SamplingParams,
        seed: int,
        suppressed_token_ids: Sequence[int],
        num_prompt_tokens: int,
    ) -> None:
        """`Sampler.set_slot`."""
        self._sampler.set_slot(slot, params, seed, suppressed_token_ids, num_prompt_tokens)
        self._last = None

    # -------------------------------------------------- preparing

    def prepare(self, slots: np.ndarray, max_length: int | None = None) -> ShardedBatch:
        """`Sampler.prepare`."""
        self._sampler.flush()
        slots = np.ascontiguousarray(slots, dtype=np.int64)
        key = slots.tobytes()
        if self._last is None or self._last[0] != key:
            self._last = (key, self._describe(slots))
        batch = self._last[1]
        if batch.shared is None:
            return batch
        return replace(batch, alone=self._sampler.prepare(slots, max_length, only=batch.shared.mine))

    def _describe(self, slots: np.ndarray) -> ShardedBatch:
        whole = self._sampler.whole_row(slots)
        return ShardedBatch(
            num_rows=len(slots),
            logprobs=self._sampler.logprobs(slots),
            by_columns=not whole.all(),
            all_greedy=self._sampler.all_greedy(slots[~whole]),
            shared=self._share_out(np.flatnonzero(whole)) if whole.any() else None,
            alone=None,
        )

    def _share_out(self, rows: np.ndarray) -> SharedRows:
        per_rank = -(-len(rows) // self._tp.size)
        filled = np.concatenate((rows, np.repeat(rows[-1:], per_rank * self._tp.size - len(rows))))
        mine = filled[self._tp.rank * per_rank :][:per_rank]
        return SharedRows(len(rows), self._sampler.upload(filled), mine)

    # -------------------------------------------------- sampling

    def sample(
        self, logits: Product, slots: Tensor, positions: Tensor, token_table: Tensor, batch: ShardedBatch
    ) -> SamplerOutput:
        """One token per row, the same on every rank; `Sampler.sample` with this rank's columns of the logits,
        [m, vocab / size], the vocabulary padded at its end. Log probabilities of rows that want none mean nothing."""
        if logits.shape[0] != batch.num_rows:
            raise ValueError(f"{logits.shape[0]} rows of logits for a batch prepared for {batch.num_rows}")
        if batch.by_columns:
            token_ids = self._best(logits, slots, positions, batch.all_greedy)
        else:
            token_ids = torch.zeros(batch.num_rows, dtype=torch.int64, device=logits.device)
        if batch.shared is None or batch.alone is None:
            return SamplerOutput(token_ids, None)
        rows, count = batch.shared.rows, batch.shared.count
        mine = rows.view(self._tp.size, -1)[self._tp.rank]
        found = self._sampler.sample(self._whole(logits, rows), slots[mine], positions[mine], token_table, batch.alone)
        # Packed log probabilities begin with the token.
        packed = found.token_ids.int()[:, None] if found.logprobs is None else found.logprobs
        everyones = self._gather(packed)[:count]
        token_ids.index_copy_(0, rows[:count], everyones[:, 0].long())
        if found.logprobs is None:
            return SamplerOutput(token_ids, None)
        logprobs = everyones.new_zeros((batch.num_rows, everyones.shape[1]))
        return SamplerOutput(token_ids, logprobs.index_copy_(0, rows[:count], everyones))

    def prompt_logprobs(self, logits: Product, target_ids: Tensor, num_top: int) -> Tensor:
        """`Sampler.prompt_logprobs` with this rank's columns of the logits; whole on every rank."""
        n = len(target_ids)
        filled = torch.arange(-(-n // self._tp.size) * self._tp.size, device=target_ids.device).clamp_(max=n - 1)
        mine = filled.view(self._tp.size, -1)[self._tp.rank]
        packed = self._sampler.prompt_logprobs(self._whole(logits, filled), target_ids[mine], num_top)
        return self._gather(packed)[:n]

    def _best(self, logits: Product, slots: Tensor, positions: Tensor, all_greedy: bool) -> Tensor:
        randomness = None if all_greedy else (*self._sampler.randomness(slots), positions)
        scores, tokens = shard_scores(logits, randomness, self._first, self._count)
        own = self._tp.own_reducer
        if own is not None and (best := own.best_tokens(scores, tokens)) is not None:
            found: Tensor = best
            return found
        keys = best_token_keys(scores, tokens)
        return best_token_of_keys(self._tp.all_gather(keys[:, None]).transpose(0, 1))

    def _whole(self, logits: Product, rows: Tensor) -> Tensor:
        """This rank's part of `rows` (int64 [size * k]), with all their logits: [k, vocab]."""
        # In 16 bits where that is what the product gave; scales are applied in front, as only this rank has them.
        values = logits if isinstance(logits, Tensor) else materialize(logits, torch.float32)
        parts = values.index_select(0, rows).view(self._tp.size, -1, values.shape[1])
        whole = self._tp.all_to_all(parts).transpose(0, 1).flatten(1)
        # Where the vocabulary was padded, a copy without that: kernels of the sampler want rows behind each other.
        return whole[:, : self._vocab_size].contiguous()

    def _gather(self, part: Tensor) -> Tensor:
        """Each rank's rows [k, w], one rank's behind the other's: [size * k, w]."""
        k, w = part.shape
        return self._tp.all_gather(part).view(k, self._tp.size, w).transpose(0, 1).reshape(-1, w)
