"""Which tokens each block of the decode attention kernel attends to: made on the host for a step, from its lengths.

A sequence that is much longer than its share of the work is cut into runs of tokens, each an item; others are one item.
An item tells a block all about its work (`Work` in merge.cuh). Where they differ much, the longest come first, so that
none begins last; else first runs stand at their rows' numbers, where the kernel looks for them. Knows lengths; knows
nothing of the GPU but how many blocks run at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STRIP = 16  # tokens that a warp takes at a time; runs begin at a multiple
FIELDS = 8  # of an item: row, begin, end, length, first, chunk, chunks, place of the row's first result
MOST_CHUNKS = 64  # of a sequence: one block merges them


@dataclass(frozen=True, slots=True)
class Cutting:
    """How work is cut: `blocks` run at the same time; each item is `kv_heads` blocks; no run is cut into fewer than
    `smallest` tokens, as results of several have to be merged."""

    blocks: int
    kv_heads: int
    smallest: int

    def capacity(self, rows: int) -> int:
        """Items that a step of so many rows has at most. Blocks whose items are not needed have to come and go too:
        where rows alone are enough for the GPU, a few are to spare, for sequences much longer than the others."""
        idle = max(self.blocks - rows * self.kv_heads, 0)
        return rows + idle // self.kv_heads + max(self.blocks // (4 * self.kv_heads), 1)


def make_plan(seq_lens: np.ndarray, rows: int, window: int | None, cutting: Cutting) -> np.ndarray:
    """int32 [cutting.capacity(rows), FIELDS] for sequences of `seq_lens` tokens (int, the new one counted), with the
    sliding `window` if there is one. Rows from len(seq_lens) on and those of length 0 are padding: an item without
    tokens, which writes zeros. Items that are not needed have row -1."""
    length = np.zeros(rows, np.int64)
    length[: len(seq_lens)] = seq_lens
    first = np.zeros_like(length) if window is None else np.maximum(length - window, 0)
    begin = first // STRIP * STRIP
    tokens = length - begin
    chunks, size = _cut(tokens, cutting, cutting.capacity(rows))
    count = int(chunks.sum())
    row = np.repeat(np.arange(rows), chunks)
    place = np.cumsum(chunks) - chunks
    chunk = np.arange(count) - place[row]
    if count > rows or _differ(tokens):
        last = np.minimum(size, tokens - (chunks - 1) * size)
        longest = np.where(chunk == chunks[row] - 1, last[row], size[row])
        order = np.argsort(-longest, kind="stable") if _differ(longest) else np.argsort(chunk > 0, kind="stable")
        row, chunk = row[order], chunk[order]
    plan = np.zeros((cutting.capacity(rows), FIELDS), np.int32)
    plan[:count, 0] = row
    plan[:count, 1] = begin[row] + chunk * size[row]
    plan[:count, 2] = np.minimum(plan[:count, 1] + size[row], length[row])
    plan[:count, 3] = length[row]
    plan[:count, 4] = first[row]
    plan[:count, 5] = chunk
    plan[:count, 6] = chunks[row]
    plan[:count, 7] = place[row]
    plan[count:, 0] = -1
    return plan


def _differ(tokens: np.ndarray) -> bool:
    """Whether it is worth while to begin with the longest."""
    return 2 * int(tokens.max()) * len(tokens) > 3 * int(tokens.sum())


def _cut(tokens: np.ndarray, cutting: Cutting, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """(runs, tokens of a run but the last) of each row; no more runs than `capacity`, which is more than rows."""
    share = -(-int(tokens.sum()) * cutting.kv_heads // cutting.blocks)
    if share > cutting.smallest:
        # What blocks have differs by up to a half of a share; they compete for the memory, so it evens out.
        chunks = (2 * tokens + share) // (2 * share)
    else:
        share = cutting.smallest
        chunks = -(-tokens // share)
    while True:
        chunks = np.clip(chunks, 1, MOST_CHUNKS)
        if int(chunks.sum()) <= capacity:
            break
        share += share // 4
        chunks = (2 * tokens + share) // (2 * share)
    size = np.maximum(-(-tokens // (chunks * STRIP)) * STRIP, STRIP)
    return np.maximum(-(-tokens // size), 1), size
