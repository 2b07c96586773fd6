"""How much memory a conversion may hold at once, on every device and in the host: stated before it begins, kept by
making threads wait. Knows devices and byte counts; knows nothing of tensors.

On a GPU a spec is read, computed and stored there; host memory has page-locked pieces of what is on its way, so its
bound depends on the number of threads alone and not on the model. On the CPU all of it is host memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from appliance.checkpoint.writer import PIECE as WRITE_PIECE
from appliance.hardware.host import host
from appliance.runtime.weights import PIECE as READ_PIECE

READ_LANES = 2  # threads that read one tensor for a GPU, each through two page-locked pieces
_GPU_THREADS = 8  # of one GPU: while some write, others read
_CPU_THREADS = 3  # one reads, one computes, one writes
_SHARE = 0.25  # of the memory that is free
_MOST = 8 << 30  # bytes of a device: more would not be quicker
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_RETURNED = 4 << 20  # bytes


@dataclass
class Memory:
    """One device's part of a conversion."""

    device: torch.device
    threads: int
    limit: int  # bytes of the device that are held at once; what is larger alone is held alone
    host_bytes: int  # of host memory, at most
    held: int = 0
    most: int = 0  # that was held so far
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @contextlib.contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Wait until so many bytes are free within the limit, or nothing else is held."""
        with self._changed:
            self._changed.wait_for(lambda: self.held == 0 or self.held + nbytes <= self.limit)
            self.held += nbytes
            self.most = max(self.most, self.held)
        try:
            yield
        finally:
            with self._changed:
                self.held -= nbytes
                self._changed.notify_all()


def plan_memory(devices: Sequence[torch.device], largest: int) -> list[Memory]:
    """For each device, which are different ones: its threads and bounds. `largest`: bytes of the spec that takes the
    most."""
    cores = host().cpu_cores
    parts = []
    for device in devices:
        if device.type == "cuda":
            threads = max(2, min(_GPU_THREADS, cores // len(devices)))
            limit = _limit(torch.cuda.mem_get_info(device)[0], largest)
            pieces = READ_LANES * 2 * READ_PIECE + WRITE_PIECE
            parts.append(Memory(device, threads, limit, host_bytes=threads * pieces))
        else:
            limit = _limit(host().free_memory, largest)
            parts.append(Memory(device, _CPU_THREADS, limit, host_bytes=limit))
    return parts


def return_what_is_freed() -> None:
    """Let the C library give large blocks back to the system when they are freed. By itself it soon keeps blocks of up
    to 32 MiB for later, in a heap of each thread, which for threads that hold tensors in turn adds up to a multiple of
    what they hold. For the rest of this process; does nothing where the C library is another."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _RETURNED)


def _limit(free: int, largest: int) -> int:
    return max(largest, min(_MOST, int(_SHARE * free)))
