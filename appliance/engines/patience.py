"""Waiting for another machine, but not for ever: work in daemon threads that is abandoned when it brings nothing for a
stated time.

Knows threads and a clock; nothing of what is transferred. An abandoned thread may still hang in a library's call; when
that returns, `writing()` keeps it from touching what is another's by now.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.05


class OutOfPatience(Exception):
    """Nothing came for `Patience.seconds`."""


class Abandoned(Exception):
    """Raised in a thread whose work nobody waits for any more."""


class Patience:
    """A clock that runs from construction, starts anew with each `renew`, and stands still inside of `paused`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._since = time.monotonic()
        self._pauses = 0
        self._lock = threading.Lock()
        self._abandoned = False

    def renew(self) -> None:
        """Something came."""
        self._since = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        with self._lock:
            self._pauses += 1
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1
                self._since = time.monotonic()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around each write of what came, by one thread at a time. Raises Abandoned once patience is over: whoever
        waited has gone on and the place may be another's."""
        with self._lock:
            if self._abandoned:
                raise Abandoned
            self._since = time.monotonic()
            yield

    @property
    def over(self) -> bool:
        return self._pauses == 0 and time.monotonic() - self._since > self.seconds

    def run(self, jobs: Sequence[Callable[[], T]], *, parallel: int = 1) -> list[T]:
        """The results of all jobs, in order, `parallel` at a time. Raises OutOfPatience, or what the first job that
        failed raised; then no further job is begun and none that runs can write."""
        waiting: SimpleQueue[int] = SimpleQueue()
        for number in range(len(jobs)):
            waiting.put(number)
        results: dict[int, T] = {}
        failures: list[BaseException] = []
        ended = threading.Semaphore(0)  # released once per thread

        def work() -> None:
            try:
                while not failures and not self._abandoned:
                    number = waiting.get_nowait()
                    results[number] = jobs[number]()
            except Empty:
                pass
            except BaseException as error:
                failures.append(error)
            finally:
                ended.release()

        threads = min(parallel, len(jobs))
        for number in range(threads):
            threading.Thread(target=work, name=f"transfer-{number}", daemon=True).start()
        left = threads
        while left and not failures:
            left -= ended.acquire(timeout=_POLL_SECONDS)
            if left and not failures and self.over:
                self._abandon()
                raise OutOfPatience
        if failures:
            self._abandon()
            raise failures[0]
        return [results[number] for number in range(len(jobs))]

    def _abandon(self) -> None:
        with self._lock:
            self._abandoned = True
