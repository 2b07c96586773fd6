"""x @ weight.T for few rows of x: a kernel that streams the weight at memory bandwidth, for decode steps.

Knows shapes and number formats (FP8 and int8 with a scale per row of either side, bfloat16, float16); knows nothing of
layers. Products of int8 are summed in int32, exactly.

With up to 64 rows the time of a product is the time to read its weight, so what counts is bytes in flight on every
multiprocessor. Programs take a tile of weight rows and, where tiles alone would not fill the GPU, a share of the inner
dimension (split-K). The partial sums of a tile go to a workspace in float32, and the program that arrives last adds
them up in the order of the shares, whoever came when: results are the same bits on every run.

Launched programmatically dependent (`kernels/dependent_launch.py`), programs have the first part of their weight
brought into the L2 cache while the kernel in front, which leaves most of the bandwidth unused, still computes x. That
is no read: whatever is written meanwhile is seen later.

Safe on several streams at once: each launch has a workspace of its own and its own arrival counters, taken in turn from
a ring that only comes round after thousands of launches; launches captured in CUDA graphs have a ring apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.dependent_launch import launch_options

MAX_ROWS = 64  # what the kernel can do
_LINE = 128  # bytes of a cache line
_LINES_AHEAD = 4  # of each weight row a program brings into L2 ahead: 8 to 15 MB of a product's weight in all


@dataclass(frozen=True, slots=True)
class Config:
    """How one product is cut up. Whatever the choice, results differ in rounding only."""

    block_n: int  # weight rows a tile, a power of two from 16
    k_bytes: int  # bytes of each weight row a tile, a power of two from 64
    split: int  # shares of the inner dimension; 1: no workspace
    num_warps: int
    num_stages: int  # tiles in flight, the one being multiplied counted
    weight_first: bool  # weight tile as the left operand: Hopper's wgmma, which reads it from shared memory; else mma

    @property
    def name(self) -> str:
        """Says what it is, for people and for tables of tactics."""
        left = "weight" if self.weight_first else "x"
        shape = f"{self.block_n}x{self.k_bytes} split{self.split}"
        return f"{shape} warps{self.num_warps} stages{self.num_stages} {left}-first"

    def shared_bytes(self, m: int) -> int:
        """Shared memory of the tiles of weight and x. wgmma, for a left operand of 64 rows or more on Hopper, needs the
        tile it multiplies there too; mma has it in registers."""
        left = self.block_n if self.weight_first else block_m(m)
        tiles = self.num_stages if left >= 64 else self.num_stages - 1
        return tiles * (self.block_n + block_m(m)) * self.k_bytes

    def fits(self, n: int, k: int, m: int, element_size: int) -> bool:
        """Whether the tile and the shares make sense for a product, on a multiprocessor with 227 KiB to give."""
        k_tiles = -(-k * element_size // self.k_bytes)
        return self.split <= max(k_tiles // 2, 1) and self.shared_bytes(m) <= 200 * 1024


# Measured best: (multiprocessors, bytes per weight, n, k, largest m) -> Config. A product that is not here gets
# `default_config`. For m take the smallest entry that is large enough.
TUNED: dict[tuple[int, int, int, int, int], Config] = {
    # An 8B Llama on an H200, `bench ops`, 2026-11-20.
    (132, 1, 6144, 4096, 1): Config(64, 128, 4, 4, 5, True),  # qkv, 9.0 µs
    (132, 1, 6144, 4096, 8): Config(64, 128, 4, 4, 5, True),  # qkv, 9.6 µs
    (132, 1, 6144, 4096, 16): Config(64, 128, 1, 4, 6, True),  # qkv, 9.8 µs
    (132, 1, 6144, 4096, 32): Config(64, 128, 1, 4, 6, True),  # qkv, 10.0 µs
    (132, 1, 6144, 4096, 64): Config(64, 128, 1, 4, 6, True),  # qkv, 10.7 µs
    (132, 1, 4096, 4096, 1): Config(64, 128, 4, 4, 6, True),  # o, 7.2 µs
    (132, 1, 4096, 4096, 8): Config(64, 128, 4, 4, 6, True),  # o, 7.4 µs
    (132, 1, 4096, 4096, 16): Config(64, 128, 4, 4, 6, True),  # o, 7.7 µs
    (132, 1, 4096, 4096, 32): Config(64, 128, 2, 4, 6, True),  # o, 8.1 µs
    (132, 1, 4096, 4096, 64): Config(64, 128, 2, 4, 6, True),  # o, 9.1 µs
    (132, 1, 28672, 4096, 1): Config(64, 128, 1, 4, 5, True),  # gate_up, 30.6 µs
    (132, 1, 28672, 4096, 8): Config(64, 128, 1, 4, 5, True),  # gate_up, 31.0 µs
    (132, 1, 28672, 4096, 16): Config(64, 128, 1, 4, 5, True),  # gate_up, 31.4 µs
    (132, 1, 28672, 4096, 32): Config(64, 256, 1, 4, 4, True),  # gate_up, 33.3 µs
    (132, 1, 28672, 4096, 64): Config(64, 128, 1, 4, 5, False),  # gate_up, 34.6 µs
    (132, 1, 4096, 14336, 1): Config(64, 128, 4, 4, 6, True),  # down, 17.3 µs
    (132, 1, 4096, 14336, 8): Config(64, 128, 4, 4, 6, True),  # down, 17.8 µs
    (132, 1, 4096, 14336, 16): Config(64, 128, 4, 4, 6, True),  # down, 18.2 µs
    (132, 1, 4096, 14336, 32): Config(64, 256, 2, 4, 6, True),  # down, 19.4 µs
    (132, 1, 4096, 14336, 64): Config(64, 128, 2, 4, 6, True),  # down, 21.5 µs
    (132, 1, 128256, 4096, 1): Config(64, 128, 1, 4, 6, True),  # lm_head, 121.8 µs
    (132, 1, 128256, 4096, 8): Config(64, 128, 1, 4, 6, True),  # lm_head, 125.2 µs
    (132, 1, 128256, 4096, 16): Config(64, 128, 1, 4, 5, True),  # lm_head, 127.7 µs
    (132, 1, 128256, 4096, 32): Config(64, 128, 1, 4, 5, True),  # lm_head, 131.4 µs
    (132, 1, 128256, 4096, 64): Config(64, 128, 1, 4, 5, False),  # lm_head, 138.7 µs
}

# Tiles worth timing: block_n, k_bytes, num_warps, num_stages, weight_first. Those with few rows need no split-K.
_TILES = (
    (16, 512, 2, 5, False),
    (16, 256, 4, 8, False),
    (32, 256, 4, 5, False),
    (32, 512, 4, 4, False),
    (64, 128, 4, 5, False),
    (64, 256, 4, 4, False),
    (64, 128, 4, 6, True),
    (64, 256, 4, 4, True),
    (64, 256, 4, 6, True),
    (128, 128, 4, 5, True),
    (128, 256, 8, 4, True),
)


def block_m(m: int) -> int:
    """Rows of x a tile: the tensor cores' 16, or the next power of two."""
    return max(16, 1 << (m - 1).bit_length())


def _split_for(tiles: int, per_sm: int, sms: int) -> int:
    """Shares that bring about `per_sm` programs to each multiprocessor."""
    wanted = per_sm * sms / tiles
    return min((1, 2, 3, 4, 6, 8, 12, 16), key=lambda split: abs(split - wanted))


def default_config(n: int, k: int, m: int, sms: int, element_size: int = 1) -> Config:
    """What the shapes suggest: about three programs on each multiprocessor, each with 32 KiB of weight in flight."""
    block_n = 128 if block_m(m) == 64 and n >= 128 * sms else 64
    split = _split_for(-(-n // block_n), 3, sms)
    split = min(split, max(k * element_size // (128 * 4), 1))  # no share shorter than the pipeline
    # 99 KiB of shared memory at most, which every GPU with FP8 products has.
    return Config(block_n, 128, split, num_warps=4, num_stages=5 if block_n == 64 else 4, weight_first=True)


def choose(n: int, k: int, m: int, sms: int, element_size: int = 1) -> Config:
    """The config for x [m, k] and weight [n, k] on a GPU with `sms` multiprocessors."""
    for rows in (1, 8, 16, 32, 64):
        if m <= rows and (tuned := TUNED.get((sms, element_size, n, k, rows))):
            return tuned
    return default_config(n, k, m, sms, element_size)


def candidates(n: int, k: int, m: int, sms: int, element_size: int = 1) -> list[Config]:
    """Configs worth timing for a product, the one that `choose` gives first."""
    found = [choose(n, k, m, sms, element_size)]
    for block_n, k_bytes, num_warps, num_stages, weight_first in _TILES:
        if 2 * block_n < m:  # every program reads all of x: such a tile reads more of it than of the weight
            continue
        tiles = -(-n // block_n)
        for per_sm in (1, 2, 4):
            split = _split_for(tiles, per_sm, sms)
            found.append(Config(block_n, k_bytes, split, num_warps, num_stages, weight_first))
    return [config for config in dict.fromkeys(found) if config.fits(n, k, m, element_size)]


def likely(n: int, k: int, m: int, sms: int, element_size: int = 1) -> list[Config]:
    """The few configs that a build has the time for: that of `choose` first, then tiles that were best for any product
    in `TUNED`, with shares that bring one, two or three programs to each multiprocessor."""
    found = [choose(n, k, m, sms, element_size)]
    tiles: dict[tuple[int, int, bool], Config] = {}  # pipelines of five and six stages differ too little to time both
    for won in TUNED.values():
        tiles.setdefault((won.block_n, won.k_bytes, won.weight_first), won)
    for tile in tiles.values():
        for per_sm in (1, 2, 3):
            found.append(replace(tile, split=_split_for(-(-n // tile.block_n), per_sm, sms)))
    return [config for config in dict.fromkeys(found) if config.fits(n, k, m, element_size)]


@triton.jit(do_not_specialize=["m"])
def _skinny_kernel(
    x_ptr,
    weight_ptr,
    x_scales_ptr,
    weight_scales_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    m,
    n,
    k,
    x_stride,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    WHOLE_K: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    PROMOTE: tl.constexpr,
    WHOLE: tl.constexpr,
    LINE: tl.constexpr,
    LINES_AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (share, tile): BLOCK_N rows of the weight, one of SPLIT shares of k. WHOLE_K: BLOCK_K divides k. PROMOTE:
    inner numbers after which Hopper's FP8 product, which keeps about 14 bits, is added to a float32 sum; 0: n/a. WHOLE:
    numbers are integers, and so are their sums."""
    SUMS: tl.constexpr = tl.int32 if WHOLE else tl.float32
    share = tl.program_id(0)
    tile = tl.program_id(1)
    k_tiles = tl.cdiv(k, BLOCK_K)
    first = share * k_tiles // SPLIT
    last = (share + 1) * k_tiles // SPLIT

    rows = tl.arange(0, BLOCK_M)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = first * BLOCK_K + tl.arange(0, BLOCK_K)
    # The last tile reads the last row again instead of rows that are not there; their sums are not stored.
    weight_rows = tl.minimum(columns, n - 1).to(tl.int64)
    if PDL:
        ahead = tl.minimum(first * BLOCK_K + tl.arange(0, LINES_AHEAD) * LINE, k - 1)
        lines = (weight_ptr + weight_rows[:, None] * k + ahead[None, :]).to(tl.int64, bitcast=True)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
        )
        tl.extra.cuda.gdc_wait()
    weight_at = weight_ptr + weight_rows[:, None] * k + inner[None, :]
    x_at = x_ptr + rows[:, None].to(tl.int64) * x_stride + inner[None, :]
    row_there = rows[:, None] < m

    if WEIGHT_FIRST:
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=SUMS)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUMS)
    # The hint that the weight need not stay in L2 reaches the GPU where loads are not pipelined through shared memory;
    # Triton's asynchronous copies (3.6 to 3.9) bypass L1 and carry no hint.
    for k_tile in range(first, last):
        if WHOLE_K:
            x = tl.load(x_at, mask=row_there, other=0.0)
            weight = tl.load(weight_at, eviction_policy="evict_first")
        else:
            there = (k_tile * BLOCK_K + tl.arange(0, BLOCK_K))[None, :] < k
            x = tl.load(x_at, mask=row_there & there, other=0.0)
            weight = tl.load(weight_at, mask=there, other=0.0, eviction_policy="evict_first")
        if WEIGHT_FIRST:
            total = tl.dot(weight, tl.trans(x), total, max_num_imprecise_acc=PROMOTE, out_dtype=SUMS)
        else:
            total = tl.dot(x, tl.trans(weight), total, max_num_imprecise_acc=PROMOTE, out_dtype=SUMS)
        x_at += BLOCK_K
        weight_at += BLOCK_K
    if WEIGHT_FIRST:
        total = tl.trans(total)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # not before: the next kernel's programs would be in the way

    column_there = columns[None, :] < n
    there = row_there & column_there
    arrived = SPLIT - 1
    if SPLIT > 1:
        size: tl.constexpr = BLOCK_M * BLOCK_N
        at = rows[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        partial_at = partial_ptr + tile.to(tl.int64) * (SPLIT * size) + at
        tl.store(partial_at + share * size, total, mask=row_there)
        tl.debug_barrier()  # all threads have written before one of them says so
        arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT - 1:
            tl.store(counter_ptr + tile, 0)  # for the next launch
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUMS)
            if size <= 2048:  # small enough for all loads to be in flight at once
                for other in tl.static_range(SPLIT):
                    total += tl.load(partial_at + other * size, mask=row_there, other=0.0, cache_modifier=".cg")
            else:
                for other in range(SPLIT):
                    total += tl.load(partial_at + other * size, mask=row_there, other=0.0, cache_modifier=".cg")
    if arrived == SPLIT - 1:
        result = total
        if SCALED:
            x_scales = tl.load(x_scales_ptr + rows, mask=rows < m, other=0.0)
            result = result.to(tl.float32) * x_scales[:, None]
            result = result * tl.load(weight_scales_ptr + columns, mask=columns < n, other=0.0)[None, :]
        if BIASED:
            result += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
        out_at = out_ptr + rows[:, None].to(tl.int64) * out_stride + columns[None, :]
        tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=there)


class _Counters:
    """Arrival counters of one device, all zero between launches; every launch takes the next ones of a ring."""

    SIZE = 1 << 18  # int32 numbers; a product takes one per tile, 64 or 96 where a model has splits at all

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # Zeros made now would belong to the graph.
            raise RuntimeError("run a split product once on this device before one is captured in a CUDA graph")
        self._rings = [torch.zeros(self.SIZE, dtype=torch.int32, device=device) for _ in range(2)]
        self._next = [0, 0]

    def take(self, count: int) -> Tensor:
        ring = int(self._rings[0].is_cuda and torch.cuda.is_current_stream_capturing())
        assert count <= self.SIZE
        start = self._next[ring] if self._next[ring] + count <= self.SIZE else 0
        self._next[ring] = start + (count + 15) // 16 * 16  # keeps pointers aligned as Triton specializes on
        return self._rings[ring][start : start + count]


_counters: dict[torch.device, _Counters] = {}


def arrival_counters(device: torch.device, count: int) -> Tensor:
    """int32 [count], zeros, for one launch, which leaves zeros. The first call on a device must not be captured."""
    if device not in _counters:
        _counters[device] = _Counters(device)
    return _counters[device].take(count)


_sms: dict[torch.device, int] = {}


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 4 where Triton's interpreter stands in for one."""
    if device not in _sms:
        gpu = device.type == "cuda"
        _sms[device] = torch.cuda.get_device_properties(device).multi_processor_count if gpu else 4
    return _sms[device]


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have on a GPU."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack the field
    return int(properties.shared_memory_per_block_optin)


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    scales: Tensor | None = None,
    weight_scales: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """(x * scales) @ (weight * weight_scales).T + bias: `dtype` [m, n], sums in float32, rounded once.

    x [m, k] with 1 <= m <= 64, rows may be strided; weight [n, k], contiguous, of the same dtype: float8_e4m3fn, int8
    (exact sums, which `dtype` int32 and no scales give as they are), bfloat16 or float16. scales float32 [m, 1] and
    weight_scales float32 of n numbers, both or none; bias [n] or None. `config`: how to cut it up, by default `choose`.
    Does not synchronize; capturable after one call outside.
    """
    (m, k), n = x.shape, weight.shape[0]
    assert 1 <= m <= MAX_ROWS and weight.shape[1] == k and x.dtype == weight.dtype
    assert x.stride(1) == 1 and weight.is_contiguous() and (scales is None) == (weight_scales is None)
    assert scales is None or (scales.numel() == m and scales.is_contiguous())
    assert weight_scales is None or (weight_scales.numel() == n and weight_scales.is_contiguous())
    element_size = x.element_size()
    config = config or choose(n, k, m, multiprocessors(x.device), element_size)
    rows, block_k = block_m(m), config.k_bytes // element_size
    tiles = triton.cdiv(n, config.block_n)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    whole = x.dtype == torch.int8
    partial = counter = out  # neither read nor written with one share
    if config.split > 1:
        sums = torch.int32 if whole else torch.float32
        partial = torch.empty(tiles * config.split * rows * config.block_n, dtype=sums, device=x.device)
        counter = arrival_counters(x.device, tiles)
    _skinny_kernel[(config.split, tiles)](
        x, weight, out if scales is None else scales, out if weight_scales is None else weight_scales,
        out if bias is None else bias, out, partial, counter, m, n, k, x.stride(0), n,
        BLOCK_M=rows, BLOCK_N=config.block_n, BLOCK_K=block_k, SPLIT=config.split, WEIGHT_FIRST=config.weight_first,
        WHOLE_K=k % block_k == 0, SCALED=scales is not None, BIASED=bias is not None,
        PROMOTE=min(block_k, 128) if element_size == 1 and not whole else 0,
        WHOLE=whole, LINE=_LINE // element_size, LINES_AHEAD=_LINES_AHEAD,
        num_warps=config.num_warps, num_stages=config.num_stages, **launch_options(x.device),
    )  # fmt: skip
    return out


def skinny_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    scales: Tensor | None = None,
    weight_scales: Tensor | None = None,
) -> Tensor:
    """`skinny_linear` in plain torch, any device and any number of rows, float32 inside; of int8, exact sums."""
    wide = torch.float64 if x.dtype == torch.int8 else torch.float32  # whole numbers up to 2^53
    product = F.linear(x.to(wide), weight.to(wide))
    product = product if dtype == torch.int32 else product.float()
    if scales is not None and weight_scales is not None:
        product = product * scales * weight_scales.view(1, -1)
    return (product if bias is None else product + bias.float()).to(dtype)
