"""Several nodes: who is let in and who is refused, what is said of those that are missing, what an agent does, devices,
settings. Ranks of other nodes are in test_remote_ranks.py, whole groups in test_nodes_served.py."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from test_nodes_served import free_port, node

from appliance import hardware
from appliance.builtin import checkpoint_dir
from appliance.checkpoint import read_model_config
from appliance.errors import (
    ApplianceError,
    EngineQualityError,
    HardwareError,
    NodeError,
    SettingsError,
)
from appliance.ipc import NodesWanted
from appliance.launch import node_messages as wire
from appliance.launch.http import open_sockets
from appliance.launch.node_agent import NodeAgent
from appliance.launch.node_devices import own_devices, ranks_of_a_node, with_those_elsewhere
from appliance.launch.node_hub import NodeHub
from appliance.launch.node_messages import AgentFailed, Hello, Obtain, Obtained, Refused, RunRanks, Welcome
from appliance.launch.plan import choose
from appliance.launch.prepare import prepare_engine
from appliance.profiles import Selection
from appliance.server.lifecycle import Lifecycle
from appliance.settings import Settings, load
from appliance.settings_rules import check_place_of_node

RECORDED = Path(__file__).parent / "hardware"


def settings_of(node_rank: int = 0, nnodes: int = 2, **flags: Any) -> Settings:
    where = {"node_rank": node_rank, "nnodes": nnodes, "master_addr": "127.0.0.1"}
    return load({**where, "master_port": free_port(), **flags}, {})


def hello(own: Settings, **changes: Any) -> Hello:
    said = Hello(own.node_rank or 1, own.nnodes, wire.versions(), wire.common_settings(own))
    return msgspec.structs.replace(said, **changes)


def selection() -> Selection:
    machine = hardware.load(RECORDED / "h200-x2.yaml")
    return choose(settings_of(), machine, read_model_config(checkpoint_dir()))


# ---------------------------------------------------------------- node 0's hub


class Agent:
    """Another node, as far as the hub sees it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    async def say(self, *messages: wire.ToHub) -> Agent:
        port = self.settings.master_port
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port)
        self.tell(*messages)
        return self

    def tell(self, *messages: wire.ToHub) -> None:
        for message in messages:
            wire.write(self._writer, message)

    async def hear(self, kind: type[Any] | None = None) -> Any:
        """The next message, or the next of that kind."""
        while True:
            message = await wire.read(self._reader, wire.decode_to_agent, 5)
            if kind is None or isinstance(message, kind):
                return message

    def leave(self) -> None:
        self._writer.close()


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_agents_are_told_what_to_obtain_and_when_to_run() -> None:
    settings, life = settings_of(nnodes=3), Lifecycle()
    hub = NodeHub(settings, life)
    await hub.start()
    run = asyncio.create_task(hub.run())
    first = await Agent(settings).say(hello(settings, node=1))
    assert await first.hear() == Welcome()
    chosen = selection()
    hub.select(chosen)
    assert await first.hear(Obtain) == Obtain(1, chosen)
    second = await Agent(settings).say(hello(settings, node=2))  # it comes later, and is told all the same
    assert await second.hear(Obtain) == Obtain(1, chosen)
    first.tell(Obtained(1, "k"))
    waiting = asyncio.create_task(hub.obtained("k"))
    await until(lambda: life.detail == "node 2: starting")
    hub.want(NodesWanted(4711, "secret"))
    assert await first.hear(RunRanks) == RunRanks(4711, "secret")
    second.tell(Obtained(1, "k"))
    assert await second.hear(RunRanks) == RunRanks(4711, "secret")
    await waiting
    first.tell(wire.AgentState("loading", "2 ranks"))
    second.leave()  # and comes again
    await until(lambda: hub.missing == [2])
    assert life.as_dict()["nodes"] == [
        {"node": 1, "host": "127.0.0.1", "phase": "loading", "reason": "2 ranks"},
        {"node": 2, "host": None, "phase": "missing", "reason": "it is not connected"},
    ]
    again = await Agent(settings).say(hello(settings, node=2))
    assert await again.hear(Obtain) == Obtain(1, chosen)
    again.tell(Obtained(1, "other"))
    await again.hear(RunRanks)
    with pytest.raises(NodeError, match=r"node 2 \(127.0.0.1\) has engine other, node 0 k"):
        await hub.obtained("k")
    run.cancel()
    await hub.stop()


def other_seed(settings: Settings) -> dict[str, Any]:
    return {"settings": wire.common_settings(dataclasses.replace(settings, seed=7))}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (lambda s: {"nnodes": 4}, "it is one of 4 nodes, node 0 one of 2"),
        (lambda s: {"node": 2}, "there is no node 2 among 2"),
        (lambda s: {"node": 0}, "there is no node 0 among 2"),
        (
            lambda s: {"versions": {**wire.versions(), "torch": "1.0"}},
            f"other versions: torch is 1.0 there and {wire.versions()['torch']} on node 0",
        ),
        (other_seed, "other settings: --seed is 7 there and 0 on node 0"),
    ],
)
async def test_who_does_not_go_with_node_0_is_told_why(
    changes: Callable[[Settings], dict[str, Any]], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of()
    hub = NodeHub(settings, Lifecycle())
    await hub.start()
    agent = await Agent(settings).say(hello(settings, **changes(settings)))
    refused = await agent.hear()
    assert isinstance(refused, Refused) and refused.reason == reason and refused.hint
    assert reason in caplog.text and hub.missing == [1]
    await hub.stop()


async def test_a_second_agent_of_a_node_is_refused_while_the_first_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.launch.node_hub._SAME_NODE_SECONDS", 0.5)
    settings = settings_of()
    hub = NodeHub(settings, Lifecycle())
    await hub.start()
    first = await Agent(settings).say(hello(settings))
    await first.hear(Welcome)
    second = asyncio.create_task((await Agent(settings).say(hello(settings))).hear())
    await asyncio.sleep(0.1)
    first.tell(wire.AgentState("loading"))
    refused = await second
    assert isinstance(refused, Refused) and refused.reason == "127.0.0.1 is node 1" and "of its own" in refused.hint
    assert hub.missing == []
    third = await Agent(settings).say(hello(settings))  # the first is silent now, as after a power failure
    assert await third.hear() == Welcome()
    with pytest.raises(ConnectionError):
        await first.hear()
    assert hub.missing == []
    await hub.stop()


async def test_an_agent_gives_up_on_what_is_not_node_0(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    settings = dataclasses.replace(settings_of(node_rank=1, node_timeout=1), host="127.0.0.1", port=free_port())
    server = await asyncio.start_server(answer, "127.0.0.1", settings.master_port)
    agent = NodeAgent(settings, open_sockets(settings), tmp_path, Supply(tmp_path))
    assert await asyncio.wait_for(agent.run(), 10) == 9
    assert "cannot be reached for 1 s: what answers there is not node 0" in caplog.text
    assert "node 0 is gone" not in caplog.text
    server.close()


async def test_what_is_no_agent_is_turned_away(caplog: pytest.LogCaptureFixture) -> None:
    settings = settings_of()
    hub = NodeHub(settings, Lifecycle())
    await hub.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", settings.master_port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    assert await reader.read() == b""
    await until(lambda: "a connection from 127.0.0.1 was refused: it sends what is no message" in caplog.text)
    agent = await Agent(settings).say(Obtained(1, "k"))
    with pytest.raises(ConnectionError):
        await agent.hear()
    with pytest.raises(SettingsError, match=r"cannot listen for other nodes on port \d+: Address already in use \("):
        await NodeHub(settings, Lifecycle()).start()
    await hub.stop()


async def test_missing_nodes_are_named_until_a_deadline(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.launch.node_hub.SAY_SECONDS", 0.3)
    caplog.set_level(logging.INFO)
    settings = settings_of(nnodes=4, node_timeout=1.5)
    hub = NodeHub(settings, Lifecycle())
    await hub.start()
    agent = await Agent(settings).say(hello(settings, node=2))
    await agent.hear(Welcome)
    with pytest.raises(NodeError, match=r"nodes 1 and 3 of 4 did not come within 2 s") as caught:
        await hub.run()
    assert "--node-timeout" in str(caught.value.hint) and caught.value.exit_code == 9
    assert caplog.text.count("waiting for nodes 1 and 3 of 4") >= 3
    await hub.stop()


async def test_a_node_that_was_told_to_end_excuses_one_engine(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    settings = settings_of(nnodes=3)
    hub = NodeHub(settings, Lifecycle())
    await hub.start()
    agents = [await Agent(settings).say(hello(settings, node=node)) for node in (1, 2)]
    await until(lambda: not hub.missing)
    assert hub.excuse() is None
    agents[0].tell(wire.Leaving("it was told to end"))
    agents[0].leave()
    agents[1].leave()
    await until(lambda: hub.missing == [1, 2])
    levels = {record.getMessage(): record.levelname for record in caplog.records}
    assert levels["node 1 (127.0.0.1) is gone: it was told to end"] == "INFO"
    assert levels["node 2 (127.0.0.1) is gone: its connection was closed"] == "WARNING"
    assert hub.excuse() == "node 1 has left: it was told to end"
    assert hub.excuse() is None, "the next engine fails for another reason"
    again = await Agent(settings).say(hello(settings, node=1))
    again.tell(wire.Leaving("it was told to end"))
    await until(lambda: "node 1 (127.0.0.1) leaves" in caplog.text.rpartition("is here")[2])
    again.leave()
    await until(lambda: hub.missing == [1, 2])
    third = await Agent(settings).say(hello(settings, node=1))
    await until(lambda: hub.missing == [2])
    assert hub.excuse() is None, "no engine was running when it left, and now it is here"
    third.leave()
    await hub.stop()


@pytest.mark.parametrize(("phase", "level"), [("ready", "INFO"), ("failed", "WARNING")])
async def test_an_agent_says_whether_node_0_was_meant_to_end(
    phase: Any, level: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings, life = settings_of(), Lifecycle()
    hub = NodeHub(settings, life)
    await hub.start()
    agent = await agent_of(hub, settings, Supply(tmp_path), tmp_path)
    await until(lambda: "joined node 0" in caplog.text)
    life.enter(phase)
    await hub.stop()
    await until(lambda: "node 0 is gone" in caplog.text)
    (record,) = [record for record in caplog.records if "node 0 is gone" in record.getMessage()]
    assert record.levelname == level, record
    agent.cancel()
    await asyncio.gather(agent, return_exceptions=True)


async def test_what_an_agent_fails_with_ends_a_start_and_no_server_that_was_ready() -> None:
    settings, life = settings_of(), Lifecycle()
    hub = NodeHub(settings, life)
    await hub.start()
    agent = await Agent(settings).say(hello(settings))
    agent.tell(AgentFailed("HardwareError", "no GPU", "buy one"))
    with pytest.raises(HardwareError, match=r"node 1 \(127.0.0.1\): no GPU") as caught:
        await hub.run()
    assert caught.value.hint == "buy one"
    life.enter("ready")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(hub.run(), 0.5)
    await hub.stop()


class Supply:
    """What an agent finds of each engine that it is to obtain: an error, or the engine's key."""

    def __init__(self, directory: Path, *found: str | ApplianceError) -> None:
        self._directory = directory
        self._found = list(found)

    async def obtain_as_told(
        self, selection: Selection | None, *, repair: bool = False
    ) -> tuple[Path, tuple[str, ...]]:
        found = self._found.pop(0)
        if isinstance(found, ApplianceError):
            raise found
        return self._directory / found, ()


async def agent_of(hub: NodeHub, settings: Settings, supply: Supply, directory: Path) -> asyncio.Task[int]:
    """A real agent of this hub, connected."""
    own = dataclasses.replace(settings, node_rank=1, host="127.0.0.1", port=free_port())
    agent = asyncio.create_task(NodeAgent(own, open_sockets(own), directory, supply).run())
    await until(lambda: not hub.missing)
    return agent


async def test_an_agent_obtains_what_it_is_told_and_another_if_that_is_no_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.launch.node_agent.read_manifest", lambda path: SimpleNamespace(key=path.name))
    settings, life = settings_of(), Lifecycle()
    hub = NodeHub(settings, life)
    await hub.start()
    run = asyncio.create_task(hub.run())
    supply = Supply(tmp_path, EngineQualityError("fp8 answers otherwise"), "k1", HardwareError("no GPU"))
    agent = await agent_of(hub, settings, supply, tmp_path)
    hub.select(selection())
    refused = asyncio.create_task(hub.obtained("k0"))
    await until(lambda: "fp8 answers otherwise" in life.detail)  # node 0 finds the same, and chooses another
    refused.cancel()
    hub.select(selection())
    await asyncio.wait_for(hub.obtained("k1"), 5)
    assert not run.done() and not agent.done()
    hub.select(selection())
    with pytest.raises(HardwareError, match=r"node 1 \(127.0.0.1\): no GPU"):
        await asyncio.wait_for(run, 5)
    assert await asyncio.wait_for(agent, 10) == 3
    await hub.stop()


async def test_ranks_that_cannot_be_started_are_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_child(*arguments: Any, **options: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr("appliance.launch.node_agent.read_manifest", lambda path: SimpleNamespace(key=path.name))
    monkeypatch.setattr("appliance.launch.node_agent.Child", no_child)
    settings = settings_of()
    hub = NodeHub(settings, Lifecycle())
    await hub.start()
    agent = await agent_of(hub, settings, Supply(tmp_path, "k1"), tmp_path)
    hub.select(selection())
    await asyncio.wait_for(hub.obtained("k1"), 5)
    hub.want(NodesWanted(4711, "secret"))
    await until(lambda: "this node's ranks could not be run" in caplog.text)
    assert "no more processes" in caplog.text and not agent.done(), "it may go better next time"
    agent.cancel()
    await asyncio.gather(agent, return_exceptions=True)
    await hub.stop()


def test_a_node_that_is_refused_or_alone_ends_with_9(tmp_path: Path) -> None:
    port = free_port()
    leader = node(tmp_path / "cache", 0, port, "--node-timeout", "6")
    other = node(tmp_path / "cache", 1, port, "--node-timeout", "6", "--seed", "5")
    alone = node(tmp_path / "cache", 1, free_port(), "--node-timeout", "2")
    try:
        assert other.process.wait(30) == 9
        assert "node 0 refuses node 1: other settings: --seed is 5 there and 0 on node 0" in other.log
        assert alone.process.wait(30) == 9
        assert "cannot be reached for 2 s: Connection refused" in alone.log
        assert leader.process.wait(30) == 9
        assert "waiting for node 1 of 2" in leader.log and "node 1 of 2 did not come within 6 s" in leader.log
    finally:
        for each in (leader, other, alone):
            each.process.kill()
            each.process.wait()


# ---------------------------------------------------------------- devices and settings


def test_a_node_chooses_its_own_devices() -> None:
    machine = hardware.load(RECORDED / "h200-x4.yaml")
    uuids = [gpu.uuid for gpu in machine.gpus]
    assert list(own_devices(machine, 4, (9, 0), 1 << 30)) == uuids
    assert len(own_devices(machine, 2, (9, 0), 1 << 30)) == 2 and own_devices(machine, 2, None, 1) == ()
    with pytest.raises(HardwareError, match=r"8 GPUs of compute capability 9\.0 with 1\.0 GiB free .*here are 4"):
        own_devices(machine, 8, (9, 0), 1 << 30)
    with pytest.raises(HardwareError, match=r"4 GPUs of compute capability 8\.0 .*here are 0"):
        own_devices(machine, 4, (8, 0), 1 << 30)
    assert ranks_of_a_node(tp_size=4, pp_size=4, nnodes=2) == 8
    with pytest.raises(SettingsError, match="3 pipeline stages cannot be served by 2 nodes"):
        ranks_of_a_node(4, 3, 2)
    elsewhere = with_those_elsewhere(["GPU-a", "GPU-b"], 2)
    assert elsewhere[:2] == ("GPU-a", "GPU-b") and len(set(elsewhere)) == 4
    assert with_those_elsewhere([], 2) == ()


TORCHRUN = {
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "x",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def test_torchrun_says_which_node_this_is() -> None:
    settings = load({}, TORCHRUN)
    assert (settings.nnodes, settings.node_rank, settings.master_addr) == (2, 1, "node-0")
    assert settings.master_port == 29501  # torchrun's own store has the other
    assert load({}, TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"}).master_port == 29500
    assert load({"master_port": 29510}, TORCHRUN).master_port == 29510
    with pytest.raises(SettingsError, match="torchrun starts 4 processes on this node, and may start one"):
        load({}, TORCHRUN | {"LOCAL_WORLD_SIZE": "4"})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"nnodes": 2}, "node_rank is not set"),
        ({"nnodes": 2, "node_rank": 1}, "node 1 needs master_addr"),
        ({"nnodes": 2, "node_rank": 2}, "node_rank 2 is not below nnodes, 2"),
        ({"node_rank": 1}, r"node_rank 1 is not below nnodes, 1 \(say with --nnodes"),
        ({"nnodes": 2, "node_rank": 0, "replicas": 2}, "2 replicas on 2 nodes"),
        ({"nnodes": 2, "node_rank": 0, "pp_size": 3}, "pp_size 3 is no multiple of 2 nodes"),
    ],
)
def test_settings_of_nodes_that_do_not_go_together(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_place_of_node(load(flags, {}))


def test_an_engine_in_this_process_is_on_one_node() -> None:
    with pytest.raises(SettingsError, match="only `serve` runs an engine on several nodes"):
        prepare_engine("builtin", overrides={"nnodes": 2})


def test_processes_of_a_node_do_without_torch() -> None:
    code = "import sys, appliance.node_process, appliance.launch.node_agent, appliance.launch.node_hub; "
    subprocess.run(
        [sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], check=True, cwd=RECORDED.parents[1]
    )
