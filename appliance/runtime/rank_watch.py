"""Watches the other ranks of an engine from rank 0: which one has ended, is frozen, or holds the others up.

A thread, since rank 0's own is stuck in a collective operation just then. It counts its looks instead of seconds, so a
machine that was frozen as a whole is not taken for a rank that is. Knows processes and counters; knows neither what
ranks compute nor who restarts them.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from appliance import errors
from appliance.errors import ApplianceError, EngineCrashedError
from appliance.ipc import Failed
from appliance.runtime.step_ring import SharedSteps, Word

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
FROZEN_SECONDS = 10.0  # without a beat; while it loads libraries a process may not get to beat
START_SECONDS = 300.0  # until its first beat, for which it imports what rank 0 has imported before it
# While others wait for it a rank reads no weights and begins no operation: it may compile kernels.
LOADING_SECONDS = 300.0
STUCK_SECONDS = 20.0  # no rank gets on with a step: longer than a layer takes on a CPU, or a step on a GPU
_SETTLE_SECONDS = 0.3  # when one ends, others may follow: which was first is seen from how they end
_EXIT_SECONDS = 5.0  # between closing its end of the pipe and having ended
PEER_LOST = "PeerLost"  # what a rank reports that failed in a collective operation: likely another's fault


class Process(Protocol):
    """What is asked of a rank's process: `subprocess.Popen`, or what stands for one on another node."""

    pid: int
    returncode: int | None

    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


@dataclass
class RankProcess:
    """Another rank, as rank 0 sees it. `report`: the reading end of a pipe that it writes one `Failed` to, or nothing,
    and that closes when it ends. `where`: the node it is on, if that is another one."""

    rank: int
    process: Process
    report: int
    said: bytearray = field(default_factory=bytearray)
    ended: bool = False
    where: str = ""

    @property
    def name(self) -> str:
        return f"rank {self.rank}" + (f" on {self.where}" if self.where else "")

    def reason(self) -> ApplianceError:
        """Why it has ended."""
        failed = self.failed
        if failed is not None:
            kind = getattr(errors, failed.error, None)
            known = isinstance(kind, type) and issubclass(kind, ApplianceError)
            cls: type[ApplianceError] = kind if known and kind is not None else EngineCrashedError
            return cls(f"{self.name}: {failed.message}", hint=failed.hint)
        code = self.process.returncode
        if code is None:
            return EngineCrashedError(f"{self.name} has closed its report and does not end")
        if code >= 0:
            return EngineCrashedError(f"{self.name} exited with code {code}")
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        cause = " (out of memory, or killed by someone)" if -code == signal.SIGKILL else ""
        return EngineCrashedError(f"{self.name} was killed by {name}{cause}")

    @property
    def failed(self) -> Failed | None:
        try:
            return msgspec.msgpack.decode(self.said, type=Failed) if self.said else None
        except msgspec.DecodeError:
            return None  # it was killed while it wrote

    @property
    def blame(self) -> int:
        """Smaller is the likelier cause, among ranks that ended together."""
        failed = self.failed
        return 0 if failed is None else 2 if failed.error == PEER_LOST else 1


class RankWatch:
    """Calls `on_lost(reason)` once, from its thread, when a rank is lost."""

    def __init__(
        self,
        ranks: Sequence[RankProcess],
        shared: SharedSteps,
        on_lost: Callable[[ApplianceError], None],
        *,
        pp_size: int = 1,
        frozen_seconds: float = FROZEN_SECONDS,
        stuck_seconds: float = STUCK_SECONDS,
        start_seconds: float = START_SECONDS,
        loading_seconds: float = LOADING_SECONDS,
    ) -> None:
        self._ranks = ranks
        self._stage_ranks = shared.ranks // pp_size
        self._shared = shared
        self._on_lost = on_lost
        self._frozen_looks = int(frozen_seconds / LOOK_SECONDS)
        self._start_looks = int(max(start_seconds, frozen_seconds) / LOOK_SECONDS)
        self._stuck_looks = int(stuck_seconds / LOOK_SECONDS)
        self._loading_looks = int(loading_seconds / LOOK_SECONDS)
        self._stopping = False
        self._still: dict[int, tuple[int, int]] = {}  # rank -> (beat, looks that found the same)
        self._progress: tuple[object, int] = ((), 0)  # (what was seen, looks that found the same)
        self._read: dict[int, tuple[object, int]] = {}  # likewise of each rank, while they load
        self.operation = 0  # counts what rank 0's own thread does; odd while it is in a step
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Whatever ends from now on is meant to."""
        self._stopping = True

    def join(self, seconds: float) -> bool:
        """After `stop`: wait until no report is read any more; whether that is so. Not from `on_lost`."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        reason: ApplianceError | None = None
        while reason is None and not self._stopping:
            reason = self._ended(LOOK_SECONDS) or self._frozen() or self._loads_not() or self._stuck()
        if reason is not None and not self._stopping:
            self._on_lost(reason)

    def _ended(self, seconds: float) -> ApplianceError | None:
        """Wait up to `seconds` for one to end."""
        if not self._read_reports(seconds) or self._stopping:
            return None
        while self._read_reports(_SETTLE_SECONDS):
            pass
        ended = [rank for rank in self._ranks if rank.ended]
        for rank in ended:
            try:
                rank.process.wait(_EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                rank.process.kill()
        return min(ended, key=lambda rank: rank.blame).reason()

    def _read_reports(self, seconds: float) -> bool:
        """Take in what ranks say; whether one of them has ended."""
        open_ends = {rank.report: rank for rank in self._ranks if not rank.ended}
        poll = select.poll()
        for fd in open_ends:
            poll.register(fd, select.POLLIN)
        ended = False
        for fd, _ in poll.poll(1000 * seconds):
            data = os.read(fd, 65536)
            open_ends[fd].said += data
            if not data:
                open_ends[fd].ended = ended = True
        return ended

    def _frozen(self) -> ApplianceError | None:
        for rank in self._ranks:
            beat = self._shared.get(rank.rank, Word.BEAT)
            before, looks = self._still.get(rank.rank, (beat, 0))
            looks = looks + 1 if beat == before else 0
            self._still[rank.rank] = beat, looks
            if looks > (self._frozen_looks if beat else self._start_looks):
                seconds = looks * LOOK_SECONDS
                what = "has been frozen for" if beat else "has not begun to load within"
                return EngineCrashedError(
                    f"{rank.name} {what} {seconds:.0f} s: its process does not run",
                    hint="was it stopped, or does a device driver hold it?",
                )
        return None

    def _loads_not(self) -> ApplianceError | None:
        """One that runs, but gets nowhere while others wait for it. Until all have loaded, which rank 0 does last."""
        if all(self._shared.get(rank, Word.FINISHED) for rank in range(1, self._shared.ranks)):
            return None
        for rank in range(self._shared.ranks):
            seen = tuple(self._shared.get(rank, word) for word in (Word.LOADED, Word.CALLS, Word.FINISHED))
            before, looks = self._read.get(rank, (seen, 0))
            self._read[rank] = seen, looks + 1 if seen == before else 0
        waited_for = [rank for rank in self._waited_for() if self._read[rank][1] > self._loading_looks]
        if not waited_for:
            return None
        seconds = self._read[waited_for[0]][1] * LOOK_SECONDS
        return EngineCrashedError(
            f"{self._who(waited_for)} gets nowhere with loading, for {seconds:.0f} s, and others wait for it",
            hint="its process runs: is it in a driver or a compiler that hangs, or does it read from a disk that does?",
        )

    def _waited_for(self) -> list[int]:
        """Ranks that have not joined where others have, else those that are behind in collective operations."""
        calls = [self._shared.get(rank, Word.CALLS) for rank in range(self._shared.ranks)]
        absent = [rank for rank, count in enumerate(calls) if count == 0]
        return (absent if any(calls) else []) or self._behind(Word.CALLS)

    def _stuck(self) -> ApplianceError | None:
        words = (Word.TAKEN, Word.FINISHED, Word.CALLS)
        counters = tuple(self._shared.get(rank, word) for rank in range(self._shared.ranks) for word in words)
        before, looks = self._progress
        seen = (self.operation, counters)
        looks = looks + 1 if seen == before and self.operation % 2 else 0
        self._progress = seen, looks
        return self._hang(looks * LOOK_SECONDS) if looks > self._stuck_looks else None

    def _hang(self, seconds: float) -> ApplianceError:
        """Names the ranks that are behind: by messages taken, then by operations begun, then by work finished."""
        step = self._shared.get(0, Word.TAKEN)
        what, behind = f"cannot finish step {step}", self._behind(Word.FINISHED)
        if ranks := self._behind(Word.CALLS):
            what, behind = f"does not join the others in a collective operation of step {step}", ranks
        if ranks := self._behind(Word.TAKEN):
            what, behind = f"has not begun step {step}", ranks
        who = self._who(behind or list(range(self._shared.ranks)))
        return EngineCrashedError(f"{who} {what}, for {seconds:.0f} s")

    def _who(self, numbers: list[int]) -> str:
        if len(numbers) > 1:
            return f"each of ranks {', '.join(map(str, numbers))}"
        return next((rank.name for rank in self._ranks if rank.rank == numbers[0]), f"rank {numbers[0]}")

    def _behind(self, word: Word) -> list[int]:
        """Ranks that are not as far as others; of several pipeline stages those of the first one that is behind, since
        the next wait for it. Stages begin different numbers of operations, so only ranks of one are compared there."""
        values = [self._shared.get(rank, word) for rank in range(self._shared.ranks)]
        size = self._stage_ranks
        for first in range(0, len(values), size):
            stage = values[first : first + size]
            most = max(stage if word is Word.CALLS else values)
            if behind := [first + i for i, value in enumerate(stage) if value < most]:
                return behind
        return []
