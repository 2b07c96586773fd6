"""Which share of a model a rank holds, and how the ranks put their results together.

A *stage* has some of the model's layers; the ranks of a stage are a tensor-parallel group, which shares each layer.
Rank r of all is number r % tp_size in stage r // tp_size. Inside a stage numbers are added up (`TensorParallel`); from
stage to stage hidden states go one way only, to the rank of the same number (`PipelineStage`).

Knows ranks, not models: layers ask it for their share of a dimension. At size 1 every operation is a no-op. How numbers
travel is a `Collectives` or `Links`; those here are torch.distributed's (gloo between CPUs, NCCL between GPUs). How the
ranks found each other is `meeting.py`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed
from torch import Tensor

from appliance.errors import HardwareError

_UNSENT = 2  # hidden states on their way at once: of a long prompt each may take 100 MB


class Collectives(Protocol):
    """How a group's numbers travel. All ranks call the same operations in the same order; each waits for the others.
    On a GPU they are enqueued on the current stream and may be captured in a CUDA graph."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, with the same bits on every rank, in x's dtype; may be written over x."""

    def begin_all_reduce(self, x: Tensor) -> Callable[[], Tensor]:
        """The same beside what is enqueued next: call what is returned to wait for it. Nobody else uses x until then.
        Not captured."""

    def all_gather(self, x: Tensor) -> Tensor:
        """x [n, k] of every rank, in rank order: [size, n, k]."""

    def all_to_all(self, x: Tensor) -> Tensor:
        """x [size, n, k], whose part r is for rank r: what every rank had for this one, in rank order: [size, n, k]."""

    def minimum(self, value: int) -> int:
        """The smallest of the ranks' numbers. Waits for the device."""


class GroupCollectives:
    """torch.distributed's collectives over one of its process groups."""

    def __init__(
        self,
        size: int,
        device: torch.device,
        group: torch.distributed.ProcessGroup | None = None,
        on_call: Callable[[], None] = lambda: None,
    ) -> None:
        """`group` None: the default group. `on_call` is called in front of every operation that the host enqueues, so
        that somebody can tell which rank did not get that far."""
        self._size = size
        self._device = device
        self._group = group
        self._on_call = on_call
        # What adds numbers up instead of the library, if anything: a `kernels.partial_sum.Reducer`, set after joining.
        self.own: Any = None

    def use(self, group: torch.distributed.ProcessGroup) -> None:
        """The process group, where it could only be made after all ranks had joined."""
        self._group = group

    @property
    def process_group(self) -> torch.distributed.ProcessGroup | None:
        """None: the default group."""
        return self._group

    def library(self) -> GroupCollectives:
        """The same group's, always by the library."""
        return GroupCollectives(self._size, self._device, self._group, self._on_call)

    def all_reduce(self, x: Tensor) -> Tensor:
        self._on_call()
        if self.own is not None:
            return cast(Tensor, self.own.all_reduce(x))
        torch.distributed.all_reduce(x, group=self._group)
        return x

    def begin_all_reduce(self, x: Tensor) -> Callable[[], Tensor]:
        self._on_call()
        work = torch.distributed.all_reduce(x, group=self._group, async_op=True)

        def wait() -> Tensor:
            if work is not None:
                work.wait()
            return x

        return wait

    def all_gather(self, x: Tensor) -> Tensor:
        self._on_call()
        if self.own is not None and (found := self.own.all_gather(x)) is not None:
            return cast(Tensor, found)
        x = x.contiguous()
        whole = x.new_empty((self._size * x.shape[0], *x.shape[1:]))
        _gather_into(whole, x, group=self._group)
        return whole.view(self._size, *x.shape)

    def all_to_all(self, x: Tensor) -> Tensor:
        self._on_call()
        if self.own is not None and (found := self.own.all_to_all(x)) is not None:
            return cast(Tensor, found)
        whole = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.distributed.all_to_all_single(whole, x.contiguous(), group=self._group)
        return whole

    def minimum(self, value: int) -> int:
        self._on_call()
        smallest = torch.tensor(value, dtype=torch.int64, device=self._device)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN, group=self._group)
        return int(smallest)


# Renamed in torch 2.13.
_gather_into = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor


@dataclass(frozen=True)
class TensorParallel:
    """One rank's place in the group. Without `collectives` a rank of several can be described, but not run."""

    rank: int = 0
    size: int = 1
    collectives: Collectives | None = None

    def share(self, total: int, what: str) -> int:
        """This rank's part of a dimension. HardwareError if it does not divide evenly; `what` names it there."""
        if total % self.size:
            raise HardwareError(
                f"{total} {what} cannot be split evenly over {self.size} ranks",
                hint=f"choose a tensor-parallel size that divides {total}",
            )
        return total // self.size

    def share_or_copy(self, total: int, what: str) -> int:
        """Like `share`; where there are fewer than ranks, one, which several ranks have a copy of. HardwareError if
        neither number divides the other."""
        if total % self.size and self.size % total:
            raise HardwareError(
                f"{total} {what} can neither be split evenly over {self.size} ranks nor copied to them evenly",
                hint=f"choose a tensor-parallel size that divides {total} or is a multiple of it",
            )
        return max(1, total // self.size)

    def padded_share(self, total: int) -> int:
        """A rank's part of a dimension that is padded at its end until it divides."""
        return -(-total // self.size)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, with the same bits on every rank; may be written over x."""
        return x if self.size == 1 else self._together.all_reduce(x)

    def begin_all_reduce(self, x: Tensor) -> Callable[[], Tensor]:
        """`Collectives.begin_all_reduce`."""
        return (lambda: x) if self.size == 1 else self._together.begin_all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """Each rank's x [n, k] side by side in rank order: [n, k * size]."""
        if self.size == 1:
            return x
        return self._together.all_gather(x).transpose(0, 1).flatten(1)

    def all_to_all(self, x: Tensor) -> Tensor:
        """Part r of each rank's x [size, n, k] is for rank r: what this one gets, in rank order."""
        return x if self.size == 1 else self._together.all_to_all(x)

    def minimum(self, value: int) -> int:
        """The smallest of the ranks' numbers, for what they must agree on. Waits for the device."""
        return value if self.size == 1 else self._together.minimum(value)

    @property
    def process_group(self) -> torch.distributed.ProcessGroup | None:
        """Torch's, of these ranks; None: the default one."""
        return getattr(self.collectives, "process_group", None)

    @property
    def own_reducer(self) -> Any:
        """A `kernels.partial_sum.Reducer` that can do more than add up; None: `all_reduce` is all there is."""
        return getattr(self.collectives, "own", None)

    @property
    def _together(self) -> Collectives:
        assert self.collectives is not None, "this rank was only described"
        return self.collectives


# ---------------------------------------------------------------- from stage to stage


class Links(Protocol):
    """How hidden states travel from a stage to the next. Every send has its receive, in the same order. On a GPU both
    are enqueued on the current stream, outside of CUDA graphs."""

    def send(self, x: Tensor) -> None:
        """To the next stage, which may take it later; x must not be written to afterwards."""

    def receive(self, into: Tensor) -> None:
        """What the stage before sent: as many numbers, contiguous."""

    def progress(self) -> None:
        """The host has begun a layer: a step may take long, and somebody may look whether it gets on."""


class NeighbourLinks:
    """torch.distributed's messages between neighbours. They only ever go forward, and a stage takes them in the order
    of its steps, so no two wait for each other; what a rank was lost for ends the wait (`runtime/rank_watch.py`).

    Each message is a batch of one: NCCL's groups are made with their device, and there a batch and a call by itself
    take the same communicator and stream, but torch warns of the latter on every rank's stderr (`pointToPoint` of its
    ProcessGroupNCCL.cpp). Gloo knows no batches and makes the same call of it."""

    def __init__(self, before: int | None, behind: int | None, on_call: Callable[[], None] = lambda: None) -> None:
        """`before`, `behind`: ranks of the neighbours. `on_call`: as of `GroupCollectives`."""
        self._before = before
        self._behind = behind
        self._on_call = on_call
        self._sending: deque[tuple[torch.distributed.Work, Tensor]] = deque()  # memory that is still being read

    def send(self, x: Tensor) -> None:
        assert self._behind is not None, "there is no next stage"
        while self._sending and (len(self._sending) == _UNSENT or self._sending[0][0].is_completed()):
            self._sending.popleft()[0].wait()
        self._on_call()
        x = x.contiguous()
        (work,) = torch.distributed.batch_isend_irecv(
            [torch.distributed.P2POp(torch.distributed.isend, x, self._behind)]
        )
        self._sending.append((work, x))

    def receive(self, into: Tensor) -> None:
        assert self._before is not None, "there is no stage before"
        self._on_call()
        (work,) = torch.distributed.batch_isend_irecv(
            [torch.distributed.P2POp(torch.distributed.irecv, into, self._before)]
        )
        work.wait()

    def progress(self) -> None:
        self._on_call()


@dataclass(frozen=True)
class PipelineStage:
    """One rank's stage. Without `links` a stage of several can be described, but not run."""

    index: int = 0
    size: int = 1  # number of stages
    links: Links | None = None
    everyone: Collectives | None = None  # the ranks of all stages

    @property
    def is_first(self) -> bool:
        """It embeds tokens; others receive hidden states."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """It makes logits and samples; others send hidden states."""
        return self.index == self.size - 1

    def send(self, x: Tensor) -> None:
        """See `Links`."""
        assert self.links is not None, "this stage was only described"
        self.links.send(x)

    def receive(self, into: Tensor) -> None:
        """See `Links`."""
        assert self.links is not None, "this stage was only described"
        self.links.receive(into)

    def progress(self) -> None:
        """See `Links`."""
        if self.links is not None:
            self.links.progress()

    def minimum(self, value: int) -> int:
        """The smallest of the numbers of all ranks of all stages. Waits for the device."""
        if self.size == 1:
            return value
        assert self.everyone is not None, "this stage was only described"
        return self.everyone.minimum(value)
