"""Which GPUs of a node its ranks run on, where an engine has ranks on several nodes. Knows hardware and sizes only.

A node has whole stages, as many as every other: of `pp_size * tp_size` ranks in all, those of node n are next to each
other, behind those of node n - 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from appliance.errors import HardwareError, SettingsError
from appliance.profiles.places import Place
from appliance.types import Hardware


def ranks_of_a_node(tp_size: int, pp_size: int, nnodes: int) -> int:
    """SettingsError if the stages cannot be shared evenly."""
    if pp_size % nnodes:
        raise SettingsError(
            f"an engine of {pp_size} pipeline stages cannot be served by {nnodes} nodes: a node has whole stages",
            hint=f"choose a --pp-size that is a multiple of {nnodes}, or another number of nodes",
        )
    return tp_size * (pp_size // nnodes)


def with_those_elsewhere(own: Sequence[str], nnodes: int) -> tuple[str, ...]:
    """Devices of all ranks as node 0 knows them: its own, and a mark for each of another node's."""
    if nnodes == 1 or not own:
        return tuple(own)
    return (*own, *(f"node-{node}-{number}" for node in range(1, nnodes) for number in range(len(own))))


def own_devices(machine: Hardware, count: int, capability: tuple[int, int] | None, required: int) -> tuple[str, ...]:
    """UUIDs of `count` GPUs of this compute capability with `required` bytes free, the best linked ones; none for the
    CPU (`capability` None). HardwareError if there are not that many."""
    if capability is None:
        return ()
    fitting = tuple(gpu for gpu in machine.usable_gpus if gpu.compute_capability == capability)
    team = Place(0, fitting).take(count, required)
    if not team:
        dotted = ".".join(map(str, capability))
        most = max((gpu.free_memory for gpu in fitting), default=0)
        raise HardwareError(
            f"{count} GPUs of compute capability {dotted} with {required / 2**30:.1f} GiB free are needed, as on node "
            f"0; here are {len(fitting)}" + (f", with {most / 2**30:.1f} GiB at most" if fitting else ""),
            hint=machine.problem or "use alike nodes, or end what takes the memory",
        )
    return tuple(gpu.uuid for gpu in team)
