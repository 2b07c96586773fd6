"""Times every way there is to add up over ranks, alone and with a norm behind it, and writes the winners into `TABLE`.

All ranks time the same together, and choose by the slowest of them, so they choose alike. Knows ways by name; how they
add up is for who has them (`all_reduce_group.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from appliance.kernels.tactics import ROW_BUCKETS, TABLE, TimedChoice, Timer

log = logging.getLogger(__name__)

_MEMORY_OF_PROBES = 64 << 20  # bytes; messages beyond are as the largest that was timed, or the library's
_EPS = 1e-5


class Ways(Protocol):
    """A group's ways to add up; see `all_reduce_group.AllReduce`."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def all_reduce(self) -> Callable[[Tensor], Tensor]: ...
    @property
    def rms_norm(self) -> Callable[..., Any]: ...
    @property
    def rms_norm_quantize(self) -> Callable[..., Any]: ...

    def sum_ways(self, x: Tensor) -> list[str]:
        """To add x up."""

    def norm_ways(self, x: Tensor) -> list[str]:
        """To add x up and norm the sum."""

    def by(self, way: str) -> AbstractContextManager[None]:
        """Sums, or norms, go this way."""

    def slowest(self, value: float) -> float:
        """The largest of the ranks' numbers. Waits for the device."""


def key(kind: str, dtype: torch.dtype) -> str:
    """What `TABLE` calls an operation: `kind` "all_reduce" or "all_reduce_norm"."""
    return f"{kind} {str(dtype).removeprefix('torch.')}"


@torch.inference_mode()
def tune(
    ways: Ways, hidden: int, dtype: torch.dtype, timer: Timer, quantized: torch.dtype | None = None
) -> list[TimedChoice]:
    """All ways for rows of `hidden` numbers, norms with results in `quantized` if they are rounded. A choice's features
    are the hidden size and the ranks; its µs are those of the slowest rank. Takes a second or two, and some seconds
    more where kernels are yet to be compiled."""
    weight = torch.ones(hidden, dtype=dtype, device=ways.device)
    chosen = []
    for rows in ROW_BUCKETS:
        if rows * hidden * dtype.itemsize > _MEMORY_OF_PROBES:
            break
        x = torch.zeros(rows, hidden, dtype=dtype, device=ways.device)  # sums of sums would grow
        residual = torch.zeros_like(x)
        launches = 24 if rows <= 256 else 6
        norm: Callable[[], object] = partial(ways.rms_norm, x, residual, weight, _EPS)
        if quantized is not None:
            norm = partial(ways.rms_norm_quantize, x, residual, weight, _EPS, quantized, None)
        for kind, names, run in (
            ("all_reduce", ways.sum_ways(x), partial(ways.all_reduce, x)),
            ("all_reduce_norm", ways.norm_ways(x), norm),
        ):
            times = {name: _time(ways, timer, run, launches, name) for name in names}
            if len(names) > 1:
                chosen.append(_choose(ways, kind, x, times))
    return chosen


def _time(ways: Ways, timer: Timer, run: Callable[[], object], launches: int, way: str) -> float:
    """µs on the slowest rank."""
    with ways.by(way):
        run()
        return ways.slowest(timer([run], launches))


def _choose(ways: Ways, kind: str, x: Tensor, times: Mapping[str, float]) -> TimedChoice:
    ranked = sorted(times, key=lambda way: times[way])
    best, other = ranked[0], ranked[1]
    (rows, hidden), scheme = x.shape, key(kind, x.dtype)
    TABLE.choose(scheme, hidden, ways.size, rows, best)
    if ways.rank == 0:
        line = ", ".join(f"{way} {times[way]:.1f} µs" for way in ranked)
        log.info("%s of %d x %d over %d ranks: %s", kind, rows, hidden, ways.size, line)
    return TimedChoice(
        kind, scheme, hidden, ways.size, rows, best, round(times[best], 2), other, round(times[other], 2)
    )
