"""What passes over TCP between rank 0's process and the process that holds the ranks of another node.

A frame is a length, a kind and bytes: a `Note` as MessagePack, or bytes that are passed on unread (messages to ranks,
and what ranks say back). Knows sockets; not what steps are, nor who starts whom. Imports no torch.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from enum import IntEnum

import msgspec

from appliance.types import Struct

BEAT_SECONDS = 0.1  # between two `Counters`
SILENCE_SECONDS = 8.0  # without a word from the other end: it is lost
_HEAD = struct.Struct("<IB")  # length of what follows, kind
_LARGEST = 1 << 30  # bytes of a frame; more is no frame of ours
_BUFFER = 4 << 20  # bytes that may be on their way before a send waits
_LOOK_SECONDS = 0.05
_CLOSED = "its connection was closed"


class Kind(IntEnum):
    NOTE = 0
    STEP = 1  # a message of rank 0 to all others
    RESULT = 2  # a piece of what one rank says back, as it comes out of its pipe


class Join(Struct, frozen=True, tag=True):
    """A node's first word. `token` is of the engine that it means to join."""

    node: int
    token: str


class Begin(Struct, frozen=True, tag=True):
    """Rank 0's answer, once all nodes are there: start your ranks, which meet at `port` of the address that you reached
    me by. What the rank `results` says of steps is to be passed on, if it is one of them."""

    first_rank: int
    num_ranks: int
    world_size: int
    port: int
    results: int


class Counters(Struct, frozen=True, tag=True):
    """How far the ranks of a node are: a list of `step_ring.Word` values each. Also shows that the node is there."""

    values: list[list[int]]


class Ended(Struct, frozen=True, tag=True):
    """A rank's process has ended, having said this in its report."""

    rank: int
    returncode: int
    said: bytes


Note = Join | Begin | Counters | Ended
_encode = msgspec.msgpack.Encoder().encode
_decode: Callable[[bytes], Note] = msgspec.msgpack.Decoder(Note).decode


class Channel:
    """One end. Any thread may send; one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._sending = threading.Lock()
        self._received = bytearray()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # or what is not acknowledged is sent again for a quarter of an hour
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SILENCE_SECONDS))

    @property
    def here(self) -> str:
        """The address of this end, as the other reaches it."""
        return plain_address(self.socket.getsockname()[0])

    @property
    def there(self) -> str:
        return plain_address(self.socket.getpeername()[0])

    def note(self, message: Note, check: Callable[[], None] = lambda: None) -> None:
        """`send` of a note."""
        self.send(Kind.NOTE, _encode(message), check)

    def send(self, kind: Kind, data: bytes, check: Callable[[], None] = lambda: None) -> None:
        """Where the other end is slow to take it this waits, calling `check`, which raises if that is in vain: the
        channel is of no use afterwards. OSError if the other end is gone."""
        with self._sending:
            left = memoryview(_HEAD.pack(len(data), kind) + data)
            while left:
                try:
                    left = left[self.socket.send(left) :]
                    continue
                except BlockingIOError:
                    pass
                except (ConnectionResetError, BrokenPipeError):
                    raise ConnectionError(_CLOSED) from None
                check()
                self._wait_for_room()

    def _wait_for_room(self) -> None:
        fd = self.socket.fileno()
        if fd < 0:  # another thread has closed it
            raise ConnectionError(_CLOSED)
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        poll.poll(1000 * _LOOK_SECONDS)

    def receive(self) -> Iterator[tuple[Kind, bytes]]:
        """Frames that are there, also those that came with what was taken before; does not wait. ConnectionError if the
        other end is gone, or speaks otherwise."""
        with contextlib.suppress(BlockingIOError):
            try:
                data = self.socket.recv(1 << 20)
            except ConnectionResetError:  # the same, with something unread
                data = b""
            if not data:
                raise ConnectionError(_CLOSED)
            self._received += data
        while len(self._received) >= _HEAD.size:
            length, kind = _HEAD.unpack_from(self._received)
            if length > _LARGEST or kind not in set(Kind):
                raise ConnectionError("it sends what is no message")
            end = _HEAD.size + length
            if len(self._received) < end:
                return
            data = bytes(self._received[_HEAD.size : end])
            del self._received[:end]
            yield Kind(kind), data

    def wait_for_note(self, seconds: float) -> Note:
        """The next frame, which must be a note. ConnectionError as `receive`, or if there is no whole one in time."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and poll.poll(1000 * left):
            for kind, data in self.receive():
                if kind != Kind.NOTE:
                    raise ConnectionError("it sends what was not expected")
                return decode_note(data)
        raise ConnectionError(f"it has said nothing that was expected within {seconds:g} s")

    def close(self) -> None:
        """From any thread: whoever waits at either end sees it."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def decode_note(data: bytes) -> Note:
    """ConnectionError for bytes that are none."""
    try:
        return _decode(data)
    except msgspec.DecodeError as error:
        raise ConnectionError(f"it sends what is no message: {error}") from None


def plain_address(address: str) -> str:
    """As others write it: a socket for both families has IPv4 addresses inside of IPv6 ones."""
    return address.removeprefix("::ffff:")


def listen(address: str, port: int) -> socket.socket:
    """A listening socket; `address` empty: all of this machine's, also those of IPv6 where it has any. OSError."""
    if address:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=64)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=64, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=64)


def bind_address(master_addr: str | None) -> str:
    """Where node 0 listens: on loopback if that is where the others look for it, else on all addresses, since its name
    may stand for one that this machine does not know as its own."""
    return "127.0.0.1" if master_addr in ("127.0.0.1", "localhost") else "::1" if master_addr == "::1" else ""
