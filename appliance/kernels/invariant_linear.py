"""x @ weight.T whose rows do not depend on how many there are: a row has the same bits alone and among thousands. What
`--batch-invariant` multiplies with.

The quick products choose tiles, splits of the inner dimension and instructions by the number of rows, so a row's sums
are added up in another order in another batch. This kernel has one tile for all of them, takes the inner dimension from
front to back, and fills missing rows with zeros. (He et al., "Defeating Nondeterminism in LLM Inference", 2025.)

Knows FP8 with a scale per row of either side, and 16- and 32-bit floats without; knows nothing of layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.dependent_launch import launch_options
from appliance.kernels.skinny_linear import skinny_linear_reference as invariant_linear_reference

__all__ = ["invariant_linear", "invariant_linear_reference"]

_BLOCK_M, _BLOCK_N, _K_BYTES = 64, 64, 128  # one tile for every product: a choice by size could depend on the batch
_GROUP = 16  # tiles of rows that share a tile of weight in L2


@triton.jit(do_not_specialize=["m"])
def _invariant_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    weight_scales_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    x_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_K: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    PROMOTE: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one tile of the result."""
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
    row_there, column_there = rows < m, columns < n
    x_at = x_ptr + rows.to(tl.int64)[:, None] * x_stride + inner[None, :]
    weight_at = weight_ptr + columns.to(tl.int64)[None, :] * k + inner[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        if WHOLE_K:
            x = tl.load(x_at, mask=row_there[:, None], other=0.0)
            weight = tl.load(weight_at, mask=column_there[None, :], other=0.0)
        else:
            there = start + inner < k
            x = tl.load(x_at, mask=row_there[:, None] & there[None, :], other=0.0)
            weight = tl.load(weight_at, mask=column_there[None, :] & there[:, None], other=0.0)
        if PROMOTE:  # FP8 products on Hopper add up in fewer bits: no longer than a tile
            total += tl.dot(x, weight, max_num_imprecise_acc=PROMOTE)
        else:
            total = tl.dot(x, weight, total, input_precision=PRECISION)
        x_at += BLOCK_K
        weight_at += BLOCK_K
    if SCALED:
        total = total * tl.load(scales_ptr + rows, mask=row_there, other=0.0)[:, None]
        total = total * tl.load(weight_scales_ptr + columns, mask=column_there, other=0.0)[None, :]
    if BIASED:
        total += tl.load(bias_ptr + columns, mask=column_there, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=row_there[:, None] & column_there[None, :])


def invariant_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    scales: Tensor | None = None,
    weight_scales: Tensor | None = None,
) -> Tensor:
    """(x * scales) @ (weight * weight_scales).T + bias: `dtype` [m, n], sums in float32, rounded once.

    x [m, k], any m, rows may be strided; weight [n, k], contiguous, of the same dtype: float8_e4m3fn, bfloat16, float16
    or float32. scales float32 [m, 1] and weight_scales float32 of n numbers, both or none; bias [n] or None.
    """
    (m, k), n = x.shape, weight.shape[0]
    assert weight.shape[1] == k and x.dtype == weight.dtype and x.stride(1) == 1 and weight.is_contiguous()
    assert (scales is None) == (weight_scales is None)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    if m == 0:
        return out
    block_k = _K_BYTES // x.element_size()
    _invariant_kernel[(triton.cdiv(m, _BLOCK_M) * triton.cdiv(n, _BLOCK_N),)](
        x, weight, out if scales is None else scales, out if weight_scales is None else weight_scales,
        out if bias is None else bias, out, m, n, k, x.stride(0),
        BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, BLOCK_K=block_k, GROUP=_GROUP, WHOLE_K=k % block_k == 0,
        SCALED=scales is not None, BIASED=bias is not None, PROMOTE=block_k if x.element_size() == 1 else 0,
        PRECISION="ieee" if x.element_size() == 4 else "tf32",  # of 32-bit floats; without effect on others
        num_warps=4, num_stages=6, **launch_options(x.device),
    )  # fmt: skip
    return out
