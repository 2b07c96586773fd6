"""Sampling where every rank has the logits of its own part of the vocabulary, without gathering them where that is
cheaper.

Rows that need nothing but each token's own logit and noise (greedy ones, and draws by temperature alone) are sampled by
columns: each rank finds the best of its tokens, and one number per row and rank tells which of these it is
(`kernels/sharded_draw.py`). Rows that need all of their logits (filters, penalties, log probabilities) are shared out
where there are many: every rank gets some of them whole, one all-to-all instead of an all-gather, samples them as a
single rank would, and the results are gathered. Few are gathered, and every rank samples them all: one exchange instead
of two. Any way a row's token and log probabilities have the bits of a single rank's.

What is few: four H200s, 128,256 tokens, µs shared out / gathered. On the GPU at 1, 8, 64 and 256 rows: top-p 90/81,
154/155, 262/354, 377/857; top-k 127/117, 134/144, 179/360, 384/1095; log probabilities 144/140, 165/164, 216/406,
439/1249. From call to result, which at few rows is what the host takes to launch it all: 329/244 and 377/328, 718/590
and 734/613, 514/365 and 559/375 at 1 and 8 rows; at 64 gathering still wins (410/460 for top-p, 595/769, 501/538), at
256 it does not. A decode step launches its sampling while the GPU works on the layers, so the GPU's time decides, and
the host's only where the GPU's makes no difference: up to the number of rows at which it makes none, 8 over 4 ranks,
where sharing spares each rank the sampling of 6 rows.

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

WORTH = 7  # rows whose sampling sharing out has to spare each rank


@dataclass(frozen=True, slots=True)
class WholeRows:
    """Rows of a batch that are sampled from all of their logits: shared out, `per_rank` for each rank, or gathered."""

    count: int
    gathered: bool
    # int64, on the device: [count], or of shared ones [size * per_rank] in the order of ranks, filled up with the last
    # one; None: all rows of the batch are gathered.
    rows: Tensor | None
    mine: np.ndarray  # int64: those that this rank samples


@dataclass(frozen=True, slots=True)
class ShardedBatch:
    """What the rows of one `sample` call need. Made by `ShardedSampler.prepare`; valid as a `SamplingBatch` is."""

    num_rows: int
    logprobs: tuple[int | None, ...]  # per row, as in SamplingParams
    by_columns: bool  # some row is sampled by columns
    all_greedy: bool  # all of those are greedy
    whole: WholeRows | None
    alone: SamplingBatch | None  # of those whole rows that this rank samples


class ShardedSampler:
    """`Sampler` of one rank of several; call order and uploads as there. All ranks make the same calls."""

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        max_model_len: int,
        device: torch.device | str,
        tp: TensorParallel,
        worth: int = WORTH,
    ) -> None:
        """`worth`: rows are gathered where sharing them out spares each rank the sampling of fewer; 0: never."""
        self._worth = worth
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
        if batch.whole is None:
            return batch
        return replace(batch, alone=self._sampler.prepare(slots, max_length, only=batch.whole.mine))

    def _describe(self, slots: np.ndarray) -> ShardedBatch:
        whole = self._sampler.whole_row(slots)
        if whole.any() and self._are_few(len(slots)):
            whole[:] = True  # the others come along
        return ShardedBatch(
            num_rows=len(slots),
            logprobs=self._sampler.logprobs(slots),
            by_columns=not whole.all(),
            all_greedy=self._sampler.all_greedy(slots[~whole]),
            whole=self._deal(np.flatnonzero(whole), len(slots)) if whole.any() else None,
            alone=None,
        )

    def _are_few(self, count: int) -> bool:
        """Rows that are gathered if they have to be sampled from all of their logits."""
        return count - -(-count // self._tp.size) < self._worth

    def _deal(self, rows: np.ndarray, num_rows: int) -> WholeRows:
        """Who samples these."""
        if self._are_few(len(rows)):
            some = None if len(rows) == num_rows else self._sampler.upload(rows)
            return WholeRows(len(rows), True, some, rows)
        per_rank = -(-len(rows) // self._tp.size)
        filled = np.concatenate((rows, np.repeat(rows[-1:], per_rank * self._tp.size - len(rows))))
        mine = filled[self._tp.rank * per_rank :][:per_rank]
        return WholeRows(len(rows), False, self._sampler.upload(filled), mine)

    # -------------------------------------------------- sampling

    def sample(
        self, logits: Product, slots: Tensor, positions: Tensor, token_table: Tensor, batch: ShardedBatch
    ) -> SamplerOutput:
        """One token per row, the same on every rank; `Sampler.sample` with this rank's columns of the logits,
        [m, vocab / size], the vocabulary padded at its end. Log probabilities of rows that want none mean nothing."""
        if logits.shape[0] != batch.num_rows:
            raise ValueError(f"{logits.shape[0]} rows of logits for a batch prepared for {batch.num_rows}")
        whole, alone = batch.whole, batch.alone
        if whole is not None and alone is not None and whole.rows is None:
            return self._sampler.sample(self._gathered(logits, None), slots, positions, token_table, alone)
        if batch.by_columns:
            token_ids = self._best(logits, slots, positions, batch.all_greedy)
        else:
            token_ids = torch.zeros(batch.num_rows, dtype=torch.int64, device=logits.device)
        if whole is None or alone is None or whole.rows is None:
            return SamplerOutput(token_ids, None)
        mine = whole.rows if whole.gathered else whole.rows.view(self._tp.size, -1)[self._tp.rank]
        numbers = self._gathered(logits, mine) if whole.gathered else self._shared_out(logits, whole.rows)
        found = self._sampler.sample(numbers, slots[mine], positions[mine], token_table, alone)
        # Packed log probabilities begin with the token.
        packed = found.token_ids.int()[:, None] if found.logprobs is None else found.logprobs
        everyones = packed if whole.gathered else self._rows_of_all(packed)[: whole.count]
        at = whole.rows[: whole.count]
        token_ids.index_copy_(0, at, everyones[:, 0].long())
        if found.logprobs is None:
            return SamplerOutput(token_ids, None)
        logprobs = everyones.new_zeros((batch.num_rows, everyones.shape[1]))
        return SamplerOutput(token_ids, logprobs.index_copy_(0, at, everyones))

    def prompt_logprobs(self, logits: Product, target_ids: Tensor, num_top: int) -> Tensor:
        """`Sampler.prompt_logprobs` with this rank's columns of the logits; whole on every rank."""
        n = len(target_ids)
        filled = torch.arange(-(-n // self._tp.size) * self._tp.size, device=target_ids.device).clamp_(max=n - 1)
        mine = filled.view(self._tp.size, -1)[self._tp.rank]
        packed = self._sampler.prompt_logprobs(self._shared_out(logits, filled), target_ids[mine], num_top)
        return self._rows_of_all(packed)[:n]

    def _best(self, logits: Product, slots: Tensor, positions: Tensor, all_greedy: bool) -> Tensor:
        randomness = None if all_greedy else (*self._sampler.randomness(slots), positions)
        scores, tokens = shard_scores(logits, randomness, self._first, self._count)
        own = self._tp.own_reducer
        if own is not None and (best := own.best_tokens(scores, tokens)) is not None:
            found: Tensor = best
            return found
        keys = best_token_keys(scores, tokens)
        return best_token_of_keys(self._tp.all_gather(keys[:, None]).transpose(0, 1))

    def _gathered(self, logits: Product, rows: Tensor | None) -> Tensor:
        """These rows (int64 [k]; None: all) with all their logits, on every rank: [k, vocab], its own copy."""
        values = _values(logits)
        whole = self._tp.all_gather(values if rows is None else values.index_select(0, rows))
        return whole[:, : self._vocab_size].contiguous()

    def _shared_out(self, logits: Product, rows: Tensor) -> Tensor:
        """This rank's part of `rows` (int64 [size * k]), with all their logits: [k, vocab]."""
        values = _values(logits)
        parts = values.index_select(0, rows).view(self._tp.size, -1, values.shape[1])
        whole = self._tp.all_to_all(parts).transpose(0, 1).flatten(1)
        # Where the vocabulary was padded, a copy without that: kernels of the sampler want rows behind each other.
        return whole[:, : self._vocab_size].contiguous()

    def _rows_of_all(self, part: Tensor) -> Tensor:
        """Each rank's rows [k, w], one rank's behind the other's: [size * k, w]."""
        k, w = part.shape
        return self._tp.all_gather(part).view(k, self._tp.size, w).transpose(0, 1).reshape(-1, w)


def _values(logits: Product) -> Tensor:
    """In 16 bits where that is what the product gave; scales are applied, as only this rank has them."""
    return logits if isinstance(logits, Tensor) else materialize(logits, torch.float32)
