"""Where the appliance stands between process start and exit, for health endpoints, metrics and admission of requests.

Knows phases and their timing. Does not know what happens in a phase, nor what the engine is: the supervisor tells it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal, get_args

Phase = Literal[
    "starting",
    "detecting",
    "selecting",
    "downloading",
    "fetching",
    "building",
    "verifying",
    "loading",
    "warming",
    "ready",
    "restarting",
    "draining",
    "failed",
]
PHASES: tuple[str, ...] = get_args(Phase)

_MAX_RETRY_AFTER = 60  # seconds; a client should look again at least this often, whatever the estimate says


class Lifecycle:
    """One per process, changed only from the event-loop thread. `clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._entered = self._started
        self._finished_seconds: dict[str, float] = {}
        self.phase: Phase = "starting"
        self.detail = ""
        self.percent: float | None = None  # of this phase; None: not known
        self.bytes_done = 0
        self.bytes_total = 0
        self.eta_seconds: float | None = None
        self.was_ready = False
        self.draining = False
        self.time_to_ready: float | None = None  # seconds from process start to the first "ready"
        self.replicas: Callable[[], list[dict[str, Any]]] = list  # for `as_dict`, where there are several
        self.nodes: Callable[[], list[dict[str, Any]]] = list  # likewise

    def enter(self, phase: Phase, detail: str = "") -> None:
        """Begin a phase. After "draining" only "failed" is taken: nothing makes a leaving server ready again."""
        if phase not in PHASES:
            raise ValueError(f"unknown phase {phase!r}, known: {', '.join(PHASES)}")
        if self.draining and phase != "failed":
            return
        now = self._clock()
        self._finished_seconds[self.phase] = self._finished_seconds.get(self.phase, 0.0) + now - self._entered
        self._entered = now
        self.phase = phase
        self.detail = detail
        self.percent = None
        self.bytes_done = self.bytes_total = 0
        self.eta_seconds = None
        self.draining = self.draining or phase == "draining"
        if phase == "ready" and not self.was_ready:
            self.was_ready = True
            self.time_to_ready = now - self._started

    def progress(
        self,
        *,
        percent: float | None = None,
        detail: str | None = None,
        bytes_done: int | None = None,
        bytes_total: int | None = None,
        eta_seconds: float | None = None,
    ) -> None:
        """Report on the current phase; what is left out stays as it was, but an estimate is never kept: without a new
        one it is made from the percentage and the time that the phase has taken."""
        if percent is not None:
            self.percent = min(100.0, max(0.0, percent))
        if detail is not None:
            self.detail = detail
        if bytes_done is not None:
            self.bytes_done = bytes_done
        if bytes_total is not None:
            self.bytes_total = bytes_total
        self.eta_seconds = self._estimate() if eta_seconds is None else eta_seconds

    def _estimate(self) -> float | None:
        seconds = self._clock() - self._entered
        if self.percent is None or not 1.0 <= self.percent < 100.0 or seconds < 1.0 or self.phase == "restarting":
            return None
        return seconds * (100.0 - self.percent) / self.percent

    @property
    def reason(self) -> str:
        """One plain line: why the phase is what it is."""
        if self.detail:
            return self.detail
        return "" if self.phase == "ready" else f"the server is {self.phase}"

    @property
    def is_ready(self) -> bool:
        return self.phase == "ready"

    @property
    def live(self) -> bool:
        return self.phase != "failed"

    @property
    def accepts_requests(self) -> bool:
        """True from the first "ready" on, also while the engine restarts: such requests wait for it."""
        return self.was_ready and not self.draining and self.phase != "failed"

    @property
    def retry_after(self) -> int:
        """Seconds, for the Retry-After header of a refusal."""
        if self.eta_seconds is None:
            return 5
        return max(1, min(_MAX_RETRY_AFTER, math.ceil(self.eta_seconds)))

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Seconds spent in each phase so far, in the order first entered; the current one still grows."""
        seconds = dict(self._finished_seconds)
        seconds[self.phase] = seconds.get(self.phase, 0.0) + self._clock() - self._entered
        return seconds

    @property
    def uptime_seconds(self) -> float:
        return self._clock() - self._started

    def as_dict(self) -> dict[str, Any]:
        """The body of the health endpoints."""
        several = {"replicas": self.replicas(), "nodes": self.nodes()}
        return {
            "phase": self.phase,
            "percent": None if self.percent is None else round(self.percent, 1),
            "eta_seconds": None if self.eta_seconds is None else round(self.eta_seconds, 1),
            "reason": self.reason,
            "bytes_done": self.bytes_done,
            "bytes_total": self.bytes_total,
            "phase_seconds": {name: round(value, 3) for name, value in self.phase_seconds.items()},
            "uptime_seconds": round(self.uptime_seconds, 3),
            "time_to_ready": None if self.time_to_ready is None else round(self.time_to_ready, 3),
        } | {name: each for name, each in several.items() if each}
