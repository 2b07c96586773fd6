"""One child process and its channel. Knows processes and messages, not what the child does.

Must be used from one event loop in the main thread: the kernel ties a child's life to the thread that started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance import errors
from appliance.errors import ApplianceError
from appliance.ipc import Failed, ServerEnd, Shutdown, ToChild, ToServer

log = logging.getLogger(__name__)

_LAST_WORDS_SECONDS = 0.5  # how long messages of a dead child may still arrive
_numbers = itertools.count(1)


@dataclass(frozen=True)
class ChildExit:
    name: str
    returncode: int  # negative: minus the signal's number

    def __str__(self) -> str:
        if self.returncode >= 0:
            return f"the {self.name} process exited with code {self.returncode}"
        try:
            number = signal.Signals(-self.returncode)
        except ValueError:
            return f"the {self.name} process was killed by signal {-self.returncode}"
        cause = " (out of memory, or killed by someone)" if number == signal.SIGKILL else ""
        return f"the {self.name} process was killed by {number.name}{cause}"


class Child:
    """Starts `python -m MODULE --ipc ADDRESS ARGS...` at construction.

    `directory` is where its Unix socket goes; a path of more than about 60 characters is too long for one. The child
    leads a process group of its own, so a Ctrl-C on the terminal reaches only the server, which then drains.
    """

    def __init__(
        self, name: str, module: str, args: Sequence[str], *, directory: Path, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self._channel = ServerEnd(directory / f"{name}-{next(_numbers)}")
        bootstrap = [sys.executable, "-m", "appliance.launch.bootstrap", str(os.getpid()), name, module]
        try:
            self._process = subprocess.Popen(
                [*bootstrap, "--ipc", self._channel.address, *args],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            self._channel.close()
            raise
        _alive.add(self)
        loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[ChildExit] = loop.create_future()
        threading.Thread(target=self._wait_in_thread, args=(loop,), name=f"wait-{name}", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self._exit.done()

    def _wait_in_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        returncode = self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(self._on_exit, ChildExit(self.name, returncode))

    def _on_exit(self, end: ChildExit) -> None:
        _alive.discard(self)
        self._signal_group(signal.SIGKILL)  # workers that outlived their leader
        if not self._exit.done():
            self._exit.set_result(end)

    async def send(self, message: ToChild) -> None:
        """Raises ConnectionError if the child is gone, or goes before it has connected."""
        sending = asyncio.ensure_future(self._channel.send(message))
        try:
            if self.alive:
                either: set[asyncio.Future[Any]] = {sending, self._exit}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not self.alive:
                raise ConnectionError(f"the {self.name} process is gone")
            sending.result()
        finally:
            sending.cancel()  # with nobody at the other end it would wait for ever

    async def listen(self, on_message: Callable[[ToServer], None]) -> ChildExit:
        """Give every message to `on_message`, in order, until the child has exited and its last words were read. An
        exception of `on_message` ends the listening and is raised."""
        pump = asyncio.create_task(self._pump(on_message))
        try:
            either: set[asyncio.Future[Any]] = {pump, self._exit}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not pump.done():
                await asyncio.wait({pump}, timeout=_LAST_WORDS_SECONDS)
            if pump.done():
                pump.result()
            return self._exit.result()
        finally:
            pump.cancel()

    async def _pump(self, on_message: Callable[[ToServer], None]) -> None:
        while True:
            message = await self._channel.receive()
            on_message(message)
            if isinstance(message, Failed):
                await asyncio.shield(self._exit)  # the last message: no need to wait for more words
                return

    async def stop(self, grace_seconds: float = 5.0) -> None:
        """Ask it to shut down; SIGTERM after the grace time, SIGKILL two seconds later. Idempotent."""
        try:
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(grace_seconds):
                    await self.send(Shutdown())
                    await asyncio.shield(self._exit)
            for number, seconds in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
                if self.alive:
                    log.warning("the %s process does not stop, sending %s", self.name, number.name)
                    self._signal_group(number)
                    await asyncio.wait({self._exit}, timeout=seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL the child and everything in its process group. Idempotent."""
        if self.alive:
            self._signal_group(signal.SIGKILL)

    def close(self) -> None:
        """Kill it and close the channel; nobody may listen any more. Idempotent."""
        self.kill()
        self._channel.close()

    def _signal_group(self, number: signal.Signals) -> None:
        # Only until the exit was handled: later the number may be another's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


_alive: set[Child] = set()


def kill_all() -> None:
    """SIGKILL every child that still runs: for an exit that cannot wait."""
    for child in list(_alive):
        child._signal_group(signal.SIGKILL)


def reap_orphans() -> int:
    """Collect exited processes that are not ours but were handed to us, as to PID 1 of a container. Returns how many.

    Children started here are left to the thread that waits for them."""
    ours = {child.pid for child in _alive}
    count = 0
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return count
        if ended is None or ended.si_pid in ours:
            return count
        with contextlib.suppress(ChildProcessError):
            os.waitpid(ended.si_pid, os.WNOHANG)
            count += 1


def error_of(failed: Failed, fallback: type[ApplianceError]) -> ApplianceError:
    """The exception a child reported, as its own class if errors.py has it, so that its exit code survives."""
    cls = getattr(errors, failed.error, None)
    if isinstance(cls, type) and issubclass(cls, ApplianceError):
        return cls(failed.message, hint=failed.hint)
    message = failed.message if failed.error in failed.message else f"{failed.error}: {failed.message}"
    return fallback(message, hint=failed.hint)
