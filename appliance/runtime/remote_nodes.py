"""The other nodes of an engine, as rank 0 has them: their ranks look like its own children, but for being elsewhere.

A node joins over TCP (`NodeListener`), is told which ranks it has (`RemoteNodes.begin`), gets every message that goes
to all ranks, and sends back how far its ranks are, which goes into rank 0's own shared memory, and what they say. So
`RankWatch` sees a rank of another node frozen, stuck or ended as it does one of this node's. A node that is silent or
whose connection closes has lost all its ranks. Knows neither torch nor who started the nodes.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from appliance.errors import ApplianceError, EngineCrashedError, HardwareError, NodeError
from appliance.ipc import Failed
from appliance.runtime.node_channel import (
    SILENCE_SECONDS,
    Begin,
    Channel,
    Counters,
    Ended,
    Join,
    Kind,
    Note,
    decode_note,
    listen,
    plain_address,
)
from appliance.runtime.rank_watch import RankProcess
from appliance.runtime.step_ring import SharedSteps, Word

log = logging.getLogger(__name__)

MIRRORED = (Word.TAKEN, Word.FINISHED, Word.CALLS, Word.BEAT, Word.LOADED)  # counters that travel
NODE_LOST = "NodeLost"  # as the kind of `Failed`
_JOIN_SECONDS = 3.0  # for a node's first word, once it has connected
_LOOK_SECONDS = 0.25
_KILLED = -9


class RemoteRank:
    """Stands for the process of a rank on another node (`rank_watch.Process`)."""

    def __init__(self, rank: int, kill: Callable[[], None]) -> None:
        self.pid = 0  # means nothing here
        self.returncode: int | None = None
        self._rank = rank
        self._kill = kill
        self._ended = threading.Event()

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"rank {self._rank}", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """Ends all ranks of its node."""
        self._kill()

    def end(self, returncode: int) -> None:
        self.returncode = returncode
        self._ended.set()


@dataclass
class _Node:
    number: int
    channel: Channel
    ranks: dict[int, RemoteRank] = field(default_factory=dict)
    reports: dict[int, int] = field(default_factory=dict)  # rank -> the end of its report pipe that is written here
    heard: float = 0.0  # monotonic seconds
    lost: bool = False

    @property
    def name(self) -> str:
        return f"node {self.number}"


class NodeListener:
    """Where the nodes of one engine join it."""

    def __init__(self, address: str, nnodes: int) -> None:
        """HardwareError if nothing can listen. `address`: as `node_channel.listen` has it."""
        self.nnodes = nnodes
        self.token = secrets.token_hex(16)
        try:
            self._socket = listen(address, 0)
        except OSError as error:
            raise HardwareError(f"cannot listen for other nodes on {address or 'any address'}: {error}") from error

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def accept_all(self, on_wait: Callable[[list[int]], None]) -> RemoteNodes:
        """Wait for every node; `on_wait` is called several times a second with those that are missing, and raises if
        the wait is to end. Whoever else connects is turned away."""
        nodes: dict[int, _Node] = {}
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        try:
            while missing := [n for n in range(1, self.nnodes) if n not in nodes]:
                on_wait(missing)
                for number in [n for n, node in nodes.items() if _is_gone(node.channel)]:
                    nodes.pop(number).channel.close()  # it will come again
                if poll.poll(1000 * _LOOK_SECONDS) and (node := self._accept()) is not None:
                    nodes[node.number] = node
        except BaseException:
            for node in nodes.values():
                node.channel.close()
            raise
        finally:
            self._socket.close()
        return RemoteNodes([nodes[number] for number in sorted(nodes)])

    def _accept(self) -> _Node | None:
        connection, address = self._socket.accept()
        channel = Channel(connection)
        try:
            note = channel.wait_for_note(_JOIN_SECONDS)
            if isinstance(note, Join) and note.token == self.token and 0 < note.node < self.nnodes:
                return _Node(note.node, channel, heard=time.monotonic())
            reason = "it belongs to another engine"
        except OSError as error:
            reason = str(error)
        log.warning("a connection from %s was refused: %s", plain_address(address[0]), reason)
        channel.close()
        return None


def _is_gone(channel: Channel) -> bool:
    """Whether the other end has closed; it sends nothing before it is told to begin."""
    try:
        return not channel.socket.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


class RemoteNodes:
    """All other nodes of an engine, joined."""

    def __init__(self, nodes: list[_Node]) -> None:
        self._nodes = nodes
        self._closed = False
        self._losing = threading.Lock()
        self._shared: SharedSteps | None = None
        self._thread = threading.Thread(target=self._run, name="remote-nodes", daemon=True)
        # What the rank that gives results says comes out of the first of these.
        self.results, self._results = os.pipe()
        os.set_blocking(self._results, False)

    @property
    def nnodes(self) -> int:
        return len(self._nodes) + 1

    @property
    def address(self) -> str:
        """Of this node, as the others reach it."""
        return self._nodes[0].channel.here

    def begin(self, shared: SharedSteps, port: int, results: int) -> list[RankProcess]:
        """Have the nodes start their ranks, which meet at `port` of this node; returns them. `results`: the rank that
        gives results, -1 if none does. Raises EngineCrashedError if a node is gone again."""
        self._shared = shared
        share = shared.ranks // self.nnodes
        found: list[RankProcess] = []
        for node in self._nodes:
            first = node.number * share
            for rank in range(first, first + share):
                hears, node.reports[rank] = os.pipe()
                node.ranks[rank] = RemoteRank(rank, self.kill)
                found.append(RankProcess(rank, node.ranks[rank], hears, where=f"{node.name} ({node.channel.there})"))
            try:
                node.channel.note(Begin(first, share, shared.ranks, port, results))
            except OSError as error:
                self.kill()
                raise EngineCrashedError(f"{node.name} is lost: {error}") from error
            node.heard = time.monotonic()
        self._thread.start()
        return found

    def send(self, message: bytes, check: Callable[[], None] = lambda: None) -> None:
        """A message of rank 0 to all ranks. Waits where a node is slow to take it, calling `check`; what goes to a node
        that is lost goes nowhere, since whoever watches will say so."""
        for node in self._nodes:
            if not node.lost:
                try:
                    node.channel.send(Kind.STEP, message, check)
                except OSError as error:
                    self._lose(node, str(error))

    def kill(self) -> None:
        """End all ranks of all other nodes: they go with their connection. Idempotent."""
        self._closed = True
        for node in self._nodes:
            node.channel.close()

    # ------------------------------------------------------------ from the nodes

    def _run(self) -> None:
        while not self._closed and (live := [node for node in self._nodes if not node.lost]):
            poll = select.poll()
            by_fd = {node.channel.socket.fileno(): node for node in live}
            for fd in by_fd:
                if fd >= 0:  # else it was closed just now
                    poll.register(fd, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(1000 * _LOOK_SECONDS)}
            now = time.monotonic()  # before one node's results may keep this thread from looking at another
            for fd, node in by_fd.items():
                self._take(node, fd in ready, now)
        for node in self._nodes:
            self._lose(node, "the engine has ended")
        os.close(self._results)

    def _take(self, node: _Node, ready: bool, now: float) -> None:
        try:
            if ready:
                node.heard = now
                for kind, data in node.channel.receive():
                    if kind == Kind.RESULT:
                        self._pass_on(data)
                    elif kind == Kind.NOTE:
                        self._on_note(node, decode_note(data))
            elif now - node.heard > SILENCE_SECONDS:
                raise ConnectionError(f"nothing was heard of it for {now - node.heard:.0f} s")
        except OSError as error:
            self._lose(node, str(error))

    def _pass_on(self, data: bytes) -> None:
        """Results to whoever reads them. Waits while nobody does, as the rank would, until the engine ends."""
        poll = select.poll()
        poll.register(self._results, select.POLLOUT)
        left = memoryview(data)
        while left and not self._closed:
            try:
                left = left[os.write(self._results, left) :]
            except BlockingIOError:
                poll.poll(1000 * _LOOK_SECONDS)

    def _on_note(self, node: _Node, note: Note) -> None:
        assert self._shared is not None
        match note:
            case Counters(values=values):
                for rank, words in zip(node.ranks, values):
                    for word, value in zip(MIRRORED, words):
                        self._shared.put(rank, word, value)
            case Ended(rank=rank, returncode=returncode, said=said):
                self._end(node, rank, returncode, said)

    def _lose(self, node: _Node, reason: str) -> None:
        """All ranks of a node, as far as they have not ended."""
        with self._losing:  # a send and the thread that receives may both notice
            if node.lost:
                return
            node.lost = True
        failed = Failed(error=NODE_LOST, message=f"{node.name} is lost: {reason}")
        for rank in list(node.reports):
            self._end(node, rank, _KILLED, msgspec.msgpack.encode(failed))
        node.channel.close()

    def _end(self, node: _Node, rank: int, returncode: int, said: bytes) -> None:
        report = node.reports.pop(rank, None)
        if report is None:
            return
        node.ranks[rank].end(returncode)
        os.write(report, said[: select.PIPE_BUF])
        os.close(report)


class WaitForNodes:
    """`on_wait` of `accept_all`: tells of missing nodes every few seconds, and ends a wait that nobody else ends."""

    def __init__(self, say: Callable[[str], None], seconds: float, gone: Callable[[], bool]) -> None:
        """`gone`: whether whoever wants the engine has ended."""
        self._say = say
        self._seconds = seconds
        self._gone = gone
        self._began = time.monotonic()
        self._told = 0.0

    def __call__(self, missing: list[int]) -> None:
        waited = time.monotonic() - self._began
        if self._gone():
            raise ApplianceError("the server is gone")
        if waited > self._seconds:
            raise NodeError(
                f"{name_nodes(missing)} did not join the engine within {self._seconds:.0f} s",
                hint="see its log; can it reach this node at every port?",
            )
        if waited - self._told >= 2.0:
            self._told = waited
            self._say(f"waiting for {name_nodes(missing)} to join ({waited:.0f} s)")


def name_nodes(numbers: list[int]) -> str:
    """ "node 1", "nodes 1 and 3"."""
    if len(numbers) == 1:
        return f"node {numbers[0]}"
    return f"nodes {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
