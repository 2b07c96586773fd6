"""int8 products with a scale per row of either side (W8A8): the library's, whose exact int32 sums leave their scales to
the next kernel, and an own kernel for many rows that applies them itself. For few rows there is `skinny_linear`.

values [n, in] @ weight [out, in].T has sums of at most 127 * 127 * in, below 2^31 for `in` up to 133,000: exact in
int32, so every way to compute the product gives the same sums. float32 then holds them to one part in 2^24.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.deferred_scale import DeferredScale
from appliance.kernels.dependent_launch import launch_options

MULTIPLE = 16  # of both dimensions of a weight, by the library's product
_FEWEST_ROWS = 17  # that the library's product takes
_GROUP = 8  # tiles of rows that share a tile of weight in L2


def int8_linear_reference(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(values * scales) @ (weight * weight_scales).T + bias in plain torch, any device: exact sums, float32 behind.

    values int8 [n, in], scales float32 [n, 1]; weight int8 [out, in]; weight_scales float32 [1, out]; bias [out] or
    None. Returns `dtype` [n, out].
    """
    product = int8_sums_reference(values, weight).float() * scales * weight_scales
    return (product if bias is None else product + bias.float()).to(dtype)


def int8_sums_reference(values: Tensor, weight: Tensor) -> Tensor:
    """values int8 [n, in] @ weight int8 [out, in].T: int32 [n, out], any device; exact, as float64 has whole numbers up
    to 2^53."""
    return F.linear(values.double(), weight.double()).to(torch.int32)


def int8_sums(values: Tensor, weight: Tensor) -> Tensor:
    """`int8_sums_reference` by the library, CPU or GPU; there `in` and `out` are multiples of 8, best of 16. Rows that
    it asks for at least are added and cut off again."""
    rows = values.shape[0]
    if rows == 0:
        return values.new_empty((0, weight.shape[0]), dtype=torch.int32)
    if values.is_cuda and rows < _FEWEST_ROWS:
        values = F.pad(values, (0, 0, 0, _FEWEST_ROWS - rows))
    # weight.t() is the column-major right side that the product asks for.
    return torch._int_mm(values, weight.t())[:rows]


def int8_linear_deferred(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> DeferredScale:
    """`int8_linear_reference` by the library, with scales and bias left to whoever takes the exact sums."""
    return DeferredScale(int8_sums(values, weight), scales, weight_scales, bias, dtype)


# ---------------------------------------------------------------- own kernel for many rows


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How a product of many rows is cut up. Whatever the choice, results are the same."""

    block_m: int  # rows of values a tile
    block_n: int  # weight rows a tile
    block_k: int  # inner numbers, bytes, a step
    num_warps: int
    num_stages: int  # steps in flight

    @property
    def name(self) -> str:
        """Says what it is, for people and for tables of tactics."""
        return f"{self.block_m}x{self.block_n}x{self.block_k} warps{self.num_warps} stages{self.num_stages}"

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the tiles in flight."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k


# Worth timing, for few rows first. 99 KiB of shared memory is what every GPU from compute capability 8.6 on has.
TILES = (
    TileConfig(64, 64, 128, 4, 5),
    TileConfig(64, 128, 128, 4, 4),
    TileConfig(64, 256, 128, 4, 4),
    TileConfig(128, 128, 128, 4, 3),
    TileConfig(128, 128, 128, 8, 4),
    TileConfig(128, 256, 64, 8, 4),
    TileConfig(128, 256, 128, 8, 3),
    TileConfig(128, 256, 128, 8, 4),
)


def tiles_for(rows: int, shared_bytes: int) -> list[TileConfig]:
    """Tiles worth timing for up to `rows` rows on a GPU that gives a program so much shared memory."""
    fitting = [tile for tile in TILES if tile.shared_bytes <= shared_bytes]
    return [tile for tile in fitting if tile.block_m <= max(64, rows)]


def default_tile(rows: int) -> TileConfig:
    """Where nothing was timed; fits on every GPU with int8 tensor cores from compute capability 8.0 on."""
    return TILES[0] if rows <= 128 else TILES[3]


@triton.jit(do_not_specialize=["m"])
def _int8_linear_kernel(
    values_ptr,
    weight_ptr,
    scales_ptr,
    weight_scales_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    values_stride,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_K: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one tile of the result. Programs that run side by side share tiles of weight: tiles of rows are
    taken GROUP at a time before the next columns."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row_tiles, column_tiles = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP * column_tiles)
    group_size = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = program - group * GROUP * column_tiles
    rows = (group * GROUP + within % group_size) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (within // group_size) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Rows and columns that are not there read the last again; what comes of them is not stored.
    values_at = values_ptr + tl.minimum(rows, m - 1).to(tl.int64)[:, None] * values_stride + inner[None, :]
    weight_at = weight_ptr + tl.minimum(columns, n - 1).to(tl.int64)[:, None] * k + inner[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, k, BLOCK_K):
        if WHOLE_K:
            values, weight = tl.load(values_at), tl.load(weight_at)
        else:
            there = (start + inner)[None, :] < k
            values, weight = tl.load(values_at, mask=there, other=0.0), tl.load(weight_at, mask=there, other=0.0)
        total = tl.dot(values, tl.trans(weight), total, out_dtype=tl.int32)
        values_at += BLOCK_K
        weight_at += BLOCK_K
    if SCALED:
        total = total.to(tl.float32) * tl.load(scales_ptr + rows, mask=rows < m, other=0.0)[:, None]
        total = total * tl.load(weight_scales_ptr + columns, mask=columns < n, other=0.0)[None, :]
    if BIASED:
        total += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    there = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=there)


def int8_linear_triton(
    values: Tensor,
    scales: Tensor | None,
    weight: Tensor,
    weight_scales: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: TileConfig | None = None,
) -> Tensor:
    """`int8_linear_reference` as one kernel, for any number of rows and any shape. Rows of `values` may be strided. No
    scales and `dtype` int32: the sums as they are."""
    (m, k), n = values.shape, weight.shape[0]
    assert values.stride(1) == 1 and weight.is_contiguous() and (scales is None) == (weight_scales is None)
    out = torch.empty((m, n), dtype=dtype, device=values.device)
    if m == 0:
        return out
    config = config or default_tile(m)
    programs = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    _int8_linear_kernel[(programs,)](
        values,
        weight,
        scales,
        weight_scales,
        bias,
        out,
        m,
        n,
        k,
        values.stride(0),
        n,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=_GROUP,
        WHOLE_K=k % config.block_k == 0,
        SCALED=scales is not None,
        BIASED=bias is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(values.device),
    )
    return out
