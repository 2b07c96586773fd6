"""Typed messages between server, engine and builder processes, and the two ends of the channel.

ZeroMQ PAIR sockets over a Unix socket, msgspec MessagePack on the wire. The server binds, the child connects; a new
channel per child process, so nothing of a dead child can be read as a message of its successor. The transport knows
nothing of what the messages mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import zmq
import zmq.asyncio

from appliance.types import EngineInfo, EngineOptions, EngineOutput, EngineRequest, EngineStats, Struct

Phase = Literal["detect", "select", "download", "fetch", "build", "verify", "load", "warmup"]


class AddRequests(Struct, frozen=True, tag=True):
    requests: list[EngineRequest]


class AbortRequests(Struct, frozen=True, tag=True):
    request_ids: list[str]


class Shutdown(Struct, frozen=True, tag=True):
    """Finish nothing, release the device, exit 0."""


class Nodes(Struct, frozen=True):
    """Of an engine on several nodes, of which this one is node 0."""

    count: int
    address: str  # to listen at for the others; empty: all of this machine's
    timeout: float  # seconds that one may be missing


class StartEngine(Struct, frozen=True, tag=True):
    options: EngineOptions
    nodes: Nodes | None = None


class Progress(Struct, frozen=True, tag=True):
    """Of a long phase; at least one every few seconds while one runs."""

    phase: Phase
    detail: str = ""  # one plain line, e.g. "layers.12.mlp"
    percent: float = 0.0  # of this phase, 0..100
    bytes_done: int = 0
    bytes_total: int = 0
    eta_seconds: float | None = None


class NodesWanted(Struct, frozen=True, tag=True):
    """The other nodes are to join this engine, at this port, with this token."""

    port: int
    token: str


class Ready(Struct, frozen=True, tag=True):
    info: EngineInfo


class Outputs(Struct, frozen=True, tag=True):
    outputs: list[EngineOutput]
    stats: EngineStats


class Built(Struct, frozen=True, tag=True):
    engine_dir: str
    engine_key: str
    seconds: float


class Failed(Struct, frozen=True, tag=True):
    """The child is about to exit. `error` is the class name in errors.py (or the exception's own), so that the exit
    code survives the process border."""

    error: str
    message: str
    hint: str | None = None


ToChild = AddRequests | AbortRequests | Shutdown | StartEngine
ToServer = Progress | NodesWanted | Ready | Outputs | Built | Failed

_encoder = msgspec.msgpack.Encoder()


class ServerEnd:
    """The server's end: asyncio, binds. `address` goes to the child on its command line."""

    def __init__(self, path: Path) -> None:
        self.address = f"ipc://{path}"
        self._path = path
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._socket.set_hwm(0)  # the server's journal bounds what is in flight; ZeroMQ must not drop or block
        self._socket.linger = 0
        self._socket.bind(self.address)
        self._decoder: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)

    async def send(self, message: ToChild) -> None:
        await self._socket.send(_encoder.encode(message))

    async def receive(self) -> ToServer:
        return self._decoder.decode(await self._socket.recv())

    def close(self) -> None:
        self._socket.close()
        self._path.unlink(missing_ok=True)


class ChildEnd:
    """The child's end: blocking, connects."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 2000)  # ms: a Failed message sent just before exit must get out
        self._socket.connect(address)
        self._decoder: msgspec.msgpack.Decoder[ToChild] = msgspec.msgpack.Decoder(ToChild)

    def send(self, message: ToServer) -> None:
        self._socket.send(_encoder.encode(message))

    def receive(self, timeout_seconds: float | None = None) -> ToChild | None:
        """The next message; None if none came in time. None as timeout waits for ever; 0 only looks."""
        if self._socket.poll(None if timeout_seconds is None else int(timeout_seconds * 1000)) == 0:
            return None
        return self._decoder.decode(self._socket.recv())

    def close(self) -> None:
        self._socket.close()

    @staticmethod
    def flush() -> None:
        """After `close`, in a process that ends without cleaning up: wait until what was sent is out."""
        zmq.Context.instance().term()
