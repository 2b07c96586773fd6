"""Sums in the background on NVIDIA GPUs (`copy_sums.py`): the driver's stream operations, and whether these ranks can
rely on them.

Everything is tried before it is relied on: first what a rank does alone, then whether flags and copies arrive, without
anybody waiting for them, then sums. Ranks agree after each, so one that cannot leaves no other waiting. Knows nothing
of who adds up when.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.all_reduce import all_reduce_reference
from appliance.kernels.copy_sums import BUFFERS, FLAG_BYTES, ROUND_BYTES, CopySums, shared_bytes
from appliance.kernels.cuda_core import cuda_bindings
from appliance.kernels.peer_memory import Agreement, PeerMemory, agree, share

log = logging.getLogger(__name__)

_LATE_SECONDS = 0.01  # in which a rank that is being killed may still write a flag
_PRIORITY = -1  # of streams: before the products
_CHECK_SHAPES = ((67, 4096), (8, 512), (256, 1024))
_TRIED = FLAG_BYTES // 2  # offset of words for trying flags, which no sum uses
_VALUE = 77


class CudaQueues:
    """`copy_sums.Queues` of a GPU. RuntimeError for whatever the driver refuses."""

    def __init__(self, device: torch.device) -> None:
        """ImportError without cuda.bindings."""
        self._driver = cuda_bindings("driver")
        self._device = device
        self._success = self._driver.CUresult.CUDA_SUCCESS
        self._at_least = int(self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ)
        # Made now: nothing can be allocated any more while streams wait for ranks that are gone.
        self._values = torch.empty(FLAG_BYTES // 4, dtype=torch.int32).pin_memory()
        self._releasing = torch.cuda.Stream(device, priority=_PRIORITY)

    def current(self) -> Any:
        return torch.cuda.current_stream(self._device)

    def stream(self) -> Any:
        return torch.cuda.Stream(self._device, priority=_PRIORITY)

    def record(self, stream: Any) -> Any:
        return stream.record_event()

    def wait_event(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def copy(self, stream: Any, to: int, source: int, size_bytes: int) -> None:
        if size_bytes:
            self._done("a copy", self._driver.cuMemcpyDtoDAsync(to, source, size_bytes, stream.cuda_stream))

    def write(self, stream: Any, address: int, value: int) -> None:
        self._done("a write", self._driver.cuStreamWriteValue32(stream.cuda_stream, address, value & 0xFFFFFFFF, 0))

    def wait(self, stream: Any, address: int, value: int) -> None:
        value &= 0xFFFFFFFF
        self._done("a wait", self._driver.cuStreamWaitValue32(stream.cuda_stream, address, value, self._at_least))

    def run(self, stream: Any, launch: Callable[[], None]) -> None:
        with torch.cuda.stream(stream):
            launch()

    def release(self, words: Tensor, value: int) -> None:
        """Copies, since kernels that wait too may fill the GPU."""
        self._values.fill_(value)
        with torch.cuda.stream(self._releasing):
            for _ in range(2):
                words.copy_(self._values, non_blocking=True)
                time.sleep(_LATE_SECONDS)

    def _done(self, what: str, result: Any) -> None:
        if result[0] != self._success:
            raise RuntimeError(f"the driver refuses {what} in a stream: {result[0].name}")


def connect(
    group: Agreement, rank: int, size: int, device: torch.device, round_bytes: int = ROUND_BYTES
) -> CopySums | None:
    """The group's sums by copy engines; None, with a line in the log that says why, where the library has to do. Called
    by all ranks, whose GPUs see each other's memory; waits for the device."""
    reason, queues = None, None
    try:
        queues = CudaQueues(device)
    except (ImportError, RuntimeError) as error:
        reason = f"cuda.bindings cannot be used: {error}"
    reason = agree(group, rank, size, reason if HAS_TRITON else "Triton is not installed")
    if reason is None and queues is not None:
        try:
            piece = share(group, rank, shared_bytes(round_bytes), device)
        except RuntimeError as error:  # the same on all ranks
            reason = f"torch gives no memory that GPUs share: {str(error).splitlines()[0]}"
        else:
            found = CopySums(rank, piece.addresses, piece.memory, queues, round_bytes=round_bytes, owner=piece)
            reason = _refusal(group, found, queues, piece, device)
            if reason is None:
                return found
    if reason:
        log.warning("sums of prompts by NCCL: %s", reason)
    return None


def _refusal(
    group: Agreement, found: CopySums, queues: CudaQueues, piece: PeerMemory, device: torch.device
) -> str | None:
    """Try everything, by all ranks together: why any of them cannot, as `agree` says."""
    rank, size = found.rank, found.size
    for attempt in (
        lambda: _alone(queues, piece, rank, device),
        lambda: _tell(queues, piece, rank, device),
        lambda: _told(piece, size),
        lambda: _check(found, device),
    ):
        reason = None
        try:
            reason = attempt()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        reason = agree(group, rank, size, reason)
        if reason is not None:
            return reason
    return None


def _alone(queues: CudaQueues, piece: PeerMemory, rank: int, device: torch.device) -> str | None:
    """A flag to oneself, a wait for it, a copy."""
    stream, address = queues.stream(), piece.addresses[rank] + _TRIED
    source, target = torch.arange(16, device=device), torch.zeros(16, dtype=torch.int64, device=device)
    torch.cuda.synchronize(device)
    queues.write(stream, address + 4 * rank, _VALUE)
    queues.wait(stream, address + 4 * rank, _VALUE)
    queues.copy(stream, target.data_ptr(), source.data_ptr(), 128)
    stream.synchronize()
    return None if torch.equal(source, target) else "a copy in a stream gives other numbers"


def _tell(queues: CudaQueues, piece: PeerMemory, rank: int, device: torch.device) -> None:
    """A flag and a copy to each other rank, and nobody waits."""
    stream, mine = queues.stream(), torch.full((1,), _VALUE, dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)
    for peer, address in enumerate(piece.addresses):
        if peer != rank:
            queues.write(stream, address + _TRIED + 4 * rank, _VALUE)
            queues.copy(stream, address + _TRIED + 32 + 4 * rank, mine.data_ptr(), 4)
    stream.synchronize()


def _told(piece: PeerMemory, size: int) -> str | None:
    """All have told."""
    words = piece.memory[_TRIED : _TRIED + 64].view(torch.int32).view(2, 8)[:, :size].tolist()
    if words[0] != [_VALUE] * size:
        return "flags written by a stream do not arrive in the memory of another GPU"
    copied = [value for value in words[1] if value == _VALUE]
    return None if len(copied) == size - 1 else "copies by a stream do not arrive in the memory of another GPU"


def _check(found: CopySums, device: torch.device) -> str | None:
    """Sums that are known, more of them in flight than there are buffers; every rank makes all calls, whatever comes
    out."""
    wrong = False
    for rows, columns in _CHECK_SHAPES:
        generator = torch.Generator().manual_seed(rows)
        shape = (BUFFERS + 2, rows, columns)
        partials = [torch.randn(shape, generator=generator).bfloat16() for _ in range(found.size)]
        expected = all_reduce_reference(partials)
        waits = [found.begin(x) for x in partials[found.rank].to(device)]
        for wait, want in zip(waits, expected, strict=True):
            wrong = wrong or not torch.equal(wait().cpu(), want)
    return f"copy engines give wrong sums on rank {found.rank}" if wrong else None
