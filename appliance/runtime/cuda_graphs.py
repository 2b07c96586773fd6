"""CUDA graphs of decode steps, one per batch bucket. Knows capture and replay; what a step computes is the runner's.

All graphs share one memory pool and are captured largest first, so that the smaller ones live in memory the largest
took. A graph reads its inputs from the input batch's arena and leaves its logits in a buffer of its own, which the next
replay of any graph overwrites: consume it in stream order.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

import torch
from torch import Tensor

from appliance.runtime.input_batch import StepInputs

# Dense at the low end, where a padded row costs as much as a real one; coarser where steps are long anyway.
_BUCKETS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)


def decode_buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, ascending: dense up to 64, every 16 up to 256, then every 64; ends with max_num_seqs."""
    sizes = list(_BUCKETS) + list(range(80, 257, 16)) + list(range(320, max_num_seqs + 1, 64))
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


class DecodeGraphs:
    """`make_inputs(n)` gives the inputs of a dummy decode step of n sequences, planned; `forward` turns inputs into
    logits [n, vocab] using device work only."""

    def __init__(self, forward: Callable[[StepInputs], Tensor], make_inputs: Callable[[int], StepInputs]) -> None:
        self._forward = forward
        self._make_inputs = make_inputs
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._sizes: list[int] = []
        self._pool = torch.cuda.graph_pool_handle()

    def bucket(self, num_seqs: int) -> int | None:
        """The smallest captured size that holds `num_seqs`; None if there is none."""
        at = bisect.bisect_left(self._sizes, num_seqs)
        return self._sizes[at] if at < len(self._sizes) else None

    def capture(self, size: int) -> None:
        """Capture the step of `size` sequences. Runs it once before, so that lazily compiled kernels exist."""
        inputs = self._make_inputs(size)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            logits = self._forward(inputs)
        self._graphs[size] = (graph, logits)
        bisect.insort(self._sizes, size)

    def replay(self, size: int) -> Tensor:
        """Run the captured step on what the arena holds now; logits float32 [size, vocab]."""
        graph, logits = self._graphs[size]
        graph.replay()
        return logits
