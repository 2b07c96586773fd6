"""Sum over ranks, residual add, RMS norm and 8-bit rounding as one kernel of our own CUDA C++ (`sum_norm.cu`), which
pushes numbers into the other ranks' memory: three ways, for few and for many rows.

- *One-shot*: every rank's rows to all ranks; each adds up and norms all rows. One trip.
- *Two-shot*: row r belongs to rank r mod size. The others send it theirs, it adds them up and hands the sums, in 16
  bits, to all, which norm all rows. Two trips, (size - 1) / size of the bytes twice.
- *Dealt*: owners add up *and* norm, and hand the results to all: in 8 bits where they are rounded, and a norm is made
  once instead of by every rank. In return the residual stream is dealt out, a rank keeps its own rows only
  (`partial_sum.DealtStream`). That is sequence parallelism of Korthikanti et al., "Reducing Activation Recomputation in
  Large Transformer Models" (2022), section 4.2.2: reduce-scatter in front of the norm, all-gather behind it.

A row is cut into pieces, one for each block of a cluster, eight numbers for each thread: few rows are sent and received
by many multiprocessors at once. Blocks of a cluster meet once a row, for the sum of squares and the largest number.

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

A launch has no more blocks than can be on the GPU at once, so all run at once, as soon as the kernel in front leaves
room, and none waits for one that cannot start. Sending waits for nothing.

Sums are in float32, in the order of ranks, rounded to bf16 once, as in `all_reduce.py`; results have the same bits on
every rank. All ranks must launch the same in the same order. Knows nothing of how the memory came to be
(`all_reduce_group.py`).
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from appliance.kernels.all_reduce import SIZES
from appliance.kernels.deferred_scale import DeferredScale, Product
from appliance.kernels.dependent_launch import launch_options
from appliance.kernels.int4_launch import Kernel, load
from appliance.kernels.row_quantization import FP8, quantized_rows
from appliance.kernels.weight_prefetch import Ahead

MISSING = 0x80008000 - (1 << 32)  # what has not come, as an int32
_BUFFERS = 2
_MESSAGE_BYTES = 16 << 20  # of the most numbers that are added up at once, and of their results
_SCALES_BYTES = 64 << 10  # of as many rows' scales
_PIECES = (8, 4, 2, 1)  # blocks of a cluster
_MAX_BLOCKS = 8  # of a multiprocessor at once, as the kernel's registers have it; threads: `Way.threads`
_RESULTS = {None: 0, FP8: 1, torch.int8: 2}


class Way(Enum):
    """Values: of the kernel's MODE."""

    ONE_SHOT = 0
    TWO_SHOT = 1
    DEALT = 2

    def threads(self, ranks: int) -> int:
        """Of a multiprocessor at once, as the kernel's registers have it."""
        return 512 if self is Way.TWO_SHOT or ranks > 4 else 1024


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
        lines = rows * self.size if way is Way.ONE_SHOT else -(-rows // self.size) * self.size
        held = 0 < lines * hidden * 2 <= _MESSAGE_BYTES and rows * 4 <= _SCALES_BYTES
        if isinstance(x, DeferredScale):
            biased = x.bias is None or x.bias.dtype == torch.bfloat16
            held = held and biased and x.values.dtype in (torch.bfloat16, torch.int32)
        return x.dtype == torch.bfloat16 and held and bool(cuts(hidden, self.size, way))


def sum_bytes() -> int:
    """Memory of a rank that the others write to."""
    return _BUFFERS * _buffer_bytes()


def _buffer_bytes() -> int:
    """Summands, sums or results, and these rows' scales."""
    return 2 * _MESSAGE_BYTES + _SCALES_BYTES


def cuts(hidden: int, ranks: int, way: Way) -> list[int]:
    """How many pieces a row may be cut into, most first: of whole warps, no more threads than a multiprocessor has."""
    most = way.threads(ranks)
    return [pieces for pieces in _PIECES if hidden % (256 * pieces) == 0 and hidden // (8 * pieces) <= most]


def grid(
    rows: int, hidden: int, ranks: int, way: Way, multiprocessors: int, pieces: int | None = None
) -> tuple[int, int]:
    """(blocks, pieces): rows in as many pieces as keep all multiprocessors busy at once, if it is not said how many,
    and as many blocks as run at once at most."""
    units = rows if way is Way.ONE_SHOT else -(-rows // ranks)
    if pieces is None:
        possible = cuts(hidden, ranks, way)
        pieces = next((cut for cut in possible if units * cut <= multiprocessors), possible[-1])
    at_once = multiprocessors * min(_MAX_BLOCKS, way.threads(ranks) * 8 * pieces // hidden)
    return min(units, at_once // pieces) * pieces, pieces


# ---------------------------------------------------------------- kernel


def sum_rms_norm(
    x: Product,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    space: SumSpace,
    way: Way,
    ahead: Ahead | None = None,
    pieces: int | None = None,
) -> Tensor:
    """The sum over the ranks of x [n, hidden] is added to residual [n, hidden], bf16, which is overwritten (if dealt,
    its `partial_sum.dealt_rows` are), and normalized with weight [hidden]: what is returned, bf16. The reference is
    `all_reduce_norm.all_reduce_rms_norm_reference`. `SumSpace.fits` x. `pieces`: of a row; None: `grid` says."""
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(x, residual, weight, eps, space, way, result, None, None, ahead, pieces)
    return result


def sum_rms_norm_quantize(
    x: Product,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    space: SumSpace,
    way: Way,
    dtype: torch.dtype = FP8,
    scale: Tensor | None = None,
    ahead: Ahead | None = None,
    pieces: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Likewise, rounded as in `norm.rms_norm_quantize`: `dtype` [n, hidden] and float32 [n, 1]."""
    values, scales = quantized_rows(x.shape, dtype, x.device)
    launch(x, residual, weight, eps, space, way, values, scales, scale, ahead, pieces)
    return values, scales


def launch(
    x: Product,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    space: SumSpace,
    way: Way,
    result: Tensor,
    scales: Tensor | None,
    static_scale: Tensor | None,
    ahead: Ahead | None = None,
    pieces: int | None = None,
) -> None:
    """Writes `result` [n, hidden] and, where it is rounded, `scales`; enqueues one kernel, capturable in CUDA graphs.
    `ahead`: what it brings into L2 for the next product."""
    assert space.fits(x, way) and space.size in SIZES and residual.dtype == weight.dtype == torch.bfloat16
    n, hidden = x.shape
    deferred = x if isinstance(x, DeferredScale) else None
    values = x.values if isinstance(x, DeferredScale) else x
    bias = None if deferred is None else deferred.bias
    assert values.stride(1) == 1 and residual.stride(1) == 1 and result.is_contiguous() and weight.is_contiguous()
    blocks, pieces = grid(n, hidden, space.size, way, space.multiprocessors, pieces)
    kernel = _kernel(
        way.value,
        space.size,
        hidden,
        pieces,
        0 if deferred is None else 2 if values.dtype == torch.int32 else 1,
        bias is not None,
        _RESULTS[None if scales is None else result.dtype],
        static_scale is not None,
        x.device.index or 0,
    )
    kernel.launch(
        blocks,
        launch_options(x.device)["PDL"],
        (
            values.data_ptr(),
            0 if deferred is None else deferred.row_scales.data_ptr(),
            0 if deferred is None else deferred.column_scales.data_ptr(),
            _address(bias),
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
            *(
                (0, 0, 0, 0)
                if ahead is None
                else (ahead.weight.data_ptr(), len(ahead.weight), ahead.row_bytes, ahead.piece)
            ),
        ),
    )


def compile_for(rows: int, hidden: int, ranks: int, way: Way, multiprocessors: int, device: torch.device) -> None:
    """Have the kernel compiled that norms so many plain rows, unrounded. RuntimeError or ImportError where that cannot
    be."""
    _, pieces = grid(rows, hidden, ranks, way, multiprocessors)
    _kernel(way.value, ranks, hidden, pieces, 0, False, 0, False, device.index or 0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def source() -> str:
    return (Path(__file__).parent / "sum_norm.cu").read_text()


def macros(
    way: int, ranks: int, hidden: int, pieces: int, values: int, biased: bool, result: int, static: bool
) -> dict[str, int]:
    """Compile-time constants of `sum_norm.cu`."""
    return {
        "MODE": way,
        "RANKS": ranks,
        "HIDDEN": hidden,
        "PIECES": pieces,
        "VALUES": values,
        "BIASED": int(biased),
        "RESULT": result,
        "STATIC": int(static),
    }


@functools.cache
def _kernel(
    way: int, ranks: int, hidden: int, pieces: int, values: int, biased: bool, result: int, static: bool, index: int
) -> Kernel:
    constants = macros(way, ranks, hidden, pieces, values, biased, result, static)
    return load(source(), constants, hidden // 8 // pieces, 0, index, "sum_norm", "a")
