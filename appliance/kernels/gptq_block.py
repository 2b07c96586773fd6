"""The inner loop of GPTQ (`quantization/calibration/gptq.py`): columns of one block are rounded one after the other,
each one's error being made up for by the columns behind it. One kernel for all columns, as thousands of small ones per
weight would take minutes per model; rows are independent of each other.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022,
arXiv 2210.17323), algorithm 1, the inner loop. Knows one block; what happens between blocks is the caller's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from appliance.kernels._triton import tl, triton

_ROWS = 16  # of a program
_LARGEST = 15  # value of an int4


def gptq_block(
    weight: Tensor, original: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    """Round a block of columns: (values uint8 [out, columns], errors float32 [out, columns]).

    weight float32 [out, columns]: with what earlier blocks ask for. original float32 [out, columns]: errors are these
    less the rounded ones. factor float32 [columns, columns]: upper triangle, the diagonal block of the Cholesky factor
    U of the inverse Hessian (U^T U), rows divided by their diagonal number. scales, zeros float32 [out, columns] or,
    one for all columns, [out, 1]."""
    if weight.is_cuda:
        return gptq_block_triton(weight, original, factor, scales, zeros)
    return gptq_block_reference(weight, original, factor, scales, zeros)


def gptq_block_reference(
    weight: Tensor, original: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    """`gptq_block` in plain torch, any device."""
    columns = weight.shape[1]
    remaining = weight.T.contiguous()  # a column is a row here: consecutive in memory
    scales, zeros = scales.expand(-1, columns).T, zeros.expand(-1, columns).T
    values = torch.empty_like(remaining, dtype=torch.uint8)
    rounded = torch.empty_like(remaining)
    for column in range(columns):
        now = remaining[column]
        value = ((now / scales[column] + 0.5).floor() + zeros[column]).clamp(0, _LARGEST)
        values[column] = value
        rounded[column] = (value - zeros[column]) * scales[column]
        remaining[column + 1 :] -= factor[column, column + 1 :, None] * (now - rounded[column])
    return values.T.contiguous(), original - rounded.T


@triton.jit
def _gptq_block_kernel(
    weight_ptr,
    original_ptr,
    factor_ptr,
    scales_ptr,
    zeros_ptr,
    values_ptr,
    errors_ptr,
    rows,
    weight_stride,
    original_stride,
    scales_stride,
    scales_column_stride,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """One program: ROWS rows, all columns, in registers."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    row_there = row < rows
    there = row_there[:, None] & (column < columns)[None, :]
    remaining = tl.load(weight_ptr + row[:, None] * weight_stride + column[None, :], mask=there, other=0.0)
    values = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    rounded = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for current in range(columns):
        scale_at = row * scales_stride + current * scales_column_stride
        scale = tl.load(scales_ptr + scale_at, mask=row_there, other=1.0)
        zero = tl.load(zeros_ptr + scale_at, mask=row_there, other=0.0)
        factor = tl.load(
            factor_ptr + current * columns + column, mask=(column > current) & (column < columns), other=0.0
        )
        here = (column == current)[None, :]
        now = tl.sum(tl.where(here, remaining, 0.0), axis=1)
        value = tl.floor(tl.div_rn(now, scale) + 0.5) + zero
        value = tl.minimum(tl.maximum(value, 0.0), LARGEST)
        nearest = (value - zero) * scale
        remaining -= factor[None, :] * (now - nearest)[:, None]
        values = tl.where(here, value[:, None], values)
        rounded = tl.where(here, nearest[:, None], rounded)
    at = row[:, None] * columns + column[None, :]
    original = tl.load(original_ptr + row[:, None] * original_stride + column[None, :], mask=there, other=0.0)
    tl.store(values_ptr + at, values.to(tl.uint8), mask=there)
    tl.store(errors_ptr + at, original - rounded, mask=there)


def gptq_block_triton(
    weight: Tensor, original: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    """`gptq_block` as one kernel."""
    rows, columns = weight.shape
    assert weight.stride(1) == original.stride(1) == 1 and factor.is_contiguous()
    assert scales.stride(0) == zeros.stride(0) and scales.shape == zeros.shape
    per_column = scales.shape[1] > 1 or columns == 1
    assert not per_column or scales.stride(1) == zeros.stride(1)
    values = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
    errors = torch.empty((rows, columns), dtype=torch.float32, device=weight.device)
    _gptq_block_kernel[(triton.cdiv(rows, _ROWS),)](
        weight,
        original,
        factor,
        scales,
        zeros,
        values,
        errors,
        rows,
        weight.stride(0),
        original.stride(0),
        scales.stride(0),
        scales.stride(1) if per_column else 0,
        columns,
        ROWS=_ROWS,
        COLUMNS=triton.next_power_of_2(columns),
        LARGEST=float(_LARGEST),
        num_warps=4,
    )
    return values, errors
