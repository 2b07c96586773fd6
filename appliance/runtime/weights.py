"""A rank's weight file onto its device, as fast as the machine copies.

An engine stores exactly what the device wants, so loading is reading: on the CPU into the parameters themselves, on a
GPU through page-locked buffers, by several threads and streams, so that reads, host copies and transfers overlap.
Knows nothing of architectures: names and shapes come from the model and must equal those of the file.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from appliance.checkpoint.files import TensorInfo, read_header
from appliance.engines.digest import default_threads
from appliance.errors import CheckpointError, EngineDamagedError
from appliance.layers.decoder import Decoder
from appliance.runtime import random_weights

ProgressFn = Callable[[int, int], None]  # (bytes done, bytes in all)

log = logging.getLogger(__name__)

PIECE = 16 << 20  # bytes read and copied at once
_LANES = 8  # threads, each with a stream and two page-locked buffers of PIECE bytes


@dataclass(frozen=True)
class _Piece:
    """Bytes [offset, offset + len(into)) of the file go to `into`, uint8 on the target device."""

    offset: int
    into: Tensor


def load_weights(
    model: Decoder, rank_file: Path, device: torch.device | str, *, progress: ProgressFn | None = None
) -> int:
    """Replace every parameter of `model` (on the meta device) by its tensor of the file, on `device`; returns the bytes
    read. A parameter whose dtype differs from the stored one, both plain floats, is converted: the CPU backend asks for
    float32 this way. Parameters come out with requires_grad False; buffers are left alone. A file may stand for random
    numbers (`random_weights.py`).

    Raises EngineDamagedError: the file is truncated, or its names, shapes or dtypes are not those of the model.
    """
    device = torch.device(device)
    try:
        seed = random_weights.seed_of(rank_file)
        stored = {} if seed is not None else read_header(rank_file)
    except CheckpointError as error:
        raise EngineDamagedError(error.message, hint="the engine is built anew") from error
    if seed is not None:
        log.warning("%s has no weights: they are random numbers, made on the device", rank_file)
        return random_weights.fill(model, device, seed)
    wanted = dict(model.named_parameters())
    _compare(stored, wanted, rank_file)
    raw = {
        name: torch.empty(info.shape, dtype=getattr(torch, info.dtype), device=device) for name, info in stored.items()
    }
    counter = _Counter(sum(info.nbytes for info in stored.values()), progress)
    _read_all(rank_file, list(_pieces(stored, raw)), device, counter)
    for name, old in wanted.items():
        tensor = raw.pop(name)
        owner, _, attribute = name.rpartition(".")
        new = nn.Parameter(tensor.to(old.dtype), requires_grad=False)
        model.get_submodule(owner).register_parameter(attribute, new)
    return counter.total


def read_tensors(infos: Iterable[TensorInfo], device: torch.device | str, *, lanes: int = _LANES) -> dict[str, Tensor]:
    """Some tensors of safetensors files, as stored, on `device`, by name; `lanes`: threads. EngineDamagedError for a
    file that ends too early."""
    device = torch.device(device)
    files: dict[Path, dict[str, TensorInfo]] = {}
    for info in infos:
        files.setdefault(info.file, {})[info.name] = info
    found: dict[str, Tensor] = {}
    for file, stored in files.items():
        raw = {n: torch.empty(i.shape, dtype=getattr(torch, i.dtype), device=device) for n, i in stored.items()}
        total = sum(info.nbytes for info in stored.values())
        _read_all(file, list(_pieces(stored, raw)), device, _Counter(total, None), whole=False, lanes=lanes)
        found |= raw
    return found


def load_weights_reference(model: nn.Module, rank_file: Path, device: torch.device | str) -> None:
    """`load_weights` through the safetensors library, one tensor at a time."""
    from safetensors.torch import load_file

    for name, tensor in load_file(rank_file).items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        value = tensor.to(device=device, dtype=getattr(module, attribute).dtype)
        module.register_parameter(attribute, nn.Parameter(value, requires_grad=False))


def _compare(stored: dict[str, TensorInfo], wanted: dict[str, nn.Parameter], path: Path) -> None:
    missing, foreign = wanted.keys() - stored.keys(), stored.keys() - wanted.keys()
    if missing or foreign:
        what = f"lacks {min(missing)}" if missing else f"has {min(foreign)}, which the model does not know"
        raise EngineDamagedError(f"{path} {what}", hint="it was built by another version; remove it and build anew")
    for name, parameter in wanted.items():
        info = stored[name]
        dtype = getattr(torch, info.dtype)
        convertible = {dtype, parameter.dtype} <= {torch.float32, torch.float16, torch.bfloat16}
        if info.shape != tuple(parameter.shape) or (dtype != parameter.dtype and not convertible):
            raise EngineDamagedError(
                f"{path}: {name} is {info.dtype}{list(info.shape)}, "
                f"the model wants {str(parameter.dtype).removeprefix('torch.')}{list(parameter.shape)}",
                hint="it was built by another version; remove it and build anew",
            )


def _pieces(stored: dict[str, TensorInfo], raw: dict[str, Tensor]) -> Iterator[_Piece]:
    """Pieces in file order, none larger than PIECE."""
    for info in sorted(stored.values(), key=lambda info: info.offset):
        if info.nbytes == 0:
            continue
        flat = raw[info.name].view(-1).view(torch.uint8)
        for at in range(0, info.nbytes, PIECE):
            yield _Piece(info.offset + at, flat[at : at + PIECE])


class _Counter:
    """Bytes done, told to `progress` from whichever thread, one call at a time."""

    def __init__(self, total: int, progress: ProgressFn | None) -> None:
        self.total = total
        self._done = 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self.total)


def _read_all(
    path: Path,
    pieces: list[_Piece],
    device: torch.device,
    counter: _Counter,
    *,
    whole: bool = True,
    lanes: int = _LANES,
) -> None:
    """`whole`: they are about all of the file, which the system may then read ahead."""
    lanes = max(1, min(lanes, default_threads(), len(pieces)))
    fd = os.open(path, os.O_RDONLY)
    try:
        if whole and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        remaining, lock = iter(pieces), threading.Lock()

        def draw() -> _Piece | None:
            with lock:
                return next(remaining, None)

        with ThreadPoolExecutor(lanes, thread_name_prefix="load") as pool:
            if device.type == "cuda":
                allocated_on = torch.cuda.current_stream(device)
                jobs = [pool.submit(_gpu_lane, fd, draw, allocated_on, counter) for _ in range(lanes)]
            else:
                jobs = [pool.submit(_host_lane, fd, draw, counter) for _ in range(lanes)]
            for job in jobs:
                job.result()
    finally:
        os.close(fd)


def _read_into(fd: int, into: Tensor, offset: int) -> None:
    """Fill a uint8 host tensor from the file; the interpreter lock is released meanwhile."""
    view = memoryview(into.numpy().data)
    while len(view):
        got = os.preadv(fd, [view], offset)
        if got == 0:
            raise EngineDamagedError(f"the weight file ends at byte {offset}", hint="the engine is built anew")
        view, offset = view[got:], offset + got


def _host_lane(fd: int, draw: Callable[[], _Piece | None], counter: _Counter) -> None:
    """Read straight into the parameters."""
    while (piece := draw()) is not None:
        _read_into(fd, piece.into, piece.offset)
        counter.add(piece.into.numel())


def _gpu_lane(fd: int, draw: Callable[[], _Piece | None], allocated_on: torch.cuda.Stream, counter: _Counter) -> None:
    """Read into one page-locked buffer while the other is on its way to the GPU."""
    # Inference mode is a thread's own; without it, tensors that were made in it cannot be filled.
    with torch.inference_mode(), torch.cuda.device(allocated_on.device):
        # Of another pool than the streams that graphs are captured on meanwhile: torch's pool of 32 begins again.
        stream = torch.cuda.Stream(priority=-1)
        stream.wait_stream(allocated_on)  # which may still be using this memory for what was freed before
        buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        copied = [torch.cuda.Event(), torch.cuda.Event()]
        turn = 0
        while (piece := draw()) is not None:
            count = piece.into.numel()
            copied[turn].synchronize()  # of an event never recorded: returns at once
            _read_into(fd, buffers[turn][:count], piece.offset)
            with torch.cuda.stream(stream):
                piece.into.copy_(buffers[turn][:count], non_blocking=True)
                copied[turn].record(stream)
            turn = 1 - turn
            counter.add(count)
        stream.synchronize()
