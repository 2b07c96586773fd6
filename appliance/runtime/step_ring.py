"""Messages from rank 0 to the other ranks of an engine, through memory that they share, and how far each rank is.

A ring of slots, written by one process and read by all others: a part of a message goes into the slot after the last
one, its number last of all, and a slot is written again only when every reader has taken what was in it. A message
longer than a slot takes several; none is ever lost. Readers spin for a moment, then sleep on a pipe that the writer
writes to if somebody sleeps. Beside the ring, each rank has a line of counters that the others can read at any time.

Knows bytes and processes; not what messages mean. The memory has no name in any file system, so a killed engine leaves
none behind: it is inherited as a file descriptor.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from enum import IntEnum

SLOTS = 16
SLOT_BYTES = 128 << 10  # of a message, per slot; a plan of 256 decodes takes some 20 KB, of a prompt 5 bytes a token
_LINE = 8  # words of 8 bytes: a cache line, so that no two processes write to one
_SLOT_WORDS = 4  # number, length, parts that follow, CRC-32
_FIRST_SLEEP = 0.001  # seconds; bounds what is lost if reader and writer miss each other (see `RingReader._sleep`)
_WRITER_POLL = 0.0002  # seconds between looks whether a full ring has room


class Word(IntEnum):
    """A rank's counters; each is written by that rank only."""

    PARTS = 0  # taken from the ring
    TAKEN = 1  # messages taken (rank 0: sent)
    FINISHED = 2  # messages whose work is done, on the device too
    CALLS = 3  # collective operations that the host has begun
    BEAT = 4  # changes while the process gets to run
    ASLEEP = 5  # 1 while it waits for the pipe
    LOADED = 6  # parts of the weights that it has read


class LeaderGoneError(Exception):
    """The writing process has ended."""


class SharedSteps:
    """The memory: counters of all ranks, then the slots."""

    def __init__(self, fd: int, ranks: int) -> None:
        """`fd`: of `create`, here or in the process that this one was started by."""
        self.fd = fd
        self.ranks = ranks
        self._header = 8 * _LINE * ranks
        self._stride = 8 * _SLOT_WORDS + SLOT_BYTES
        self._view = memoryview(mmap.mmap(fd, self._header + SLOTS * self._stride))
        # Words are read and written whole, which `struct` does not promise.
        self._counters = self._view[: self._header].cast("Q")
        starts = [self._header + i * self._stride for i in range(SLOTS)]
        self._heads = [self._view[start : start + 8 * _SLOT_WORDS].cast("Q") for start in starts]
        self._bodies = [self._view[start + 8 * _SLOT_WORDS : start + self._stride] for start in starts]

    @staticmethod
    def create(ranks: int) -> SharedSteps:
        nbytes = 8 * _LINE * ranks + SLOTS * (8 * _SLOT_WORDS + SLOT_BYTES)
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("appliance-steps", os.MFD_CLOEXEC)
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, nbytes)
        return SharedSteps(fd, ranks)

    def get(self, rank: int, word: Word) -> int:
        return self._counters[rank * _LINE + word]

    def put(self, rank: int, word: Word, value: int) -> None:
        self._counters[rank * _LINE + word] = value

    def count(self, rank: int, word: Word) -> None:
        self._counters[rank * _LINE + word] += 1

    def slot(self, part: int) -> tuple[memoryview, memoryview]:
        """Head, four words, and body of the slot of the part with this number."""
        return self._heads[part % SLOTS], self._bodies[part % SLOTS]


class RingWriter:
    """The writing end, rank 0's; on another node, that of the process that passes on what rank 0 sends. `wake`: of each
    rank that reads here, a pipe's writing end, not blocking."""

    def __init__(self, shared: SharedSteps, wake: Mapping[int, int]) -> None:
        self._shared = shared
        self._wake = dict(wake)
        self._parts = 0  # written; numbers begin with 1, since memory begins with 0

    def send(self, message: bytes, check: Callable[[], None] = lambda: None) -> None:
        """Give a message to every reader. Waits while the ring is full, calling `check`, which raises if that is in
        vain."""
        pieces = [message[at : at + SLOT_BYTES] for at in range(0, len(message), SLOT_BYTES)] or [b""]
        for i, piece in enumerate(pieces):
            self._wait_for_room(check)
            self._parts += 1
            head, body = self._shared.slot(self._parts)
            body[: len(piece)] = piece
            head[1], head[2], head[3] = len(piece), len(pieces) - 1 - i, zlib.crc32(piece)
            head[0] = self._parts
            self._wake_sleepers()
        self._shared.count(0, Word.TAKEN)

    def _wait_for_room(self, check: Callable[[], None]) -> None:
        while self._wake and min(self._shared.get(rank, Word.PARTS) for rank in self._wake) + SLOTS <= self._parts:
            check()
            time.sleep(_WRITER_POLL)

    def _wake_sleepers(self) -> None:
        for rank, fd in self._wake.items():
            if self._shared.get(rank, Word.ASLEEP):
                # It has enough to wake up by, or is dead, which somebody else looks after.
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    os.write(fd, b"\0")


class RingReader:
    """Another rank's end. `wake`: the reading end of its pipe; `spin_seconds`: how long it looks before it sleeps."""

    def __init__(self, shared: SharedSteps, rank: int, wake: int, spin_seconds: float) -> None:
        self._shared = shared
        self._rank = rank
        self._wake = wake
        self._spin = spin_seconds
        self._parts = 0  # taken
        self._begun: list[bytes] = []  # parts of a message whose rest is yet to come
        self._poll = select.poll()
        self._poll.register(wake, select.POLLIN)
        os.set_blocking(wake, False)

    def receive(self, timeout: float) -> bytes | None:
        """The next message; None if there was none within `timeout` seconds. LeaderGoneError."""
        deadline = time.monotonic() + timeout
        while True:
            if self._wait(deadline):
                message = self._take()
                if message is not None:
                    return message
            elif time.monotonic() >= deadline:
                return None

    def _there(self) -> bool:
        head, _ = self._shared.slot(self._parts + 1)
        return head[0] == self._parts + 1

    def _take(self) -> bytes | None:
        """Take the part that is there; the message if it was its last."""
        head, body = self._shared.slot(self._parts + 1)
        length, following, crc = head[1], head[2], head[3]
        piece = bytes(body[:length]) if length <= SLOT_BYTES else b""
        if zlib.crc32(piece) != crc:  # a CPU may show the number before the rest: it is on its way
            time.sleep(0)
            return None
        self._parts += 1
        self._shared.put(self._rank, Word.PARTS, self._parts)
        self._begun.append(piece)
        if following:
            return None
        message, self._begun = b"".join(self._begun), []
        self._shared.count(self._rank, Word.TAKEN)
        return message

    def _wait(self, deadline: float) -> bool:
        """Whether a part is there, at the latest at `deadline`."""
        if self._there():
            return True
        spin_until = min(time.monotonic() + self._spin, deadline)
        while time.monotonic() < spin_until:
            if self._there():
                return True
        return self._sleep(deadline)

    def _sleep(self, deadline: float) -> bool:
        """Reader and writer each write a word and read the other's; CPUs may let both read the old one. So the first
        sleep is short; after it the writer sees that somebody sleeps."""
        nap = _FIRST_SLEEP
        self._shared.put(self._rank, Word.ASLEEP, 1)
        try:
            while not self._there():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                for _, event in self._poll.poll(1000 * min(nap, left)):
                    if event & select.POLLIN:
                        os.read(self._wake, 4096)
                    elif event & (select.POLLHUP | select.POLLERR):
                        raise LeaderGoneError
                nap = left
            return True
        finally:
            self._shared.put(self._rank, Word.ASLEEP, 0)
