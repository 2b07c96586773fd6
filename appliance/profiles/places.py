"""Where a candidate could run: a group of identical GPUs, or the CPU; and which GPUs of a group it would take."""

from __future__ import annotations

from collections.abc import Sequence

from appliance.profiles.gpus import facts_of
from appliance.profiles.load import GpuFacts
from appliance.types import Gpu, Hardware, Struct

_BUSY_UTILIZATION = 50  # percent; among GPUs with enough memory, those below are taken first
LINK_RANK = {"nvlink": 0, "pcie": 1, "none": 2}
PATH_RANK = {"switch": 0, "switches": 1, "host": 2, "numa": 3, "system": 4}
_UNKNOWN_PATH = 5

Team = tuple[Gpu, ...]  # GPUs of one engine, one per rank


class Place(Struct, frozen=True):
    """GPUs that are alike, or the CPU when there are none in it."""

    order: int  # 0 is preferred
    gpus: tuple[Gpu, ...] = ()
    facts: GpuFacts | None = None

    @property
    def is_cpu(self) -> bool:
        return not self.gpus

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        return self.gpus[0].compute_capability if self.gpus else None

    @property
    def label(self) -> str:
        return f"{len(self.gpus)} × {self.gpus[0].name}" if self.gpus else "the CPU"

    def free(self, count: int) -> int:
        """Free bytes of the fullest of the `count` emptiest GPUs; 0 if there are fewer."""
        emptiest = sorted((gpu.free_memory for gpu in self.gpus), reverse=True)
        return emptiest[count - 1] if count <= len(emptiest) else 0

    def take(self, count: int, required: int) -> Team:
        """The `count` GPUs to run on, each with `required` free bytes: best linked first, then idle, then nearest to
        each other on PCIe, then emptiest.

        Empty if there are not that many.
        """
        able = sorted((gpu for gpu in self.gpus if gpu.free_memory >= required), key=_readiness)
        if len(able) < count:
            return ()
        teams = []
        for first in able:
            others = sorted((gpu for gpu in able if gpu is not first), key=lambda gpu: _farness(first, gpu))
            team = [first, *others[: count - 1]]
            farness = (LINK_RANK[worst_link(team)], sum(map(at_work, team)), _path_rank(worst_path(team)))
            teams.append((farness, sorted(map(able.index, team))))
        best = min(teams)[1]
        return tuple(sorted((able[i] for i in best), key=self.gpus.index))

    def without(self, gpus: Sequence[Gpu]) -> Place:
        """The place when those are taken. It is not to be asked for its label when none is left."""
        taken = {gpu.uuid for gpu in gpus}
        return Place(self.order, tuple(gpu for gpu in self.gpus if gpu.uuid not in taken), self.facts)

    def teams(self, count: int, required: int, most: int, required_of_others: int | None = None) -> list[Team]:
        """Up to `most` disjoint teams of `count` GPUs, each as `take` chooses it among those that are left. Those after
        the first take GPUs with `required_of_others` free bytes, if that is given, and none that is at work."""
        found: list[Team] = []
        left = self
        while len(found) < most:
            if found and required_of_others is not None:
                idle = tuple(gpu for gpu in left.gpus if not at_work(gpu))
                left, required = Place(self.order, idle, self.facts), required_of_others
            team = left.take(count, required)
            if not team:
                break
            found.append(team)
            left = left.without(team)
        return found


def at_work(gpu: Gpu) -> bool:
    """Whether somebody else computes on it."""
    return gpu.utilization >= _BUSY_UTILIZATION


def _readiness(gpu: Gpu) -> tuple[bool, int, int]:
    # Whole GiB, so that a few MiB do not decide over the order of the machine.
    return at_work(gpu), -(gpu.free_memory >> 30), gpu.index


def _link(a: Gpu, b: Gpu) -> str:
    return a.links.get(b.index, "none")


def _path_rank(path: str | None) -> int:
    return PATH_RANK.get(path or "", _UNKNOWN_PATH)


def _farness(first: Gpu, other: Gpu) -> tuple[int, bool, int]:
    return LINK_RANK[_link(first, other)], at_work(other), _path_rank(first.paths.get(other.index))


def worst_link(gpus: Sequence[Gpu]) -> str:
    """The slowest link within a team; "nvlink" for a single GPU."""
    links = [_link(a, b) for a in gpus for b in gpus if a is not b]
    return max(links, key=LINK_RANK.__getitem__, default="nvlink")


def worst_path(gpus: Sequence[Gpu]) -> str | None:
    """The longest way over PCIe within a team; None for a single GPU, and where any is unknown."""
    paths = [a.paths.get(b.index) for a in gpus for b in gpus if a is not b]
    return max(paths, key=_path_rank, default=None)


def _memory_gib(gpus: Sequence[Gpu]) -> int:
    return round(sum(gpu.total_memory for gpu in gpus) / 2**30)


def places(hardware: Hardware, facts: Sequence[GpuFacts]) -> list[Place]:
    """Groups of identical usable GPUs, the one with most memory in all (then: most GPUs) first; then the CPU."""
    groups: dict[tuple[object, ...], list[Gpu]] = {}
    for gpu in hardware.usable_gpus:
        key = (gpu.pci_id, gpu.compute_capability, gpu.mig_profile, round(gpu.total_memory / 2**30))
        groups.setdefault(key, []).append(gpu)
    ordered = sorted(groups.values(), key=lambda gpus: (-_memory_gib(gpus), -len(gpus), gpus[0].index))
    found = [Place(order, tuple(gpus), facts_of(gpus[0], facts)) for order, gpus in enumerate(ordered)]
    return [*found, Place(len(found))]
