"""Ranks of other nodes as rank 0 sees them: frames over TCP, who joins, what is said of a rank or a node that is lost.
With sockets of this machine and no rank at all."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable

import msgspec
import pytest

from appliance.errors import (
    ApplianceError,
    EngineCrashedError,
    HardwareError,
    NodeError,
)
from appliance.ipc import Failed
from appliance.runtime import remote_nodes
from appliance.runtime.node_channel import (
    Begin,
    Channel,
    Counters,
    Ended,
    Join,
    Kind,
    bind_address,
    decode_note,
    listen,
)
from appliance.runtime.rank_watch import RankWatch
from appliance.runtime.remote_nodes import NodeListener, RemoteNodes, WaitForNodes
from appliance.runtime.step_ring import SharedSteps, Word


class FakeNode:
    """The process that holds another node's ranks, without any."""

    def __init__(self, listener: NodeListener, number: int, token: str | None = None) -> None:
        self.channel = Channel(socket.create_connection(("127.0.0.1", listener.port)))
        self.channel.note(Join(number, listener.token if token is None else token))

    def frames(self, count: int) -> list[tuple[Kind, bytes]]:
        found: list[tuple[Kind, bytes]] = []
        deadline = time.monotonic() + 5
        while len(found) < count:
            assert time.monotonic() < deadline
            found += self.channel.receive()
        return found


def never() -> bool:
    return False


def joined(nnodes: int = 2) -> tuple[RemoteNodes, list[FakeNode]]:
    listener = NodeListener("127.0.0.1", nnodes)
    nodes = [FakeNode(listener, number) for number in range(1, nnodes)]
    return listener.accept_all(WaitForNodes(lambda line: None, 5, never)), nodes


def test_steps_results_and_counters_travel() -> None:
    remote, (other,) = joined()
    shared = SharedSteps.create(4)
    ranks = remote.begin(shared, 29500, results=2)
    (kind, data), *_ = other.frames(1)
    assert kind == Kind.NOTE and decode_note(data) == Begin(2, 2, 4, 29500, 2)
    assert [rank.name for rank in ranks] == ["rank 2 on node 1 (127.0.0.1)", "rank 3 on node 1 (127.0.0.1)"]
    messages = [b"", b"x" * 3_000_000, b"y"]
    sender = threading.Thread(target=lambda: [remote.send(message) for message in messages])
    sender.start()
    assert other.frames(3) == [(Kind.STEP, message) for message in messages]
    sender.join()
    other.channel.note(Counters([[5, 4, 3, 2, 1], [6, 5, 4, 3, 2]]))
    other.channel.send(Kind.RESULT, b"tokens")
    assert os.read(remote.results, 100) == b"tokens"
    assert [shared.get(3, word) for word in (Word.TAKEN, Word.FINISHED, Word.CALLS, Word.BEAT)] == [6, 5, 4, 3]
    remote.kill()
    with pytest.raises(ConnectionError):
        other.frames(1)


def lost(remote: RemoteNodes, act: Callable[[], None]) -> ApplianceError:
    """What the watch says of ranks of which something becomes."""
    shared = SharedSteps.create(remote.nnodes)
    reasons: list[ApplianceError] = []
    watch = RankWatch(remote.begin(shared, 1, -1), shared, reasons.append)
    watch.start()
    act()
    deadline = time.monotonic() + 5
    while not reasons:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    remote.kill()
    return reasons[0]


def test_a_rank_that_ends_on_another_node_is_named_with_it() -> None:
    remote, nodes = joined(3)
    error = lost(remote, lambda: nodes[1].channel.note(Ended(2, -signal.SIGKILL, b"")))
    assert error.message.startswith("rank 2 on node 2 (127.0.0.1) was killed by SIGKILL")
    remote, nodes = joined()
    said = msgspec.msgpack.encode(Failed(error="HardwareError", message="out of memory"))
    error = lost(remote, lambda: nodes[0].channel.note(Ended(1, 3, said)))
    assert isinstance(error, HardwareError) and error.message == "rank 1 on node 1 (127.0.0.1): out of memory"


def test_a_node_that_goes_or_is_silent_has_lost_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    remote, nodes = joined()
    error = lost(remote, nodes[0].channel.close)
    assert isinstance(error, EngineCrashedError)
    assert error.message == "rank 1 on node 1 (127.0.0.1): node 1 is lost: its connection was closed"
    remote, nodes = joined()
    nodes[0].channel.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert "node 1 is lost: its connection was closed" in lost(remote, nodes[0].channel.socket.close).message  # a reset
    monkeypatch.setattr(remote_nodes, "SILENCE_SECONDS", 0.5)
    remote, nodes = joined()
    assert "node 1 is lost: nothing was heard of it for" in lost(remote, lambda: None).message


def test_only_nodes_of_this_engine_may_join(caplog: pytest.LogCaptureFixture) -> None:
    listener = NodeListener("127.0.0.1", 2)
    stranger = FakeNode(listener, 1, token="of the engine before")
    lines: list[str] = []
    with pytest.raises(NodeError, match="node 1 did not join the engine within 1 s"):
        listener.accept_all(WaitForNodes(lines.append, 1, never))
    assert "was refused: it belongs to another engine" in caplog.text
    with pytest.raises(ConnectionError):
        stranger.frames(1)
    with pytest.raises(ApplianceError, match="the server is gone"):
        NodeListener("127.0.0.1", 2).accept_all(WaitForNodes(lines.append, 9, lambda: True))


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_both_kinds_of_addresses_are_as_others_write_them(address: str) -> None:
    assert [bind_address(name) for name in (address, "localhost", "node-0.group", None)] == [
        address,
        "127.0.0.1",
        "",
        "",
    ]
    if address == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    with listen("", 0) as listener:
        there = socket.create_connection((address, listener.getsockname()[1]))
        here = Channel(listener.accept()[0])
        assert here.here == here.there == address
        there.close()


def test_results_that_nobody_reads_do_not_hold_the_end_up() -> None:
    remote, (other,) = joined()
    (rank,) = remote.begin(SharedSteps.create(2), 1, results=1)
    other.channel.send(Kind.RESULT, bytes(1 << 20))  # more than the pipe takes
    assert len(os.read(remote.results, 1)) == 1
    remote.kill()
    assert rank.process.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("said", "seconds"),
    [(b"", 0.5), (b"\x32\x00\x00\x00\x00" + bytes(30), 0.5), (b"\x01\x00\x00\x00\x01x", 5)],
    ids=["silent", "slow", "a step"],
)
def test_a_stranger_keeps_nobody_waiting(said: bytes, seconds: float) -> None:
    """Whether it says nothing, part of a frame again and again, or something else than a note."""
    with listen("127.0.0.1", 0) as listener:
        stranger = socket.create_connection(listener.getsockname())
        channel = Channel(listener.accept()[0])
    stop = threading.Event()

    def talk() -> None:
        for at in range(len(said)):
            if stop.wait(0.1):
                return
            stranger.send(said[at : at + 1])

    thread = threading.Thread(target=talk)
    thread.start()
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match="was not expected" if seconds > 1 else "nothing that was expected"):
        channel.wait_for_note(seconds)
    assert time.monotonic() - begin < 2
    stop.set()
    thread.join()
    stranger.close()
    channel.close()


def test_a_channel_that_is_closed_while_it_waits_is_gone() -> None:
    remote, _ = joined()
    remote.begin(SharedSteps.create(2), 1, -1)
    closed: list[bool] = []

    def close_once() -> None:
        if not closed:
            closed.append(True)
            remote._nodes[0].channel.close()

    with pytest.raises(OSError):
        remote._nodes[0].channel.send(Kind.STEP, bytes(100_000_000), close_once)
    assert closed
    remote.kill()


def test_a_slow_node_is_waited_for_until_the_check_gives_up() -> None:
    remote, nodes = joined()
    remote.begin(SharedSteps.create(2), 1, -1)

    def give_up() -> None:
        raise EngineCrashedError("lost meanwhile")

    with pytest.raises(EngineCrashedError, match="lost meanwhile"):
        for _ in range(100):
            remote.send(bytes(10_000_000), give_up)
    nodes[0].channel.close()
    remote.kill()
