"""A reducer whose ranks share out rows, for ranks that are processes without GPUs: the kernel is interpreted and really
waits for what the others write into shared memory; everything else goes by the library."""

from __future__ import annotations

import torch
from torch import Tensor

from appliance.distributed import GroupCollectives
from appliance.kernels.all_reduce import Workspace
from appliance.kernels.all_reduce_group import SHARED_ROWS, AllReduce
from appliance.kernels.all_reduce_push import MISSING, PushSpace, push_bytes
from appliance.kernels.deferred_scale import Product

SLOTS = 2
REGION_BYTES = 1 << 14


class SharedRows(AllReduce):
    """Norms by shared rows wherever they fit, in passes; else by the library and a norm."""

    def _norm_way(self, x: Product, residual: Tensor) -> str:
        self._forced = SHARED_ROWS
        way = super()._norm_way(x, residual)
        return way if way == SHARED_ROWS else "separate"

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._group.all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor | None:
        return None

    def all_to_all(self, x: Tensor) -> Tensor | None:
        return None


def shared_memory(size: int) -> Tensor:
    """int32 [size, words]: memory of `size` ranks that processes may share, in which nothing has come."""
    words = push_bytes(SLOTS, REGION_BYTES) // 4
    return torch.full((size, words), MISSING, dtype=torch.int32).share_memory_()


def connected(memory: Tensor, rank: int, group: GroupCollectives) -> SharedRows:
    """Over `shared_memory` of a group's ranks, as this process sees it."""
    size = len(memory)
    addresses = torch.tensor([part.data_ptr() for part in memory])
    state = torch.zeros(SLOTS, 2, dtype=torch.int32)
    stopped = torch.zeros(1, dtype=torch.int32)
    push = PushSpace(rank, size, addresses, state, stopped, REGION_BYTES, memory[rank])
    workspace = Workspace(rank, size, addresses, torch.zeros(SLOTS, dtype=torch.int32), REGION_BYTES)
    return SharedRows(group, workspace, push)
