"""Content digests of large files, hashed in parallel, and a memory of them.

A digest is "tree64m:" + hex of SHA-256 over (file size as 8 little-endian bytes, then SHA-256 of each 64 MiB chunk in
order). The root binds the size, so no two files share a chunk list. One SHA-256 stream is limited to one core (1.4 GB/s
with SHA instructions); chunks spread over files and threads, since hashlib and pread release the interpreter lock, so
the limit is the number of cores.

Knows nothing of checkpoints or engines.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec

from appliance.engines.disk import write_atomically
from appliance.engines.meter import ByteMeter

CHUNK = 64 << 20  # bytes; part of the format: another value is another digest
_BLOCK = 4 << 20  # bytes read at once; small enough to be hashed from the cache
_PREFIX = "tree64m:"
_TICK_NS = 20_000_000  # file times advance in steps of at most 10 ms on Linux


def default_threads() -> int:
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _root(size: int, chunks: Sequence[bytes]) -> str:
    root = hashlib.sha256(size.to_bytes(8, "little"))
    for chunk in chunks:
        root.update(chunk)
    return _PREFIX + root.hexdigest()


class TreeHasher:
    """The digest of a stream, for whoever writes a file: equal to `hash_file` of what was written."""

    def __init__(self) -> None:
        self.size = 0
        self._chunks: list[bytes] = []
        self._current = hashlib.sha256()
        self._room = CHUNK

    def update(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            part = view[: self._room]
            self._current.update(part)
            self.size += len(part)
            self._room -= len(part)
            view = view[len(part) :]
            if self._room == 0:
                self._chunks.append(self._current.digest())
                self._current, self._room = hashlib.sha256(), CHUNK

    def digest(self) -> str:
        tail = [] if self._room == CHUNK else [self._current.digest()]
        return _root(self.size, self._chunks + tail)


class PiecewiseHasher:
    """The digest of a file that is written in pieces, in any order and by any thread: equal to `hash_file` of what was
    written. A chunk is read back, as a rule from the page cache, and hashed by a thread of this object's once all of it
    was written; so the digest is that of what the system took, and hashing goes on beside writing."""

    def __init__(self, fd: int, size: int, threads: int | None = None) -> None:
        """`fd`: open for reading, as long as this object is used."""
        self.size = size
        self._fd = fd
        self._missing = [min(CHUNK, size - at) for at in range(0, size, CHUNK)]  # bytes of each chunk
        self._hashed: list[Future[bytes] | None] = [None] * len(self._missing)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads or default_threads(), thread_name_prefix="digest")

    def wrote(self, offset: int, count: int) -> None:
        """Bytes [offset, offset + count) are in the file; each byte is told once."""
        with self._lock:
            while count:
                index, at = divmod(offset, CHUNK)
                part = min(count, CHUNK - at)
                self._missing[index] -= part
                if self._missing[index] == 0:
                    length = min(CHUNK, self.size - index * CHUNK)
                    self._hashed[index] = self._pool.submit(_hash_chunk, self._fd, index * CHUNK, length, None)
                offset, count = offset + part, count - part

    def digest(self) -> str:
        """Once all was written. Raises OSError."""
        hashed = [future for future in self._hashed if future is not None]
        assert len(hashed) == len(self._hashed), "not all bytes were written"
        return _root(self.size, [future.result() for future in hashed])

    def close(self) -> None:
        """End the threads; the file is not read any more afterwards."""
        self._pool.shutdown(cancel_futures=True)


def _hash_chunk(fd: int, offset: int, size: int, meter: ByteMeter | None) -> bytes:
    digest = hashlib.sha256()
    buffer = bytearray(min(_BLOCK, size))
    view = memoryview(buffer)
    while size:
        got = os.preadv(fd, [view[: min(len(view), size)]], offset)
        if got == 0:  # shrank while we read: whatever we return cannot match
            break
        digest.update(view[:got])
        offset += got
        size -= got
        if meter is not None:
            meter.advance(got)
    return digest.digest()


def hash_files(paths: Sequence[Path], *, meter: ByteMeter | None = None, threads: int | None = None) -> list[str]:
    """Digests of files, in order. `meter` is advanced by the bytes read. Raises OSError."""
    fds: list[int] = []
    with ThreadPoolExecutor(threads or default_threads(), thread_name_prefix="digest") as pool:
        try:
            pending = []
            for path in paths:
                fd = os.open(path, os.O_RDONLY)
                fds.append(fd)
                size = os.fstat(fd).st_size
                chunks = [
                    pool.submit(_hash_chunk, fd, at, min(CHUNK, size - at), meter) for at in range(0, size, CHUNK)
                ]
                pending.append((size, chunks))
            return [_root(size, [chunk.result() for chunk in chunks]) for size, chunks in pending]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for fd in fds:
                os.close(fd)


def hash_file(path: Path) -> str:
    return hash_files([path])[0]


class FileStamp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What says, without reading it, that a file is the one whose digest is known."""

    size: int
    mtime_ns: int
    ctime_ns: int  # no user program can set it back
    inode: int

    @staticmethod
    def of(path: Path) -> FileStamp:
        stat = path.stat()
        return FileStamp(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


class StampedDigest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    stamp: FileStamp
    digest: str


class DigestMemory:
    """Digests of files that have not changed since they were hashed, in one small JSON file.

    An unreadable or foreign file is an empty memory; one that cannot be written is not kept. Never wrong about a
    size: a file of another length, time or inode is unknown to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, StampedDigest] = {}
        with contextlib.suppress(OSError, msgspec.DecodeError):
            self._known = msgspec.json.decode(path.read_bytes(), type=dict[str, StampedDigest])

    def get(self, name: str, path: Path) -> str | None:
        """The digest of the file at `path`, remembered as `name`, if it has not changed. Raises OSError."""
        known = self._known.get(name)
        return known.digest if known is not None and known.stamp == FileStamp.of(path) else None

    def put(self, name: str, digest: str, stamp: FileStamp) -> None:
        """`stamp` was taken before the file was read, so that a change during the reading is seen next time. A file
        changed just now is not remembered: within the clock's tick a second change would leave the same stamp."""
        if time.time_ns() - stamp.ctime_ns > _TICK_NS:
            self._known[name] = StampedDigest(stamp, digest)

    def save(self) -> bool:
        """Whether it could be kept."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, msgspec.json.encode(self._known))
        except OSError:
            return False
        return True
