"""A safetensors file written tensor by tensor: the header first, from shapes known beforehand, then the data in order.

Nothing is held back in memory, and the file's digest is ready with its last byte.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.checkpoint.files import DTYPES
from appliance.engines.digest import TreeHasher
from appliance.engines.disk import free_bytes, full_disk_explained, is_full, no_space
from appliance.errors import NoSpaceError

if TYPE_CHECKING:
    from torch import Tensor

_STORED = {torch_name: (stored, width) for stored, (torch_name, width) in DTYPES.items()}
_ALIGNMENT = 64  # bytes, of the first tensor; the format allows no gaps between tensors


@dataclass(frozen=True)
class TensorPlan:
    name: str
    dtype: str  # torch's name, e.g. "bfloat16"
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _STORED[self.dtype][1]


class SafetensorsWriter:
    """Writes `plan`'s tensors to `path`, which must not exist; `write` is called once for each, in the plan's order."""

    def __init__(self, path: Path, plan: list[TensorPlan], metadata: Mapping[str, str] | None = None) -> None:
        assert len({tensor.name for tensor in plan}) == len(plan), "two tensors of one name"
        self.path = path
        self._plan = plan
        self._next = 0
        self._hasher = TreeHasher()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="digest")  # hashes while the disk writes
        self._file = path.open("xb", buffering=0)
        self._put(memoryview(_header(plan, metadata)))

    @property
    def size(self) -> int:
        """Bytes of the file so far."""
        return self._hasher.size

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor, on any device. Raises NoSpaceError; a name, shape or dtype that differs from the plan is our
        own bug."""
        import torch

        planned = self._plan[self._next]
        dtype = str(tensor.dtype).removeprefix("torch.")
        got = (name, dtype, tuple(tensor.shape))
        assert got == (planned.name, planned.dtype, planned.shape), f"writing {got}, planned {planned}"
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        self._put(memoryview(data.data))
        self._next += 1

    def _put(self, data: memoryview) -> None:
        hashed = self._pool.submit(self._hasher.update, data)
        try:
            rest = data
            while len(rest):
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            if is_full(error):
                raise self._full(len(rest)) from error
            raise
        finally:
            hashed.result()

    def _full(self, left: int) -> NoSpaceError:
        rest = left + sum(tensor.nbytes for tensor in self._plan[self._next + 1 :])
        return no_space(self.path.parent, rest, free_bytes(self.path), f"writing the rest of {self.path.name}")

    def finish(self) -> tuple[int, str]:
        """Make the file durable; its (size in bytes, digest)."""
        assert self._next == len(self._plan), f"{len(self._plan) - self._next} planned tensors were not written"
        with full_disk_explained(self.path.parent, self.path.name):  # some file systems find room only now
            os.fsync(self._file.fileno())
            self._file.close()
        return self._hasher.size, self._hasher.digest()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._file.close()


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
