"""CUDA graphs of what lies between two attentions, for steps that run prompts: their forward pass is hundreds of small
kernels, which the CPU launches more slowly than the GPU runs them as long as a step has few thousand tokens.

The number of tokens is padded to a captured size. Attention depends on how tokens belong to sequences, so it is called
anew at every step, over the real tokens only. Knows capture and replay; what a forward pass is comes in as a function
that is given the attention to use. The idea is that of vLLM's piecewise graphs; here the pieces are found by capturing
up to each call of `attend`, so the model does not know of them.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from appliance.kernels.attention import UNIT_SCALES, Attention, AttentionMetadata, KvScales
from appliance.runtime.input_batch import StepInputs

log = logging.getLogger(__name__)

# Tokens; beyond, the GPU is the slower side.
_SIZES = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1280, 1536, 2048)


def token_buckets(max_num_batched_tokens: int) -> list[int]:
    """Numbers of tokens to capture, ascending."""
    return [size for size in _SIZES if size <= max_num_batched_tokens]


@dataclass(frozen=True)
class _Call:
    """An attention between two pieces."""

    kv_cache: Tensor
    scale: float
    window: int | None
    kv_scales: KvScales


@dataclass
class _Pieces:
    """A forward pass of one size: pieces[0], calls[0], pieces[1], ..., pieces[-1]."""

    pieces: list[torch.cuda.CUDAGraph] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    hidden: Tensor | None = None  # [size, hidden]: what the last piece writes


class _Splitter:
    """Stands in for the attention while a forward pass is captured (or, before that, run once: `pieces` None)."""

    name = "between graphs"

    def __init__(
        self, q: Tensor, out: Tensor, pieces: _Pieces | None, begin: Callable[[], torch.cuda.CUDAGraph]
    ) -> None:
        self._q, self._out, self._pieces, self._begin = q, out, pieces, begin

    def plan(self, metadata: AttentionMetadata) -> None:
        pass

    def attend(
        self,
        q: Tensor,
        kv_cache: Tensor,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None,
        kv_scales: KvScales = UNIT_SCALES,
    ) -> Tensor:
        self._q.copy_(q)
        if self._pieces is not None:
            self._pieces.pieces[-1].capture_end()
            self._pieces.calls.append(_Call(kv_cache, scale, window, kv_scales))
            self._pieces.pieces.append(self._begin())
        return self._out


class PiecewiseGraphs:
    """`forward(inputs, attention)` gives hidden states [tokens, hidden] with device work only; `make_inputs(n)` gives
    inputs of n padding tokens. q and the result of attention pass through two tensors that all sizes share."""

    def __init__(
        self,
        forward: Callable[[StepInputs, Attention], Tensor],
        make_inputs: Callable[[int], StepInputs],
        max_tokens: int,
        q_shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`max_tokens`: of the largest size; q_shape: (heads, head_dim)."""
        self._forward = forward
        self._make_inputs = make_inputs
        self._captured: dict[int, _Pieces] = {}
        self._sizes: list[int] = []
        self._q = torch.zeros(max_tokens, *q_shape, dtype=dtype, device=device)
        self._out = torch.zeros_like(self._q)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Captured, ascending."""
        return tuple(self._sizes)

    def bucket(self, num_tokens: int) -> int | None:
        """The smallest captured size that holds so many tokens; None if there is none."""
        at = bisect.bisect_left(self._sizes, num_tokens)
        return self._sizes[at] if at < len(self._sizes) else None

    def capture_all(self, sizes: Sequence[int], progress: Callable[[int, int], None]) -> None:
        """Capture every size, largest first, so that the smaller ones live in memory that the largest took;
        `progress(done, total)` after each. Takes some 50 ms a size. Where memory is too little for one, it and those
        below it are left out."""
        for done, size in enumerate(sorted(sizes, reverse=True), start=1):
            try:
                self._capture(size)
            except torch.cuda.OutOfMemoryError:
                log.warning("no memory for CUDA graphs of %d prompt tokens: they are launched kernel by kernel", size)
                return
            progress(done, len(sizes))

    def _capture(self, size: int) -> None:
        inputs = self._make_inputs(size)
        q, out = self._q[:size], self._out[:size]
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._forward(inputs, _Splitter(q, out, None, self._begin))  # compiles and allocates what it needs
            pieces = _Pieces()
            pieces.pieces.append(self._begin())
            try:
                pieces.hidden = self._forward(inputs, _Splitter(q, out, pieces, self._begin))
            except BaseException:
                with contextlib.suppress(RuntimeError):  # what went wrong is what matters
                    pieces.pieces[-1].capture_end()
                raise
            pieces.pieces[-1].capture_end()
        current.wait_stream(self._stream)
        self._captured[size] = pieces
        bisect.insort(self._sizes, size)

    def _begin(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        return graph

    def run(self, size: int, inputs: StepInputs, attention: Attention) -> Tensor:
        """Hidden states [size, hidden] of inputs that are padded to `size` tokens, valid until the next run; attention,
        planned, is that of the real tokens."""
        pieces, n = self._captured[size], inputs.num_tokens
        for piece, call in zip(pieces.pieces, pieces.calls, strict=False):
            piece.replay()
            attended = attention.attend(
                self._q[:n], call.kv_cache, inputs.metadata, call.scale, call.window, call.kv_scales
            )
            self._out[:n].copy_(attended)
        pieces.pieces[-1].replay()
        assert pieces.hidden is not None
        return pieces.hidden
