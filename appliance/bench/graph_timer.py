"""Times CUDA graph replays with events, without a profiler: what the device needs for them, and what lies between.

An event costs about a microsecond on the device, so a step is hardly changed by it; a profiler, which records every
kernel, changes it by more.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import torch


class GraphTimer:
    """`with GraphTimer() as timer:` around steps; every `torch.cuda.CUDAGraph.replay` inside is timed."""

    def __init__(self) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._launched_ahead = 0

    def __enter__(self) -> Self:
        self._original = torch.cuda.CUDAGraph.replay
        original, events = self._original, self._events

        def replay(graph: Any) -> None:
            if events and not events[-1][1].query():
                self._launched_ahead += 1
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            original(graph)
            end.record()
            events.append((start, end))

        self._set(replay)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._set(self._original)

    @staticmethod
    def _set(replay: Callable[[Any], None]) -> None:
        setattr(torch.cuda.CUDAGraph, "replay", replay)  # noqa: B010 — to mypy a method is nothing to assign to

    def result(self, steps: int) -> dict[str, Any]:
        """Milliseconds. `graph_ms`: device time of replays per step. `between_graphs_ms`: from one replay's end to the
        next one's start, where small kernels (inputs, sampling) run or nothing does. `launched_ahead_share`: replays
        that were launched while the device was still busy with the one before. All None if nothing was replayed."""
        if len(self._events) < 2:
            return {"graph_ms": None, "between_graphs_ms": None, "launched_ahead_share": None}
        self._events[-1][1].synchronize()
        total = sum(start.elapsed_time(end) for start, end in self._events)
        between = [end.elapsed_time(start) for (_, end), (start, _) in pairwise(self._events)]
        return {
            "graph_ms": round(total / steps, 4),
            "between_graphs_ms": {"p50": round(statistics.median(between), 4), "max": round(max(between), 4)},
            "launched_ahead_share": round(self._launched_ahead / (len(self._events) - 1), 3),
        }
