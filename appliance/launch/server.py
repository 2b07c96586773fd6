"""PID 1: sockets first, then HTTP, then the start-up sequence beside it; signals, drain, exit code.

Knows the order of things and when to end. What a start does is in startup.py, how an engine is kept alive in engine.py.
Never imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from appliance import __version__, builtin, garbage, logs, termination
from appliance.clock import process_age_seconds
from appliance.engines.disk import full, is_full
from appliance.errors import ApplianceError, SettingsError
from appliance.launch.child import Child, kill_all, reap_orphans
from appliance.launch.scratch import socket_directory
from appliance.launch.watchdog import Watchdog
from appliance.settings import Settings, child_environment, export_otel_environment, otel_exporters, secrets_of

if TYPE_CHECKING:
    from appliance.errors import EngineDamagedError
    from appliance.launch.replicas import Replicas
    from appliance.server.state import ServerState
    from appliance.server.tracing import RequestTracer
    from appliance.types import EngineOptions

log = logging.getLogger("appliance.launch")

# Of idle connections. More than the pools of clients (httpx: 5 s) and load balancers (60 s) keep them, as else these
# send requests into connections that are being closed.
_KEEP_ALIVE_SECONDS = 75
_EARLY_ENGINES = 8  # started before it is known whether so many replicas can be served at all
_HTTP_SHUTDOWN_SECONDS = 5  # for responses whose last bytes are on their way


class Sequence(Protocol):
    """What leads to a loadable engine: `startup.Startup`, or a test's."""

    async def prepare(self) -> EngineOptions: ...
    async def repair(self, error: EngineDamagedError) -> EngineOptions: ...


SequenceFactory = Callable[[Settings, "ServerState", Path], Sequence]


def serve(settings: Settings, *, sequence: SequenceFactory | None = None, engine_module: str | None = None) -> int:
    """Serve until a signal or a failure; returns the exit code: 0 after a drain, the error's own otherwise.

    `sequence` and `engine_module` are seams for tests. Raises SettingsError if a port cannot be opened."""
    logs.configure(settings.log_level, settings.json_logging, secrets=secrets_of(settings))
    for warning in settings.warnings:
        log.warning("%s", warning)
    sockets = open_sockets(settings)
    with socket_directory() as directory:
        try:
            import uvloop

            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(_Process(settings, sockets, directory, sequence, engine_module).run())
        finally:
            kill_all()


def open_sockets(settings: Settings) -> list[socket.socket]:
    """Listening sockets of the API and health ports. Connections wait in them until HTTP is up."""
    ports = [settings.port]
    if settings.health_port not in (None, settings.port):
        ports.append(int(settings.health_port or 0))
    return [_listen(settings.host, port) for port in ports]


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
        opened.listen(2048)
    except OSError as error:
        opened.close()
        raise SettingsError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            hint="stop what uses it, or choose another with --port",
        ) from error
    return opened


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
        self._sockets = sockets
        self._directory = directory
        self._make_sequence = sequence
        self._engine_module = engine_module or "appliance.engine_process"
        self._environment: Mapping[str, str] = child_environment(settings)
        self._stop = asyncio.Event()
        self._http: Any = None  # uvicorn.Server
        self._watchdog: Watchdog | None = None

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
            if self._watchdog is not None:
                self._watchdog.stop()  # or its copies of the sockets would keep connections that nobody takes
            await self._leave(replicas, http, work, [stop, *helpers])
            if state.tracer is not None:
                state.tracer.shutdown()

    # ------------------------------------------------------------ making the parts

    def _spawn_engine(self, name: str, variables: Mapping[str, str]) -> Child:
        environment = {**self._environment, **variables}
        return Child(name, self._engine_module, [], directory=self._directory, environment=environment)

    def _make_watchdog(self) -> Watchdog | None:
        if not self._settings.stuck_seconds:
            return None
        return Watchdog(
            asyncio.get_running_loop(),
            self._sockets,
            self._settings.stuck_seconds,
            self._give_up,
            lambda: getattr(self._http.config, "ssl", None),  # from when it serves
        )

    def _give_up(self, reason: str) -> None:
        """From the watchdog's thread: the loop will not end this process."""
        log.error("%s: leaving", reason)
        termination.write(reason, self._settings.termination_log)
        kill_all()
        shutil.rmtree(self._directory, ignore_errors=True)
        sys.stderr.flush()
        os._exit(1)

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

        if self._make_sequence is None:
            from appliance.launch.startup import Startup

            self._make_sequence = Startup
        self._sequence = self._make_sequence(self._settings, state, self._directory)
        return Replicas(
            self._spawn_engine,
            state,
            repair=self._sequence.repair,
            prepared=first,
            restart_budget=self._settings.restart_budget,
        )

    # ------------------------------------------------------------ running

    async def _work(self, state: ServerState, replicas: Replicas) -> None:
        """The start-up sequence, then the engines. Ends only with an error, or when the replicas are stopped."""
        replicas.prepare(min(self._settings.replicas or 1, _EARLY_ENGINES, os.cpu_count() or 1))
        options = await self._sequence.prepare()
        state.lifecycle.enter("loading")
        await replicas.run(options)

    async def _serve_http(self, state: ServerState) -> None:
        import uvicorn

        from appliance.server.app import create_app

        class Http(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield  # signals are ours

        tls: dict[str, Any] = {}
        if self._settings.ssl_mode != "DISABLED":
            tls = {"ssl_certfile": self._settings.ssl_certs_path, "ssl_keyfile": self._settings.ssl_key_path}
        if self._settings.ssl_mode == "MTLS":
            tls |= {"ssl_ca_certs": self._settings.ssl_ca_certs_path, "ssl_cert_reqs": ssl.CERT_REQUIRED}
        config = uvicorn.Config(
            create_app(state),
            log_config=None,
            server_header=False,
            ws="none",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_HTTP_SHUTDOWN_SECONDS,
            **tls,
        )
        self._http = Http(config)
        self._watchdog = self._make_watchdog()
        if self._watchdog is not None:
            self._watchdog.start()  # only now: imports in the loop may take long where files come over a network
        await self._http.serve(sockets=self._sockets)

    async def _say_when_ready(self, state: ServerState, before_seconds: float) -> None:
        from appliance.launch.report import breakdown

        scheme = "http" if self._settings.ssl_mode == "DISABLED" else "https"
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
            kill_all()
            shutil.rmtree(self._directory, ignore_errors=True)
            sys.stderr.flush()
            os._exit(128 + number)
        log.info("%s: finishing what is running, %g s at most", number.name, self._settings.drain_seconds)
        self._stop.set()

    async def _drain(self, state: ServerState, work: asyncio.Task[None]) -> None:
        """Let running requests finish, unless there is no engine to finish them."""
        drain = asyncio.create_task(state.journal.drain(self._settings.drain_seconds))
        await asyncio.wait({drain, work}, return_when=asyncio.FIRST_COMPLETED)
        if not drain.done():
            state.journal.fail_all("the engine failed while the server was shutting down")
        left = await drain
        log.info("drained%s", f", {left} requests cut off" if left else "")

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
        if self._http is not None:
            self._http.should_exit = True
        await asyncio.wait({http}, timeout=_HTTP_SHUTDOWN_SECONDS + 1)
        await replicas.stop()
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
