"""One rank of tests/test_all_reduce_gpu.py: sums in the background by copy engines on a real GPU group."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable

import torch
from all_reduce_ranks import partials
from torch import Tensor, distributed

from appliance.distributed import GroupCollectives
from appliance.kernels import copy_engines
from appliance.kernels.all_reduce import all_reduce_reference
from appliance.kernels.all_reduce_group import connect
from appliance.kernels.copy_sums import CopySums
from appliance.settings import share_gpu

_ROUND_BYTES = 2 << 20
_SHAPES = [(300, 8192), (64, 4096), (8, 8192), (1001, 1024)]  # of three rounds, one, one with few rows, two


def run(rank: int, size: int, address: str) -> None:
    device = torch.device("cuda", rank % torch.cuda.device_count())
    if torch.cuda.device_count() < size:
        share_gpu(rank)
    torch.cuda.set_device(device)
    distributed.init_process_group("nccl", init_method=address, rank=rank, world_size=size, device_id=device)
    group = GroupCollectives(size, device)
    own = connect(group.library(), rank, size, device)
    assert own is not None, "no peer access here"
    copies = copy_engines.connect(group.library(), rank, size, device, _ROUND_BYTES)
    assert copies is not None, "a check found something"
    own.use_copies(copies)
    group.own = own
    with torch.inference_mode():
        for lanes in (1, size - 1):
            copies.use_lanes(lanes)
            _in_flight(group, rank, size, device)
            torch.cuda.synchronize()
            group.minimum(0)
        _lets_go(copies, group, rank, device)
    # Streams of rank 0 were let go on with rubbish: nothing is left to be told to the library.
    os._exit(0)


def _in_flight(group: GroupCollectives, rank: int, size: int, device: torch.device) -> None:
    """Products beside up to three sums; each sum is read and its memory written anew, while ranks are slow in turns."""
    given = [partials(size, *shape, device, seed) for seed, shape in enumerate(_SHAPES)]
    expected = [all_reduce_reference(summands) for summands in given]
    weight = torch.randn(2048, 2048, device=device).bfloat16()
    pending: deque[tuple[int, Callable[[], Tensor]]] = deque()
    wrong = torch.zeros((), dtype=torch.int64, device=device)

    def read() -> None:
        which, wait = pending.popleft()
        wrong.add_((wait() != expected[which]).sum())

    for turn in range(120):
        if turn % size == rank:
            torch.cuda._sleep(200_000)
        if len(pending) == 3:
            read()
        which = turn % len(_SHAPES)
        pending.append((which, group.begin_all_reduce(given[which][rank].clone())))
        weight @ weight
    while pending:
        read()
    assert int(wrong) == 0, f"{int(wrong)} numbers are not those of the reference"


def _lets_go(copies: CopySums, group: GroupCollectives, rank: int, device: torch.device) -> None:
    """A stream that waits for ranks that never come ends once it is told to."""
    if rank == 0:
        wait = copies.begin(torch.ones(64, 4096, device=device).bfloat16())
        again = copies.begin(torch.ones(640, 4096, device=device).bfloat16())
        ended = torch.cuda.Event()
        wait(), again()
        ended.record()
        time.sleep(0.3)
        assert not ended.query(), "it did not wait for the others"
        copies.abort()
        limit = time.monotonic() + 20
        while not ended.query():
            assert time.monotonic() < limit, "it does not end"
            time.sleep(0.01)
    group.minimum(0)
