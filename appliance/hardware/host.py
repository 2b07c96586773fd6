"""CPU cores and memory that this process may really use: psutil, narrowed by cgroup limits (v2 and v1)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Host:
    cpu_cores: int
    memory: int  # bytes
    free_memory: int  # bytes


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _read_int(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text is not None and text.lstrip("-").isdigit() else None


def _stat(path: Path, key: str) -> int:
    for line in (_read(path) or "").splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.isdigit():
            return int(value)
    return 0


def _cgroup_dirs(root: Path, controller: str) -> list[Path]:
    """The process's cgroup of a controller and its ancestors, as far as mounted; v2 when `controller` is ""."""
    mount = root / "sys/fs/cgroup" / controller
    own = "/"
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == controller or (controller and controller in controllers.split(",")):
            own = path
    directory = mount / own.lstrip("/")
    found = [directory, *directory.parents]
    # In a container the path in /proc may be the host's while only the container's own cgroup is mounted.
    return [d for d in found if d == mount or mount in d.parents]


def _memory_limit(root: Path) -> tuple[int, int] | None:
    """(limit, in use without reclaimable file cache) in bytes of the tightest cgroup, None without a limit."""
    limits: list[tuple[int, int]] = []
    for d in _cgroup_dirs(root, ""):
        limit = _read_int(d / "memory.max")
        if limit is not None:
            used = (_read_int(d / "memory.current") or 0) - _stat(d / "memory.stat", "inactive_file")
            limits.append((limit, max(0, used)))
    for d in _cgroup_dirs(root, "memory"):
        limit = _read_int(d / "memory.limit_in_bytes")
        if limit is not None and limit < 1 << 60:  # v1 writes "no limit" as a huge number
            used = (_read_int(d / "memory.usage_in_bytes") or 0) - _stat(d / "memory.stat", "total_inactive_file")
            limits.append((limit, max(0, used)))
    return min(limits, key=lambda pair: pair[0] - pair[1], default=None)


def _cpu_quota(root: Path) -> float | None:
    """CPU cores' worth of time granted by the tightest cgroup, None without a quota."""
    quotas: list[float] = []
    for d in _cgroup_dirs(root, ""):
        parts = (_read(d / "cpu.max") or "").split()
        if len(parts) == 2 and all(part.isdigit() for part in parts):
            quotas.append(int(parts[0]) / int(parts[1]))
    for d in _cgroup_dirs(root, "cpu"):
        quota, period = _read_int(d / "cpu.cfs_quota_us"), _read_int(d / "cpu.cfs_period_us")
        if quota is not None and period is not None and quota > 0 and period > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def host(root: Path = Path("/")) -> Host:
    """Measure now. `root` is where /proc and /sys are found (tests)."""
    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    limit = _memory_limit(root)
    if limit is not None:
        total = min(total, limit[0])
        free = min(free, max(0, limit[0] - limit[1]))
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else (os.cpu_count() or 1)
    quota = _cpu_quota(root)
    if quota is not None:
        cores = min(cores, max(1, int(quota)))
    return Host(cpu_cores=max(1, cores), memory=total, free_memory=min(free, total))
