"""Page-locked host buffers in turn, for FlashInfer's schedules. Knows nothing of what is in them."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class PinnedRing:
    """Buffers of `nbytes` that somebody writes into and copies from asynchronously: one is used again after its copy
    has run. With `size` at least three steps' worth of plans, `next` does not wait in a pipeline of depth two.
    """

    def __init__(self, size: int, nbytes: int) -> None:
        self._free = deque(
            (torch.empty(nbytes, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(size)
        )

    def next(self) -> tuple[Tensor, torch.cuda.Event]:
        """A buffer, and the event to record behind the copy."""
        buffer, event = self._free[0]
        self._free.rotate(-1)
        event.synchronize()  # returns at once unless this buffer's copy is still queued
        return buffer, event
