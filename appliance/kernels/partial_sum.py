"""A product that the ranks are still to add up, and who does that: whoever takes it from a row-parallel layer.

The norm behind such a layer can add, normalize and quantize in one kernel (`all_reduce_norm.py`); anybody else calls
`materialize`, as with scales that are still to be applied. Knows neither ranks nor kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from appliance.kernels.deferred_scale import DeferredScale, Product, materialize
from appliance.kernels.weight_prefetch import Ahead


class Reducer(Protocol):
    """Adds products up over ranks."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks; may be written over x."""

    def rms_norm(
        self, x: Product, residual: Tensor, weight: Tensor, eps: float, ahead: Ahead | None = None
    ) -> tuple[Tensor, Tensor]:
        """`norm.rms_norm` of the sum over the ranks."""

    def rms_norm_quantize(
        self,
        x: Product,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
        scale: Tensor | None,
        ahead: Ahead | None = None,
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """`norm.rms_norm_quantize` of the sum over the ranks."""


@dataclass(frozen=True, slots=True)
class PartialSum(DeferredScale):
    """This rank's summand, [n, out]: `values`, or, if `has_scales`, what they stand for. To be consumed once, by all
    ranks in the same way."""

    has_scales: bool = False
    reducer: Reducer | None = None

    @classmethod
    def of(cls, product: Product, reducer: Reducer) -> PartialSum:
        """`product` must not be used any more."""
        if isinstance(product, Tensor):
            return cls(product, product, product, None, None, False, reducer)
        scales = product.row_scales, product.column_scales, product.bias
        return cls(product.values, *scales, product.result_dtype, True, reducer)

    @property
    def summand(self) -> Product:
        """The product as it was given."""
        if not self.has_scales:
            return self.values
        return DeferredScale(self.values, self.row_scales, self.column_scales, self.bias, self.result_dtype)

    def materialize(self, dtype: torch.dtype) -> Tensor:
        """The sum over the ranks in `dtype`; it is made in the product's own."""
        assert self.reducer is not None
        return self.reducer.all_reduce(materialize(self.summand, self.dtype)).to(dtype)

    def rms_norm(
        self, residual: Tensor, weight: Tensor, eps: float, ahead: Ahead | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `norm.rms_norm` does with the sum over the ranks."""
        assert self.reducer is not None
        return self.reducer.rms_norm(self.summand, residual, weight, eps, ahead)

    def rms_norm_quantize(
        self,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
        scale: Tensor | None,
        ahead: Ahead | None = None,
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """As `norm.rms_norm_quantize` does with the sum over the ranks."""
        assert self.reducer is not None
        return self.reducer.rms_norm_quantize(self.summand, residual, weight, eps, dtype, scale, ahead)
