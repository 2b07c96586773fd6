"""Ranks as threads of one process, which meet in every collective operation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from appliance.distributed import TensorParallel

T = TypeVar("T")


class Meeting:
    """Collective operations of ranks that are threads; counts the numbers that travel to a rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: list[str] = []
        self.numbers = 0
        self._given: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=20)

    def rank(self, rank: int) -> TensorParallel:
        return TensorParallel(rank, self.size, _Rank(self, rank))

    def run(self, act: Callable[[TensorParallel], T]) -> list[T]:
        """What `act` gives on each rank."""
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: act(self.rank(rank)), range(self.size)))

    def exchange(self, rank: int, name: str, x: Tensor, take: Callable[[list[Tensor]], Tensor]) -> Tensor:
        self._given[rank] = (name, x)
        self._barrier.wait()
        names, given = zip(*self._given, strict=True)
        assert set(names) == {name} and len({x.shape for x in given}) == 1, "ranks do different things"
        found = take(list(given)).clone()
        if rank == 0:
            self.calls.append(name)
            self.numbers += found.numel()
        self._barrier.wait()
        return found


class _Rank:
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self._rank = meeting, rank

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._meeting.exchange(self._rank, "all_reduce", x, lambda xs: torch.stack(xs).sum(0))

    def begin_all_reduce(self, x: Tensor) -> Callable[[], Tensor]:
        return lambda: self._meeting.exchange(self._rank, "background all_reduce", x, lambda xs: torch.stack(xs).sum(0))

    def all_gather(self, x: Tensor) -> Tensor:
        return self._meeting.exchange(self._rank, "all_gather", x, torch.stack)

    def all_to_all(self, x: Tensor) -> Tensor:
        take = lambda xs: torch.stack([x[self._rank] for x in xs])  # noqa: E731
        return self._meeting.exchange(self._rank, "all_to_all", x, take)

    def minimum(self, value: int) -> int:
        return value
