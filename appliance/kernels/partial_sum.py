"""A product that the ranks are still to add up, and who does that: whoever takes it from a row-parallel layer. And a
residual stream of which each rank has some rows.

The norm behind such a layer can add, normalize and quantize in one kernel (`all_reduce_norm.py`); anybody else calls
`materialize`, as with scales that are still to be applied. Knows neither ranks nor kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from appliance.kernels.deferred_scale import DeferredScale, Product, materialize


class Reducer(Protocol):
    """Adds products up over ranks."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks; may be written over x."""

    def rms_norm(self, x: Product, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`norm.rms_norm` of the sum over the ranks."""

    def rms_norm_quantize(
        self, x: Product, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, scale: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """`norm.rms_norm_quantize` of the sum over the ranks."""

    def fuses(self, x: Product) -> bool:
        """Whether the norm behind the sum of x comes in one kernel with it, however many rows there are."""


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

    def rms_norm(self, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """As `norm.rms_norm` does with the sum over the ranks."""
        assert self.reducer is not None
        return self.reducer.rms_norm(self.summand, residual, weight, eps)

    def rms_norm_quantize(
        self, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, scale: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """As `norm.rms_norm_quantize` does with the sum over the ranks."""
        assert self.reducer is not None
        return self.reducer.rms_norm_quantize(self.summand, residual, weight, eps, dtype, scale)


def dealt_rows(stream: Tensor, rank: int, size: int) -> Tensor:
    """A rank's own rows of the residual stream [n, hidden]: a view of every size-th row; the last ranks may have one
    less than the first."""
    return stream[rank::size]


def whole_rows(shares: Tensor, rows: int) -> Tensor:
    """The residual stream [rows, hidden] of all ranks' own rows: shares [size, most rows of a rank, hidden], of which
    those that a rank does not have count for nothing."""
    return shares.transpose(0, 1).flatten(0, 1)[:rows]


# What may be asked of a dealt stream as it is.
_FACTS = (
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.as_subclass,
)


class DealtStream(Tensor):
    """A residual stream [n, hidden] of which each rank has its `dealt_rows` only, in the memory of a whole one. A norm
    that sums over ranks and deals streams out returns it, and the next one may go on with it; whatever else is done
    with it is done with the whole stream, which all ranks ask for at once then."""

    _rank: int
    _size: int
    _gather: Callable[[Tensor], Tensor]

    @staticmethod
    def of(rows: Tensor, rank: int, size: int, gather: Callable[[Tensor], Tensor]) -> DealtStream:
        """`rows` [n, hidden]: what it holds of other ranks' rows is stale. `gather`: x [m, hidden] of every rank:
        [size, m, hidden]."""
        stream = rows.as_subclass(DealtStream)
        stream._rank, stream._size, stream._gather = rank, size, gather
        return stream

    @property
    def rows(self) -> Tensor:
        """The memory: this rank's rows are true."""
        return self.as_subclass(Tensor)

    def whole(self) -> Tensor:
        """All of it, on every rank."""
        rows = self.rows
        mine = dealt_rows(rows, self._rank, self._size)
        share = rows.new_zeros(-(-rows.shape[0] // self._size), rows.shape[1])
        share[: len(mine)] = mine
        return whole_rows(self._gather(share), rows.shape[0])

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FACTS:
                return func(*args, **(kwargs or {}))
            if func is Tensor.data_ptr:
                raise TypeError("a stream that is dealt out is asked for its address: ask `whole` or `rows` for it")
            return func(*_whole(args), **_whole(kwargs or {}))


def whole_stream(residual: Tensor) -> Tensor:
    """A residual stream for who needs all of it."""
    return residual.whole() if isinstance(residual, DealtStream) else residual


def _whole(given: Any) -> Any:
    """Streams in arguments made whole."""
    if isinstance(given, DealtStream):
        return given.whole()
    if isinstance(given, dict):
        return {key: _whole(value) for key, value in given.items()}
    return type(given)(_whole(value) for value in given) if type(given) in (tuple, list) else given
