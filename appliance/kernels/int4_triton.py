"""Triton kernels over packed 4-bit weights (`int4_layout.py`): the product with 16-bit activations (W4A16), and
dequantization to 16 bits for products of many rows.

The product serves where the CUDA C++ kernel (`int4_native.py`) does not run, and rows beyond what that is made for.
Values become floats by being put under the exponent of 128 (bfloat16) or 1024 (float16), less that and the zero point:
exact. Scales are applied to each group's sums in float32. With split-K, the program that arrives last adds the shares
up in their order: the same bits on every run. Float16 works from compute capability 7.5 on, bfloat16 from 8.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.dependent_launch import launch_options
from appliance.kernels.int4_layout import PER_WORD
from appliance.kernels.skinny_linear import arrival_counters, multiprocessors

_MOST_BLOCK_M = 128
_DEQUANTIZED_WORDS = 64  # of a row, a program of dequantization
_DEQUANTIZED_ROWS = 16


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How one product is cut up. Whatever the choice, results differ in rounding only."""

    block_n: int  # weight rows a tile
    block_k: int  # inner positions a step, where groups are as long
    split: int  # shares of the inner dimension
    num_warps: int
    num_stages: int
    block_m: int = 0  # rows of x a tile; 0: what x has, from 16 to 128

    @property
    def name(self) -> str:
        """Says what it is, for people and for tables of tactics."""
        rows = f"x{self.block_m}" if self.block_m else ""
        return f"{self.block_n}{rows}x{self.block_k} split{self.split} warps{self.num_warps} stages{self.num_stages}"

    def rows_of_x(self, m: int) -> int:
        return self.block_m or max(16, min(1 << (m - 1).bit_length(), _MOST_BLOCK_M))

    def shared_bytes(self, m: int) -> int:
        """Shared memory of the tiles of weight and x in flight, and of a weight tile as the tensor cores read it."""
        packed, x = self.block_n * self.block_k // 2, self.rows_of_x(m) * self.block_k * 2
        return self.num_stages * (packed + x) + self.block_n * self.block_k * 2


def _split_for(tiles: int, per_sm: int, sms: int, k: int, block_k: int) -> int:
    """Shares that bring about `per_sm` programs to each multiprocessor, none shorter than four steps."""
    most = max(k // (block_k * 4), 1)
    return min((1, 2, 3, 4, 6, 8), key=lambda split: abs(min(split, most) - per_sm * sms / tiles))


def default_config(n: int, k: int, m: int, sms: int) -> TileConfig:
    """What the shapes suggest, on any GPU: tiles of 64 weight rows, two programs on each multiprocessor."""
    tiles = -(-n // 64) * -(-m // _MOST_BLOCK_M)
    block_k = 128 if m <= 32 else 64
    return TileConfig(64, block_k, _split_for(tiles, 2, sms, k, block_k), 4, 3 if m > 64 else 4)


# Tiles worth timing: block_n, block_k, num_warps, num_stages, block_m.
_FEW_ROWS = ((32, 128, 4, 5, 0), (64, 128, 4, 4, 0), (64, 128, 4, 6, 0), (128, 128, 4, 4, 0), (128, 64, 4, 5, 0))
_MANY_ROWS = (
    (64, 64, 4, 4, 0),
    (128, 64, 4, 4, 0),
    (128, 64, 8, 4, 0),
    (128, 128, 8, 3, 0),
    (256, 64, 8, 4, 0),
    (128, 64, 8, 4, 256),
    (128, 64, 8, 4, 64),
)


def candidates(n: int, k: int, m: int, sms: int, shared_limit: int) -> list[TileConfig]:
    """Configs worth timing for a product, the default first."""
    found = [default_config(n, k, m, sms)]
    for block_n, block_k, num_warps, num_stages, block_m in _FEW_ROWS if m <= 32 else _MANY_ROWS:
        if block_m > max(m, 16):
            continue
        tile = TileConfig(block_n, block_k, 1, num_warps, num_stages, block_m)
        tiles = -(-n // block_n) * -(-m // tile.rows_of_x(m))
        for per_sm in (1, 2):
            split = _split_for(tiles, per_sm, sms, k, block_k)
            found.append(TileConfig(block_n, block_k, split, num_warps, num_stages, block_m))
    fitting = [config for config in dict.fromkeys(found) if config.shared_bytes(m) <= shared_limit]
    return fitting or [TileConfig(32, 32, 1, 4, 2)]


@triton.jit
def _unpacked(words):
    """int32 [rows, words] -> int32 0..15 [rows, 8 * words], in the order of the positions."""
    position = tl.arange(0, 8)
    shifts = (position >> 1) * 4 + (position & 1) * 16  # nibble 0, 4, 1, 5, 2, 6, 3, 7
    values = (words[:, :, None] >> shifts[None, None, :]) & 15
    return tl.reshape(values, (words.shape[0], words.shape[1] * 8))


@triton.jit(do_not_specialize=["m"])
def _int4_linear_kernel(
    x_ptr,
    weight_ptr,
    scale_zero_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    m,
    n,
    k,
    groups,
    x_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    BIASED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (share, tile, rows): BLOCK_N rows of the weight, BLOCK_M of x, one of SPLIT shares of k. BLOCK_K divides
    GROUP, the positions of a scale."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    share = tl.program_id(0)
    tile = tl.program_id(1)
    k_tiles = k // BLOCK_K
    first = share * k_tiles // SPLIT
    last = (share + 1) * k_tiles // SPLIT

    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # The last tile reads the last row again instead of rows that are not there; their sums are not stored.
    weight_rows = tl.minimum(columns, n - 1).to(tl.int64)
    word = first * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    weight_at = weight_ptr + weight_rows[:, None] * (k // 8) + word[None, :]
    x_at = x_ptr + rows[:, None].to(tl.int64) * x_stride + (first * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    scale_at = scale_zero_ptr + weight_rows * (groups * 2)
    row_there = rows[:, None] < m
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    bits: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
    base: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0

    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k_tile in range(first, last):
        words = tl.load(weight_at)
        x = tl.load(x_at, mask=row_there, other=0.0)
        group = k_tile * BLOCK_K // GROUP
        scale = tl.load(scale_at + group * 2).to(tl.float32)
        zero = tl.load(scale_at + (group * 2 + 1)).to(tl.float32)
        values = (_unpacked(words) | bits).to(tl.int16).to(dtype, bitcast=True)
        weight = values - (zero + base).to(dtype)[:, None]
        total += tl.dot(weight, tl.trans(x)) * scale[:, None]
        weight_at += BLOCK_K // 8
        x_at += BLOCK_K
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # not before: the next kernel's programs would be in the way

    total = tl.trans(total)
    there = row_there & (columns[None, :] < n)
    arrived = SPLIT - 1
    if SPLIT > 1:
        size: tl.constexpr = BLOCK_M * BLOCK_N
        output = tl.program_id(2) * tl.num_programs(1) + tile
        at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        partial_at = partial_ptr + output.to(tl.int64) * (SPLIT * size) + at
        tl.store(partial_at + share * size, total, mask=row_there)
        tl.debug_barrier()  # all threads have written before one of them says so
        arrived = tl.atomic_add(counter_ptr + output, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT - 1:
            tl.store(counter_ptr + output, 0)  # for the next launch
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for other in range(SPLIT):
                total += tl.load(partial_at + other * size, mask=row_there, other=0.0, cache_modifier=".cg")
    if arrived == SPLIT - 1:
        if BIASED:
            total += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
        out_at = out_ptr + rows[:, None].to(tl.int64) * n + columns[None, :]
        tl.store(out_at, total.to(dtype), mask=there)


def takes(group: int) -> bool:
    """Whether weights in groups of that size can be multiplied: the tensor cores take 16 positions at a time."""
    return group % 16 == 0


def _block_k(config: TileConfig, group: int) -> int:
    """The config's step, or the longest one that divides a group."""
    return min(config.block_k, group & -group)


def tile_linear(
    x: Tensor, weight: Tensor, scale_zero: Tensor, bias: Tensor | None, config: TileConfig | None = None
) -> Tensor:
    """x @ weight.T + bias, [m, n] in x's dtype; arguments as in `int4_native.stream_linear`, but groups of a multiple
    of 16 positions and x of any alignment. Any number of rows from 1."""
    (m, k), n = x.shape, weight.shape[0]
    groups = scale_zero.shape[1]
    group = k // groups
    assert m >= 1 and weight.shape[1] * PER_WORD == k and group * groups == k and takes(group)
    assert x.stride(1) == 1 and weight.is_contiguous() and scale_zero.is_contiguous()
    config = config or default_config(n, k, m, multiprocessors(x.device))
    rows, block_k = config.rows_of_x(m), _block_k(config, group)
    split = max(min(config.split, k // block_k), 1)
    grid = (split, triton.cdiv(n, config.block_n), triton.cdiv(m, rows))
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    partial = counter = out  # neither read nor written with one share
    if split > 1:
        tiles = grid[1] * grid[2]
        partial = torch.empty(tiles * split * rows * config.block_n, dtype=torch.float32, device=x.device)
        counter = arrival_counters(x.device, tiles)
    _int4_linear_kernel[grid](
        x, weight, scale_zero, out if bias is None else bias, out, partial, counter, m, n, k, groups, x.stride(0),
        BLOCK_M=rows, BLOCK_N=config.block_n, BLOCK_K=block_k, GROUP=group, SPLIT=split, BIASED=bias is not None,
        num_warps=config.num_warps, num_stages=config.num_stages, **launch_options(x.device),
    )  # fmt: skip
    return out


# ---------------------------------------------------------------- dequantization


@triton.jit
def _dequantize_kernel(
    weight_ptr,
    scale_zero_ptr,
    out_ptr,
    n,
    words,
    groups,
    GROUP_WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: WORDS words of ROWS rows."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    at_row = row.to(tl.int64)[:, None]
    there = (row[:, None] < n) & (word[None, :] < words)
    packed = tl.load(weight_ptr + at_row * words + word[None, :], mask=there, other=0)
    scale_at = scale_zero_ptr + (at_row * groups + word[None, :] // GROUP_WORDS) * 2
    scale = tl.load(scale_at, mask=there, other=0.0).to(tl.float32)
    zero = tl.load(scale_at + 1, mask=there, other=0.0).to(tl.float32)
    # 2^23 + value, whose last bit is a 1's; less 2^23 + zero: exact.
    position = tl.arange(0, 8)
    shifts = (position >> 1) * 4 + (position & 1) * 16
    values = (((packed[:, :, None] >> shifts[None, None, :]) & 15) | 0x4B000000).to(tl.float32, bitcast=True)
    numbers = (values - (zero + 8388608.0)[:, :, None]) * scale[:, :, None]
    out_at = out_ptr + (at_row * words + word[None, :])[:, :, None] * 8 + position[None, None, :]
    tl.store(out_at, numbers.to(out_ptr.dtype.element_ty), mask=there[:, :, None])


def dequantize_triton(weight: Tensor, scale_zero: Tensor, dtype: torch.dtype) -> Tensor:
    """`int4_linear.dequantize_reference` as one kernel, at memory bandwidth."""
    n, words = weight.shape
    groups = scale_zero.shape[1]
    assert weight.is_contiguous() and scale_zero.is_contiguous() and words % groups == 0
    out = torch.empty((n, words * PER_WORD), dtype=dtype, device=weight.device)
    grid = (triton.cdiv(words, _DEQUANTIZED_WORDS), triton.cdiv(n, _DEQUANTIZED_ROWS))
    _dequantize_kernel[grid](
        weight, scale_zero, out, n, words, groups,
        GROUP_WORDS=words // groups, ROWS=_DEQUANTIZED_ROWS, WORDS=_DEQUANTIZED_WORDS,
        num_warps=4, **launch_options(weight.device),
    )  # fmt: skip
    return out
