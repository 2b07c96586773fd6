"""How the ranks find each other: rank 0 listens, all make torch.distributed's process groups together, and each learns
its place.

Whoever starts the ranks gives them a `Rendezvous`, with torchrun's meaning of its numbers; reads no environment. What
ranks then do together is `distributed.py`'s; who starts and watches them is the runtime's.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch.distributed import (  # type: ignore[attr-defined]
    ProcessGroupGloo,
    TCPStore,
    distributed_c10d,
)

from appliance.distributed import GroupCollectives, NeighbourLinks, PipelineStage, TensorParallel
from appliance.errors import HardwareError
from appliance.settings import forbid_nvlink_multicast

LOOPBACK = "127.0.0.1"
# Whoever watches the ranks ends them long before; the library's own limit must only not be in the way.
_TIMEOUT = datetime.timedelta(hours=24)
_HERE = "appliance/rank-{}"  # key that a rank sets when it joins
_LOOK_SECONDS = 0.005
_JOIN_TIMEOUT = datetime.timedelta(minutes=30)  # a rank may read its imports from a slow disk


@dataclass(frozen=True)
class Rendezvous:
    """Where ranks meet: torchrun's RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Rank 0 listens there."""

    rank: int
    world_size: int
    master_addr: str = LOOPBACK
    master_port: int = 0  # of rank 0 only: 0 is any free one, see `Meeting.port`
    local_addr: str = LOOPBACK  # this rank's own address, as ranks on other machines reach it, if there are any


class Meeting:
    """A rank's end of the rendezvous. Rank 0 opens it before the others are started, since it knows the port."""

    def __init__(self, rendezvous: Rendezvous) -> None:
        """HardwareError if the address cannot be listened on or reached."""
        self._rendezvous = rendezvous
        self._tp_size = rendezvous.world_size
        self._inside: GroupCollectives | None = None
        try:
            self._store = TCPStore(
                rendezvous.master_addr,
                rendezvous.master_port,
                rendezvous.world_size,
                is_master=rendezvous.rank == 0,
                timeout=_JOIN_TIMEOUT,
                wait_for_workers=False,
            )
        except RuntimeError as error:  # torch's own kinds of it
            where = f"{rendezvous.master_addr}:{rendezvous.master_port}"
            raise HardwareError(
                f"rank {rendezvous.rank} cannot meet the others at {where}: {error}",
                hint="is the address that of rank 0's machine, and its port free?",
            ) from error

    @property
    def port(self) -> int:
        return int(self._store.port)

    def place(
        self, device: torch.device, pp_size: int = 1, on_call: Callable[[], None] = lambda: None
    ) -> tuple[TensorParallel, PipelineStage]:
        """This rank's place in its stage, and its stage, on its `device`; what they do together can be used once all
        have joined. `on_call`: see `GroupCollectives`."""
        rank, world = self._rendezvous.rank, self._rendezvous.world_size
        size = world // pp_size
        stage, number = divmod(rank, size)
        self._tp_size = size
        self._inside = GroupCollectives(size, device, None, on_call)
        tp = TensorParallel(number, size, self._inside)
        if pp_size == 1:
            return tp, PipelineStage()
        before, behind = (rank - size if stage else None), (rank + size if stage < pp_size - 1 else None)
        everyone = GroupCollectives(world, device, None, on_call)
        return tp, PipelineStage(stage, pp_size, NeighbourLinks(before, behind, on_call), everyone)

    def join(self, device: torch.device, check: Callable[[], None] = lambda: None) -> None:
        """Wait for all ranks and make them the default process group; `device`: this rank's, the current one if it is a
        GPU. While rank 0 waits for others it calls `check`, which raises if that is in vain: the library would wait
        without looking."""
        rank, size = self._rendezvous.rank, self._rendezvous.world_size
        if rank == 0:
            while not self._store.check([_HERE.format(other) for other in range(1, size)]):
                check()
                time.sleep(_LOOK_SECONDS)
        else:
            self._store.set(_HERE.format(rank), "")
        if device.type == "cuda":
            forbid_nvlink_multicast()
            torch.distributed.init_process_group(
                "nccl", store=self._store, rank=rank, world_size=size, device_id=device, timeout=_TIMEOUT
            )
        else:
            torch.distributed.init_process_group(
                "gloo", store=self._store, rank=rank, world_size=size, timeout=_TIMEOUT, pg_options=self._options()
            )
        if 1 < self._tp_size < size:
            self._make_groups(device)

    def _make_groups(self, device: torch.device) -> None:
        """A group for each stage; every rank has a part in making all of them."""
        rank, size = self._rendezvous.rank, self._tp_size
        for begin in range(0, self._rendezvous.world_size, size):
            options = None if device.type == "cuda" else self._options()
            members = list(range(begin, begin + size))
            group = torch.distributed.new_group(members, timeout=_TIMEOUT, pg_options=options)
            if rank in members and self._inside is not None:
                self._inside.use(group)

    def _options(self) -> Any:
        """Gloo's: otherwise it looks the machine's name up, which may stand for none of its addresses."""
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = _TIMEOUT
        options._devices = [ProcessGroupGloo.create_device(hostname=self._rendezvous.local_addr, lazy_init=False)]
        return options


def leave() -> None:
    """Give the default process group up, if there is one, without waiting for ranks that may be gone. Nothing that uses
    it may run any more; CUDA graphs that it is captured in should have been dropped."""
    if not torch.distributed.is_initialized():
        return
    if torch.distributed.get_backend() == "nccl":
        distributed_c10d._abort_process_group()
    else:
        torch.distributed.destroy_process_group()
