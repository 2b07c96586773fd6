"""The engine processes of one server: a supervisor for each replica, and the server's state made of theirs.

The server is ready as soon as one replica is and for as long as one is. A replica that fails for good is given up while
others go on; the last one's failure is the server's. Knows supervisors and lifecycles; neither requests nor HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import msgspec

from appliance.errors import ApplianceError, EngineCrashedError, EngineDamagedError
from appliance.launch.child import Child
from appliance.launch.engine import EngineSupervisor
from appliance.server.lifecycle import PHASES, Lifecycle, Phase
from appliance.server.metrics import ServerMetrics
from appliance.server.state import ServerState
from appliance.types import EngineInfo, EngineOptions

log = logging.getLogger(__name__)


def split(options: EngineOptions) -> list[EngineOptions]:
    """What each replica is started with: `devices` lists those of each in turn; without devices all share the CPU."""
    count = options.replicas
    each, rest = divmod(len(options.devices), count)
    assert rest == 0, f"{len(options.devices)} devices for {count} replicas"
    return [
        msgspec.structs.replace(options, devices=options.devices[number * each : (number + 1) * each])
        for number in range(count)
    ]


class _ReplicaLifecycle(Lifecycle):
    """Of one of several replicas; tells of its changes."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        super().__init__()
        self._on_change = on_change

    def enter(self, phase: Phase, detail: str = "") -> None:
        super().enter(phase, detail)
        self._on_change()

    def progress(self, **known: Any) -> None:
        super().progress(**known)
        self._on_change()


class Replicas:
    """`spawn` starts an engine process of that name, with these variables in its environment. `repair` makes a damaged
    engine whole and returns the options to go on with. `prepared` is the process that was started first, before anyone
    knew what to load. `restart_budget`, `backoff_seconds` and `hang_seconds` are each replica's, as `EngineSupervisor`
    has them."""

    def __init__(
        self,
        spawn: Callable[[str, Mapping[str, str]], Child],
        state: ServerState,
        *,
        repair: Callable[[EngineDamagedError], Awaitable[EngineOptions]],
        prepared: Child,
        **supervision: Any,
    ) -> None:
        self._spawn = spawn
        self._state = state
        self._life: Lifecycle = state.lifecycle
        self._repair = repair
        self._prepared = [prepared]
        self._supervision = supervision
        self._stopping = False
        self._lives: list[Lifecycle] = []  # of each replica, where there are several
        self._phases: list[str] = []  # of each, as last seen
        self._supervisors: list[EngineSupervisor] = []
        self._repairing = asyncio.Lock()
        self._parts: list[EngineOptions] = []  # of the newest engine
        self._repairs = 0
        self._repairs_seen: list[int] = []  # by each replica

    def prepare(self, count: int) -> None:
        """Start processes now, so that they import what they need while the server still decides what to load."""
        while len(self._prepared) < count:
            self._prepared.append(self._spawn(_name(len(self._prepared), count), {}))

    async def run(self, options: EngineOptions) -> None:
        """Serve until `stop`. Raises what the last replica fails with: what its engine said if none was ever ready,
        EngineCrashedError otherwise."""
        if self._stopping:
            return
        self._make(options)
        tasks = {
            asyncio.create_task(supervisor.run(part)): number
            for number, (supervisor, part) in enumerate(zip(self._supervisors, self._parts))
        }
        try:
            while tasks:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    number, error = tasks.pop(task), task.exception()
                    if error is None:
                        continue  # stopped
                    if not tasks or not isinstance(error, ApplianceError):
                        raise self._last_error(error)
                    self._give_up(number, error, len(tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _last_error(self, error: BaseException) -> BaseException:
        if len(self._parts) == 1 or not self._life.was_ready or isinstance(error, EngineCrashedError):
            return error
        return EngineCrashedError(f"no replica is left, the last failed: {error}")

    def _make(self, options: EngineOptions) -> None:
        self._parts = split(options)
        count = len(self._parts)
        self._repairs_seen = [0] * count
        for child in self._prepared[count:]:
            child.kill()
        if count == 1:
            self._lives = [self._life]
        else:
            log.info("starting %d replicas", count)
            self._lives = [_ReplicaLifecycle(self._show) for _ in range(count)]
            self._phases = [life.phase for life in self._lives]
            self._life.replicas = self._describe
            self._state.metrics.replica_phases = lambda: [life.phase for life in self._lives]
            self._state.journal.set_replicas(count, prefix_caching=options.prefix_caching)
        self.prepare(count)
        for number, part in enumerate(self._parts):
            spawn = partial(self._spawn, _name(number, count), _variables(part))
            if _variables(part):
                self._prepared[number].close()
                self._prepared[number] = spawn()
            self._prepared[number].name = _name(number, count)
            supervisor = EngineSupervisor(
                spawn,
                self._lives[number],
                self._state.journal.of_replica(number),
                repair=partial(self._repair_once, number),
                on_ready=partial(self._on_ready, number),
                name="the engine" if count == 1 else f"replica {number}",
                prepared=self._prepared[number],
                **self._supervision,
            )
            self._supervisors.append(supervisor)

    def _on_ready(self, number: int, info: EngineInfo) -> None:
        self._metrics.engines[number] = info

    @property
    def _metrics(self) -> ServerMetrics:
        return self._state.metrics

    async def _repair_once(self, number: int, error: EngineDamagedError) -> EngineOptions:
        """All replicas load the same files, and find the same damage: the first has it repaired."""
        async with self._repairing:
            if self._repairs_seen[number] == self._repairs:
                self._parts = split(await self._repair(error))
                self._repairs += 1
            self._repairs_seen[number] = self._repairs
            return self._parts[number]

    async def stop(self) -> None:
        """End all engine processes and `run`. Idempotent."""
        self._stopping = True
        await asyncio.gather(*(supervisor.stop() for supervisor in self._supervisors))
        for child in self._prepared[len(self._supervisors) :]:
            child.kill()  # it waits for something to load
            await child.stop()

    def close(self) -> None:
        """After `stop`, when `run` has ended."""
        for child in self._prepared:
            child.close()

    # ------------------------------------------------------------ what the server shows

    def _give_up(self, number: int, error: ApplianceError, left: int) -> None:
        log.error("replica %d is given up, %d of %d remain: %s", number, left, len(self._lives), error)
        self._metrics.engines.pop(number, None)
        self._state.journal.on_replica_given_up(number)
        self._lives[number].enter("failed", error.message)

    def _show(self) -> None:
        """A replica has changed: so has the server, perhaps."""
        self._log_changes()
        life = self._life
        if life.draining:
            return
        if any(each.is_ready for each in self._lives):
            problems = self._problems()
            if not life.is_ready:
                life.enter("ready", problems)
            elif life.detail != problems:
                life.progress(detail=problems)
        elif life.was_ready:
            if life.phase != "restarting":
                life.enter("restarting")
            life.progress(detail=self._problems())
        else:
            self._show_start()

    def _log_changes(self) -> None:
        before, self._phases = self._phases, [life.phase for life in self._lives]
        ready = self._phases.count("ready")
        for number, (old, new) in enumerate(zip(before, self._phases)):
            if old != new and "ready" in (old, new):
                verb = "is ready" if new == "ready" else f"is not ready ({new})"
                level = logging.INFO if new == "ready" else logging.WARNING
                log.log(level, "replica %d %s: %d of %d serve", number, verb, ready, len(self._lives))

    def _show_start(self) -> None:
        """Before anything serves: what the replica does that is farthest on its way."""
        on_the_way = [life for life in self._lives if life.phase not in ("starting", "failed")]
        if not on_the_way:
            return
        lead = max(on_the_way, key=lambda life: PHASES.index(life.phase))
        if self._life.phase != lead.phase:
            self._life.enter(lead.phase, lead.detail)
        self._life.progress(
            percent=lead.percent,
            detail=lead.detail,
            bytes_done=lead.bytes_done,
            bytes_total=lead.bytes_total,
            eta_seconds=lead.eta_seconds,
        )

    def _problems(self) -> str:
        """One line on the replicas that do not serve; empty if all do."""
        ready = self._phases.count("ready")
        if ready == len(self._lives):
            return ""
        rest = (f"replica {n}: {each.phase}, {each.reason}" for n, each in enumerate(self._lives) if not each.is_ready)
        return f"{ready} of {len(self._lives)} replicas serve; {'; '.join(rest)}"

    def _describe(self) -> list[dict[str, Any]]:
        """For the health endpoints."""
        return [
            {
                "replica": number,
                "phase": life.phase,
                "reason": life.reason,
                "restarts": self._metrics.restarts_of(number),
            }
            for number, life in enumerate(self._lives)
        ]


def _variables(part: EngineOptions) -> dict[str, str]:
    """What the process of one of several replicas needs in its environment: CUDA shows a process one MIG slice only,
    the first unless it is told which."""
    if part.replicas == 1 or not any(device.startswith("MIG-") for device in part.devices):
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(part.devices)}


def _name(number: int, count: int) -> str:
    """Of a process, in log lines."""
    return "engine" if count == 1 else f"engine-{number}"
