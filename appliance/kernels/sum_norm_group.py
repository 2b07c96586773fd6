"""The ways of `sum_norm.py` as tactics of a group's norms: their memory, what is tried of them before they are relied
on, and which of them take what.

Knows `sum_norm.py` and its reference; which way serves how many rows is `all_reduce_group.py`'s choice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from appliance.kernels.all_reduce_norm import all_reduce_rms_norm_reference
from appliance.kernels.deferred_scale import Product
from appliance.kernels.partial_sum import DealtStream, dealt_rows, whole_stream
from appliance.kernels.peer_memory import Agreement, agree, share
from appliance.kernels.skinny_linear import multiprocessors
from appliance.kernels.sum_norm import (
    MISSING,
    MOST_ONE_SHOT,
    Launch,
    SumSpace,
    Way,
    prepare,
    sum_bytes,
    sum_rms_norm,
    sum_rms_norm_quantize,
    takes_rows_of,
)

log = logging.getLogger(__name__)

CLUSTER_ONE_SHOT, CLUSTER_DEALT = "cluster one-shot", "cluster dealt"
WAYS = {CLUSTER_ONE_SHOT: Way.ONE_SHOT, CLUSTER_DEALT: Way.DEALT}  # by tactic
CAPABILITY = (9, 0)  # clusters, and the instructions that the kernel is made of
_CHECK_ROWS = (3, 70, 150)  # of each number of pieces
_CHECK_EPS = 1e-5


class SumNorms:
    """Sum over ranks, residual add and norm by one kernel, all ways. All ranks call the same in the same order."""

    def __init__(self, space: SumSpace, gather: Callable[[Tensor], Tensor]) -> None:
        """`gather`: x [m, hidden] of every rank: [size, m, hidden]."""
        self.space = space
        self._gather = gather

    def tactics(self, x: Product) -> list[str]:
        """Those that take x and may serve it best."""
        few = x.shape[0] <= MOST_ONE_SHOT
        return [name for name, way in WAYS.items() if self.space.fits(x, way) and (few or way is not Way.ONE_SHOT)]

    def rms_norm(self, how: Launch, x: Product, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """As `partial_sum.Reducer.rms_norm`."""
        stream, result_stream = self._stream(how, residual)
        return sum_rms_norm(x, stream, weight, eps, self.space, how), result_stream

    def rms_norm_quantize(
        self,
        how: Launch,
        x: Product,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
        scale: Tensor | None,
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """As `partial_sum.Reducer.rms_norm_quantize`."""
        stream, result_stream = self._stream(how, residual)
        return sum_rms_norm_quantize(x, stream, weight, eps, self.space, how, dtype, scale), result_stream

    def _stream(self, how: Launch, residual: Tensor) -> tuple[Tensor, Tensor]:
        """What the kernel takes, and what stands for it behind."""
        if how.way is not Way.DEALT:
            whole = whole_stream(residual)
            return whole, whole
        if isinstance(residual, DealtStream):
            return residual.rows, residual
        return residual, DealtStream.of(residual, self.space.rank, self.space.size, self._gather)


# ---------------------------------------------------------------- setting up


@dataclass(frozen=True)
class Norms:
    """Which norms of a model follow sums."""

    hidden: int  # numbers of a row
    dtype: torch.dtype  # of the residual stream
    quantized: torch.dtype | None = None  # of their results; None: `dtype`, as of the final one always


def connect(
    group: Agreement,
    rank: int,
    size: int,
    device: torch.device,
    norms: Norms,
    gather: Callable[[Tensor], Tensor],
) -> SumNorms | None:
    """The group's, `gather` as of `SumNorms`; None, with a line in the log that says why, where other
    kernels have to do, and without one where the model is not for these. Called by all ranks, whose GPUs see each
    other's memory; waits for the device."""
    if norms.dtype != torch.bfloat16 or not takes_rows_of(norms.hidden, size):
        return None
    reason, level = None, logging.WARNING
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        level = logging.INFO  # nothing is wrong
        reason = f"they need compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
    else:
        try:
            integers = norms.quantized == torch.int8
            results = dict.fromkeys((None, norms.quantized))
            prepare(norms.hidden, size, list(results), integers, device)
        except (ImportError, RuntimeError) as error:  # no rank waits for one that cannot compile
            reason = f"the kernel cannot be compiled: {str(error).splitlines()[0]}"
    reason = agree(group, rank, size, reason)
    if reason is None:
        try:
            found = SumNorms(_space(group, rank, size, device), gather)
        except RuntimeError as error:  # the same on all ranks
            reason = f"torch gives no memory that GPUs share: {str(error).splitlines()[0]}"
        else:
            reason = agree(group, rank, size, check(found, device, norms.hidden))
            if reason is None:
                return found
    if reason:
        log.log(level, "no norms by clusters of blocks: %s", reason)
    return None


def _space(group: Agreement, rank: int, size: int, device: torch.device) -> SumSpace:
    """RuntimeError where torch cannot map it."""
    shared = share(group, rank, sum_bytes(), device)
    shared.memory.view(torch.int32).fill_(MISSING)
    counters = torch.zeros(2, dtype=torch.int32, device=device)
    addresses = torch.tensor(shared.addresses, dtype=torch.int64, device=device)
    count = group.minimum(multiprocessors(device))
    torch.cuda.synchronize(device)
    group.minimum(0)  # nobody sends before all memory says that nothing has come
    return SumSpace(rank, size, addresses, counters, torch.zeros_like(counters[:1]), count, shared)


@torch.inference_mode()
def check(sums: SumNorms, device: torch.device, hidden: int) -> str | None:
    """Run all ways on numbers whose sum is known; more calls than there are buffers. Ranks wait for each other in every
    call, so each rank makes all calls, whatever comes out."""
    space = sums.space
    wrong: list[str] = []
    weight = torch.ones(hidden, dtype=torch.bfloat16, device=device)
    for rows in _CHECK_ROWS:
        for turn in range(3):
            partials = [_numbers(rows, hidden, 10 * turn + rank, device) for rank in range(space.size)]
            zeros = torch.zeros_like(partials[0])
            expected, stream = all_reduce_rms_norm_reference(partials, zeros.clone(), weight, _CHECK_EPS)
            assert isinstance(expected, Tensor)
            for name in sums.tactics(partials[0]):
                got_stream = zeros.clone()
                how = Launch(WAYS[name])
                got = sum_rms_norm(partials[space.rank], got_stream, weight, _CHECK_EPS, space, how)
                streams: Sequence[Tensor] = (got_stream, stream)
                if how.way is Way.DEALT:
                    streams = [dealt_rows(kept, space.rank, space.size) for kept in streams]
                if not torch.equal(*streams) or not torch.allclose(got.float(), expected.float(), rtol=1e-2):
                    wrong.append(f"the {name} kernel gives wrong sums on rank {space.rank}")
    return wrong[0] if wrong else None


def _numbers(rows: int, hidden: int, seed: int, device: torch.device) -> Tensor:
    """The same on every device."""
    at = torch.arange(rows * hidden, device=device).view(rows, hidden)
    return ((at * 7919 + seed * 104729) % 1009 - 504).div(256).bfloat16()
