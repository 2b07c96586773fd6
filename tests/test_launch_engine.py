"""Supervision with child processes that really die: restart, budget, repair, resubmission, orphans."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from appliance.errors import EngineCrashedError, EngineDamagedError, HardwareError
from appliance.ipc import Shutdown
from appliance.launch.child import Child, ChildExit
from appliance.launch.engine import EngineSupervisor
from appliance.server.journal import RequestJournal
from appliance.server.lifecycle import Lifecycle
from appliance.server.metrics import ServerMetrics
from appliance.types import EngineInfo, EngineOptions, EngineRequest, SamplingParams

OPTIONS = EngineOptions(engine_dir="/nowhere", backend="fake")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}


class Rig:
    """A supervisor of fake engines, with a real journal and lifecycle."""

    def __init__(
        self, directory: Path, mode: str, *, budget: int = 3, hang_seconds: float = 60.0, excuse: str | None = None
    ) -> None:
        self.directory = directory
        self.marker = directory / "marker"
        self.children: list[Child] = []
        self.repaired: list[EngineDamagedError] = []
        self.infos: list[EngineInfo] = []
        self.lifecycle = Lifecycle()
        self.journal = RequestJournal(self.lifecycle, ServerMetrics("m"))
        self._mode = mode
        self.supervisor = EngineSupervisor(
            self.spawn,
            self.lifecycle,
            self.journal,
            repair=self.repair,
            on_ready=self.infos.append,
            restart_budget=budget,
            backoff_seconds=0.01,
            hang_seconds=hang_seconds,
            excuse=lambda: excuse,
        )

    def spawn(self) -> Child:
        args = [self._mode, str(self.marker)]
        self.children.append(Child("engine", "fake_engine", args, directory=self.directory, environment=ENVIRONMENT))
        return self.children[-1]

    async def repair(self, error: EngineDamagedError) -> EngineOptions:
        self.repaired.append(error)
        return OPTIONS

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        task = asyncio.create_task(self.supervisor.run(OPTIONS))
        try:
            yield task
        finally:
            await self.supervisor.stop()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def until_ready(self, task: asyncio.Task[None]) -> None:
        async with asyncio.timeout(20):
            while not self.lifecycle.is_ready:
                if task.done():
                    task.result()
                await asyncio.sleep(0.01)

    async def tokens_of(self, request: EngineRequest) -> list[int]:
        tokens: list[int] = []
        async with asyncio.timeout(20):
            async for outputs in self.journal.submit([request]):
                for output in outputs:
                    assert output.error is None
                    tokens += output.token_ids
        return tokens


def request(max_tokens: int) -> EngineRequest:
    return EngineRequest("r", [1, 2, 3], SamplingParams(max_tokens=max_tokens))


def gone(pid: int) -> bool:
    """Whether no living process has this pid, within ten seconds."""
    for _ in range(1000):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


async def test_stop_does_not_wait_for_an_engine_that_still_loads(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "slow-load")
    async with rig.running():
        async with asyncio.timeout(20):
            while rig.lifecycle.phase != "loading":
                await asyncio.sleep(0.01)
        begun = time.monotonic()
        await rig.supervisor.stop()
        assert time.monotonic() - begun < 10.0  # it would load for 20 s
    assert gone(rig.children[0].pid) and not rig.infos


async def test_ready_after_a_token_then_serves_and_stops(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "ok")
    async with rig.running() as task:
        await rig.until_ready(task)
        assert rig.infos and rig.infos[0].device_name == "fake"
        assert {"loading", "warming"} <= set(rig.lifecycle.phase_seconds)
        assert await rig.tokens_of(request(5)) == [3, 4, 5, 6, 7]
        rig.journal.check_integrity()
    assert gone(rig.children[0].pid) and len(rig.children) == 1
    assert not list(tmp_path.glob("engine-*")), "the socket files are removed"


async def test_killed_in_mid_request_the_client_sees_a_pause_only(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "crash-in-request-once")
    async with rig.running() as task:
        await rig.until_ready(task)
        assert await rig.tokens_of(request(8)) == [3, 4, 5, 6, 7, 8, 9, 10]  # two from the first, six from the second
        await rig.until_ready(task)
        assert len(rig.children) == 2 and "restarting" in rig.lifecycle.phase_seconds
        rig.journal.check_integrity()


async def test_an_engine_that_hangs_on_a_request_is_replaced(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "hang-in-request-once", hang_seconds=1.0)
    async with rig.running() as task:
        await rig.until_ready(task)
        await asyncio.sleep(1.5)
        assert len(rig.children) == 1, "an idle engine says nothing and is left alone"
        assert await rig.tokens_of(request(4)) == [3, 4, 5, 6]
        assert len(rig.children) == 2


async def test_a_child_that_ends_before_it_connects_is_not_waited_for(tmp_path: Path) -> None:
    def child(module: str) -> Child:
        return Child("engine", module, [], directory=tmp_path, environment=ENVIRONMENT)

    async with asyncio.timeout(20):
        killed = child("fake_engine")
        killed.kill()
        await killed.stop()  # its exit was not noticed yet, so it is asked
        killed.close()
        broken = child("no_such_module")
        with pytest.raises(ConnectionError, match="the engine process is gone"):
            await broken.send(Shutdown())
        await broken.stop()
        broken.close()


async def test_crash_during_load_is_retried_within_the_budget(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "crash-in-load-once")
    async with rig.running() as task:
        await rig.until_ready(task)
    assert len(rig.children) == 2


async def test_budget_ends_a_crash_loop(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "crash-in-load", budget=2)
    async with rig.running() as task:
        with pytest.raises(EngineCrashedError, match=r"failed 3 times within 10 minutes, last: .*SIGSEGV"):
            await asyncio.wait_for(task, 20)
    assert len(rig.children) == 3


async def test_an_engine_that_was_meant_to_end_costs_neither_the_budget_nor_its_requests(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rig = Rig(tmp_path, "ok", budget=0, excuse="node 1 has left: it was told to end")
    async with rig.running() as task:
        await rig.until_ready(task)
        for number in range(1, 4):  # as many losses as end a request that is blamed for them
            tokens = asyncio.create_task(rig.tokens_of(request(400)))
            rig.children[-1].kill()
            async with asyncio.timeout(20):
                while len(rig.infos) <= number or not rig.lifecycle.is_ready:
                    await asyncio.sleep(0.01)
            assert len(await tokens) == 400
    # A request that was on its way to the engine just then is a warning of its own.
    warnings = [record for record in caplog.records if record.levelno > logging.INFO]
    assert all("did not reach it" in record.getMessage() for record in warnings)
    assert caplog.text.count("the engine is started anew: node 1 has left") == 3


async def test_a_reported_reason_ends_the_start_at_once_with_its_own_class(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "no-memory")
    async with rig.running() as task:
        with pytest.raises(HardwareError, match="too little memory") as caught:
            await asyncio.wait_for(task, 20)
    assert caught.value.exit_code == 3 and caught.value.hint == "use a smaller model" and len(rig.children) == 1


async def test_damaged_engine_is_repaired(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "damaged-once")
    async with rig.running() as task:
        await rig.until_ready(task)
    assert [error.message for error in rig.repaired] == ["rank-0 is damaged"]


async def test_stop_kills_what_does_not_listen(tmp_path: Path) -> None:
    child = Child("engine", "fake_engine", ["stubborn"], directory=tmp_path, environment=ENVIRONMENT)
    heard: list[str] = []
    listening = asyncio.create_task(child.listen(lambda message: heard.append(type(message).__name__)))
    from appliance.ipc import StartEngine

    await child.send(StartEngine(OPTIONS))
    while "Ready" not in heard:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    await child.stop(grace_seconds=0.1)
    assert str(await asyncio.wait_for(listening, 5)).startswith("the engine process was killed by SIGKILL")
    with pytest.raises(ConnectionError):
        await child.send(StartEngine(OPTIONS))
    child.close()


async def test_workers_of_a_dead_engine_are_killed(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "grandchild")
    async with rig.running() as task:
        await rig.until_ready(task)
        worker = int(rig.marker.read_text())
        os.kill(rig.children[0].pid, signal.SIGKILL)
        await asyncio.sleep(0)
        assert await asyncio.to_thread(gone, worker)


def test_children_die_with_a_killed_parent(tmp_path: Path) -> None:
    code = f"""
        import asyncio, os
        from pathlib import Path
        from appliance.launch.child import Child

        async def main():
            child = Child("engine", "fake_engine", ["ok"], directory=Path({str(tmp_path)!r}), environment=os.environ)
            print(child.pid, flush=True)
            await asyncio.sleep(600)

        asyncio.run(main())
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.3)  # let it pass the first lines of bootstrap
    parent.kill()
    parent.wait()
    assert gone(pid)


def test_orphans_are_reaped() -> None:
    """A process that adopts orphans (as PID 1 does) collects them, and leaves the children it started alone."""
    code = """
        import ctypes, subprocess, time
        from appliance.launch.child import reap_orphans

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        subprocess.run(["sh", "-c", "sh -c 'exit 0' & sh -c 'sleep 0.2' & exit 0"])
        time.sleep(0.6)
        print(reap_orphans(), reap_orphans())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT).stdout.split() in (
        ["2", "0"],
        ["1", "0"],  # the shell itself collected the first
    )


def test_exit_texts() -> None:
    assert str(ChildExit("builder", 7)) == "the builder process exited with code 7"
    assert "SIGKILL (out of memory" in str(ChildExit("engine", -9))
    assert "signal 63" in str(ChildExit("engine", -63))
