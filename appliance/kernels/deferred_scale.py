"""A product whose scales are still to be applied, and the kernel that applies them where nobody else does.

The library multiplies FP8 matrices fastest when it has one scale for all of a matrix, and slower by up to half when it
has one per row. So the fast product is run on the stored numbers as they are, and the scales of rows (tokens) and
columns (output channels) are applied by the kernel that reads the result anyway: the norm, silu(gate) * up, the rotary
embedding, the conversion of logits. bfloat16 has float32's range, so unscaled sums do not overflow, and rounding them
is relatively the same as rounding the scaled ones. Products of 8-bit integers are exact int32 sums, too large for
bfloat16 without a rounding that the result does not need: they are carried as they are.

Knows nothing of how the product was made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.dependent_launch import launch_options

_BLOCK = 1024  # columns of a row that a program takes


@dataclass(frozen=True, slots=True)
class DeferredScale:
    """values * row_scales * column_scales + bias, [n, out], not yet computed.

    It is consumed once: whoever takes it may write the result over `values` (if `in_place`).
    """

    values: Tensor  # [n, out], the dtype that the result has in the model, or int32; last dimension contiguous
    row_scales: Tensor  # float32 [n, 1], contiguous
    column_scales: Tensor  # float32 [1, out], last dimension contiguous
    bias: Tensor | None  # [out], any float dtype
    result_dtype: torch.dtype | None = None  # of the result in the model, if not that of the values

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the result."""
        return self.result_dtype or self.values.dtype

    @property
    def in_place(self) -> bool:
        """Whether the result fits where the values are."""
        return self.dtype == self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def is_cuda(self) -> bool:
        return self.values.is_cuda

    def first_columns(self, count: int) -> DeferredScale:
        """Without the columns from `count` on: those that a padded weight gave."""
        bias = None if self.bias is None else self.bias[:count]
        return replace(self, values=self.values[:, :count], column_scales=self.column_scales[:, :count], bias=bias)

    def first_rows(self, count: int) -> DeferredScale:
        """The first `count` rows."""
        return replace(self, values=self.values[:count], row_scales=self.row_scales[:count])

    def scaled(self) -> Tensor:
        """The result in float32, in plain torch: the reference of every kernel that takes a deferred product."""
        product = self.values.float() * self.row_scales * self.column_scales
        return product if self.bias is None else product + self.bias.float()

    def materialize(self, dtype: torch.dtype) -> Tensor:
        """The result in `dtype`, [n, out]; in place of `values` where that is their dtype."""
        return materialize_triton(self, dtype) if self.is_cuda else materialize_reference(self, dtype)


# What a linear layer gives: numbers, or numbers with scales to be applied by who takes them.
Product = Tensor | DeferredScale


def materialize(product: Product, dtype: torch.dtype) -> Tensor:
    """A product as a tensor of `dtype`, whatever form it came in."""
    return product.to(dtype) if isinstance(product, Tensor) else product.materialize(dtype)


def first_rows(product: Product, count: int) -> Product:
    """The first `count` rows of a product, whatever form it has."""
    return product[:count] if isinstance(product, Tensor) else product.first_rows(count)


def as_float(product: Product) -> Tensor:
    """A product in float32 in plain torch, for references."""
    return product.float() if isinstance(product, Tensor) else product.scaled()


def materialize_reference(product: DeferredScale, dtype: torch.dtype) -> Tensor:
    """`DeferredScale.materialize` in plain torch, any device."""
    scaled = product.scaled()
    return product.values.copy_(scaled) if dtype == product.values.dtype else scaled.to(dtype)


@triton.jit
def apply_scales(x, row_scale, column_scales_ptr, bias_ptr, column, mask, BIASED: tl.constexpr):
    """float32 numbers of one row's columns, scaled, bias added; in the order of `DeferredScale.scaled`. 0 outside
    `mask` if x is."""
    x = x * row_scale * tl.load(column_scales_ptr + column, mask=mask, other=0.0)
    if BIASED:
        x += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _materialize_kernel(
    values_ptr,
    row_scales_ptr,
    column_scales_ptr,
    bias_ptr,
    out_ptr,
    values_stride,
    out_stride,
    size,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: BLOCK columns of one row."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    x = tl.load(values_ptr + row * values_stride + column, mask=mask, other=0.0).to(tl.float32)
    x = apply_scales(x, tl.load(row_scales_ptr + row), column_scales_ptr, bias_ptr, column, mask, BIASED)
    tl.store(out_ptr + row * out_stride + column, x.to(out_ptr.dtype.element_ty), mask=mask)


def materialize_triton(product: DeferredScale, dtype: torch.dtype) -> Tensor:
    """`DeferredScale.materialize` as one kernel."""
    values = product.values
    assert values.stride(-1) == 1 and product.row_scales.is_contiguous() and product.column_scales.stride(-1) == 1
    n, size = values.shape
    out = values if dtype == values.dtype else torch.empty((n, size), dtype=dtype, device=values.device)
    if n == 0:
        return out
    _materialize_kernel[(n, triton.cdiv(size, _BLOCK))](
        values,
        product.row_scales,
        product.column_scales,
        values if product.bias is None else product.bias,
        out,
        values.stride(0),
        out.stride(0),
        size,
        BIASED=product.bias is not None,
        BLOCK=_BLOCK,
        num_warps=4,
        **launch_options(values.device),
    )
    return out
