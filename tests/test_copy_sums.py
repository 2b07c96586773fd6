"""Sums in the background by copies: several "ranks" in one process, whose streams are queues that run in any order that
their waits allow. (Real ones: all_reduce_ranks.py.)"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from quantized_helpers import DEVICE
from test_all_reduce import partials
from torch import Tensor

from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.all_reduce import all_reduce_reference
from appliance.kernels.copy_sums import BUFFERS, FLAG_BYTES, CopySums, add_up_, add_up_reference, shared_bytes

pytestmark = pytest.mark.skipif(not HAS_TRITON or DEVICE == "cuda", reason="only in Triton's interpreter")

ROUND = 4096


class Queue:
    """A stream: what is first in it says, when tried, whether it is done."""

    def __init__(self) -> None:
        self.operations: deque[Callable[[], bool]] = deque()

    def add(self, act: Callable[[], Any]) -> None:
        self.operations.append(lambda: act() is not False)


class FakeQueues:
    """`single`: the driver has put all streams in one queue."""

    def __init__(self, *, single: bool = False) -> None:
        self.main = Queue()
        self.all = [self.main]
        self._single = single

    def current(self) -> Queue:
        return self.main

    def stream(self) -> Queue:
        if not self._single:
            self.all.append(Queue())
        return self.all[-1]

    def record(self, stream: Queue) -> list[bool]:
        event: list[bool] = []
        stream.add(lambda: event.append(True))
        return event

    def wait_event(self, stream: Queue, event: list[bool]) -> None:
        stream.add(lambda: bool(event))

    def copy(self, stream: Queue, to: int, source: int, size_bytes: int) -> None:
        stream.add(lambda: ctypes.memmove(to, source, size_bytes))

    def write(self, stream: Queue, address: int, value: int) -> None:
        def act() -> None:
            ctypes.c_uint32.from_address(address).value = value & 0xFFFFFFFF

        stream.add(act)

    def wait(self, stream: Queue, address: int, value: int) -> None:
        def reached() -> bool:
            behind = (ctypes.c_uint32.from_address(address).value - value) & 0xFFFFFFFF
            return behind < 1 << 31

        stream.add(reached)

    def run(self, stream: Queue, launch: Callable[[], None]) -> None:
        stream.add(launch)

    def release(self, words: Tensor, value: int) -> None:
        words.fill_(value)


class Group:
    def __init__(self, size: int, *, single: bool = False, lanes: int = 1) -> None:
        self.queues = [FakeQueues(single=single) for _ in range(size)]
        self.memory = torch.zeros(size, shared_bytes(ROUND), dtype=torch.uint8)
        addresses = [memory.data_ptr() for memory in self.memory]
        self.ranks = [
            CopySums(rank, addresses, self.memory[rank], queues, round_bytes=ROUND, lanes=lanes)
            for rank, queues in enumerate(self.queues)
        ]

    def drain(self, seed: int) -> bool:
        """Run what can be run, in some order; whether that is everything."""
        order = random.Random(seed)
        waiting = [queue for queues in self.queues for queue in queues.all if queue.operations]
        blocked: set[int] = set()
        while len(blocked) < len(waiting):
            queue = order.choice([queue for queue in waiting if id(queue) not in blocked])
            steps = order.choice([1, 1, 3, 1000])
            advanced = 0
            while steps and queue.operations and queue.operations[0]():
                queue.operations.popleft()
                steps, advanced = steps - 1, advanced + 1
            blocked = set() if advanced else blocked | {id(queue)}
            waiting = [queue for queue in waiting if queue.operations]
            blocked &= {id(queue) for queue in waiting}
        return not waiting


def _read(pending: deque[Callable[[], Tensor]], main: Queue, results: list[Tensor]) -> None:
    """The oldest sum, on the stream that computes."""
    x = pending.popleft()()
    main.add(lambda: results.append(x.clone()))


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(("single", "lanes"), [(False, 1), (False, 3), (True, 1)])
def test_sums_have_the_bits_of_the_reference_in_any_order(size: int, single: bool, lanes: int) -> None:
    """Two tensors in turns, written anew as soon as their sum was read, of one to three rounds, with more rounds in
    flight than there are buffers; streams get on as they like."""
    for seed in range(4):
        group = Group(size, single=single, lanes=lanes)
        columns, turns = 16, 9
        rows = [random.Random(seed).randint(size, 3 * ROUND // 32 // 2) for _ in range(turns)]
        given = [partials(size, rows[turn], columns, seed=100 * seed + turn) for turn in range(turns)]
        found: list[list[Tensor]] = [[] for _ in range(size)]
        for rank, (sums, queues) in enumerate(zip(group.ranks, group.queues, strict=True)):
            places = [torch.zeros(max(rows), columns) for _ in range(2)]
            pending: deque[Callable[[], Tensor]] = deque()

            read = partial(_read, pending, queues.main, found[rank])
            for turn in range(turns):
                if len(pending) == 2:
                    read()
                x = places[turn % 2][: rows[turn]]
                queues.main.add(lambda x=x, mine=given[turn][rank]: x.copy_(mine) is not None)
                pending.append(sums.begin(x))
            while pending:
                read()
        assert group.drain(seed), "ranks wait for each other"
        for results in found:
            for got, summands in zip(results, given, strict=True):
                assert torch.equal(got, all_reduce_reference(summands))


def test_ranks_that_are_gone_are_waited_for_until_abort() -> None:
    group = Group(2)
    sums, queues = group.ranks[0], group.queues[0]
    waits = [sums.begin(torch.ones(4, 16)) for _ in range(BUFFERS + 2)]
    for wait in waits:
        wait()
    assert not group.drain(1)
    sums.abort()
    assert group.drain(2)
    x = torch.ones(4, 16)
    assert sums.begin(x)() is x and not any(queue.operations for queue in queues.all)


def test_flags_may_wrap_around() -> None:
    group = Group(2)
    for sums in group.ranks:
        sums._rounds = (1 << 32) - 3
        sums.memory[:FLAG_BYTES].view(torch.int32).fill_(-3)
    xs = [[torch.full((4, 16), 1.0 + rank) for _ in range(8)] for rank in range(2)]
    waits = [sums.begin(x) for rank, sums in enumerate(group.ranks) for x in xs[rank]]
    assert len(waits) == 16 and not any((x == 3).any() for x in xs[0])
    assert group.drain(3)
    assert all((x == 3).all() for mine in xs for x in mine)


def test_what_fits() -> None:
    sums = Group(4).ranks[0]
    row = torch.zeros(4, ROUND // 4 // 2, dtype=torch.bfloat16)
    assert sums.fits(row) and sums.fits(row.repeat(100, 1))
    assert not sums.fits(row[:3]), "a rank would have no row"
    assert not sums.fits(torch.zeros(4, 2 * row.shape[1], dtype=torch.bfloat16)), (
        "a row is more than a share of a round"
    )
    assert not sums.fits(row[:, :8]) and not sums.fits(torch.zeros(8, 4, dtype=torch.bfloat16))
    assert not sums.fits(torch.zeros(8, 16, dtype=torch.int32)) and not sums.fits(torch.zeros(64))
    assert not sums.fits(torch.zeros(4097, dtype=torch.bfloat16)[1:].view(8, 512)), "not aligned"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [1, 4096, 5001])
def test_kernel_adds_up_in_rank_order(dtype: torch.dtype, count: int) -> None:
    for rank in range(4):
        x = torch.randn(1, count, generator=torch.Generator().manual_seed(rank)).to(dtype)
        slots = torch.randn(4, 5008, generator=torch.Generator().manual_seed(9)).to(dtype)
        before, want = slots.clone(), add_up_reference(x, slots, rank)
        add_up_(x, slots, rank)
        assert torch.equal(x, want) and torch.equal(slots[rank, :count], want[0])
        before[rank, :count] = want[0]
        assert torch.equal(slots, before), "others' numbers, and what is behind them, stay"
