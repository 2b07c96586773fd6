"""Sum over ranks, residual add, RMS norm and 8-bit rounding as one kernel of our own CUDA C++ (`sum_norm.cu`), which
pushes numbers into the other ranks' memory: two ways, for few and for many rows.

- *One-shot*: every rank's rows to all ranks; each adds up and norms all rows. One trip.
- *Dealt*: row r belongs to rank r mod size. The others send it theirs, it adds them up and norms the sum, and hands the
  result to all: in 8 bits where it is rounded, and a norm is made once instead of by every rank. In return the residual
  stream is dealt out, a rank keeps its own rows only (`partial_sum.DealtStream`). That is sequence parallelism of
  Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), section 4.2.2:
  reduce-scatter in front of the norm, all-gather behind it.

A row is cut into pieces, one for each block of a cluster, eight numbers for each thread: few rows are sent and received
by many multiprocessors at once. Blocks of a cluster meet once a row, for the sum of squares and the largest number.
More rows than the memory between ranks holds are dealt out in rounds, a launch each, through the same memory.

**Protocol.** Numbers are their own flags (Lamport, "Concurrent Reading and Writing", 1977; NCCL's protocol LL): a
receiver looks at a place until it is no longer *missing*, a pair of 16-bit minus zeros, or of bytes 0x00 0x80, in 32
bits, which nobody sends (zeros go in their place). Words of 32 bits are written and read whole (PTX ISA: a vector
access is so many scalar ones, each of which is single-copy atomic). The thread that has received a word makes its place
missing again.

There are two buffers, which calls take in turn. A rank writes to a place of call e again in call e + 2, when its own
call e + 1 has ended, as kernels that use a space run one after the other (a dependent launch waits for the end of the
kernel in front before it sends). For that to end it needs something of each rank's call e + 1, if not directly then by
way of an owner who needs all; and a rank sends in call e + 1 when its own call e has ended, the places of which are
missing then. The number of the call is in device memory, where the last block to have read it counts it up, so that
replays of CUDA graphs count on.

A launch has no more blocks than can be on the GPU at once, so all run at once, as soon as other kernels leave room, and
none waits for one that cannot start: what else runs on a GPU, in front or in another stream, ends without any rank's
help. Block b needs block b of the other ranks only, and sending waits for nothing.

Sums are in float32, in the order of ranks, rounded to bf16 once, as in `all_reduce.py`; results have the same bits on
every rank. All ranks must launch the same in the same order. Knows nothing of how the memory came to be
(`all_reduce_group.py`).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from appliance.kernels.all_reduce import SIZES
from appliance.kernels.deferred_scale import DeferredScale, Product
from appliance.kernels.dependent_launch import launch_options
from appliance.kernels.native_kernel import Kernel, load, read_sources
from appliance.kernels.row_quantization import FP8, quantized_rows

MISSING = 0x80008000 - (1 << 32)  # what has not come, as an int32
_BUFFERS = 2
_MESSAGE_BYTES = 16 << 20  # of the most numbers that are added up at once, and of their results
_SCALES_BYTES = 64 << 10  # of as many rows' scales
_MAX_BLOCKS = 8  # of a multiprocessor at once, as the kernel's registers have it
_ALIGNMENT = 16  # bytes of the widest load
_RESULTS = {None: 0, FP8: 1, torch.int8: 2}
MOST_ONE_SHOT = 16  # rows: beyond, sending all to all is slower everywhere (four H200s: 32 rows of 8192)
# Blocks of a cluster that share a row, by up to how many rows: many where rows are few, or multiprocessors are idle.
_PIECES = ((64, 8), (128, 4))
_FEWEST_PIECES = 2  # with more rows


class Way(Enum):
    """Values: of the kernel's MODE."""

    ONE_SHOT = 0
    DEALT = 1


@dataclass(frozen=True)
class SumSpace:
    """One rank's end of the memory that ranks push numbers into."""

    rank: int
    size: int  # ranks: one of SIZES
    # int64 [size]: where this rank sees every rank's memory, `sum_bytes` each, filled with MISSING at first
    addresses: Tensor
    counters: Tensor  # int32 [2], zeros at first: calls so far, blocks of the running one that know
    stopped: Tensor  # int32 [1], 0: set to let blocks that wait go on
    multiprocessors: int
    owner: Any = None  # keeps the memory

    def stop(self) -> None:
        """Let blocks that wait for ranks that are gone go on, with rubbish, now and from now on. From any thread."""
        device = self.stopped.device
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            self.stopped.fill_(1)

    def fits(self, x: Product, way: Way) -> bool:
        """Whether the kernel takes x, of bf16 numbers, that way."""
        rows, hidden = x.shape
        held = x.dtype == torch.bfloat16 and rows > 0 and takes_rows_of(hidden, self.size)
        if held and isinstance(x, DeferredScale):
            held = x.values.dtype in (torch.bfloat16, torch.int32) and _takes(x.column_scales, torch.float32)
            held = held and (x.bias is None or _takes(x.bias, torch.bfloat16))
        return held and (way is Way.DEALT or rows * self.size * hidden * 2 <= _MESSAGE_BYTES)


def _takes(vector: Tensor, dtype: torch.dtype) -> bool:
    return vector.dtype == dtype and vector.data_ptr() % _ALIGNMENT == 0


def sum_bytes() -> int:
    """Memory of a rank that the others write to."""
    return _BUFFERS * _buffer_bytes()


def _buffer_bytes() -> int:
    """Summands, results, and these rows' scales."""
    return 2 * _MESSAGE_BYTES + _SCALES_BYTES


def takes_rows_of(hidden: int, ranks: int) -> bool:
    """Whether the kernel takes rows of so many numbers, however many rows."""
    return bool(cuts(hidden, ranks)) and rows_at_once(hidden, ranks) > 0


def rows_at_once(hidden: int, ranks: int) -> int:
    """Most rows of a launch that deals them out, a multiple of the ranks."""
    return min(_MESSAGE_BYTES // (hidden * 2), _SCALES_BYTES // 4) // ranks * ranks


def _threads(ranks: int) -> int:
    """Of a multiprocessor at once, as the kernel's registers have it."""
    return 512 if ranks > 4 else 1024


def cuts(hidden: int, ranks: int) -> list[int]:
    """How many pieces a row may be cut into, most first: of whole warps, no more threads than a multiprocessor has."""
    most = _threads(ranks)
    return [pieces for pieces in (8, 4, 2, 1) if hidden % (256 * pieces) == 0 and hidden // (8 * pieces) <= most]


def pieces_of(rows: int, hidden: int, ranks: int) -> int:
    """How many pieces rows are cut into, if so many are normed."""
    wanted = next((pieces for most, pieces in _PIECES if rows <= most), _FEWEST_PIECES)
    possible = cuts(hidden, ranks)
    return next((cut for cut in possible if cut <= wanted), possible[-1])


def grid(
    rows: int,
    hidden: int,
    ranks: int,
    way: Way,
    multiprocessors: int,
    pieces: int | None = None,
) -> tuple[int, int]:
    """(blocks, pieces): as many blocks as run at once at most. `pieces` None: `pieces_of`."""
    pieces = pieces or pieces_of(rows, hidden, ranks)
    units = rows if way is Way.ONE_SHOT else -(-rows // ranks)
    at_once = multiprocessors * min(_MAX_BLOCKS, _threads(ranks) * 8 * pieces // hidden)
    return min(units, at_once // pieces) * pieces, pieces


# ---------------------------------------------------------------- kernel


@dataclass(frozen=True, slots=True)
class Launch:
    """How a sum is launched."""

    way: Way
    pieces: int | None = None  # of a row; None: `pieces_of`


def sum_rms_norm(x: Product, residual: Tensor, weight: Tensor, eps: float, space: SumSpace, how: Launch) -> Tensor:
    """The sum over the ranks of x [n, hidden] is added to residual [n, hidden], bf16, which is overwritten (if dealt,
    its `partial_sum.dealt_rows` are), and normalized with weight [hidden]: what is returned, bf16. The reference is
    `all_reduce_norm.all_reduce_rms_norm_reference`. `SumSpace.fits` x."""
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(x, residual, weight, eps, space, how, result, None, None)
    return result


def sum_rms_norm_quantize(
    x: Product,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    space: SumSpace,
    how: Launch,
    dtype: torch.dtype = FP8,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Likewise, rounded as in `norm.rms_norm_quantize`: `dtype` [n, hidden] and float32 [n, 1]."""
    values, scales = quantized_rows(x.shape, dtype, x.device)
    launch(x, residual, weight, eps, space, how, values, scales, scale)
    return values, scales


def launch(
    x: Product,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    space: SumSpace,
    how: Launch,
    result: Tensor,
    scales: Tensor | None,
    static_scale: Tensor | None,
) -> None:
    """Writes `result` [n, hidden] and, where it is rounded, `scales`; enqueues one kernel, or one for each of
    `rows_at_once`, capturable in CUDA graphs."""
    assert space.fits(x, how.way) and space.size in SIZES and residual.dtype == weight.dtype == torch.bfloat16
    values = x.values if isinstance(x, DeferredScale) else x
    assert values.stride(1) == 1 and residual.stride(1) == 1 and result.is_contiguous() and weight.is_contiguous()
    n, hidden = x.shape
    most = rows_at_once(hidden, space.size)
    for first in range(0, n, most):
        rows = slice(first, min(first + most, n))
        part = None if scales is None else scales[rows]
        _launch(x, rows, residual[rows], weight, eps, space, how, result[rows], part, static_scale)


def _launch(
    x: Product,
    rows: slice,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    space: SumSpace,
    how: Launch,
    result: Tensor,
    scales: Tensor | None,
    static_scale: Tensor | None,
) -> None:
    """`rows` of x; the others' are those given."""
    deferred = x if isinstance(x, DeferredScale) else None
    values = (x.values if isinstance(x, DeferredScale) else x)[rows]
    n, hidden = values.shape
    blocks, pieces = grid(n, hidden, space.size, how.way, space.multiprocessors, how.pieces)
    kernel = kernel_for(
        how.way,
        space.size,
        hidden,
        pieces,
        values.dtype == torch.int32,
        None if scales is None else result.dtype,
        x.device.index or 0,
    )
    for other in _loaded:
        other.note()
    kernel.launch(
        blocks,
        launch_options(x.device)["PDL"],
        (
            values.data_ptr(),
            0 if deferred is None else deferred.row_scales[rows].data_ptr(),
            0 if deferred is None else deferred.column_scales.data_ptr(),
            _address(None if deferred is None else deferred.bias),
            residual.data_ptr(),
            weight.data_ptr(),
            _address(static_scale),
            result.data_ptr(),
            _address(scales),
            space.addresses.data_ptr(),
            space.counters.data_ptr(),
            space.stopped.data_ptr(),
            space.rank,
            n,
            values.stride(0),
            residual.stride(0),
            _MESSAGE_BYTES,
            2 * _MESSAGE_BYTES,
            _buffer_bytes(),
            struct.unpack("<I", struct.pack("<f", eps))[0],
        ),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# ---------------------------------------------------------------- compiling


def prepare(
    hidden: int, ranks: int, results: Sequence[torch.dtype | None], integers: bool, device: torch.device
) -> None:
    """Have all kernels loaded that sums of rows of `hidden` numbers may need, for whatever number of rows: so that one
    that a start did not need does not hold up a prompt, and is in an engine that is tried. `results`: dtypes, None for
    norms that are not rounded; `integers`: summands may be int32. RuntimeError or ImportError where that cannot be."""
    of_more = {(Way.DEALT, pieces_of(most + 1, hidden, ranks)) for most, _ in _PIECES}
    for way, pieces in {(way, pieces_of(1, hidden, ranks)) for way in Way} | of_more:
        for result in results:
            for whole in (False, True) if integers else (False,):
                kernel_for(way, ranks, hidden, pieces, whole, result, device.index or 0)


_loaded: list[Kernel] = []  # of this process: all are in an engine if one is, see `prepare`


@functools.cache
def source() -> str:
    return read_sources("dependent_launch.cuh", "sum_norm.cu")


def macros(
    way: Way, ranks: int, hidden: int, pieces: int, integers: bool, result: torch.dtype | None
) -> dict[str, int]:
    """Compile-time constants of `sum_norm.cu`."""
    return {
        "MODE": way.value,
        "RANKS": ranks,
        "HIDDEN": hidden,
        "PIECES": pieces,
        "INTEGERS": int(integers),
        "RESULT": _RESULTS[result],
    }


@functools.cache
def kernel_for(
    way: Way, ranks: int, hidden: int, pieces: int, integers: bool, result: torch.dtype | None, index: int
) -> Kernel:
    """On the GPU of that index, which is current."""
    constants = macros(way, ranks, hidden, pieces, integers, result)
    found = load("sum", source(), constants, hidden // 8 // pieces, 0, index, "sum_norm", "a")
    _loaded.append(found)
    return found
