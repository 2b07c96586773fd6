"""`serve` on a node that is not node 0: obtains the engine that node 0 has selected, and holds this node's ranks.

Waits for node 0, says what it is, does what it is told (`node_messages.py`), and starts over when node 0 is gone: an
agent outlives engines and servers, up to `node_timeout`. The ranks are children of `node_process`. Never imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any, Protocol, cast, get_args

from appliance import __version__, termination
from appliance.engines import read_manifest
from appliance.errors import ApplianceError, EngineQualityError, NodeError
from appliance.ipc import Failed, ToServer
from appliance.launch import node_messages as wire
from appliance.launch import report
from appliance.launch.child import Child, error_of, reap_orphans
from appliance.launch.http import SHUTDOWN_SECONDS, HttpServer, leave_at_once
from appliance.launch.node_messages import (
    BEAT_SECONDS,
    SILENCE_SECONDS,
    AgentFailed,
    AgentState,
    Hello,
    LeaderState,
    Leaving,
    Obtain,
    Obtained,
    Refused,
    RunRanks,
    Welcome,
)
from appliance.launch.startup import Startup
from appliance.profiles import Selection
from appliance.runtime.node_channel import plain_address
from appliance.server.lifecycle import Phase
from appliance.server.node_app import create_node_app
from appliance.server.state import ServerState
from appliance.settings import Settings, child_environment

log = logging.getLogger("appliance.nodes")

_RETRY_SECONDS = 1.0
_LOOK_SECONDS = 0.1
_SAY_SECONDS = 5.0  # between two lines of a wait
_CONNECT_SECONDS = 5.0
_LATER: tuple[str, ...] = get_args(Phase)[get_args(Phase).index("loading") :]  # phases in which node 0 has an engine


class Supply(Protocol):
    """What obtains engines: `startup.Startup`, or a test's."""

    async def obtain_as_told(
        self, selection: Selection | None, *, repair: bool = False
    ) -> tuple[Path, tuple[str, ...]]: ...


class _LeaderLeft(ConnectionError):
    """Node 0 has said that it ends."""


class NodeAgent:
    """One run of the process on another node than 0. `directory` is for the sockets of its children; `supply` is a seam
    for tests."""

    def __init__(
        self, settings: Settings, sockets: list[socket.socket], directory: Path, supply: Supply | None = None
    ) -> None:
        assert settings.node_rank and settings.master_addr
        self._settings = settings
        self._directory = directory
        self._node, self._host, self._port = settings.node_rank, settings.master_addr, settings.master_port
        self._http = HttpServer(settings, sockets, directory)
        self._state = ServerState((settings.model,), version=__version__)
        self._life = self._state.lifecycle
        self._supply = supply or Startup(settings, self._state, directory)
        self._stop = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None  # to node 0, while connected
        self._joined = False  # this connection is to a node 0, which took this node in
        self._obtaining: asyncio.Task[None] | None = None
        self._engine: tuple[Path, tuple[str, ...]] | None = None  # that was obtained, and the devices of its ranks
        self._ranks: asyncio.Task[None] | None = None
        self._failure: asyncio.Future[ApplianceError]

    async def run(self) -> int:
        """Until a signal (exit code 0) or an error (its code)."""
        self._failure = asyncio.get_running_loop().create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        leader = f"{self._host}:{self._port}"
        log.info("node %d of %d: node 0 is expected at %s", self._node, self._settings.nnodes, leader)
        http = asyncio.create_task(self._http.serve(create_node_app(self._state, self._node, self._host)))
        helpers = [asyncio.create_task(report.report_progress(self._life, silence_seconds=_SAY_SECONDS))]
        if os.getpid() == 1:
            helpers.append(asyncio.create_task(_reap_for_ever()))
        work = asyncio.create_task(self._work())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({http, work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if self._stop.is_set():
                await self._drain(work)
            return self._outcome(http, work)
        finally:
            self._http.stop_watching()
            await self._leave([work, stop, *helpers], http)

    # ------------------------------------------------------------ node 0

    async def _work(self) -> None:
        """Ends only with an error."""
        lost_at = time.monotonic()
        while True:
            self._joined = False
            try:
                reader, writer = await asyncio.wait_for(
                    asyncio.open_connection(self._host, self._port), _CONNECT_SECONDS
                )
            except (OSError, TimeoutError) as error:
                reason = getattr(error, "strerror", None) or str(error) or "no answer"
                self._wait_longer(time.monotonic() - lost_at, reason)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            try:
                await self._converse(reader, writer)
            except ConnectionError as error:
                if self._joined:
                    expected = isinstance(error, _LeaderLeft) or self._stop.is_set()
                    log.log(logging.INFO if expected else logging.WARNING, "node 0 is gone: %s", error)
                    lost_at = time.monotonic()
                else:  # perhaps it has just begun to end; perhaps something else listens there
                    self._wait_longer(time.monotonic() - lost_at, f"what answers there is not node 0: {error}")
            finally:
                writer.close()
                await self._forget()
                self._writer = None
            await asyncio.sleep(_RETRY_SECONDS)

    def _wait_longer(self, waited: float, reason: str) -> None:
        """Raises NodeError when there is no hope left."""
        patience = self._settings.node_timeout
        where = f"node 0 at {self._host}:{self._port}"
        if waited > patience:
            raise NodeError(
                f"{where} cannot be reached for {patience:.0f} s: {reason}",
                hint="is it running, and are --master-addr and --master-port its own? --node-timeout gives it longer",
            )
        self._show("starting", f"waiting for {where}: {reason} ({waited:.0f} of {patience:.0f} s)")

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until node 0 is gone: ConnectionError. Raises what this node fails with, having told node 0."""
        own = wire.common_settings(self._settings)
        wire.write(writer, Hello(self._node, self._settings.nnodes, wire.versions(), own))
        answer = await wire.read(reader, wire.decode_to_agent, SILENCE_SECONDS)
        if isinstance(answer, Refused):
            raise NodeError(f"node 0 refuses node {self._node}: {answer.reason}", hint=answer.hint)
        if not isinstance(answer, Welcome):
            raise ConnectionError("it does not answer as node 0 does")
        log.info("joined node 0")
        self._joined = True
        self._writer = writer
        beat = asyncio.create_task(self._beat(writer))
        listen = asyncio.create_task(self._listen(reader))
        try:
            either: set[asyncio.Future[Any]] = {listen, self._failure}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                error = self._failure.result()
                wire.write(writer, AgentFailed(type(error).__name__, error.message, error.hint))
                with contextlib.suppress(OSError):
                    await writer.drain()
                raise error
            listen.result()
        finally:
            beat.cancel()
            listen.cancel()
            await asyncio.gather(beat, listen, return_exceptions=True)

    async def _beat(self, writer: asyncio.StreamWriter) -> None:
        """Also at once when the phase changes."""
        while True:
            phase, until = self._life.phase, time.monotonic() + BEAT_SECONDS
            wire.write(writer, AgentState(phase, report.progress_line(self._life).partition(": ")[2]))
            while self._life.phase == phase and time.monotonic() < until:
                await asyncio.sleep(_LOOK_SECONDS)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while True:
            message = await wire.read(reader, wire.decode_to_agent, SILENCE_SECONDS)
            match message:
                case Obtain():
                    await self._forget()
                    self._obtaining = asyncio.create_task(self._obtain(message))
                case RunRanks():
                    await self._end_ranks()
                    self._ranks = asyncio.create_task(self._run_ranks(message))
                    self._ranks.add_done_callback(_say_failure)
                case LeaderState():
                    self._follow(message)
                case Leaving(reason=reason):
                    raise _LeaderLeft(reason)
                case _:
                    raise ConnectionError("it says what node 0 would not say")

    def _follow(self, leader: LeaderState) -> None:
        """Ready is this node only with node 0, and with ranks of its own."""
        if self._engine is None or leader.phase not in _LATER or self._stop.is_set():
            return
        if leader.phase == "ready" and (self._ranks is None or self._ranks.done()):
            return
        if leader.phase in ("draining", "failed"):  # that is node 0's end, not this one's
            self._show("restarting", f"node 0 is {leader.phase}: {leader.reason}")
        else:
            if leader.phase == "ready" and not self._life.is_ready:
                log.info("ready: node 0 serves, with the ranks of this node")
            self._show(leader.phase, leader.reason)

    def _show(self, phase: str, detail: str) -> None:
        if self._life.phase == phase:
            self._life.progress(detail=detail)
        else:
            self._life.enter(cast(Phase, phase), detail)

    # ------------------------------------------------------------ what node 0 wants

    async def _obtain(self, order: Obtain) -> None:
        try:
            self._engine = await self._supply.obtain_as_told(order.selection, repair=order.repair)
        except EngineQualityError as error:
            if self._settings.on_quality_failure == "fallback":  # node 0 finds the same, and orders another
                self._show(self._life.phase, error.message)
                await asyncio.sleep(self._settings.node_timeout)
            self._fail(error)
            return
        except Exception as error:
            if not isinstance(error, ApplianceError):
                log.error("unexpected failure", exc_info=error)
                error = NodeError(f"{type(error).__name__}: {error}")
            self._fail(error)
            return
        key = read_manifest(self._engine[0]).key
        log.info("engine %s is here", key[:12])
        self._show("loading", "waiting for node 0's engine process")
        self._say(Obtained(order.job, key))

    async def _run_ranks(self, order: RunRanks) -> None:
        """The ranks of this node in one engine, until it ends."""
        assert self._engine is not None and self._writer is not None
        engine_dir, devices = self._engine
        host = plain_address(self._writer.get_extra_info("peername")[0])
        arguments = {
            "leader": f"{host}:{order.port}",
            "node": str(self._node),
            "token": order.token,
            "engine-dir": str(engine_dir),
        } | ({"devices": ",".join(devices)} if devices else {})
        child = Child(
            "node",
            "appliance.node_process",
            [f"--{name}={value}" for name, value in arguments.items()],
            directory=self._directory,
            environment=child_environment(self._settings),
        )
        failed: list[Failed] = []

        def on_message(message: ToServer) -> None:
            if isinstance(message, Failed):
                failed.append(message)

        try:
            end = await child.listen(on_message)
        finally:
            child.close()
        if failed:
            log.error("%s", error_of(failed[0], NodeError))
        elif end.returncode:
            log.error("%s", end)
        if self._life.is_ready:
            self._show("restarting", "the engine has ended")

    def _fail(self, error: ApplianceError) -> None:
        if not self._failure.done():
            self._failure.set_result(error)

    def _say(self, message: wire.ToHub) -> None:
        if self._writer is not None:
            wire.write(self._writer, message)

    async def _forget(self) -> None:
        """End what the last order began."""
        await self._end_ranks()
        await _cancelled(self._obtaining)
        self._engine = None

    async def _end_ranks(self) -> None:
        await _cancelled(self._ranks)
        self._ranks = None

    # ------------------------------------------------------------ ending

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            log.warning("%s again: leaving at once", number.name)
            leave_at_once(self._directory, 128 + number)
        self._stop.set()

    async def _drain(self, work: asyncio.Task[None]) -> None:
        """Where the whole group ends, node 0 still finishes requests, with this node's ranks. Where this node ends
        alone, node 0 knows beforehand what it will lose them for."""
        seconds = self._settings.drain_seconds
        self._say(Leaving("it was told to end"))
        if self._writer is not None:
            with contextlib.suppress(OSError):
                await self._writer.drain()
        if self._ranks is not None and not self._ranks.done():
            log.info("leaving when node 0 has ended its engine, after %g s at most", seconds)
            self._life.enter("draining", "leaving when node 0 has ended its engine")
            await asyncio.wait({self._ranks, work}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)

    def _outcome(self, http: asyncio.Task[None], work: asyncio.Task[None]) -> int:
        ended = next((task for task in (work, http) if task.done() and not task.cancelled()), None)
        if self._stop.is_set() or ended is None:
            return 0
        error = ended.exception() or RuntimeError("the HTTP server ended by itself")
        self._life.enter("failed", str(error))
        if isinstance(error, ApplianceError):
            log.error("%s", error)
        else:
            log.error("unexpected failure", exc_info=error)
        termination.write(error, self._settings.termination_log)
        return error.exit_code if isinstance(error, ApplianceError) else 1

    async def _leave(self, tasks: list[asyncio.Task[Any]], http: asyncio.Task[None]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._forget()
        self._http.stop()
        await asyncio.wait({http}, timeout=SHUTDOWN_SECONDS + 1)
        await _cancelled(http)


def _say_failure(task: asyncio.Task[None]) -> None:
    """Nobody waits for it; node 0 misses the ranks."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("this node's ranks could not be run", exc_info=error)


async def _cancelled(task: asyncio.Task[Any] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _reap_for_ever() -> None:
    while True:
        await asyncio.sleep(1.0)
        reap_orphans()
