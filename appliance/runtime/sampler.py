"""Turns logits into tokens for the slots of a batch, each with its own parameters, without waiting for the device.

Knows `SamplingParams` and slots; knows nothing of the model, of scheduling or of text. The arithmetic is in
`kernels/sampling.py` and `kernels/filtered_draw.py`. What a batch needs is decided on the host from the parameters
(`prepare`), so a batch of greedy requests runs an argmax and nothing else.

Order of a row's processing, as in Hugging Face `generate` and vLLM: logit bias, suppression before min_tokens,
repetition, frequency and presence penalties, temperature, top-k, top-p, min-p, draw. Log probabilities are of the raw
logits. On one of several ranks this is a part of `sharded_sampler.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from appliance.kernels.deferred_scale import Product, materialize
from appliance.kernels.filtered_draw import draw_filtered
from appliance.kernels.sampling import GREEDY_TEMPERATURE, apply_penalties, argmax, draw, pack_logprobs
from appliance.types import SamplingParams, TokenLogprobs

# One row of the parameter table, on the host and on the device: words of 32 bits, so that one copy moves it.
_ROW = np.dtype(
    [
        ("temperature", "<f4"),
        ("top_p", "<f4"),
        ("min_p", "<f4"),
        ("repetition", "<f4"),
        ("presence", "<f4"),
        ("frequency", "<f4"),
        ("top_k", "<i4"),
        ("num_prompt", "<i4"),
        ("seed_low", "<u4"),
        ("seed_high", "<u4"),
    ]
)
_COLUMN = {name: i for i, name in enumerate(_ROW.names or ())}
_WORDS = len(_COLUMN)
_SEED = slice(_COLUMN["seed_low"], _COLUMN["seed_high"] + 1)
_MAX_TOP_K = 1024  # beyond it sorting all is no slower
_ALWAYS = np.iinfo(np.int64).max  # `until` of a bias: at every position


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """What the rows of one `sample` call need. Made by `Sampler.prepare`; valid for its slots until one is set anew."""

    num_rows: int
    all_greedy: bool
    any_filter: bool  # some random row has top-k, top-p or min-p
    num_sorted: int  # most likely tokens that the filters must look at; 0: all of the vocabulary
    max_logprobs: int  # most top log probabilities a row asks for; -1: no row wants any
    logprobs: tuple[int | None, ...]  # per row, as in SamplingParams
    penalty_rows: Tensor | None  # int64 [p], on the device: rows with a penalty
    bias: Tensor | None  # int64 [4, b], on the device: row, token, float32 bits of the value, until (position)
    width: int  # columns of the token table that penalties read


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """token_ids int64 [m]; logprobs int32 [m, 3 + 2n], packed by `kernels.sampling.pack_logprobs`, None if no row wants
    any. Both on the device of the logits; `unpack_logprobs` reads a host copy of the latter."""

    token_ids: Tensor
    logprobs: Tensor | None


class Sampler:
    """Parameters of all slots, and sampling from them.

    Call order of a step: `set_slot` for slots that changed, `prepare`, `sample`; all on one stream. Uploads go through
    freshly taken blocks of torch's pinned-memory cache, which gives a block out again only after the copies that read
    it have run, so the host may be any number of steps ahead.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, max_model_len: int, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        # A slot that was never set is greedy and wants nothing (rows that only pad a batch use such a slot).
        self._params = np.zeros(max_num_seqs, dtype=_ROW)
        self._params["top_p"] = self._params["repetition"] = 1
        host_table = torch.from_numpy(self._params.view(np.int32).reshape(-1, _WORDS))
        self._table = host_table.to(self._device, copy=True)
        self._bias: list[np.ndarray | None] = [None] * max_num_seqs  # int64 [3, k]: token, value bits, until
        self._logprobs: list[int | None] = [None] * max_num_seqs
        self._changed: set[int] = set()
        self._last: tuple[bytes, SamplingBatch] | None = None

    def set_slot(
        self,
        slot: int,
        params: SamplingParams,
        seed: int,
        suppressed_token_ids: Sequence[int],
        num_prompt_tokens: int,
    ) -> None:
        """Gives a slot to a sequence. Host only; the next `prepare` uploads it.

        seed: any integer, its low 64 bits count. suppressed_token_ids: not sampled while the output is shorter than
        params.min_tokens. Token ids of the bias that the vocabulary lacks have no logit and therefore no effect.
        """
        row = self._params[slot : slot + 1]
        row["temperature"] = 0.0 if params.greedy else params.temperature
        row["top_p"], row["min_p"], row["top_k"] = params.top_p, params.min_p, max(0, min(params.top_k, 2**31 - 1))
        row["repetition"] = params.repetition_penalty
        row["presence"], row["frequency"] = params.presence_penalty, params.frequency_penalty
        row["num_prompt"] = num_prompt_tokens
        row["seed_low"], row["seed_high"] = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
        entries = [(token, value, _ALWAYS) for token, value in params.logit_bias.items()]
        if params.min_tokens > 0:
            until = num_prompt_tokens + params.min_tokens
            entries += [(token, float("-inf"), until) for token in dict.fromkeys(suppressed_token_ids)]
        entries = [entry for entry in entries if 0 <= entry[0] < self._vocab_size]
        self._bias[slot] = _pack_bias(entries) if entries else None
        self._logprobs[slot] = params.logprobs
        self._changed.add(slot)
        self._last = None

    def prepare(
        self, slots: np.ndarray, max_length: int | None = None, only: np.ndarray | None = None
    ) -> SamplingBatch:
        """Uploads what changed and says what the rows `slots` (int [m]) need.

        max_length: an upper bound of the rows' token counts, so that penalties need not read whole rows of the token
        table; None: max_model_len. only: of the rows that are sampled here, if not all are; the same for the same
        slots. They are processed as they would be among all. Costs no upload while neither the slots nor their
        parameters change.
        """
        self.flush()
        slots = np.ascontiguousarray(slots, dtype=np.int64)
        key = slots.tobytes()
        if self._last is None or self._last[0] != key:
            self._last = (key, self._describe(slots, slots if only is None else slots[only]))
        length = self._max_model_len if max_length is None else max_length
        width = min(max(64, 1 << max(0, length - 1).bit_length()), self._max_model_len)
        return replace(self._last[1], width=width)

    def whole_row(self, slots: np.ndarray) -> np.ndarray:
        """bool [m]: rows whose token or log probabilities depend on more than each token's own logit and noise."""
        rows = self._params[slots]
        wants = [self._bias[slot] is not None or self._logprobs[slot] is not None for slot in slots]
        return _filtered(rows) | _penalized(rows) | np.array(wants, dtype=bool)

    def logprobs(self, slots: np.ndarray) -> tuple[int | None, ...]:
        """Per row, as in SamplingParams."""
        return tuple(self._logprobs[slot] for slot in slots)

    def all_greedy(self, slots: np.ndarray) -> bool:
        return not _random(self._params[slots]).any()

    def flush(self) -> None:
        """Uploads what changed; `prepare` does."""
        if not self._changed:
            return
        changed = np.fromiter(self._changed, dtype=np.int64)
        rows = np.empty((len(changed), _WORDS + 1), dtype=np.int32)
        rows[:, 0] = changed
        rows[:, 1:] = self._params[changed].view(np.int32).reshape(-1, _WORDS)
        uploaded = self.upload(rows)
        self._table.index_copy_(0, uploaded[:, 0].long(), uploaded[:, 1:])
        self._changed.clear()

    def upload(self, array: np.ndarray) -> Tensor:
        """A copy on the device, for work that is enqueued behind it."""
        tensor = torch.from_numpy(array)
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _describe(self, slots: np.ndarray, sampled: np.ndarray) -> SamplingBatch:
        rows = self._params[slots]
        filtered = _filtered(rows)
        unlimited = np.any(filtered & (rows["top_k"] <= 0) & (rows["top_p"] < 1))
        num_sorted = max(1, int(rows["top_k"][filtered].max(initial=0)))
        penalized = np.flatnonzero(_penalized(self._params[sampled]))
        return SamplingBatch(
            num_rows=len(sampled),
            all_greedy=not _random(rows).any(),
            any_filter=bool(filtered.any()),
            num_sorted=0 if unlimited or num_sorted > _MAX_TOP_K else num_sorted,
            max_logprobs=max((n for n in self.logprobs(slots) if n is not None), default=-1),
            logprobs=self.logprobs(sampled),
            penalty_rows=self.upload(penalized) if len(penalized) else None,
            bias=self._upload_bias(sampled),
            width=self._max_model_len,
        )

    def _upload_bias(self, slots: np.ndarray) -> Tensor | None:
        parts = []
        for row, slot in enumerate(slots):
            entries = self._bias[slot]
            if entries is not None:
                parts.append(np.concatenate((np.full((1, entries.shape[1]), row, dtype=np.int64), entries)))
        return self.upload(np.concatenate(parts, axis=1)) if parts else None

    def sample(
        self, logits: Product, slots: Tensor, positions: Tensor, token_table: Tensor, batch: SamplingBatch
    ) -> SamplerOutput:
        """One token per row.

        logits [m, vocab], raw, of any float dtype or with scales still to be applied: converted to float32 (and written
        to, if they are that), save where one pass over them is all that is wanted. slots int64 [m], as in `prepare`;
        positions int64 [m]: where each new token will stand, which is the number of tokens before it; token_table int
        [slots, tokens].
        Raises ValueError if the batch was prepared for another number of rows.
        """
        if logits.shape[0] != batch.num_rows:
            raise ValueError(f"{logits.shape[0]} rows of logits for a batch prepared for {batch.num_rows}")
        if batch.bias is None and batch.penalty_rows is None and batch.max_logprobs < 0:
            return SamplerOutput(self._draw(logits, slots, positions, batch), None)
        numbers = materialize(logits, torch.float32)
        token_ids = self._draw(self._edit(numbers, slots, positions, token_table, batch), slots, positions, batch)
        if batch.max_logprobs < 0:
            return SamplerOutput(token_ids, None)
        return SamplerOutput(token_ids, pack_logprobs(numbers, token_ids, min(batch.max_logprobs, self._vocab_size)))

    def _edit(
        self, logits: Tensor, slots: Tensor, positions: Tensor, token_table: Tensor, batch: SamplingBatch
    ) -> Tensor:
        """Logits with bias, suppression and penalties; the raw ones are kept where log probabilities need them."""
        if batch.bias is None and batch.penalty_rows is None:
            return logits
        if batch.max_logprobs >= 0:
            logits = logits.clone()
        if batch.bias is not None:
            row, token, bits, until = batch.bias
            value = torch.where(positions[row] < until, bits.int().view(torch.float32), 0.0)
            logits.index_put_((row, token), value, accumulate=True)
        if batch.penalty_rows is not None:
            rows = batch.penalty_rows
            slot, params = slots[rows], self._table[slots[rows]]
            floats = params.view(torch.float32)
            logits[rows] = apply_penalties(
                logits[rows],
                token_table[slot, : batch.width],
                params[:, _COLUMN["num_prompt"]],
                positions[rows],
                floats[:, _COLUMN["repetition"]],
                floats[:, _COLUMN["presence"]],
                floats[:, _COLUMN["frequency"]],
            )
        return logits

    def _draw(self, logits: Product, slots: Tensor, positions: Tensor, batch: SamplingBatch) -> Tensor:
        if batch.all_greedy:
            return argmax(logits)
        params = self._table[slots]
        floats = params.view(torch.float32)
        temperature, seeds = floats[:, _COLUMN["temperature"]], params[:, _SEED]
        if not batch.any_filter:
            return draw(logits, temperature, seeds, positions, None)
        filters = params[:, _COLUMN["top_k"]], floats[:, _COLUMN["top_p"]], floats[:, _COLUMN["min_p"]]
        return draw_filtered(
            materialize(logits, torch.float32), temperature, seeds, positions, *filters, batch.num_sorted
        )

    def randomness(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """temperature float32 [m] and seeds int32 [m, 2] of slots int64 [m], on the device."""
        params = self._table[slots]
        return params.view(torch.float32)[:, _COLUMN["temperature"]], params[:, _SEED]

    def prompt_logprobs(self, logits: Product, target_ids: Tensor, num_top: int) -> Tensor:
        """`prompt_logprobs` of logits as `sample` takes them."""
        return prompt_logprobs(materialize(logits, torch.float32), target_ids, num_top)


def _random(rows: np.ndarray) -> np.ndarray:
    return rows["temperature"] >= GREEDY_TEMPERATURE


def _filtered(rows: np.ndarray) -> np.ndarray:
    return _random(rows) & ((rows["top_k"] > 0) | (rows["top_p"] < 1) | (rows["min_p"] > 0))


def _penalized(rows: np.ndarray) -> np.ndarray:
    return (rows["repetition"] != 1) | (rows["presence"] != 0) | (rows["frequency"] != 0)


def _pack_bias(entries: list[tuple[int, float, int]]) -> np.ndarray:
    """int64 [3, k]: token, float32 bits of the value, until."""
    tokens, values, until = zip(*entries)
    bits = np.array(values, dtype=np.float32).view(np.int32)
    return np.array([tokens, bits, until], dtype=np.int64)


def prompt_logprobs(logits: Tensor, target_ids: Tensor, num_top: int) -> Tensor:
    """Log probabilities of prompt tokens: logits float32 [n, vocab] of the tokens before, target_ids int64 [n] the
    tokens that stand there. Packed as `SamplerOutput.logprobs` are, with num_top (0..vocab) most likely ones."""
    return pack_logprobs(logits, target_ids, num_top)


def unpack_logprobs(packed: np.ndarray, wanted: Sequence[int | None]) -> list[TokenLogprobs | None]:
    """A host copy of packed log probabilities (int32 [m, 3 + 2n]) as values; `wanted`: per row how many of the most
    likely ones (at most n), or None for no entry."""
    num_top = (packed.shape[1] - 3) // 2
    values = np.ascontiguousarray(packed).view(np.float32)
    result: list[TokenLogprobs | None] = []
    for ints, floats, count in zip(packed, values, wanted):
        if count is None:
            result.append(None)
            continue
        ids, logprobs = ints[3 : 3 + count].tolist(), floats[3 + num_top : 3 + num_top + count].tolist()
        result.append(TokenLogprobs(int(ints[0]), float(floats[2]), int(ints[1]), tuple(zip(ids, logprobs))))
    return result
