"""Memory that all ranks of a group have mapped: each has its own piece and sees everybody's (torch's symmetric memory,
no multicast).

Whether GPUs can read each other's memory at all is for the caller to find out (`peer_access.py`). Knows nothing of what
lies in the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from appliance.settings import forbid_nvlink_multicast


class Agreement(Protocol):
    """Of a group's collective operations."""

    @property
    def process_group(self) -> torch.distributed.ProcessGroup | None:
        """Torch's; None: the default one."""

    def minimum(self, value: int) -> int:
        """The smallest of the ranks' numbers."""


def agree(group: Agreement, rank: int, size: int, reason: str | None) -> str | None:
    """Whether any rank has a reason against something: the reason on the first that has, "" on others, None if none
    has."""
    first = group.minimum(size if reason is None else rank)
    return None if first == size else (reason or "") if first == rank else ""


@dataclass(frozen=True)
class PeerMemory:
    """One rank's end. Exists as long as any rank may use it."""

    memory: Tensor  # uint8: this rank's piece
    addresses: tuple[int, ...]  # where this rank sees every rank's piece, in rank order
    handle: Any  # keeps the others' pieces mapped


def share(group: Agreement, rank: int, size_bytes: int, device: torch.device) -> PeerMemory:
    """A piece of `size_bytes` zeros on every rank of the group, 16-byte aligned; `rank`: number in it. Called by all of
    them, with the same size; waits for the device. RuntimeError, on every rank, where torch cannot make or map one."""
    forbid_nvlink_multicast()
    import torch.distributed._symmetric_memory as symmetric

    memory, failure = None, None
    try:
        memory = symmetric.empty(size_bytes, dtype=torch.uint8, device=device)
        memory.zero_()
    except RuntimeError as error:
        failure = error
    if group.minimum(0 if memory is None else 1) == 0 or memory is None:
        raise failure or RuntimeError("another rank has no memory for it")
    everyone = group.process_group or torch.distributed.group.WORLD
    assert everyone is not None, "the ranks have not joined"
    handle = symmetric.rendezvous(memory, everyone)
    offset = memory.data_ptr() - handle.buffer_ptrs[rank]
    torch.cuda.synchronize(device)
    group.minimum(0)  # nobody writes before all pieces are zero
    return PeerMemory(memory, tuple(pointer + offset for pointer in handle.buffer_ptrs), handle)
