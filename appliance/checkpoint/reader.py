"""Tensors of a checkpoint, one at a time, straight from the mapped files. Imports torch only where tensors are made."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.checkpoint.files import INDEX_NAME, TensorInfo, read_header, weight_files
from appliance.errors import CheckpointError
from appliance.types import WeightSpec

if TYPE_CHECKING:
    from torch import Tensor


class Checkpoint:
    """All safetensors files of a directory, or one file. Headers are checked on opening, weights are read on demand.

    Tensors are views of mapped, read-only pages: copy before writing, and keep none beyond `close`.
    Raises CheckpointError (see `files`), also when two files hold the same tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = weight_files(path) if path.is_dir() else [path]
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            infos = read_header(file)
            twice = self.tensors.keys() & infos.keys()
            if twice:
                raise CheckpointError(f"{file} repeats tensor {min(twice)} of another file of this checkpoint")
            self.tensors |= infos
        self._maps: dict[Path, mmap.mmap] = {}

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        """Raises CheckpointError if there is no such tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            near = [other for other in self.tensors if other.rpartition(".")[2] == name.rpartition(".")[2]][:3]
            raise CheckpointError(
                f"{self.path} has no tensor {name}; alike: {', '.join(near) or 'none'}",
                hint=f"download the checkpoint again, {INDEX_NAME} included",
            ) from None

    def check(self, specs: Iterable[WeightSpec]) -> None:
        """Every source of every spec is there in its expected shape. CheckpointError for the first that is not."""
        for spec in specs:
            for name, shape in zip(spec.sources, spec.shapes):
                self.check_tensor(name, shape, spec)
            for name, shape in zip(spec.bias_sources, spec.shapes):
                self.check_tensor(name, shape[:1], spec)

    def check_tensor(self, name: str, shape: tuple[int, ...], spec: WeightSpec) -> None:
        """A source of `spec` is there, in its expected shape and a floating-point dtype; else CheckpointError."""
        info = self.info(name)
        if info.shape != shape:
            raise CheckpointError(
                f"tensor {name} in {info.file.name} has shape {list(info.shape)}, "
                f"expected {list(shape)} for {spec.name}",
                hint="config.json and the weights are not of the same model",
            )
        if "float" not in info.dtype:
            raise CheckpointError(
                f"tensor {name} in {info.file.name} has dtype {info.dtype}, expected a floating-point one",
                hint="use the unquantized checkpoint; the appliance quantizes it itself",
            )

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or the slice [start, stop) of its dimension `dim` (0 or 1), as a view of the file; one stored at
        an odd offset, as a copy."""
        import torch

        info = self.info(name)
        dtype = getattr(torch, info.dtype)
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        data = memoryview(self._map(info.file))[info.offset : info.offset + info.nbytes]
        if info.offset % dtype.itemsize:
            data = memoryview(bytearray(data))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")
            tensor = torch.frombuffer(data, dtype=dtype).view(info.shape)
        if stop is None and start == 0:
            return tensor
        return tensor.narrow(dim, start, (info.shape[dim] if stop is None else stop) - start)

    def release(self, name: str) -> None:
        """Say that a tensor's pages are done with: they leave this process's resident memory, not the page cache. Views
        of them stay valid."""
        info = self.info(name)
        first = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (info.offset + info.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0 and info.file in self._maps and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[info.file].madvise(mmap.MADV_DONTNEED, first, length)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as opened:
                mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_SEQUENTIAL"):
                mapped.madvise(mmap.MADV_SEQUENTIAL)
            self._maps[file] = mapped
        return self._maps[file]

    def close(self) -> None:
        """Drop the maps. Tensors that were read keep theirs alive, so nothing dangles."""
        self._maps.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
