"""x @ weight.T with packed 4-bit weights and 16-bit activations (W4A16): ways to compute it, and the plain reference.

The ways: CUDA C++ that streams the weight for few rows (`int4_native.py`), and on Hopper for more of them
(`int4_wide.py`); Triton tiles (`int4_triton.py`) where those do not run; and, for prompts, dequantization to 16 bits
(`int4_dequantize.py`) in front of the library's product, a layer or a slice of it at a time: there is never a second
copy of a model's weights. Which serves how many rows is a tactic (`kernels/tactics.py`); `default_way` is the choice
without timings. Knows the packed layout and activation order; knows nothing of schemes or layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.kernels import int4_dequantize, int4_native, int4_triton, int4_wide
from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.int4_layout import PER_WORD, unpack
from appliance.kernels.skinny_linear import multiprocessors

# (x, weight, scale_zero, bias) -> x @ weight.T + bias in x's dtype
Way = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

STREAMED_ROWS = 64  # up to so many rows the streaming kernel is the default where it runs
FEW_ROWS = 16  # the same where the kernel for Hopper runs
TIMED_ROWS = 256  # up to so many rows kernels that run anywhere are worth timing
WIDE_ROWS = 512  # up to so many rows the kernel for Hopper is the default where it runs
MOST_WIDE_ROWS = 2048  # and worth timing
DEQUANTIZED_ROWS = 256  # from so many rows dequantizing is worth timing there: of a whole layer, slices are slower
_SLICE_BYTES = 32 << 20  # of dequantized weight: a slice is still in the L2 cache of a large GPU when it is multiplied


def int4_linear(
    x: Tensor,
    weight: Tensor,
    scale_zero: Tensor,
    bias: Tensor | None,
    order: Tensor | None = None,
    way: Way | None = None,
) -> Tensor:
    """x @ weight.T + bias: [m, n] in x's dtype.

    x [m, k], bfloat16 or float16 (any float dtype off the GPU), rows may be strided; weight int32 [n, k // 8] as
    `int4_layout.pack` gives it; scale_zero float16 [n, groups, 2], scale and zero point of a group; bias [n] or None;
    order int32 [k]: position j of a row multiplies channel order[j] of x. `way`: how, by default `default_way`. On a
    GPU does not synchronize; capturable after one call outside.
    """
    if x.shape[0] == 0:
        return x.new_empty((0, weight.shape[0]))
    if not x.is_cuda and way is None:
        return int4_linear_reference(x, weight, scale_zero, bias, order)
    if order is not None:
        x = x.index_select(1, order)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    way = way or default_way(x.shape[0], weight.shape[1] * PER_WORD // scale_zero.shape[1], weight.device)
    return way(x, weight, scale_zero, bias)


def int4_linear_reference(
    x: Tensor, weight: Tensor, scale_zero: Tensor, bias: Tensor | None, order: Tensor | None = None
) -> Tensor:
    """`int4_linear` in plain torch, any device and dtype, float32 inside, rounded once."""
    columns = x if order is None else x.index_select(1, order)
    product = F.linear(columns.float(), dequantize_reference(weight, scale_zero, torch.float32))
    return (product if bias is None else product + bias.float()).to(x.dtype)


def dequantize_reference(weight: Tensor, scale_zero: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of packed weights, [n, k] in `dtype`, columns as they are stored: plain torch, any device."""
    groups = scale_zero.shape[1]
    scales, zeros = scale_zero.float().unbind(-1)
    values = unpack(weight).unflatten(1, (groups, -1)).float()
    return ((values - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).flatten(1).to(dtype)


def dequantize(weight: Tensor, scale_zero: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantize_reference`, by a kernel on a GPU."""
    if int4_dequantize.takes(weight.shape[1] * PER_WORD // scale_zero.shape[1], dtype, weight.device):
        return int4_dequantize.dequantize_native(weight, scale_zero, dtype)
    if weight.is_cuda and HAS_TRITON:
        return int4_triton.dequantize_triton(weight, scale_zero, dtype)
    return dequantize_reference(weight, scale_zero, dtype)


# ---------------------------------------------------------------- ways


def default_way(rows: int, group: int, device: torch.device) -> Way:
    """Where nothing was timed."""
    if rows <= WIDE_ROWS and int4_wide.takes(group, device):
        return int4_native.stream_linear if rows <= FEW_ROWS else int4_wide.wide_linear
    if rows <= STREAMED_ROWS and int4_native.takes(group, device):
        return int4_native.stream_linear
    if rows <= TIMED_ROWS and HAS_TRITON and int4_triton.takes(group):
        return int4_triton.tile_linear
    return dequantized_linear


def ways(n: int, k: int, group: int, rows: int, device: torch.device) -> dict[str, Way]:
    """All that are worth timing for up to `rows` rows of x, by name, the default first."""
    found: dict[str, Way] = {}
    limit, hopper = int4_native.shared_limit(device.index or 0), int4_wide.takes(group, device)
    if rows <= TIMED_ROWS and int4_native.takes(group, device):
        streams = int4_native.candidates(rows, group, device)
        if hopper:
            streams = int4_native.hopper_candidates(n, k, rows, group, multiprocessors(device), limit)
        for config in streams:
            found[f"stream {config.name}"] = functools.partial(int4_native.stream_linear, config=config)
    if hopper and rows <= MOST_WIDE_ROWS:
        for block in int4_wide.candidates(n, k, rows, group, multiprocessors(device), limit):
            found[f"wide {block.name}"] = functools.partial(int4_wide.wide_linear, config=block)
    if rows <= TIMED_ROWS and not hopper and HAS_TRITON and int4_triton.takes(group):
        for tile in int4_triton.candidates(n, k, rows, multiprocessors(device), limit):
            found[f"tile {tile.name}"] = functools.partial(int4_triton.tile_linear, config=tile)
    if not hopper or rows >= DEQUANTIZED_ROWS:
        found["dequantize"] = dequantized_linear
    if not hopper and n * k * 2 > 2 * _SLICE_BYTES:
        found["dequantize sliced"] = functools.partial(dequantized_linear, slice_bytes=_SLICE_BYTES)
    first = default_way(rows, group, device)
    default = next(name for name, way in found.items() if getattr(way, "func", way) is first)
    return {default: found[default]} | found


def dequantized_linear(
    x: Tensor, weight: Tensor, scale_zero: Tensor, bias: Tensor | None, slice_bytes: int | None = None
) -> Tensor:
    """The library's product with weights dequantized to x's dtype just before: all of a layer, or slices of its rows of
    about so many bytes."""
    n, k = weight.shape[0], weight.shape[1] * PER_WORD
    rows = n if slice_bytes is None else max(slice_bytes // (k * 2) // 256 * 256, 256)
    if rows >= n:
        return F.linear(x, dequantize(weight, scale_zero, x.dtype), bias)
    out = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    for start in range(0, n, rows):
        some = slice(start, min(start + rows, n))
        numbers = dequantize(weight[some], scale_zero[some], x.dtype)
        if bias is None:
            torch.mm(x, numbers.t(), out=out[:, some])
        else:
            torch.addmm(bias[some], x, numbers.t(), out=out[:, some])
    return out
