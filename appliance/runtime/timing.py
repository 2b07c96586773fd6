"""Time of device work, measured in a CUDA graph so that launching it does not count. Knows nothing of what is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from appliance.runtime.cuda_graphs import capture

_REPLAYS = 5


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all captures of a device: cuBLAS keeps a workspace of some 30 MB for each stream that it has seen."""
    return torch.cuda.Stream(device)


def time_in_graph(calls: Sequence[Callable[[], object]], launches: int) -> float:
    """Microseconds of one call: the best of several replays of a CUDA graph that goes through `calls` until it has made
    at least `launches`. The best, since whatever else uses the GPU only adds to it. Each call must have run before."""
    rounds = max(1, -(-launches // len(calls)))

    def run() -> None:
        for _ in range(rounds):
            for call in calls:
                call()  # its result is dropped, so that the next one takes its memory

    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # so that the workspace is not made inside of a graph
    torch.cuda.current_stream().wait_stream(stream)
    graph, _ = capture(run, stream=stream)
    best = float("inf")
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return best * 1e3 / (rounds * len(calls))
