"""Progress of long byte-counted work: how far, how fast, how long still.

Knows nothing of what is counted nor of who is told: it hands plain snapshots to a callback.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType


@dataclass(frozen=True)
class Snapshot:
    detail: str  # one plain line: the file or tensor at hand
    bytes_done: int
    bytes_total: int
    eta_seconds: float | None  # None until a rate is known

    @property
    def percent(self) -> float:
        return 100.0 * self.bytes_done / self.bytes_total if self.bytes_total else 100.0


ProgressFn = Callable[[Snapshot], None]


class ByteMeter:
    """Counts bytes from any thread and tells `progress` at most every `interval` seconds, also while nothing moves (a
    heartbeat thread), so that whoever watches can tell slow from dead. Use as a context manager; the callback gets a
    last snapshot at a clean exit and is never called by two threads at once."""

    def __init__(self, total: int, progress: ProgressFn | None, *, interval: float = 1.0, detail: str = "") -> None:
        self.total = total
        self._progress = progress
        self._interval = interval
        self._detail = detail
        self._done = 0
        self._skipped = 0  # bytes that were there already: they must not make the rate look better than it is
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def advance(self, count: int, detail: str | None = None) -> None:
        with self._lock:
            self._done += count
            if detail is not None:
                self._detail = detail

    def skip(self, count: int, detail: str | None = None) -> None:
        """Count bytes that cost no time (already downloaded, already known)."""
        with self._lock:
            self._done += count
            self._skipped += count
            if detail is not None:
                self._detail = detail

    def move_to(self, done: int, detail: str | None = None) -> None:
        """Set the absolute count, for work whose progress is looked up rather than counted."""
        with self._lock:
            self._done = done
            if detail is not None:
                self._detail = detail

    def snapshot(self) -> Snapshot:
        with self._lock:
            worked = self._done - self._skipped
            elapsed = time.monotonic() - self._started
            eta = (self.total - self._done) * elapsed / worked if worked > 0 else None
            return Snapshot(self._detail, self._done, self.total, max(eta, 0.0) if eta is not None else None)

    def __enter__(self) -> ByteMeter:
        self._started = time.monotonic()
        if self._progress is not None:
            self._progress(self.snapshot())
            self._thread = threading.Thread(target=self._heartbeat, name="progress", daemon=True)
            self._thread.start()
        return self

    def _heartbeat(self) -> None:
        assert self._progress is not None
        while not self._stop.wait(self._interval):
            self._progress(self.snapshot())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._progress is not None and kind is None:
            self._progress(self.snapshot())
