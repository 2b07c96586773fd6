"""What an interrupted calibration leaves for the next build of the same engine: the stored tensors of every finished
block, and the hidden states that the next block takes in.

    state.json               which blocks are done, with the digest of every file; written last, at once
    block-<i>.safetensors    tensors as the engine stores them
    hidden-<i>.bin           hidden states behind block i, of the latest block only

Knows nothing of models or algorithms. Used under the engine's build lock, by one process at a time; a thread of its own
writes while the next block is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from appliance.checkpoint import Checkpoint, SafetensorsWriter, TensorPlan
from appliance.engines.digest import TreeHasher, hash_files
from appliance.engines.disk import remove_tree, write_atomically
from appliance.engines.manifest import EngineFile
from appliance.engines.meter import ByteMeter, ProgressFn

_STATE = "state.json"
_VERSION = 1
_PIECE = 64 << 20  # bytes of hidden states brought to the host and written at once


class BlockReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What calibration did to one block; by key of `quantization.calibration.block.PRODUCTS`."""

    name: str  # "layers.3"
    seconds: float
    nearest: dict[str, float]  # relative error of each product over the calibration text, rounded to nearest
    result: dict[str, float]  # the same of what is stored
    choices: dict[str, str]  # what a search chose


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    key: str  # of the engine, so of checkpoint, scheme and text
    blocks: tuple[EngineFile, ...]
    reports: tuple[BlockReport, ...]
    hidden: EngineFile
    hidden_dtype: str  # "bfloat16"
    hidden_shape: tuple[int, int]


class CalibrationStore:
    """A context manager; leaving it waits for what is being written, unless an error makes that worthless."""

    def __init__(
        self,
        directory: Path,
        key: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        progress: ProgressFn | None = None,
    ) -> None:
        """`directory` exists; `shape` and `dtype` are those of the hidden states. What is there and cannot be gone on
        with is removed: of another key, shape or version, damaged, or not part of it. `progress` is told how far the
        files are read."""
        self._directory = directory
        self._hidden = (_name(dtype), shape)
        self._key = key
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="calibration")
        self._saving: Future[None] | None = None
        self._state = self._usable(progress)
        known = {_STATE, *(file.name for file in _files(self._state))} if self._state else set()
        for path in directory.iterdir():
            if path.name not in known:
                remove_tree(path)

    @property
    def reports(self) -> tuple[BlockReport, ...]:
        """Of the finished blocks, in order."""
        return self._state.reports if self._state else ()

    @property
    def done(self) -> int:
        """Finished blocks; they are the first ones."""
        return len(self.reports)

    def tensors(self, index: int) -> dict[str, Tensor]:
        """The stored tensors of a finished block, by their names in the engine; views of the mapped file."""
        self.wait()
        assert self._state is not None
        stored = Checkpoint(self._directory / self._state.blocks[index].name)
        return {name: stored.read(name) for name in stored.tensors}

    def load_hidden(self, hidden: Tensor) -> None:
        """Fill `hidden` with what the next block takes in; at least one block is done."""
        assert self._state is not None and self._hidden == (_name(hidden.dtype), tuple(hidden.shape))
        flat, at = hidden.view(-1).view(torch.uint8), 0
        with (self._directory / self._state.hidden.name).open("rb") as file:
            while piece := file.read(_PIECE):
                flat[at : at + len(piece)] = torch.frombuffer(bytearray(piece), dtype=torch.uint8).to(flat.device)
                at += len(piece)

    def save(self, tensors: Mapping[str, Tensor], hidden: Tensor, report: BlockReport) -> None:
        """Keep the next block, in the background: `wait` before `hidden` changes."""
        self.wait()
        self._saving = self._pool.submit(self._save, tensors, hidden, report)

    def wait(self) -> None:
        """Until what was given to `save` is kept. Raises what went wrong with it."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def __enter__(self) -> CalibrationStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()

    # -------------------------------------------------- writing

    def _save(self, tensors: Mapping[str, Tensor], hidden: Tensor, report: BlockReport) -> None:
        index = self.done
        before = self._state
        file = self._directory / f"block-{index:03}.safetensors"
        file.unlink(missing_ok=True)
        plan = [TensorPlan(name, _name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
        with SafetensorsWriter(file, plan) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            size, digest = writer.finish()
        state = _State(
            version=_VERSION,
            key=self._key,
            blocks=(*(before.blocks if before else ()), EngineFile(name=file.name, size=size, digest=digest)),
            reports=(*self.reports, report),
            hidden=_write_hidden(self._directory / f"hidden-{index:03}.bin", hidden),
            hidden_dtype=self._hidden[0],
            hidden_shape=self._hidden[1],
        )
        write_atomically(self._directory / _STATE, msgspec.json.encode(state))
        self._state = state
        if before is not None:
            (self._directory / before.hidden.name).unlink(missing_ok=True)

    # -------------------------------------------------- reading

    def _usable(self, progress: ProgressFn | None) -> _State | None:
        """What state.json says, if it is of this engine and every file is as it was written."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            state = msgspec.json.decode((self._directory / _STATE).read_bytes(), type=_State)
            files = list(_files(state))
            paths = [self._directory / file.name for file in files]
            if (state.version, state.key) != (_VERSION, self._key) or len(state.blocks) != len(state.reports):
                return None
            if (state.hidden_dtype, state.hidden_shape) != self._hidden:
                return None
            if any(path.stat().st_size != file.size for path, file in zip(paths, files)):
                return None
            total = sum(file.size for file in files)
            with ByteMeter(total, progress, detail="checking the blocks of an interrupted calibration") as meter:
                found = hash_files(paths, meter=meter)
            return state if found == [file.digest for file in files] else None
        return None


def _files(state: _State) -> Iterator[EngineFile]:
    yield from state.blocks
    yield state.hidden


def _write_hidden(path: Path, hidden: Tensor) -> EngineFile:
    """Not flushed to the disk: the next block's takes its place in seconds, and a torn one shows in its digest."""
    hasher = TreeHasher()
    with path.open("wb", buffering=0) as file:
        flat = hidden.view(-1).view(torch.uint8)
        for at in range(0, len(flat), _PIECE):
            data = memoryview(flat[at : at + _PIECE].cpu().numpy().data)
            hasher.update(data)
            rest = data
            while len(rest):
                rest = rest[file.write(rest) :]
    return EngineFile(name=path.name, size=hasher.size, digest=hasher.digest())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
