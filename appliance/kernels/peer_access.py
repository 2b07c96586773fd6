"""Whether the GPUs of a group's ranks can read each other's memory: they are in one host and one container, visible to
each other's processes, and have peer access. Knows nothing of what it is for (`peer_memory.py`).
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from appliance.settings import gpus_shared


class Gatherer(Protocol):
    """Of a group's collective operations."""

    def all_gather(self, x: Tensor) -> Tensor:
        """x [n, k] of every rank: [size, n, k]."""


def no_access(group: Gatherer, rank: int, device: torch.device) -> str | None:
    """Why GPUs of the group's ranks cannot read each other's memory, as far as this one sees; None: nothing is against
    it. Called by all ranks; waits for the device."""
    mine = torch.tensor([[_number(_host()), _number(_uuid(device.index or 0))]], device=device)
    others = group.all_gather(mine)[:, 0].tolist()
    here = {_number(_uuid(index)): index for index in range(torch.cuda.device_count())}
    for other, (host, uuid) in enumerate(others):
        if host != others[rank][0]:
            return f"ranks {rank} and {other} are on different hosts or in different containers"
        if other == rank:
            continue
        if uuid == others[rank][1]:
            if gpus_shared():
                continue
            return f"ranks {rank} and {other} are on the same GPU"
        if uuid not in here:
            return f"the GPU of rank {other} is not visible to rank {rank} (a MIG slice, or CUDA_VISIBLE_DEVICES)"
        if not torch.cuda.can_device_access_peer(device.index or 0, here[uuid]):
            return f"GPUs {device.index or 0} and {here[uuid]} have no access to each other's memory"
    return None


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


def _host() -> str:
    """The same for processes that can hand each other file descriptors."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = ""
    return f"{platform.node()} {boot}"


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
