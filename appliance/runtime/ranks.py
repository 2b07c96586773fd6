"""The ranks of one engine: started by rank 0, told what to do through shared memory, lost together.

Rank 0 is the process that loads the engine (`lead`); the others are `python -m appliance.worker_process`, its children,
killed by the kernel when it ends. A backend loads and runs its share the same way in all of them and asks its `Member`
for its place. Knows processes and messages; nothing of models.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from appliance.batching.step import StepPlan, StepResult
from appliance.distributed import PipelineStage, TensorParallel
from appliance.engines.manifest import read_manifest
from appliance.errors import ApplianceError
from appliance.meeting import LOOPBACK, Meeting, Rendezvous, leave
from appliance.runtime.rank_processes import start_rank
from appliance.runtime.rank_watch import FROZEN_SECONDS, STUCK_SECONDS, RankProcess, RankWatch
from appliance.runtime.remote_nodes import RemoteNodes
from appliance.runtime.step_results import ResultReader, ResultWriter
from appliance.runtime.step_ring import RingWriter, SharedSteps, Word
from appliance.types import EngineOptions, Struct

log = logging.getLogger(__name__)

_STOP_SECONDS = 3.0  # for ranks to end by themselves
_BLAME_SECONDS = 2.0  # for the watch to find out who was lost, when an operation fails


class LoadEngine(Struct, frozen=True, tag=True):
    """The first message."""

    options: EngineOptions


class RunStep(Struct, frozen=True, tag=True):
    plan: StepPlan


class PrepareMore(Struct, frozen=True, tag=True):
    """`LocalExecutor.prepare_more`, on every rank."""


class Stop(Struct, frozen=True, tag=True):
    """End, exit 0."""


ToRank = LoadEngine | RunStep | PrepareMore | Stop
encode: Callable[[ToRank], bytes] = msgspec.msgpack.Encoder().encode
decode: Callable[[bytes], ToRank] = msgspec.msgpack.Decoder(ToRank).decode


Place = tuple[TensorParallel, PipelineStage]


class Member(Protocol):
    """A rank's place among the others, for those who load and assemble its share."""

    rank: int
    size: int

    def place(self, device: torch.device, pp_size: int) -> Place:
        """To build the model with, on this rank's device; `pp_size`: of the engine."""

    def gets_on(self) -> None:
        """Has read another part of the weights: somebody may look whether it does."""

    def join(self, device: torch.device) -> None:
        """Wait for the others; in front of the first collective operation."""

    def explain(self, error: Exception) -> Exception:
        """What a rank was lost for, if that may be why there is this error; else the error."""

    def close(self) -> None:
        """Rank 0's: end the others. Idempotent."""


class Alone:
    """The member of an engine of one rank."""

    rank = 0
    size = 1

    def place(self, device: torch.device, pp_size: int) -> Place:
        return TensorParallel(), PipelineStage()

    def gets_on(self) -> None:
        """Nobody waits."""

    def join(self, device: torch.device) -> None:
        """There is nobody."""

    def explain(self, error: Exception) -> Exception:
        return error

    def close(self) -> None:
        """There is nobody."""


class Follower:
    """Another rank than 0, in its own process."""

    def __init__(self, rendezvous: Rendezvous, shared: SharedSteps, results: ResultWriter | None = None) -> None:
        """`results`: where steps' results go, of the one rank that gives them."""
        self.results = results
        self.rank = rendezvous.rank
        self.size = rendezvous.world_size
        self._meeting = Meeting(rendezvous)
        self._shared = shared

    def place(self, device: torch.device, pp_size: int) -> Place:
        return self._meeting.place(device, pp_size, lambda: self._shared.count(self.rank, Word.CALLS))

    def gets_on(self) -> None:
        self._shared.count(self.rank, Word.LOADED)

    def join(self, device: torch.device) -> None:
        self._shared.count(self.rank, Word.CALLS)  # it waits here as in a collective operation
        self._meeting.join(device)

    def explain(self, error: Exception) -> Exception:
        return error  # rank 0 finds out

    def close(self) -> None:
        """Rank 0 is the one that ends ranks."""


class Leader:
    """Rank 0, and the processes of the others."""

    rank = 0

    def __init__(
        self,
        options: EngineOptions,
        size: int,
        on_lost: Callable[[ApplianceError], None] | None = None,
        rendezvous: Rendezvous | None = None,
        *,
        pp_size: int = 1,
        nodes: RemoteNodes | None = None,
        frozen_seconds: float = FROZEN_SECONDS,
        stuck_seconds: float = STUCK_SECONDS,
    ) -> None:
        """Start the other ranks and have them load the engine, which has `pp_size` stages of `size` ranks in all. They
        die with the thread that this is called in. `nodes`: those that have joined, each of which has as many ranks as
        this one. `on_lost` is called once, from a thread, when a rank is lost; all others have been killed then, which
        may free this one from an operation that it is stuck in. `rendezvous`: where ranks meet, any free port by
        default; the seconds are those of `RankWatch`."""
        self.size = size
        self.pp_size = pp_size
        self.lost: ApplianceError | None = None
        self._on_lost = on_lost or self._abort
        self._found = threading.Event()
        self._tp = TensorParallel()
        self._nodes = nodes
        self._address = LOOPBACK if nodes is None else nodes.address
        self._meeting = Meeting(rendezvous or Rendezvous(0, size, self._address, local_addr=self._address))
        self._shared = SharedSteps.create(size)
        self._wake: dict[int, int] = {}
        self._ranks: list[RankProcess] = []
        self._results: ResultReader | None = None
        self._closed = False
        try:
            for rank in range(1, size // (nodes.nnodes if nodes is not None else 1)):
                self._start(rank)
            if nodes is not None:
                self._begin(nodes)
        except BaseException:
            self._kill()
            self._release()
            raise
        self._ring = RingWriter(self._shared, self._wake)
        self._watch = RankWatch(
            self._ranks,
            self._shared,
            self._lose,
            pp_size=pp_size,
            frozen_seconds=frozen_seconds,
            stuck_seconds=stuck_seconds,
        )
        self._watch.start()
        atexit.register(self.close)
        self._tell(encode(LoadEngine(options)), self.check)
        self._shared.count(0, Word.FINISHED)

    @property
    def _giver(self) -> int:
        """The rank that gives results: the first of the last stage; -1 where every rank has them."""
        return -1 if self.pp_size == 1 else self.size - self.size // self.pp_size

    def _begin(self, nodes: RemoteNodes) -> None:
        self._ranks += nodes.begin(self._shared, self._meeting.port, self._giver)
        if self._giver >= self.size // nodes.nnodes:
            self._results = ResultReader(nodes.results)

    def _tell(self, message: bytes, check: Callable[[], None]) -> None:
        self._ring.send(message, check)
        if self._nodes is not None:
            self._nodes.send(message, check)

    def _start(self, rank: int) -> None:
        inherited = {}
        if rank == self._giver:
            reads, inherited["results"] = os.pipe()
            self._results = ResultReader(reads)
        try:
            here = {"local-addr": self._address}
            process, wake = start_rank(rank, self._shared, self._address, self._meeting.port, inherited, here)
        finally:
            for fd in inherited.values():
                os.close(fd)
        self._ranks.append(process)
        self._wake[rank] = wake

    @property
    def pids(self) -> list[int]:
        """Of the other ranks, in order."""
        return [rank.process.pid for rank in self._ranks]

    def place(self, device: torch.device, pp_size: int) -> Place:
        place = self._meeting.place(device, pp_size, lambda: self._shared.count(0, Word.CALLS))
        self._tp = place[0]
        return place

    def gets_on(self) -> None:
        self._shared.count(0, Word.LOADED)

    def join(self, device: torch.device) -> None:
        self._shared.count(0, Word.CALLS)
        with self._explained():
            self._meeting.join(device, self.check)

    def send(self, message: RunStep | PrepareMore) -> None:
        """To every other rank. Raises what they were lost for."""
        self._tell(encode(message), self._check_while_full)

    def result(self) -> StepResult:
        """Of the oldest step whose result has not been asked for: of several stages, what the last one sends. Raises
        what ranks were lost for."""
        assert self._results is not None, "there is one stage"
        return self._results.receive(self.check)

    def finished(self) -> None:
        """Rank 0's own part of the oldest message is done."""
        self._shared.count(0, Word.FINISHED)

    def check(self) -> None:
        """Raises what a rank was lost for."""
        if self.lost is not None:
            raise self.lost

    def _check_while_full(self) -> None:
        """Ranks take no messages while they wait for somebody to read results."""
        self.check()
        if self._results is not None:
            self._results.take()

    @contextlib.contextmanager
    def operation(self) -> Iterator[None]:
        """Around everything that may wait for other ranks, once the engine is loaded: the watch looks whether it gets
        on, and what fails in it is explained by a rank that was lost."""
        self.check()
        self._watch.operation += 1
        try:
            with self._explained():
                yield
        finally:
            self._watch.operation += 1

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
            self.check()  # kernels that waited for a rank end with rubbish
        except Exception as error:
            reason = self.explain(error)
            if reason is error:
                raise
            raise reason from error

    def explain(self, error: Exception) -> Exception:
        self._found.wait(_BLAME_SECONDS)
        return self.lost or error

    def _lose(self, reason: ApplianceError) -> None:
        """From the watch's thread."""
        self.lost = reason
        log.error("%s", reason)
        self._kill()
        self._found.set()
        self._on_lost(reason)

    def _abort(self, reason: ApplianceError) -> None:
        """What is enqueued on a GPU would wait for ever for ranks that are gone; gloo notices by itself."""
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
            with contextlib.suppress(RuntimeError):
                if self._tp.own_reducer is not None:
                    self._tp.own_reducer.abort()
                leave()

    def _kill(self) -> None:
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.process.kill()

    def close(self) -> None:
        """End the other ranks. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._watch.stop()
        atexit.unregister(self.close)
        if self.lost is None:
            with contextlib.suppress(ApplianceError):
                self._tell(encode(Stop()), self._give_up)
        for rank in self._ranks:
            try:
                rank.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()
        if self._nodes is not None:
            self._nodes.kill()
        if self._watch.join(_STOP_SECONDS):  # else it still reads what would be closed
            self._release()

    def _release(self) -> None:
        """Close what this process has of the pipes and the memory, since it may go on without this engine."""
        for fd in (*self._wake.values(), *(rank.report for rank in self._ranks), self._shared.fd):
            os.close(fd)
        if self._results is not None:
            self._results.close()

    def _give_up(self) -> None:
        raise ApplianceError("the ring is full")


def lead(
    options: EngineOptions,
    on_lost: Callable[[ApplianceError], None] | None = None,
    nodes: RemoteNodes | None = None,
) -> Leader | Alone:
    """Rank 0's place in the engine that `options` name; starts the other ranks, if there are any, here and on other
    nodes. EngineDamagedError if there is no engine, HardwareError if they cannot meet."""
    manifest = read_manifest(Path(options.engine_dir))
    size = manifest.tp_size * manifest.pp_size
    return Leader(options, size, on_lost, pp_size=manifest.pp_size, nodes=nodes) if size > 1 else Alone()
