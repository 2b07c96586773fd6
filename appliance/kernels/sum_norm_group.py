"""The ways of `sum_norm.py` as tactics of a group's norms: their memory, what is tried of them before they are relied
on, and which of them take what.

Knows `sum_norm.py` and its reference; which way serves how many rows is `all_reduce_group.py`'s choice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from appliance.kernels.all_reduce_norm import all_reduce_rms_norm_reference
from appliance.kernels.deferred_scale import Product
from appliance.kernels.partial_sum import DealtStream, dealt_rows, whole_stream
from appliance.kernels.peer_memory import Agreement, agree, share
from appliance.kernels.skinny_linear import multiprocessors
from appliance.kernels.sum_norm import (
    MISSING,
    SumSpace,
    Way,
    compile_for,
    sum_bytes,
    sum_rms_norm,
    sum_rms_norm_quantize,
)
from appliance.kernels.weight_prefetch import Ahead

log = logging.getLogger(__name__)

WAYS = {"cluster one-shot": Way.ONE_SHOT, "cluster two-shot": Way.TWO_SHOT, "cluster dealt": Way.DEALT}  # by tactic
_MOST_ONE_SHOT = 64  # rows; with more, sending all to all is slower everywhere
_CHECK_COLUMNS = 1024
_CHECK_ROWS = (3, 70)
_CHECK_EPS = 1e-5


class SumNorms:
    """Sum over ranks, residual add and norm by one kernel, all ways. All ranks call the same in the same order."""

    def __init__(self, space: SumSpace, gather: Callable[[Tensor], Tensor]) -> None:
        """`gather`: x [m, hidden] of every rank: [size, m, hidden]."""
        self.space = space
        self._gather = gather

    def tactics(self, x: Product) -> list[str]:
        """Those that take x."""
        few = x.shape[0] <= _MOST_ONE_SHOT
        return [name for name, way in WAYS.items() if self.space.fits(x, way) and (few or way is not Way.ONE_SHOT)]

    def rms_norm(
        self, tactic: str, x: Product, residual: Tensor, weight: Tensor, eps: float, ahead: Ahead | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `partial_sum.Reducer.rms_norm`."""
        stream, result_stream = self._stream(tactic, residual)
        return sum_rms_norm(x, stream, weight, eps, self.space, WAYS[tactic], ahead), result_stream

    def rms_norm_quantize(
        self,
        tactic: str,
        x: Product,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
        scale: Tensor | None,
        ahead: Ahead | None = None,
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """As `partial_sum.Reducer.rms_norm_quantize`."""
        stream, result_stream = self._stream(tactic, residual)
        found = sum_rms_norm_quantize(x, stream, weight, eps, self.space, WAYS[tactic], dtype, scale, ahead)
        return found, result_stream

    def _stream(self, tactic: str, residual: Tensor) -> tuple[Tensor, Tensor]:
        """What the kernel takes, and what stands for it behind."""
        if WAYS[tactic] is not Way.DEALT:
            whole = whole_stream(residual)
            return whole, whole
        if isinstance(residual, DealtStream):
            return residual.rows, residual
        return residual, DealtStream.of(residual, self.space.rank, self.space.size, self._gather)


class Group(Agreement, Protocol):
    def all_gather(self, x: Tensor) -> Tensor:
        """x [n, k] of every rank: [size, n, k]."""


def connect(group: Group, rank: int, size: int, device: torch.device) -> SumNorms | None:
    """The group's; None, with a line in the log that says why, where other kernels have to do. Called by all ranks,
    whose GPUs see each other's memory; waits for the device."""
    reason = None
    try:
        for way in Way:  # no rank waits for one that cannot compile
            for rows in _CHECK_ROWS:
                compile_for(rows, _CHECK_COLUMNS, size, way, multiprocessors(device), device)
    except (ImportError, RuntimeError) as error:
        reason = f"the kernel cannot be compiled: {str(error).splitlines()[0]}"
    reason = agree(group, rank, size, reason)
    if reason is None:
        try:
            found = _make(group, rank, size, device)
        except RuntimeError as error:  # the same on all ranks
            reason = f"torch gives no memory that GPUs share: {str(error).splitlines()[0]}"
        else:
            reason = agree(group, rank, size, check(found, device))
            if reason is None:
                return found
    if reason:
        log.warning("no norms by clusters of blocks: %s", reason)
    return None


def _make(group: Group, rank: int, size: int, device: torch.device) -> SumNorms:
    shared = share(group, rank, sum_bytes(), device)
    shared.memory.view(torch.int32).fill_(MISSING)
    counters = torch.zeros(2, dtype=torch.int32, device=device)
    addresses = torch.tensor(shared.addresses, dtype=torch.int64, device=device)
    count = group.minimum(multiprocessors(device))
    torch.cuda.synchronize(device)
    group.minimum(0)  # nobody sends before all memory says that nothing has come
    space = SumSpace(rank, size, addresses, counters, torch.zeros_like(counters[:1]), count, shared)
    return SumNorms(space, group.all_gather)


def check(sums: SumNorms, device: torch.device) -> str | None:
    """Run all ways on numbers whose sum is known; more calls than there are buffers. Ranks wait for each other in every
    call, so each rank makes all calls, whatever comes out."""
    space = sums.space
    wrong: list[str] = []
    weight = torch.ones(_CHECK_COLUMNS, dtype=torch.bfloat16)
    for rows in _CHECK_ROWS:
        for name, way in WAYS.items():
            for turn in range(3):
                generator = torch.Generator().manual_seed(turn)
                shape = rows, _CHECK_COLUMNS
                partials = [torch.randn(shape, generator=generator).bfloat16() for _ in range(space.size)]
                zeros = torch.zeros_like(partials[0])
                expected, stream = all_reduce_rms_norm_reference(partials, zeros, weight, _CHECK_EPS)
                assert isinstance(expected, Tensor)
                x = partials[space.rank].to(device)
                got_stream = torch.zeros_like(x)
                got = sum_rms_norm(x, got_stream, weight.to(device), _CHECK_EPS, space, way).cpu()
                streams = got_stream.cpu(), stream
                if way is Way.DEALT:
                    streams = tuple(dealt_rows(kept, space.rank, space.size) for kept in streams)  # type: ignore[assignment]
                if not torch.equal(*streams) or not torch.allclose(got.float(), expected.float(), rtol=1e-2):
                    wrong.append(f"the {name} kernel gives wrong sums on rank {space.rank}")
    return wrong[0] if wrong else None
