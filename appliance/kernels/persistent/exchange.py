"""The memory in which the persistent kernels of several ranks leave their sums for each other: laid out as exchange.cuh
has it, inboxes for every number of rows that there is a kernel for.

Each rank has a piece that the others write to (`peer_memory.py`), and epochs of its own. All ranks must launch the same
kernels in the same order. Knows neither models nor how sums are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from appliance.kernels.peer_memory import Agreement, share

RANKS = (2, 4, 8)  # numbers of ranks that kernels are made for
_WORD_BYTES = 8  # a pair of bf16 numbers and an epoch
_HALVES = 2


def inbox_bytes(ranks: int, hidden: int, rows: int) -> int:
    """Of one rank, for kernels of `rows` rows: [2, ranks, rows, hidden / 2] words."""
    return _HALVES * ranks * rows * (hidden // 2) * _WORD_BYTES


class Exchange:
    """One rank's view of all inboxes."""

    def __init__(
        self, rank: int, addresses: Sequence[int], hidden: int, sizes: Sequence[int], device: torch.device, owner: Any
    ) -> None:
        """`addresses`: where this rank sees every rank's piece, zeros; `owner` keeps them. `sizes`: numbers of rows."""
        self.ranks = len(addresses)
        self._rank = rank
        self._owner = owner
        self._inboxes: dict[int, list[int]] = {}
        offset = 0
        for rows in sizes:
            self._inboxes[rows] = [address + offset for address in addresses]
            offset += inbox_bytes(self.ranks, hidden, rows)
        self._epochs = {rows: torch.zeros(1, dtype=torch.int64, device=device) for rows in sizes}
        # Made now: nothing can be allocated any more while kernels wait for ranks that are gone.
        self._abandoned = torch.zeros(1, dtype=torch.int64, device=device)
        self._yes = torch.ones(1, dtype=torch.int64)
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._yes, self._stream = self._yes.pin_memory(), torch.cuda.Stream(device)

    def table(self, rows: int) -> list[int]:
        """The end of the kernel's `Model`."""
        return [self._rank, self._epochs[rows].data_ptr(), self._abandoned.data_ptr(), *self._inboxes[rows]]

    @property
    def held(self) -> list[Tensor]:
        """What the table points to."""
        return [*self._epochs.values(), self._abandoned]

    def abort(self) -> None:
        """Let kernels that wait for ranks that are gone go on, with rubbish. From any thread. A copy, since there is no
        room for another kernel beside them."""
        with torch.cuda.stream(self._stream):
            self._abandoned.copy_(self._yes, non_blocking=True)


def connect(
    group: Agreement, rank: int, ranks: int, hidden: int, sizes: Sequence[int], device: torch.device
) -> Exchange:
    """Called by all ranks. RuntimeError, on every rank, where one has no memory that the others can map."""
    size_bytes = sum(inbox_bytes(ranks, hidden, rows) for rows in sizes)
    piece = share(group, rank, size_bytes, device)
    return Exchange(rank, piece.addresses, hidden, sizes, device, piece)
