"""A safetensors file written tensor by tensor: the header first, from shapes known beforehand, then each to its place.

Nothing is held back in memory; hashing and flushing to disk go on beside the writing.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from appliance.checkpoint.files import DTYPES
from appliance.engines.digest import PiecewiseHasher
from appliance.engines.disk import free_bytes, full_disk_explained, is_full, no_space
from appliance.errors import NoSpaceError

if TYPE_CHECKING:
    from torch import Tensor

_STORED = {torch_name: (stored, width) for stored, (torch_name, width) in DTYPES.items()}
_ALIGNMENT = 64  # bytes, of the first tensor; the format allows no gaps between tensors
PIECE = 16 << 20  # bytes of a tensor on a GPU that are in host memory at once
_FLUSHED = 512 << 20  # bytes after which the disk is made to begin


@dataclass(frozen=True)
class TensorPlan:
    name: str
    dtype: str  # torch's name, e.g. "bfloat16"
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _STORED[self.dtype][1]


class SafetensorsWriter:
    """Writes `plan`'s tensors to `path`, which must not exist. Each is written once, in any order, by any thread; to
    its place, which is known from the plan.

    A context manager: leaving it waits until the file is durable (NoSpaceError if the disk had no room for it after
    all), which begins long before and need not be waited for elsewhere."""

    def __init__(self, path: Path, plan: list[TensorPlan], metadata: Mapping[str, str] | None = None) -> None:
        assert len({tensor.name for tensor in plan}) == len(plan), "two tensors of one name"
        header = _header(plan, metadata)
        self.path = path
        self.names = frozenset(tensor.name for tensor in plan)
        self._places: dict[str, tuple[TensorPlan, int]] = {}  # of what is yet to be written: (plan, offset)
        self.size = len(header)
        for tensor in plan:
            self._places[tensor.name] = (tensor, self.size)
            self.size += tensor.nbytes
        self._left = self.size
        self._unflushed = 0
        self._lock = threading.Lock()
        self._file = path.open("x+b", buffering=0)
        self._hasher = PiecewiseHasher(self._file.fileno(), self.size)
        self._flushes = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._flushing: Future[None] | None = None
        try:
            self._file.truncate(self.size)
            self._put(memoryview(header), 0)
        except BaseException:
            self._end()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, on any device, to its place. Raises NoSpaceError; a name that is not planned or was written
        before, another shape or dtype are our own bugs."""
        with self._lock:
            assert name in self._places, f"writing {name}, which is not planned or was written before"
            planned, offset = self._places[name]
            got = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            assert got == (planned.dtype, planned.shape), f"writing {name} as {got}, planned {planned}"
            del self._places[name]
        for piece in host_pieces(tensor):
            self._put(piece, offset)
            offset += len(piece)

    def _put(self, data: memoryview, offset: int) -> None:
        fd, rest, at = self._file.fileno(), data, offset
        try:
            while len(rest):
                count = os.pwrite(fd, rest, at)
                rest, at = rest[count:], at + count
        except OSError as error:
            if is_full(error):
                raise self._full() from error
            raise
        self._hasher.wrote(offset, len(data))
        with self._lock:
            self._left -= len(data)
            self._unflushed += len(data)
            if self._unflushed >= _FLUSHED and (self._flushing is None or self._flushing.done()):
                self._flush()

    def _flush(self) -> None:
        """Let the disk begin with what it has not got yet. Under the lock."""
        self._unflushed = 0
        before = self._flushing

        def run() -> None:
            if before is not None:
                before.result()
            with full_disk_explained(self.path.parent, self.path.name):  # some file systems find room only now
                os.fdatasync(self._file.fileno())

        self._flushing = self._flushes.submit(run)

    def _full(self) -> NoSpaceError:
        return no_space(self.path.parent, self._left, free_bytes(self.path), f"writing the rest of {self.path.name}")

    def finish(self) -> tuple[int, str]:
        """After the last tensor: (size in bytes, digest). The disk is still being written to."""
        assert not self._places, f"{len(self._places)} planned tensors were not written"
        with self._lock:
            self._flush()
        return self.size, self._hasher.digest()

    def _end(self) -> None:
        self._hasher.close()
        self._flushes.shutdown()
        self._file.close()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end()
        if kind is None and self._flushing is not None:
            self._flushing.result()


def host_pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, on any device, in host memory: all at once where they are there already, else in pieces
    of at most PIECE bytes, each good until the next is asked for."""
    import torch

    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if flat.device.type == "cpu":
        yield memoryview(flat.numpy().data)
        return
    # Page-locked memory, which torch keeps for the next tensor: ten times as fast as a copy to pages just made.
    buffer = torch.empty(min(PIECE, flat.numel()), dtype=torch.uint8, pin_memory=True)
    for at in range(0, flat.numel(), PIECE):
        part = flat[at : at + PIECE]
        into = buffer[: part.numel()]
        into.copy_(part)
        yield memoryview(into.numpy().data)


def _header(plan: list[TensorPlan], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in plan:
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": _STORED[tensor.dtype][0],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def planned_file_size(plan: list[TensorPlan], metadata: Mapping[str, str] | None = None) -> int:
    """Bytes that the file will have."""
    return len(_header(plan, metadata)) + sum(tensor.nbytes for tensor in plan)
