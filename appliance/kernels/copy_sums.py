"""All-reduce in the background by copy engines, which take no multiprocessors from the products that run meanwhile.

A sum goes in rounds of some megabytes. Of a round's rows each rank owns a share, as in a two-shot all-reduce:

1. push: a rank copies each other rank's rows into that rank's inbox, then writes the round's number to a flag there;
2. add up: when all flags say that a round has come, one kernel adds the owner's rows up, in float32 and in rank order,
   rounded once (only the owner adds, so all ranks get the same bits), and tells the others by another flag;
3. pull: a rank copies the others' sums over its own rows.

Copies, waits and flags are operations of streams (`cuStreamWaitValue32`, `cuStreamWriteValue32`), so nothing but the
short kernel runs on multiprocessors. The three steps have streams of their own: while a round is added up or pulled the
next is pushed. (Reduce-scatter and all-gather on copy engines are what TransformerEngine's userbuffers and PyTorch's
asynchronous tensor parallelism do with products cut into pieces.)

**Memory.** Each rank has a piece that the others see: flags, and BUFFERS buffers of a round, number n in buffer
n % BUFFERS. A buffer is cut into one slot per rank: slot w of rank r is r's inbox from w; slot r is r's sums.
Flags only count up, and each word has one writer, so none is ever reset. Why nothing is overwritten too early, n being
a round and m = n + BUFFERS the next in its buffer:

- Rank w pushes m into r's inbox after its own round n has ended, so after it was told that r had added n up.
- r writes the sums of m when w's push of m has come, so after w's round n has ended, so after w has pulled r's of n.
- w pulls over rows of x that it pushed to r after r has said that these are added up.

**No wait in vain.** Whatever waits does so for what all ranks enqueue earlier in the order of rounds and steps, so
even if the driver puts all streams in one queue, ranks that enqueue the same sums get on. Of ranks that are gone,
`abort` stands for the flags.

Knows addresses and streams; not how memory came to be shared, nor whether GPUs can do this (`copy_engines.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from appliance.kernels._triton import tl, triton

BUFFERS = 3  # one is pushed, one added up, one pulled
ROUND_BYTES = 32 << 20  # less is copied below the links' speed, more would hide less of a sum behind its next round
_ARRIVED, _SUMMED = range(2)  # kinds of flags
_WORD = 4
_MAX_RANKS = 8
FLAG_BYTES = 256
_ALIGNMENT = 16
_RELEASED = 1 << 30  # ahead of every round
_BLOCK = 4096


class Queues(Protocol):
    """Streams of one device, and what they can be made to do without a kernel. Streams and events are opaque."""

    def current(self) -> Any:
        """The stream on which the caller computes."""

    def stream(self) -> Any:
        """A new one."""

    def record(self, stream: Any) -> Any:
        """An event: what is in the stream so far."""

    def wait_event(self, stream: Any, event: Any) -> None:
        """What follows in `stream` waits for the event."""

    def copy(self, stream: Any, to: int, source: int, size_bytes: int) -> None:
        """Between addresses, of this device or of another that it sees; nothing for no bytes."""

    def write(self, stream: Any, address: int, value: int) -> None:
        """A word of 4 bytes, seen by all devices after everything that is in the stream before it."""

    def wait(self, stream: Any, address: int, value: int) -> None:
        """Until a word of this device's memory is not behind `value`, by their difference as int32."""

    def run(self, stream: Any, launch: Callable[[], None]) -> None:
        """Call `launch` with `stream` as the current one."""

    def release(self, words: Tensor, value: int) -> None:
        """Fill this device's words, from any thread, beside whatever the streams wait for; words that somebody writes
        meanwhile too."""


def shared_bytes(round_bytes: int = ROUND_BYTES) -> int:
    """Memory of a rank that the others see."""
    return FLAG_BYTES + BUFFERS * round_bytes


class CopySums:
    """One rank's end. All ranks begin the same sums in the same order."""

    def __init__(
        self,
        rank: int,
        addresses: Sequence[int],
        memory: Tensor,
        queues: Queues,
        *,
        round_bytes: int = ROUND_BYTES,
        lanes: int = 1,
        owner: Any = None,
    ) -> None:
        """`addresses`: where this rank sees every rank's piece, zeros at first. `memory`, uint8 [shared_bytes]: its
        own. `owner` keeps them. `lanes`: streams that copies of a step are dealt out to."""
        self.rank, self.size = rank, len(addresses)
        assert 1 < self.size <= _MAX_RANKS and round_bytes % (self.size * _ALIGNMENT) == 0
        self.memory = memory
        self._addresses = tuple(addresses)
        self._queues = queues
        self._round_bytes = round_bytes
        self._owner = owner
        self._rounds = 0
        self._ended: list[Any] = [None] * BUFFERS  # events: rounds that were the last to use a buffer
        self._aborted = False
        self._adding = queues.stream()
        self.use_lanes(lanes)

    def use_lanes(self, lanes: int) -> None:
        """As of the constructor; when nothing is in flight."""
        self._pushing = [self._queues.stream() for _ in range(lanes)]
        self._pulling = [self._queues.stream() for _ in range(lanes)]

    @property
    def owner(self) -> Any:
        return self._owner

    # -------------------------------------------------- use

    def fits(self, x: Tensor) -> bool:
        """Whether `begin` takes x: contiguous rows [n, k] of 16 bytes or more, no fewer than ranks."""
        if x.dim() != 2 or not x.is_contiguous() or not x.dtype.is_floating_point or x.shape[0] < self.size:
            return False
        row_bytes = x.shape[1] * x.dtype.itemsize
        aligned = row_bytes % _ALIGNMENT == 0 and x.data_ptr() % _ALIGNMENT == 0
        return aligned and 0 < row_bytes <= self._round_bytes // self.size

    def begin(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin to add x up over the ranks, in place, behind what the current stream has computed so far. Call what is
        returned to let the current stream wait for it; until then x is nobody else's. Not captured in CUDA graphs."""
        assert self.fits(x)
        if self._aborted:
            return lambda: x
        queues = self._queues
        ready = queues.record(queues.current())
        rows = self._round_bytes // self.size // (x.shape[1] * x.dtype.itemsize) * self.size
        ended: Any = None
        for part in x.tensor_split(-(-x.shape[0] // rows)):
            ended = self._round(part, ready)

        def wait() -> Tensor:
            queues.wait_event(queues.current(), ended)
            return x

        return wait

    def abort(self) -> None:
        """Let streams that wait for ranks that are gone go on, with rubbish, now and from now on. From any thread."""
        self._aborted = True
        words = self.memory[:FLAG_BYTES].view(torch.int32)
        self._queues.release(words, self._rounds + _RELEASED)

    def _round(self, x: Tensor, ready: Any) -> Any:
        """Enqueue one; the event that it has ended, and all before it."""
        self._rounds += 1
        buffer = self._rounds % BUFFERS
        row_bytes = x.shape[1] * x.dtype.itemsize
        bounds = [x.shape[0] * rank // self.size for rank in range(self.size + 1)]
        begins = [x.data_ptr() + row * row_bytes for row in bounds[:-1]]
        sizes = [(end - begin) * row_bytes for begin, end in pairwise(bounds)]
        self._push(buffer, begins, sizes, ready)
        added = self._add_up(buffer, x[bounds[self.rank] : bounds[self.rank + 1]], ready)
        self._ended[buffer] = self._pull(buffer, begins, sizes, added)
        return self._ended[buffer]

    def _push(self, buffer: int, begins: Sequence[int], sizes: Sequence[int], ready: Any) -> None:
        queues, free = self._queues, self._ended[buffer]
        for lane in self._pushing:
            queues.wait_event(lane, ready)
            if free is not None:
                queues.wait_event(lane, free)
        for turn, peer in enumerate(self._others()):
            lane = self._pushing[turn % len(self._pushing)]
            queues.copy(lane, self._slot(peer, buffer, self.rank), begins[peer], sizes[peer])
            queues.write(lane, self._flag(peer, _ARRIVED, self.rank), self._rounds)

    def _add_up(self, buffer: int, mine: Tensor, ready: Any) -> Any:
        """`mine`: this rank's rows of x. The event that they are sums."""
        queues, lane = self._queues, self._adding
        queues.wait_event(lane, ready)
        for peer in self._others():
            queues.wait(lane, self._flag(self.rank, _ARRIVED, peer), self._rounds)
        first = FLAG_BYTES + buffer * self._round_bytes
        slots = self.memory[first : first + self._round_bytes].view(mine.dtype).view(self.size, -1)
        queues.run(lane, partial(add_up_, mine, slots, self.rank))
        for peer in self._others():
            queues.write(lane, self._flag(peer, _SUMMED, self.rank), self._rounds)
        return queues.record(lane)

    def _pull(self, buffer: int, begins: Sequence[int], sizes: Sequence[int], added: Any) -> Any:
        queues, first = self._queues, self._pulling[0]
        for turn, peer in enumerate(self._others()):
            lane = self._pulling[turn % len(self._pulling)]
            queues.wait(lane, self._flag(self.rank, _SUMMED, peer), self._rounds)
            queues.copy(lane, begins[peer], self._slot(peer, buffer, peer), sizes[peer])
        for lane in self._pulling[1:]:
            queues.wait_event(first, queues.record(lane))
        queues.wait_event(first, added)
        return queues.record(first)

    # -------------------------------------------------- memory

    def _others(self) -> list[int]:
        """Ranks in the order in which this one deals with them: at a time, each with another one."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def _flag(self, rank: int, kind: int, writer: int) -> int:
        return self._addresses[rank] + (kind * _MAX_RANKS + writer) * _WORD

    def _slot(self, rank: int, buffer: int, slot: int) -> int:
        return self._addresses[rank] + FLAG_BYTES + buffer * self._round_bytes + slot * (self._round_bytes // self.size)


# ---------------------------------------------------------------- the kernel


@triton.jit(do_not_specialize=["rank"])
def _add_up_kernel(x_ptr, slots_ptr, stride, rank, count, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """Program: BLOCK numbers. Slots: [RANKS, stride]."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    own = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for peer in tl.static_range(RANKS):
        theirs = tl.load(slots_ptr + peer * stride + index, mask=mask & (peer != rank), other=0.0).to(tl.float32)
        total += tl.where(peer == rank, own, theirs)
    total = total.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + index, total, mask=mask)
    tl.store(slots_ptr + rank * stride + index, total, mask=mask)


def add_up_(x: Tensor, slots: Tensor, rank: int) -> None:
    """x [n, k], contiguous, becomes the sum of itself, as number `rank`, and of the other slots, [ranks, n * k or more]
    in x's dtype; slot `rank` becomes that too. float32 in rank order, rounded once."""
    count = x.numel()
    if count == 0:
        return
    grid = (triton.cdiv(count, _BLOCK),)
    _add_up_kernel[grid](x, slots, slots.stride(0), rank, count, RANKS=slots.shape[0], BLOCK=_BLOCK, num_warps=8)


def add_up_reference(x: Tensor, slots: Tensor, rank: int) -> Tensor:
    """What `add_up_` makes of x."""
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for peer, slot in enumerate(slots):
        total += (x if peer == rank else slot[: x.numel()].view(x.shape)).float()
    return total.to(x.dtype)
