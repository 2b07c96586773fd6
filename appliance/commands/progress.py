"""How far a command is, on stderr: a bar on a terminal, log lines elsewhere. Knows bytes and phases, not the work.

Results go to stdout, so a pipe or a script never sees any of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from appliance import logs
from appliance.engines import ProgressFn, Snapshot
from appliance.engines.disk import gib

if TYPE_CHECKING:
    from rich.progress import Progress

    from appliance.server.lifecycle import Lifecycle

_SILENCE_SECONDS = 10.0  # between two lines where there is no terminal


def on_terminal() -> bool:
    return sys.stderr.isatty()


def make_bar() -> Progress:
    """Text, bar, percent, amount, remaining time; gone when it is done, since log lines tell what was done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def amount_of(done: int, total: int, eta_seconds: float | None) -> str:
    """`1.2 GiB of 3.0 GiB, 20 s left`; what is not known is left out."""
    facts = [f"{gib(done)} of {gib(total)}"] if total else []
    if eta_seconds is not None:
        facts.append(f"{eta_seconds:.0f} s left")
    return ", ".join(facts)


@contextlib.contextmanager
def shown(what: str) -> Iterator[ProgressFn]:
    """A callback for byte-counted work, from any thread."""
    if not on_terminal():
        yield _Lines(what)
        return
    with make_bar() as bar:
        task = bar.add_task(what, total=100.0, amount="")

        def update(snapshot: Snapshot) -> None:
            amount = amount_of(snapshot.bytes_done, snapshot.bytes_total, snapshot.eta_seconds)
            bar.update(task, completed=snapshot.percent, amount=amount)

        yield update


class _Lines:
    """A line every few seconds."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._told = time.monotonic()

    def __call__(self, snapshot: Snapshot) -> None:
        now = time.monotonic()
        if now - self._told >= _SILENCE_SECONDS:
            self._told = now
            amount = amount_of(snapshot.bytes_done, snapshot.bytes_total, snapshot.eta_seconds)
            logs.say(f"{self._what}: {snapshot.percent:.0f}% ({amount})")


async def watch(lifecycle: Lifecycle, poll_seconds: float = 0.1) -> None:
    """Show the phases of a start-up sequence until cancelled."""
    if not on_terminal():
        from appliance.launch.report import report_progress

        await report_progress(lifecycle)
        return
    with make_bar() as bar:
        task = bar.add_task("", total=None, amount="")
        while True:
            text = f"{lifecycle.phase}: {lifecycle.detail}" if lifecycle.detail else lifecycle.phase
            amount = amount_of(lifecycle.bytes_done, lifecycle.bytes_total, lifecycle.eta_seconds)
            total = None if lifecycle.percent is None else 100.0  # None: a bar that only moves
            bar.update(task, description=text, total=total, completed=lifecycle.percent or 0.0, amount=amount)
            await asyncio.sleep(poll_seconds)
