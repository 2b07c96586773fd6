"""Results of steps from the last pipeline stage to rank 0: messages, one behind the other in a pipe.

The last stage samples; rank 0 waits for what it sampled before it plans the next step of the same sequences. Between
machines somebody may carry the bytes on as they are. Knows results and file descriptors; not what they mean.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable

import msgspec

from appliance.batching.step import StepResult
from appliance.errors import EngineCrashedError

_LENGTH = 4  # bytes in front of a message that say how many follow, little-endian
_READ = 1 << 20  # bytes at once
_LOOK_SECONDS = 0.2  # between looks whether there is anybody to wait for
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(StepResult).decode


class ResultWriter:
    """The last stage's end: a file descriptor that blocks while the pipe is full."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def send(self, result: StepResult) -> None:
        """OSError if nobody reads any more."""
        message = _encode(result)
        rest = memoryview(len(message).to_bytes(_LENGTH, "little") + message)
        while rest:
            rest = rest[os.write(self._fd, rest) :]


class ResultReader:
    """Rank 0's end."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._bytes = bytearray()
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def take(self, seconds: float = 0.0) -> None:
        """Read what has come, waiting for it so long at most: so that the writer can go on. EngineCrashedError if the
        other end is closed and nothing is left."""
        if not self._poll.poll(1000 * seconds):
            return
        data = os.read(self._fd, _READ)
        if not data:
            raise EngineCrashedError("the last pipeline stage gives no results any more")
        self._bytes += data

    def receive(self, check: Callable[[], None] = lambda: None) -> StepResult:
        """The next result. While it waits it calls `check`, which raises if that is in vain. EngineCrashedError."""
        while (message := self._message()) is None:
            check()
            self.take(_LOOK_SECONDS)
        return _decode(message)

    def _message(self) -> bytes | None:
        end = _LENGTH + int.from_bytes(self._bytes[:_LENGTH], "little")
        if len(self._bytes) < _LENGTH or len(self._bytes) < end:
            return None
        message = bytes(self._bytes[_LENGTH:end])
        del self._bytes[:end]
        return message

    def close(self) -> None:
        os.close(self._fd)
