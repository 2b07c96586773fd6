"""Several engine processes behind one journal, with children that really die: readiness, resubmission, giving up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from fake_engine import POISON

from appliance.errors import EngineCrashedError, EngineDamagedError, HardwareError
from appliance.launch.child import Child
from appliance.launch.replicas import Replicas, split
from appliance.server.state import ServerState
from appliance.types import EngineOptions, EngineRequest, SamplingParams

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}"}


class Rig:
    """Replicas of fake engines. `modes`: of the processes of each replica, one after the other; the last one stays."""

    def __init__(self, directory: Path, modes: list[list[str]], *, budget: int = 3, hang_seconds: float = 60.0) -> None:
        self.directory = directory
        self.modes = modes
        self.children: dict[str, list[Child]] = {}
        self.variables: dict[str, dict[str, str]] = {}
        self.repaired: list[str] = []
        self.options = EngineOptions(engine_dir="/nowhere", backend="fake", replicas=len(modes))
        self.state = ServerState(("m",))
        self.life, self.journal = self.state.lifecycle, self.state.journal
        self.replicas = Replicas(
            self.spawn,
            self.state,
            repair=self.repair,
            prepared=self.spawn("engine-0", {}),
            restart_budget=budget,
            backoff_seconds=0.01,
            hang_seconds=hang_seconds,
        )

    def spawn(self, name: str, variables: Mapping[str, str]) -> Child:
        self.variables[name] = dict(variables)
        modes = self.modes[int(name.partition("-")[2])]
        mode = modes.pop(0) if len(modes) > 1 else modes[0]
        child = Child(name, "fake_engine", [mode], directory=self.directory, environment=ENVIRONMENT)
        self.children.setdefault(name, []).append(child)
        return child

    async def repair(self, error: EngineDamagedError) -> EngineOptions:
        self.repaired.append(error.message)
        await asyncio.sleep(0.3)
        return self.options

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        task = asyncio.create_task(self.replicas.run(self.options))
        try:
            yield task
        finally:
            await self.replicas.stop()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.replicas.close()
            assert not any(child.alive for children in self.children.values() for child in children)

    @property
    def phases(self) -> list[str]:
        return [replica["phase"] for replica in self.life.as_dict()["replicas"]]

    async def until(self, *phases: str, seconds: float = 30) -> None:
        """Until the replicas are in these phases."""
        async with asyncio.timeout(seconds):
            while self.life.as_dict().get("replicas") is None or self.phases != list(phases):
                await asyncio.sleep(0.01)
        self.journal.check_integrity()

    def kill(self, replica: int) -> None:
        os.kill(self.children[f"engine-{replica}"][-1].pid, signal.SIGKILL)

    def metric(self, name: str, replica: int) -> float:
        line = f'{name}{{model_name="m",replica="{replica}"}} '
        text = self.state.metrics.render().decode()
        return float(next(each for each in text.splitlines() if each.startswith(line)).removeprefix(line))


class Stream:
    """One request, read in a task of its own; token i must be prompt length + i."""

    def __init__(self, rig: Rig, name: str, max_tokens: int, first: int = 1) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.end = ""
        self._group = rig.journal.submit([EngineRequest(name, [first, 2, 3], SamplingParams(max_tokens=max_tokens))])
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for outputs in self._group:
            for output in outputs:
                self.tokens += output.token_ids
                self.times += [time.monotonic()] * len(output.token_ids)
                self.end = output.finish_reason or ""

    async def after(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.tokens) < count:
                await asyncio.sleep(0.005)

    @property
    def longest_pause(self) -> float:
        return max(later - earlier for earlier, later in zip(self.times, self.times[1:]))

    async def completes(self, max_tokens: int) -> None:
        await asyncio.wait_for(self.task, 30)
        assert (self.tokens, self.end) == (list(range(3, 3 + max_tokens)), "length")


def test_options_of_each_replica() -> None:
    options = EngineOptions(engine_dir="/e", backend="cuda", devices=("a", "b", "c", "d"), replicas=2)
    assert [part.devices for part in split(options)] == [("a", "b"), ("c", "d")]
    assert [part.replicas for part in split(options)] == [2, 2]
    assert split(EngineOptions(engine_dir="/e", backend="cpu")) == [EngineOptions(engine_dir="/e", backend="cpu")]


async def test_ready_with_the_first_and_then_with_all(tmp_path: Path) -> None:
    rig = Rig(tmp_path, [["slow-load"], ["steps"]])
    async with rig.running():
        await rig.until("loading", "ready")
        assert rig.life.is_ready and rig.life.reason.startswith("1 of 2 replicas serve; replica 0: loading")
        assert [rig.metric("replica_up", n) for n in (0, 1)] == [0, 1]
        await Stream(rig, "a", 5).completes(5)
        assert rig.journal.max_in_flight == 4096 + 4
    rig = Rig(tmp_path, [["steps"], ["steps"]])
    async with rig.running():
        await rig.until("ready", "ready")
        assert rig.life.reason == "" and rig.journal.max_in_flight == 4096 + 4 + 4
        streams = [Stream(rig, f"s{i}", 30) for i in range(4)]
        await streams[3].after(2)
        assert [rig.journal.in_flight_on(n) for n in (0, 1)] == [2, 2]
        assert [rig.metric("replica_requests_running", n) for n in (0, 1)] == [2, 2]
        for stream in streams:
            await stream.completes(30)


async def test_one_killed_in_mid_stream_its_streams_go_on_elsewhere_and_others_never_pause(tmp_path: Path) -> None:
    rig = Rig(tmp_path, [["steps", "slow-load"], ["steps"]])
    async with rig.running():
        await rig.until("ready", "ready")
        streams = [Stream(rig, f"s{i}", 100) for i in range(4)]
        await streams[3].after(5)
        rig.kill(0)
        for stream in streams:
            await stream.completes(100)
        assert rig.phases == ["restarting", "ready"], "nothing waited for the one that was killed"
        assert rig.life.is_ready and rig.life.reason.startswith("1 of 2 replicas serve; replica 0: restarting")
        assert min(sorted(stream.longest_pause for stream in streams)[:2]) < 0.5
        assert rig.state.metrics.resubmitted == 2
        assert [rig.metric("replica_restarts_total", n) for n in (0, 1)] == [1, 0]
        rig.journal.check_integrity()


async def test_both_killed_the_streams_wait_for_whichever_is_back_first(tmp_path: Path) -> None:
    rig = Rig(tmp_path, [["steps", "slow-load"], ["steps"]])
    async with rig.running():
        await rig.until("ready", "ready")
        streams = [Stream(rig, f"s{i}", 60) for i in range(4)]
        await streams[3].after(5)
        rig.kill(0)
        rig.kill(1)
        async with asyncio.timeout(10):
            while rig.life.phase != "restarting":
                await asyncio.sleep(0.005)
        assert not rig.life.is_ready and rig.life.accepts_requests
        late = Stream(rig, "late", 5)
        for stream in streams:
            await stream.completes(60)
        await late.completes(5)
        assert rig.phases == ["restarting", "ready"] and rig.life.is_ready


async def test_one_that_hangs_is_replaced_while_the_other_serves(tmp_path: Path) -> None:
    rig = Rig(tmp_path, [["hang-in-request", "steps"], ["steps"]], hang_seconds=1.0)
    async with rig.running():
        await rig.until("ready", "ready")
        streams = [Stream(rig, f"s{i}", 40) for i in range(2)]
        for stream in streams:
            await stream.completes(40)
        assert len(rig.children["engine-0"]) == 2 and len(rig.children["engine-1"]) == 1


async def test_a_poison_request_ends_alone_after_three_crashes_wherever_they_were(tmp_path: Path) -> None:
    rig = Rig(tmp_path, [["steps"], ["steps"]], budget=5)
    async with rig.running():
        await rig.until("ready", "ready")
        streams = [Stream(rig, f"s{i}", 100) for i in range(4)]
        await streams[3].after(2)
        poison = Stream(rig, "p", 50, first=POISON)
        for stream in streams:
            await stream.completes(100)
        await asyncio.wait_for(poison.task, 30)
        assert poison.end == "error" and poison.tokens == [3, 4]
        await rig.until("ready", "ready")
        assert sum(len(children) for children in rig.children.values()) == 5, "three died"


async def test_one_that_keeps_failing_is_given_up_and_the_last_one_ends_the_server(tmp_path: Path) -> None:
    rig = Rig(tmp_path, [["steps", "crash-in-load"], ["crash-in-load"]], budget=1)
    async with rig.running() as task:
        await rig.until("ready", "failed")
        assert rig.life.is_ready and "replica 1: failed, replica 1 failed 2 times within 10 min" in rig.life.reason
        stream = Stream(rig, "a", 50)
        await stream.after(5)
        assert not task.done()
        rig.kill(0)
        with pytest.raises(EngineCrashedError, match="replica 0 failed 2 times") as caught:
            await asyncio.wait_for(task, 20)
        assert caught.value.exit_code == 8
        rig.journal.fail_all("over")
        await stream.task
        assert stream.end == "error"


async def test_what_an_engine_says_of_itself_ends_the_start_only_if_all_say_it(tmp_path: Path) -> None:
    rig = Rig(tmp_path, [["no-memory"], ["steps"]])
    async with rig.running():
        await rig.until("failed", "ready")
        assert rig.life.is_ready and "too little memory" in rig.life.reason
        assert len(rig.children["engine-0"]) == 1, "it is not tried again"
    rig = Rig(tmp_path, [["no-memory"], ["no-memory"]])
    async with rig.running() as task:
        with pytest.raises(HardwareError, match="too little memory"):
            await asyncio.wait_for(task, 20)


async def test_a_damaged_engine_is_repaired_once_for_all(tmp_path: Path) -> None:
    rig = Rig(tmp_path, [["damaged", "steps"], ["damaged", "steps"]])
    async with rig.running():
        await rig.until("ready", "ready")
    assert rig.repaired == ["rank-0 is damaged"]


async def test_drain_waits_for_all_and_processes_prepared_for_nothing_are_ended(tmp_path: Path) -> None:
    rig = Rig(tmp_path, [["steps"], ["steps"]])
    rig.modes.append(["steps"])
    rig.replicas.prepare(3)  # more than is needed in the end
    rig.options = EngineOptions(engine_dir="/nowhere", backend="fake", replicas=2)
    async with rig.running():
        await rig.until("ready", "ready")
        streams = [Stream(rig, f"s{i}", 40) for i in range(2)]
        await streams[1].after(2)
        assert await rig.journal.drain(30) == 0
        for stream in streams:
            await stream.completes(40)
        assert rig.life.phase == "draining"


async def test_each_replica_on_a_mig_slice_sees_its_own(tmp_path: Path) -> None:
    """CUDA shows a process the first slice only, so the process that was started before anyone knew is replaced."""
    rig = Rig(tmp_path, [["steps"], ["steps"]])
    rig.options = EngineOptions(engine_dir="/nowhere", backend="fake", devices=("MIG-a", "MIG-b"), replicas=2)
    async with rig.running():
        await rig.until("ready", "ready")
        assert rig.variables == {f"engine-{i}": {"CUDA_VISIBLE_DEVICES": f"MIG-{x}"} for i, x in enumerate("ab")}
        rig.kill(1)
        await rig.until("ready", "restarting")
        await rig.until("ready", "ready")
        assert rig.variables["engine-1"] == {"CUDA_VISIBLE_DEVICES": "MIG-b"}


async def test_stop_before_anything_is_loaded(tmp_path: Path) -> None:
    rig = Rig(tmp_path, [["steps"], ["steps"]])
    rig.replicas.prepare(2)
    async with asyncio.timeout(20):
        await rig.replicas.stop()
        await rig.replicas.run(rig.options)
        rig.replicas.close()
    assert not any(child.alive for children in rig.children.values() for child in children)
