"""CUDA graphs of decode steps, one per batch bucket. Knows capture and replay; what a step computes is the runner's.

All graphs share one memory pool. A start captures a few sizes, the others are captured while the engine serves; until
then a batch is padded to the next larger size that there is. A graph reads its inputs from the input batch's arena and
leaves its logits where the next replay of any graph may write: consume them in stream order.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from appliance.kernels.deferred_scale import DeferredScale, Product
from appliance.runtime.input_batch import StepInputs

T = TypeVar("T")
log = logging.getLogger(__name__)

# Dense at the low end, where a padded row costs as much as a real one; coarser where steps are long anyway.
_BUCKETS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
_LARGEST = 2048  # sequences; a step of more takes so long that launching its kernels one by one does not show


def decode_buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, ascending: dense up to 64, every 16 up to 256, then every 64; ends with max_num_seqs, or
    `_LARGEST` if that is less."""
    most = min(max_num_seqs, _LARGEST)
    sizes = list(_BUCKETS) + list(range(80, 257, 16)) + list(range(320, most + 1, 64))
    return sorted({size for size in sizes if size < most} | {most})


def ready_buckets(sizes: Sequence[int]) -> list[int]:
    """Of the sizes to capture, those that a start waits for, ascending: powers of two and the largest. A batch of any
    size has one that is at most twice as large; the others follow while the engine serves."""
    return [size for size in sizes if size & (size - 1) == 0 or size == max(sizes)]


def capture(
    function: Callable[[], T], pool: Any = None, stream: torch.cuda.Stream | None = None
) -> tuple[torch.cuda.CUDAGraph, T]:
    """What `function` launches, as a graph, and what it returned; `pool` as of `graph_pool_handle`. The function must
    have run once before, so that everything that is compiled or allocated lazily exists.

    `torch.cuda.graph` does the same, but waits for the GPU and gives all cached memory back first, also page-locked
    memory, which the next steps then have to allocate anew."""
    stream = stream or torch.cuda.Stream()
    current = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        # thread_local: other threads may go on using the GPU.
        graph.capture_begin(**({} if pool is None else {"pool": pool}), capture_error_mode="thread_local")
        try:
            result = function()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # what went wrong is what matters
                graph.capture_end()
            raise
        graph.capture_end()
    current.wait_stream(stream)
    return graph, result


class _Memory:
    """A place on the GPU, for `torch.as_tensor`."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = tensor.__cuda_array_interface__


def _borrowed(product: Product) -> Product:
    """The same numbers in the same place, without a claim to it: the memory of one graph's result may serve graphs that
    are captured later. Thirty sizes with buffers of their own for logits would take more than a gigabyte. (Scales of
    columns and the bias of a deferred product are the model's own.)"""
    if isinstance(product, DeferredScale):
        return replace(product, values=_alias(product.values), row_scales=_alias(product.row_scales))
    return _alias(product)


def _alias(tensor: Tensor) -> Tensor:
    """By way of integers: the interface does not know bfloat16."""
    integers = tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    alias = torch.as_tensor(_Memory(integers), device=tensor.device).view(tensor.dtype)
    assert alias.data_ptr() == tensor.data_ptr() and alias.shape == tensor.shape
    return alias


class DecodeGraphs:
    """`make_inputs(n)` gives the inputs of a dummy decode step of n sequences, planned; `forward` turns inputs into
    logits [n, vocab] using device work only. Neither may change what sequences that are being served rely on: sizes are
    also captured between their steps."""

    def __init__(
        self,
        forward: Callable[[StepInputs], Product],
        make_inputs: Callable[[int], StepInputs],
        *,
        together: bool = False,
    ) -> None:
        """`together`: with other ranks, which must have the same sizes."""
        self._forward = forward
        self._together = together
        self._make_inputs = make_inputs
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Product]] = {}
        self._sizes: list[int] = []
        self._later: list[int] = []  # ascending; captured from the end
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def bucket(self, num_seqs: int) -> int | None:
        """The smallest captured size that holds `num_seqs`; None if there is none."""
        at = bisect.bisect_left(self._sizes, num_seqs)
        return self._sizes[at] if at < len(self._sizes) else None

    def capture_first(self, sizes: Sequence[int], progress: Callable[[int, int], None]) -> None:
        """Capture `ready_buckets(sizes)`, largest first, so that the smaller ones live in memory the largest took;
        `progress(done, total)` after each. The others wait for `capture_next`."""
        first = ready_buckets(sizes)
        for done, size in enumerate(reversed(first), start=1):
            self.capture(size)
            progress(done, len(first))
        self._later = sorted(set(sizes) - set(first))

    @property
    def waiting(self) -> bool:
        """Whether `capture_next` has something to do."""
        return bool(self._later)

    def capture_next(self) -> bool:
        """Capture one of the sizes that still wait, largest first; False if none did. Takes some 20 ms. Where memory
        has become too little for it, those that wait are left out; of several ranks, the one that has too little
        fails."""
        if not self._later:
            return False
        size = self._later.pop()
        try:
            self.capture(size)
        except torch.cuda.OutOfMemoryError:
            if self._together:
                raise
            log.warning("no memory for a CUDA graph of %d sequences: larger ones serve", size)
            self._later = []
        return True

    def capture(self, size: int) -> None:
        """Capture the step of `size` sequences. Runs it once before, so that lazily compiled kernels exist."""
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        inputs = self._make_inputs(size)
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph, logits = capture(lambda: self._forward(inputs), self._pool, stream)
        self._graphs[size] = (graph, _borrowed(logits))
        bisect.insort(self._sizes, size)

    def replay(self, size: int) -> Product:
        """Run the captured step on what the arena holds now; logits [size, vocab], as `forward` gave them."""
        graph, logits = self._graphs[size]
        graph.replay()
        return logits
