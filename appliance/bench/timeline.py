"""What a profiler's trace says of a device's time: how much of it kernels fill, the gaps between them, the costliest.

Reads the Chrome trace format that torch.profiler writes (and Perfetto opens); pure functions, no torch. Times are
microseconds.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAME_LENGTH = 90  # characters; template arguments make kernel names endless


@dataclass(frozen=True)
class Interval:
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Gap:
    """Time in which no kernel ran."""

    microseconds: float
    after: str  # the kernel that ended
    before: str  # the kernel that began


@dataclass(frozen=True)
class Timeline:
    """Kernels of a window, by start."""

    kernels: tuple[Interval, ...]

    @property
    def window(self) -> float:
        """From the first kernel's start to the last end."""
        return max(kernel.end for kernel in self.kernels) - self.kernels[0].start if self.kernels else 0.0

    @property
    def busy(self) -> float:
        """Time in which at least one kernel ran: what overlaps counts once."""
        return self.window - sum(gap.microseconds for gap in self.gaps())

    def gaps(self) -> list[Gap]:
        """Longest first."""
        found: list[Gap] = []
        last: Interval | None = None  # the one that ends latest so far
        for kernel in self.kernels:
            if last is not None and kernel.start > last.end:
                found.append(Gap(kernel.start - last.end, last.name, kernel.name))
            if last is None or kernel.end > last.end:
                last = kernel
        return sorted(found, key=lambda gap: -gap.microseconds)

    def by_name(self) -> list[tuple[str, int, float]]:
        """(name, launches, microseconds in all), the costliest first."""
        found: dict[str, list[float]] = defaultdict(list)
        for kernel in self.kernels:
            found[kernel.name].append(kernel.end - kernel.start)
        return _costliest(found)


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace file, compressed or not."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events: list[dict[str, Any]] = json.loads(data)["traceEvents"]
    return events


def timeline(events: Sequence[dict[str, Any]], marker: str) -> Timeline:
    """Kernels that began while the host's range called `marker` lasted. ValueError if the trace has no such range."""
    return Timeline(tuple(_within(events, marker, "kernel")))


def host_operations(events: Sequence[dict[str, Any]], marker: str) -> list[tuple[str, int, float]]:
    """(name, calls, microseconds without what they called) of the host's operations in the range, the costliest first.
    ValueError as for `timeline`."""
    found: dict[str, list[float]] = defaultdict(list)
    open_calls: list[tuple[Interval, list[float]]] = []  # each with the times of what it called

    def close(until: float) -> None:
        while open_calls and open_calls[-1][0].end <= until:
            call, inner = open_calls.pop()
            found[call.name].append(call.end - call.start - sum(inner))

    for call in _within(events, marker, "cpu_op"):
        close(call.start)
        if open_calls:
            open_calls[-1][1].append(call.end - call.start)
        open_calls.append((call, []))
    close(float("inf"))
    return _costliest(found)


def _within(events: Sequence[dict[str, Any]], marker: str, category: str) -> list[Interval]:
    """Intervals of a category that began in the range, by start, the enclosing one before what it encloses. Host
    operations are those of the thread that the range is of."""
    ranges = [event for event in events if event.get("name") == marker and event.get("cat") == "user_annotation"]
    if not ranges:
        raise ValueError(f"the trace has no range {marker!r}")
    begin, end, thread = ranges[0]["ts"], ranges[0]["ts"] + ranges[0]["dur"], ranges[0].get("tid")
    found = [
        Interval(event["name"][:_NAME_LENGTH], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("ph") == "X" and event.get("cat") == category and begin <= event["ts"] <= end
        if category == "kernel" or event.get("tid") == thread
    ]
    return sorted(found, key=lambda interval: (interval.start, -interval.end))


def _costliest(times: dict[str, list[float]]) -> list[tuple[str, int, float]]:
    rows = [(name, len(own), sum(own)) for name, own in times.items()]
    return sorted(rows, key=lambda row: -row[2])
