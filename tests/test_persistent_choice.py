"""Ranks take the same way to decode, whatever each of them finds: threads in place of ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from appliance.runtime import persistent_choice
from appliance.runtime.persistent_choice import choose

SIZE = 3


class Together:
    """Collective operations of threads."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(SIZE, timeout=20)
        self._values: dict[int, int] = {}

    def minimum_of(self, rank: int) -> Callable[[int], int]:
        def minimum(value: int) -> int:
            self._barrier.wait()
            self._values[rank] = value
            self._barrier.wait()
            return min(self._values.values())

        return minimum


class FakeDecode:
    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = list(sizes)

    def serves(self, rows: int) -> bool:
        return rows in self.sizes

    def keep_below(self, rows: int) -> None:
        self.sizes = [size for size in self.sizes if size < rows]


def run(
    monkeypatch: pytest.MonkeyPatch,
    *,
    refuses: Callable[[int], str | None] = lambda rank: None,
    fails: Callable[[int], bool] = lambda rank: False,
    times: Callable[[int, int], tuple[float, float]] = lambda rank, rows: (1.0, 2.0),
    room_for: Callable[[int], int] = lambda rank: 4,
    no_memory: bool = False,
) -> tuple[list[Any], list[list[Any]]]:
    """What each rank chose, and what its all-reduce is to let go."""
    together = Together()
    local = threading.local()

    def connect(*args: Any) -> Any:
        if no_memory:
            raise RuntimeError("cannot map\nmore")
        return SimpleNamespace(abort="abort")

    def make(*args: Any) -> FakeDecode:
        if fails(local.rank):
            raise ValueError("the compiler says no")
        return FakeDecode(tuple(rows for rows in args[3] if rows <= room_for(local.rank)))

    monkeypatch.setattr(persistent_choice, "refusal", lambda *_: refuses(local.rank))
    monkeypatch.setattr(persistent_choice.exchange, "connect", connect)
    monkeypatch.setattr(persistent_choice, "PersistentDecode", make)
    released: list[list[Any]] = [[] for _ in range(SIZE)]

    def of_rank(rank: int) -> Any:
        local.rank = rank
        reducer = SimpleNamespace(on_abort=released[rank])
        tp = SimpleNamespace(rank=rank, size=SIZE, minimum=together.minimum_of(rank), own_reducer=reducer)
        model: Any = SimpleNamespace(tp=tp, config=SimpleNamespace(hidden_size=64))
        caches: Any = [SimpleNamespace(device="cpu")]
        batch: Any = None
        return choose(model, caches, batch, (1, 2, 4), lambda _, rows: times(rank, rows))

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(of_rank, range(SIZE))), released


def test_the_slowest_rank_decides_up_to_which_size(monkeypatch: pytest.MonkeyPatch) -> None:
    found, released = run(monkeypatch, times=lambda rank, rows: (30.0 if (rank, rows) == (1, 4) else 10.0, 20.0))
    assert [decode.sizes for decode in found] == [[1, 2]] * SIZE
    assert released == [["abort"]] * SIZE
    # A rank on which the layers take longer holds them up for all.
    found, _ = run(monkeypatch, times=lambda rank, rows: (30.0, 40.0 if rank == 2 else 20.0))
    assert [decode.sizes for decode in found] == [[1, 2, 4]] * SIZE


def test_one_rank_refuses_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = run(monkeypatch, refuses=lambda rank: "odd weights" if rank == 1 else None)
    assert found == ["not on rank 1", "odd weights", "not on rank 1"]


def test_a_kernel_that_one_rank_cannot_make(monkeypatch: pytest.MonkeyPatch) -> None:
    found, released = run(monkeypatch, fails=lambda rank: rank == 2)
    assert found == ["not on rank 2", "not on rank 2", "it cannot be made: the compiler says no"]
    assert released == [[]] * SIZE


def test_no_memory_between_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = run(monkeypatch, no_memory=True)
    assert found == ["torch gives no memory that GPUs share: cannot map"] * SIZE


def test_what_has_no_room_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = run(monkeypatch, room_for=lambda rank: 2 if rank == 1 else 4)
    assert [decode.sizes for decode in found] == [[1, 2]] * SIZE


def test_slower_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    found, released = run(monkeypatch, times=lambda rank, rows: (3.0, 2.0))
    assert found == ["layer by layer is faster here"] * SIZE
    assert released == [[]] * SIZE, "nobody holds the memory that the ranks shared"
