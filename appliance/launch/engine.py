"""Keeps an engine process running: starts it, feeds the journal, restarts it within a budget, has it repaired.

Knows processes, messages and time. Does not know what an engine is made of, nor HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

from appliance.engines import read_manifest
from appliance.errors import ApplianceError, EngineCrashedError, EngineDamagedError
from appliance.ipc import (
    AbortRequests,
    AddRequests,
    Failed,
    NodesWanted,
    Outputs,
    Progress,
    Ready,
    StartEngine,
    ToServer,
)
from appliance.ipc import Phase as ChildPhase
from appliance.launch.child import Child, error_of
from appliance.server.lifecycle import Lifecycle
from appliance.server.lifecycle import Phase as ServerPhase
from appliance.sizes import counted
from appliance.types import EngineInfo, EngineOptions, EngineOutput, EngineRequest, EngineStats

log = logging.getLogger(__name__)

BUDGET_WINDOW_SECONDS = 600.0
_FIRST_TOKEN_SECONDS = 300.0  # of a loaded engine; more is a hang. Generous: its queue may be full after a restart
_MAX_BACKOFF_SECONDS = 30.0
_HANG_SECONDS = 600.0  # with requests in flight and not one message: longer than any step, also on a slow CPU

PHASES: dict[ChildPhase, ServerPhase] = {
    "detect": "detecting",
    "select": "selecting",
    "download": "downloading",
    "fetch": "fetching",
    "build": "building",
    "verify": "verifying",
    "load": "loading",
    "warmup": "warming",
}


def show_progress(lifecycle: Lifecycle, message: Progress, load_bytes: int = 0) -> None:
    """A child's progress as the server's. While an engine restarts the phase stays "restarting", and what is done for
    one replica while others serve is not shown. `load_bytes`: what 100% of loading is, as the engine process reports
    that phase in percent of the bytes read."""
    if lifecycle.is_ready:
        return
    phase = PHASES[message.phase]
    detail = message.detail
    if lifecycle.phase == "restarting":
        detail = f"{phase}: {detail}" if detail else phase
    elif lifecycle.phase != phase:
        lifecycle.enter(phase)
    total = message.bytes_total or (load_bytes if message.phase == "load" else 0)
    lifecycle.progress(
        percent=message.percent,
        detail=detail,
        bytes_done=message.bytes_done if message.bytes_total else int(total * message.percent / 100),
        bytes_total=total,
        eta_seconds=message.eta_seconds,
    )


def _weight_bytes(engine_dir: Path) -> int:
    """Bytes of the weight files; 0 if they cannot be told, which the engine process then says of itself."""
    try:
        manifest = read_manifest(engine_dir)
    except EngineDamagedError:
        return 0
    return sum(file.size for file in manifest.files if file.name in manifest.rank_files)


class Journal(Protocol):
    """What the supervisor needs of `server.journal.RequestJournal`, or of what that shows one of several replicas."""

    @property
    def in_flight(self) -> int: ...
    def on_outputs(self, outputs: Sequence[EngineOutput], stats: EngineStats) -> None: ...
    def on_engine_lost(self, *, blame: bool = True) -> None: ...
    async def on_engine_ready(self, link: Link) -> None: ...
    async def probe(self, token_ids: Sequence[int], timeout_seconds: float = ...) -> None: ...


class Link:
    """The journal's way to one engine process (`server.engine_client.EngineLink`)."""

    def __init__(self, child: Child) -> None:
        self._child = child

    async def add(self, requests: Sequence[EngineRequest]) -> None:
        await self._child.send(AddRequests(requests=list(requests)))

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self._child.send(AbortRequests(request_ids=list(request_ids)))


class EngineSupervisor:
    """`spawn` starts an engine process. `repair` makes a damaged engine whole and returns the options to go on with.
    `on_ready` is told what every newly loaded engine says of itself. `probe_token_ids` is any valid prompt.
    `prepared` is a process that was started already, to be used first. `name` is for the log. For engines on several
    nodes (`node_hub.py`): `start_message`, `on_nodes_wanted`, and `excuse`, asked why an engine was meant to end."""

    def __init__(
        self,
        spawn: Callable[[], Child],
        lifecycle: Lifecycle,
        journal: Journal,
        *,
        repair: Callable[[EngineDamagedError], Awaitable[EngineOptions]],
        on_ready: Callable[[EngineInfo], None],
        restart_budget: int = 3,
        probe_token_ids: Sequence[int] = (1,),
        backoff_seconds: float = 1.0,
        hang_seconds: float = _HANG_SECONDS,
        prepared: Child | None = None,
        name: str = "the engine",
        start_message: Callable[[EngineOptions], StartEngine] = StartEngine,
        on_nodes_wanted: Callable[[NodesWanted], None] | None = None,
        excuse: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._name = name
        self._spawn = spawn
        self._lifecycle = lifecycle
        self._journal = journal
        self._repair = repair
        self._on_ready = on_ready
        self._budget = restart_budget
        self._probe_token_ids = probe_token_ids
        self._backoff_seconds = backoff_seconds
        self._hang_seconds = hang_seconds
        self._start_message = start_message
        self._on_nodes_wanted = on_nodes_wanted
        self._excuse = excuse
        self._last_message = time.monotonic()
        self._child = prepared
        self._stopping = False
        self._crashes: deque[float] = deque()  # monotonic seconds
        self._failed: Failed | None = None
        self._loaded = False  # the present process said Ready
        self._load_bytes = 0  # of the engine's weights
        self._first_token = asyncio.Event()  # of the present process
        self._warming: asyncio.Task[None] | None = None

    def prepare(self) -> None:
        """Start the process now, so that it imports what it needs while the server still decides what to load."""
        if self._child is None:
            self._child = self._spawn()

    async def run(self, options: EngineOptions) -> None:
        """Serve until `stop`. Raises what the engine failed with before it was ever ready, and EngineCrashedError when
        it crashes more often than the budget allows."""
        while True:
            error = await self._run_once(options)
            if self._stopping:
                return
            excuse = self._excuse()
            self._journal.on_engine_lost(blame=excuse is None)
            if excuse is not None:
                log.info("%s is started anew: %s", self._name, excuse)
                if self._lifecycle.was_ready:
                    self._lifecycle.enter("restarting", excuse)
                continue
            if self._failed is not None and not self._lifecycle.was_ready and not isinstance(error, EngineDamagedError):
                raise error
            log.error("%s", error)
            await self._wait_for_restart(error)
            if isinstance(error, EngineDamagedError):
                options = await self._repair(error)

    def _fresh(self) -> Child:
        """The prepared process, with nothing known of its predecessor."""
        self._failed = None
        self._loaded = False
        self._first_token.clear()
        self.prepare()
        assert self._child is not None
        return self._child

    async def _run_once(self, options: EngineOptions) -> ApplianceError:
        """One life of an engine process. Returns why it ended."""
        child = self._fresh()
        self._load_bytes = _weight_bytes(Path(options.engine_dir))
        watch = asyncio.create_task(self._watch(child))
        try:
            with contextlib.suppress(ConnectionError):  # it died while it waited: listen says of what
                await child.send(self._start_message(options))
            end = await child.listen(self._on_message)
        finally:
            self._child = None
            watch.cancel()
            if self._warming is not None:
                self._warming.cancel()
            child.close()
        if self._failed is not None:
            return error_of(self._failed, EngineCrashedError)
        return EngineCrashedError(str(end))

    async def _watch(self, child: Child) -> None:
        """Kill an engine that has work and says nothing: it hangs, and only a new one will go on."""
        idle_since = time.monotonic()
        while True:
            await asyncio.sleep(self._hang_seconds / 20)
            if not self._lifecycle.is_ready or not self._journal.in_flight:
                idle_since = time.monotonic()
            silent = time.monotonic() - max(idle_since, self._last_message)
            if silent > self._hang_seconds:
                log.error("%s has said nothing for %.0f s with requests in flight: ending it", self._name, silent)
                child.kill()
                return

    def _on_message(self, message: ToServer) -> None:
        self._last_message = time.monotonic()
        match message:
            case Outputs(outputs=outputs, stats=stats):
                self._journal.on_outputs(outputs, stats)
                if not self._first_token.is_set() and any(output.token_ids for output in outputs):
                    self._first_token.set()
            case Progress():
                show_progress(self._lifecycle, message, self._load_bytes)
            case Ready(info=info):
                if self._stopping:
                    return  # what was meant to be loaded came too late
                assert self._child is not None
                self._loaded = True
                self._warming = asyncio.create_task(self._warm(self._child, info))
            case NodesWanted() if self._on_nodes_wanted is not None:
                self._on_nodes_wanted(message)
            case Failed():
                self._failed = message
            case _:
                log.warning("unexpected message of the engine process: %s", type(message).__name__)

    async def _warm(self, child: Child, info: EngineInfo) -> None:
        """From loaded to ready: what is in flight goes in first, then one real token must come out."""
        if not self._lifecycle.was_ready:
            self._lifecycle.enter("warming", "waiting for the first token")
        self._on_ready(info)
        try:
            await self._journal.on_engine_ready(Link(child))
            probe = asyncio.create_task(self._journal.probe(self._probe_token_ids, _FIRST_TOKEN_SECONDS))
            token = asyncio.create_task(self._first_token.wait())
            try:
                await asyncio.wait({probe, token}, return_when=asyncio.FIRST_COMPLETED)
                if not self._first_token.is_set():
                    probe.result()  # raises why there is no token
            finally:
                token.cancel()
                probe.cancel()
                await asyncio.gather(probe, token, return_exceptions=True)
            if self._lifecycle.was_ready:
                log.info("%s is ready again", self._name)
            self._lifecycle.enter("ready")
        except (ApplianceError, OSError) as error:
            log.error("%s was loaded but does not answer: %s", self._name, error)
            child.kill()

    async def _wait_for_restart(self, error: ApplianceError) -> None:
        """Count a crash, wait a little longer after each. Raises EngineCrashedError beyond the budget."""
        now = time.monotonic()
        while self._crashes and now - self._crashes[0] > BUDGET_WINDOW_SECONDS:
            self._crashes.popleft()
        self._crashes.append(now)
        count = len(self._crashes)
        if count > self._budget:
            raise EngineCrashedError(
                f"{self._name} failed {counted(count, 'time')} within {BUDGET_WINDOW_SECONDS / 60:g} minutes, "
                f"last: {error.message}",
                hint=error.hint or "see the log above; `doctor` checks this machine",
            )
        seconds = min(_MAX_BACKOFF_SECONDS, self._backoff_seconds * 2.0 ** (count - 2)) if count > 1 else 0.0
        if self._lifecycle.was_ready:
            self._lifecycle.enter("restarting", f"{error.message}; restart {count} of {self._budget}")
        log.warning("restarting %s (%d of %d in 10 minutes) in %.1f s", self._name, count, self._budget, seconds)
        self.prepare()
        await asyncio.sleep(seconds)

    async def stop(self) -> None:
        """End the engine process and `run`. Idempotent."""
        self._stopping = True
        if self._child is not None:
            if not self._loaded:
                self._child.kill()  # it would read the message only once it is loaded, and has nothing to finish
            await self._child.stop()
