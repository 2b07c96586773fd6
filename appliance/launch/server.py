"""PID 1: sockets first, then HTTP, then the start-up sequence beside it; signals, drain, exit code.

Knows the order of things and when to end. What a start does is in startup.py, how an engine is kept alive in engine.py.
Never imports torch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from appliance import __version__, builtin, garbage, logs, termination
from appliance.clock import process_age_seconds
from appliance.engines.disk import full, is_full
from appliance.errors import ApplianceError
from appliance.launch.child import Child, kill_all, reap_orphans
from appliance.launch.http import SHUTDOWN_SECONDS, HttpServer, leave_at_once, open_sockets
from appliance.launch.scratch import socket_directory
from appliance.settings import Settings, child_environment, export_otel_environment, otel_exporters, secrets_of
from appliance.settings_rules import check_place_of_node
from appliance.sizes import counted

if TYPE_CHECKING:
    from appliance.errors import EngineDamagedError
    from appliance.launch.node_hub import NodeHub
    from appliance.launch.replicas import Replicas
    from appliance.server.state import ServerState
    from appliance.server.tracing import RequestTracer
    from appliance.types import EngineOptions

log = logging.getLogger("appliance.launch")

_EARLY_ENGINES = 8  # started before it is known whether so many replicas can be served at all


class Sequence(Protocol):
    """What leads to a loadable engine: `startup.Startup`, or a test's."""

    async def prepare(self) -> EngineOptions: ...
    async def repair(self, error: EngineDamagedError) -> EngineOptions: ...


SequenceFactory = Callable[[Settings, "ServerState", Path], Sequence]


def serve(settings: Settings, *, sequence: SequenceFactory | None = None, engine_module: str | None = None) -> int:
    """Serve until a signal or a failure; returns the exit code: 0 after a drain, the error's own otherwise. On another
    node than 0, hold that node's ranks for as long as node 0 serves (`node_agent.py`).

    `sequence` and `engine_module` are seams for tests. Raises SettingsError if a port cannot be opened, or if it is not
    said which node this is."""
    check_place_of_node(settings)
    process = f"node-{settings.node_rank}" if settings.nnodes > 1 and settings.node_rank else "server"
    logs.configure(settings.log_level, settings.json_logging, process=process, secrets=secrets_of(settings))
    for warning in settings.warnings:
        log.warning("%s", warning)
    sockets = open_sockets(settings)
    with socket_directory() as directory:
        try:
            import uvloop

            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                if settings.node_rank and settings.nnodes > 1:
                    from appliance.launch.node_agent import NodeAgent

                    return runner.run(NodeAgent(settings, sockets, directory).run())
                return runner.run(_Process(settings, sockets, directory, sequence, engine_module).run())
        finally:
            kill_all()


class _Process:
    """One run of the server process. `run` reads top to bottom."""

    def __init__(
        self,
        settings: Settings,
        sockets: list[socket.socket],
        directory: Path,
        sequence: SequenceFactory | None,
        engine_module: str | None,
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._make_sequence = sequence
        self._engine_module = engine_module or "appliance.engine_process"
        self._environment: Mapping[str, str] = child_environment(settings)
        self._stop = asyncio.Event()
        self._http = HttpServer(settings, sockets, directory)
        self._hub: NodeHub | None = None  # of several nodes

    async def run(self) -> int:
        self._handle_signals()
        several = (self._settings.replicas or 1) > 1
        # Imports torch while this process imports the server and decides.
        first_engine = self._spawn_engine("engine-0" if several else "engine", {})
        from appliance.launch import report

        before_seconds = process_age_seconds()
        state = self._make_state(before_seconds)
        replicas = self._make_replicas(state, first_engine)
        helpers = [asyncio.create_task(report.report_progress(state.lifecycle))]
        helpers.append(asyncio.create_task(self._say_when_ready(state, before_seconds)))
        if os.getpid() == 1:
            helpers.append(asyncio.create_task(_reap_for_ever()))
        http = asyncio.create_task(self._serve_http(state))
        work = asyncio.create_task(self._work(state, replicas))
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({http, work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if self._stop.is_set():
                await self._drain(state, work)
            return self._outcome(state, http, work)
        finally:
            self._http.stop_watching()
            await self._leave(replicas, http, work, [stop, *helpers])
            if state.tracer is not None:
                state.tracer.shutdown()

    # ------------------------------------------------------------ making the parts

    def _spawn_engine(self, name: str, variables: Mapping[str, str]) -> Child:
        environment = {**self._environment, **variables}
        return Child(name, self._engine_module, [], directory=self._directory, environment=environment)

    def _make_state(self, before_seconds: float) -> ServerState:
        from appliance.server.state import ServerState

        settings = self._settings
        names = settings.served_model_name or (default_model_name(settings.model),)
        return ServerState(
            names,
            version=__version__,
            api_keys=settings.api_keys,
            max_waiting_requests=settings.max_waiting_requests,
            model_url=settings.model,
            before_seconds=before_seconds,
            tracer=self._make_tracer(names[0]),
        )

    def _make_tracer(self, model_name: str) -> RequestTracer | None:
        if not self._settings.otel:
            return None
        from appliance.server.tracing import make_tracer

        export_otel_environment(self._settings)
        return make_tracer(model_name, otel_exporters())

    def _make_replicas(self, state: ServerState, first: Child) -> Replicas:
        from appliance.launch.replicas import Replicas

        if self._settings.nnodes > 1:
            from appliance.launch.node_hub import NodeHub

            self._hub = NodeHub(self._settings, state.lifecycle)
        if self._make_sequence is None:
            from appliance.launch.startup import Startup

            self._make_sequence = partial(Startup, nodes=self._hub)
        self._sequence = self._make_sequence(self._settings, state, self._directory)
        of_nodes: dict[str, Any] = {}
        if self._hub is not None:
            of_nodes = {
                "start_message": self._hub.start_message,
                "on_nodes_wanted": self._hub.want,
                "excuse": self._hub.excuse,
            }
        return Replicas(
            self._spawn_engine,
            state,
            repair=self._sequence.repair,
            prepared=first,
            restart_budget=self._settings.restart_budget,
            **of_nodes,
        )

    # ------------------------------------------------------------ running

    async def _work(self, state: ServerState, replicas: Replicas) -> None:
        """The start-up sequence, then the engines; beside it, the other nodes. Ends only with an error, or when the
        replicas are stopped."""
        if self._hub is None:
            return await self._start_and_run(state, replicas)
        await self._hub.start()
        tasks = {asyncio.create_task(self._start_and_run(state, replicas)), asyncio.create_task(self._hub.run())}
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            ended.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _start_and_run(self, state: ServerState, replicas: Replicas) -> None:
        replicas.prepare(min(self._settings.replicas or 1, _EARLY_ENGINES, os.cpu_count() or 1))
        options = await self._sequence.prepare()
        state.lifecycle.enter("loading")
        await replicas.run(options)

    async def _serve_http(self, state: ServerState) -> None:
        from appliance.server.app import create_app

        await self._http.serve(create_app(state))

    async def _say_when_ready(self, state: ServerState, before_seconds: float) -> None:
        from appliance.launch.report import breakdown

        scheme = self._http.scheme
        log.info("listening on %s://%s:%d", scheme, self._settings.host, self._settings.port)
        while not state.lifecycle.was_ready:
            await asyncio.sleep(0.02)
        garbage.settle()
        engine_seconds = state.engine.startup_seconds if state.engine is not None else {}
        log.info("ready after %s", breakdown(state.lifecycle, before_seconds, engine_seconds))
        log.info("serving %s at %s://%s:%d/v1", state.model_names[0], scheme, self._settings.host, self._settings.port)

    # ------------------------------------------------------------ ending

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            log.warning("%s again: leaving at once", number.name)
            leave_at_once(self._directory, 128 + number)
        log.info("%s: finishing what is running, %g s at most", number.name, self._settings.drain_seconds)
        self._stop.set()

    async def _drain(self, state: ServerState, work: asyncio.Task[None]) -> None:
        """Let running requests finish, unless there is no engine to finish them."""
        drain = asyncio.create_task(state.journal.drain(self._settings.drain_seconds))
        await asyncio.wait({drain, work}, return_when=asyncio.FIRST_COMPLETED)
        if not drain.done():
            state.journal.fail_all("the engine failed while the server was shutting down")
        left = await drain
        log.info("drained%s", f", {counted(left, 'request')} cut off" if left else "")

    def _outcome(self, state: ServerState, http: asyncio.Task[None], work: asyncio.Task[None]) -> int:
        ended = next((task for task in (work, http) if task.done()), None)
        if ended is None or (self._stop.is_set() and (ended.cancelled() or ended.exception() is None)):
            return 0
        error = ended.exception() or RuntimeError("the HTTP server ended by itself")
        if is_full(error) and not isinstance(error, ApplianceError):
            error = full(self._settings.cache_dir, "a file of the start")
        state.lifecycle.enter("failed", str(error))
        state.journal.fail_all(f"the server failed: {error}")
        if isinstance(error, ApplianceError):
            log.error("%s", error)
        else:
            log.error("unexpected failure", exc_info=error)
        termination.write(error, self._settings.termination_log)
        return error.exit_code if isinstance(error, ApplianceError) else 1

    async def _leave(
        self,
        replicas: Replicas,
        http: asyncio.Task[None],
        work: asyncio.Task[None],
        others: list[asyncio.Task[Any]],
    ) -> None:
        """HTTP first, so that last bytes reach clients; then the engines, then everything else."""
        self._http.stop()
        await asyncio.wait({http}, timeout=SHUTDOWN_SECONDS + 1)
        await replicas.stop()
        if self._hub is not None:
            await self._hub.stop()
        tasks = [http, work, *others]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        replicas.close()


async def _reap_for_ever() -> None:
    while True:
        await asyncio.sleep(1.0)
        reap_orphans()


def default_model_name(model: str) -> str:
    """The name of a model nobody named: a hub id without scheme and revision, the last part of a directory."""
    if model == "builtin":
        return builtin.MODEL_NAME
    name = model.removeprefix("hf://")
    if name == model and (Path(model).expanduser().is_dir() or model.startswith((".", "/", "~"))):
        return Path(model).expanduser().resolve().name or model
    return name.partition("@")[0]
