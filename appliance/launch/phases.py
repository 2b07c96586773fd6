"""How a start shows where it is: phases and progress in the lifecycle, from the event loop and from threads beside it.

Knows the lifecycle only, not what the phases do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from appliance.engines import ProgressFn, Snapshot
from appliance.server.lifecycle import Lifecycle, Phase

log = logging.getLogger("appliance.launch")

T = TypeVar("T")


async def in_thread(work: Callable[[], T]) -> T:
    """The result of blocking work. Its thread is a daemon: cancelled or not, it never keeps the process alive."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if result.done():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        value, failure = None, None
        try:
            value = work()
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, value, failure)

    threading.Thread(target=run, daemon=True).start()
    return await result


class Phases:
    """The lifecycle as the steps of a start see it."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._life = lifecycle

    def enter(self, phase: Phase, detail: str = "") -> None:
        """A phase of the start; while an engine is repaired the server stays "restarting", or "ready" if other
        replicas serve."""
        if self._life.is_ready:
            log.info("%s%s", phase, f": {detail}" if detail else "")
        elif self._life.phase == "restarting":
            self._life.progress(detail=f"{phase}: {detail}" if detail else phase)
        else:
            self._life.enter(phase, detail)

    def progress(self) -> ProgressFn:
        """For callbacks from other threads."""
        loop = asyncio.get_running_loop()

        def show(snapshot: Snapshot) -> None:
            if self._life.is_ready:
                return  # a repair while other replicas serve
            self._life.progress(
                percent=snapshot.percent,
                detail=snapshot.detail,
                bytes_done=snapshot.bytes_done,
                bytes_total=snapshot.bytes_total,
                eta_seconds=snapshot.eta_seconds,
            )

        def report(snapshot: Snapshot) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(show, snapshot)

        return report
