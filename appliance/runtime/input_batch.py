"""The persistent batch on the device and the inputs of one step.

Knows slots, pages and tokens; knows nothing of the model, of sampling rules or of why a sequence runs. The host keeps a
mirror of the page table, because planners of attention kernels want it there; token values that were sampled on the
device exist only in `token_table`, which the next step reads directly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from appliance.batching.step import NewSequence, ScheduledSequence, StepPlan
from appliance.kernels.attention import AttentionMetadata

_ALIGNMENT = 16  # bytes; what vectorized loads of the kernels want


@dataclass(slots=True)
class StepInputs:
    """Device views of one step's inputs. They live in one arena: valid until the next step's inputs are uploaded, which
    happens in stream order. Rows past the real ones are padding (CUDA-graph buckets)."""

    num_seqs: int  # real sequences
    slots_host: np.ndarray  # int64 [num_seqs]: their slots, in host memory
    num_tokens: int  # real tokens
    padded_seqs: int
    padded_tokens: int  # rows of token_slots, positions and slot_mapping
    token_slots: Tensor  # int64 [tokens, padding included]: row of the token table
    positions: Tensor  # int64 [tokens, padding included]
    slots: Tensor  # int64 [padded_seqs]: slot of each sequence, the padding slot for padding
    write_slots: (
        Tensor  # int64 [padded_seqs]: where the sampled token goes; the padding slot if the sequence does not sample
    )
    last_rows: Tensor  # int64 [padded_seqs]: row of each sequence's last token
    next_positions: Tensor  # int64 [padded_seqs]: position that the sampled token takes
    metadata: AttentionMetadata


class InputBatch:
    """Slots, their tokens and pages. Mutated only by `apply`; `step_inputs` reads.

    token_table: int32 [max_num_seqs + 1, max_model_len + 1] on the device. The last row is the padding slot, a place to
    read from and write to for rows that stand for nothing. page_table: int32 [max_num_seqs + 1, max_pages].
    """

    def __init__(
        self, max_num_seqs: int, max_model_len: int, max_num_batched_tokens: int, page_size: int, device: torch.device
    ) -> None:
        self.page_size = page_size
        self.device = device
        self.padding_slot = max_num_seqs
        self.max_pages = -(-max_model_len // page_size)
        rows = max_num_seqs + 1
        self.token_table = torch.zeros(rows, max_model_len + 1, dtype=torch.int32, device=device)
        self.num_prompt_tokens = np.zeros(rows, np.int64)
        self.page_table = torch.zeros(rows, self.max_pages, dtype=torch.int32, device=device)
        self._page_table_host = np.zeros((rows, self.max_pages), np.int32)
        self._num_pages = np.zeros(rows, np.int64)
        self._pin = device.type == "cuda"
        # five int64 and three int32 vectors at their longest, each aligned
        size = (
            8 * (2 * max_num_batched_tokens + max_num_batched_tokens + 4 * rows) + 4 * (3 * rows + 8) + 16 * _ALIGNMENT
        )
        self._arena = torch.zeros(size, dtype=torch.uint8, device=device)

    def apply(self, plan: StepPlan) -> None:
        """Fill new slots, append new pages, and write the tokens that the plan brings, on the host mirror and
        (stream-ordered) on the device."""
        flat: list[int] = []
        pages: list[int] = []
        for new in plan.new:
            self._fill_slot(new)
            self._append_pages(new.slot, new.page_ids, flat, pages)
        for item in plan.scheduled:
            if item.new_page_ids:
                self._append_pages(item.slot, item.new_page_ids, flat, pages)
        if flat:
            packed = self._to_device(np.array([flat, pages], np.int64))
            self.page_table.view(-1).index_copy_(0, packed[0], packed[1].to(torch.int32))
        if plan.token_ids:
            rows = plan.scheduled[: len(plan.token_ids)]
            cells = [row.slot * self.token_table.shape[1] + row.start for row in rows]
            packed = self._to_device(np.array([cells, plan.token_ids], np.int64))
            self.token_table.view(-1).index_copy_(0, packed[0], packed[1].to(torch.int32))

    def _fill_slot(self, new: NewSequence) -> None:
        self._num_pages[new.slot] = 0
        self.num_prompt_tokens[new.slot] = new.num_prompt_tokens
        tokens = self._to_device(np.asarray(new.token_ids, np.int32))
        self.token_table[new.slot, : len(new.token_ids)].copy_(tokens, non_blocking=True)

    def _append_pages(self, slot: int, page_ids: list[int], flat: list[int], pages: list[int]) -> None:
        begin = int(self._num_pages[slot])
        end = begin + len(page_ids)
        assert end <= self.max_pages, f"slot {slot} holds {end} pages, at most {self.max_pages} fit its page table"
        self._page_table_host[slot, begin:end] = page_ids
        self._num_pages[slot] = end
        row = slot * self.max_pages
        flat.extend(range(row + begin, row + end))
        pages.extend(page_ids)

    def _to_device(self, array: np.ndarray) -> Tensor:
        host = torch.from_numpy(array)
        if self._pin:
            # Torch's caching host allocator keeps the block until the copy has been done.
            return host.pin_memory().to(self.device, non_blocking=True)
        return host.to(self.device)

    def step_inputs(
        self, scheduled: list[ScheduledSequence], padded_seqs: int | None = None, padded_tokens: int | None = None
    ) -> StepInputs:
        """Inputs of a step, uploaded in one copy. `padded_seqs` pads a pure decode step to a CUDA-graph bucket;
        `padded_tokens` pads what there is one of per token, and nothing else."""
        n = len(scheduled)
        slots = np.fromiter((s.slot for s in scheduled), np.int64, n)
        starts = np.fromiter((s.start for s in scheduled), np.int64, n)
        lengths = np.fromiter((s.length for s in scheduled), np.int64, n)
        samples = np.fromiter((s.samples for s in scheduled), np.bool_, n)
        ends = starts + lengths
        query_start = np.zeros(n + 1, np.int64)
        np.cumsum(lengths, out=query_start[1:])
        num_tokens = int(query_start[-1])
        token_slots, positions, slot_mapping = self._tokens(slots, starts, lengths, query_start)
        rows = padded_seqs or n
        assert padded_seqs is None or num_tokens == n, "only pure decode steps are padded"
        tokens = rows if padded_seqs else padded_tokens or num_tokens
        views = self._upload(
            {
                "token_slots": _padded(token_slots, tokens, self.padding_slot),
                "positions": _padded(positions, tokens, 0),
                "slot_mapping": _padded(slot_mapping, tokens, -1),
                "slots": _padded(slots, rows, self.padding_slot),
                "write_slots": _padded(np.where(samples, slots, self.padding_slot), rows, self.padding_slot),
                "last_rows": _padded(query_start[1:] - 1, rows, 0),
                "next_positions": _padded(ends, rows, 0),
                "query_start": _padded(query_start, rows + 1, num_tokens).astype(np.int32),
                "seq_lens": _padded(ends, rows, 0).astype(np.int32),
            }
        )
        max_seq_len = int(ends.max())
        metadata = AttentionMetadata(
            num_seqs=rows,
            num_tokens=rows if padded_seqs else num_tokens,
            max_query_len=int(lengths.max()),
            # A padded step is replayed from a graph, which must serve every length.
            max_seq_len=self.token_table.shape[1] - 1 if padded_seqs else max_seq_len,
            query_start=views["query_start"],
            seq_lens=views["seq_lens"],
            page_table=self.page_table[:0],  # `gather_page_table` fills it in, inside the graph where there is one
            slot_mapping=views["slot_mapping"],
            query_start_host=query_start.astype(np.int32),
            seq_lens_host=ends.astype(np.int32),
            page_table_host=self._page_table_host[slots, : -(-max_seq_len // self.page_size)],
        )
        return StepInputs(
            num_seqs=n,
            slots_host=slots,
            num_tokens=num_tokens,
            padded_seqs=rows,
            padded_tokens=tokens,
            token_slots=views["token_slots"],
            positions=views["positions"],
            slots=views["slots"],
            write_slots=views["write_slots"],
            last_rows=views["last_rows"],
            next_positions=views["next_positions"],
            metadata=metadata,
        )

    def _tokens(
        self, slots: np.ndarray, starts: np.ndarray, lengths: np.ndarray, query_start: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every token of a step, int64 [num_tokens]: its sequence's slot, position, and place in the KV cache.
        `query_start`: int64 [sequences + 1], where the tokens of each begin."""
        num_tokens = int(query_start[-1])
        token_slots, positions = slots, starts
        if num_tokens != len(slots):  # else a token each
            token_slots = np.repeat(slots, lengths)
            positions = np.repeat(starts - query_start[:-1], lengths) + np.arange(num_tokens)
        pages = self._page_table_host[token_slots, positions // self.page_size].astype(np.int64)
        return token_slots, positions, pages * self.page_size + positions % self.page_size

    def gather_page_table(self, inputs: StepInputs) -> None:
        """Set `inputs.metadata.page_table` to the rows of its sequences, int32 [padded_seqs, max_pages].

        Device work of the forward pass, so that a CUDA graph reads the rows anew at every replay."""
        inputs.metadata.page_table = self.page_table.index_select(0, inputs.slots)

    def _upload(self, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """Copy arrays into the arena in one transfer. Equal sizes give equal addresses, as a CUDA graph needs."""
        offsets: dict[str, int] = {}
        size = 0
        for name, array in arrays.items():
            offsets[name] = size
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        assert size <= self._arena.numel(), f"step inputs of {size} bytes, arena of {self._arena.numel()}"
        host = torch.empty(size, dtype=torch.uint8, pin_memory=self._pin)
        raw = host.numpy()
        views: dict[str, Tensor] = {}
        for name, array in arrays.items():
            begin, end = offsets[name], offsets[name] + array.nbytes
            raw[begin:end] = array.view(np.uint8)
            views[name] = self._arena[begin:end].view(torch.int64 if array.itemsize == 8 else torch.int32)
        self._arena[:size].copy_(host, non_blocking=True)
        return views


def _padded(array: np.ndarray, length: int, value: int) -> np.ndarray:
    if len(array) == length:
        return np.ascontiguousarray(array)
    out = np.full(length, value, array.dtype)
    out[: len(array)] = array
    return out
