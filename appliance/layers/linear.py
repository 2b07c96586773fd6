"""Linear layers: shares of a weight across tensor-parallel ranks, stored and multiplied as a precision scheme says.

Knows nothing of number formats (the scheme does) nor of what is multiplied. Parameters carry the names of the engine's
tensors: the scheme's suffixes, and `bias`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from appliance.distributed import TensorParallel
from appliance.kernels.deferred_scale import DeferredScale, Product, materialize
from appliance.kernels.partial_sum import PartialSum
from appliance.quantization.scheme import Activation, PrecisionScheme

_ORDER = "order"  # suffix of the stored tensor


def parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """An uninitialized inference parameter on the current default device (meta while a model is being described)."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Linear(nn.Module):
    """x [n, in_features] -> [n, out_features]; both are this rank's share.

    `scheme`: this layer's own (`PrecisionScheme.of`). `defer`: whoever takes the result accepts a `DeferredScale`, so
    the scheme may leave its scales to it.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        scheme: PrecisionScheme,
        dtype: torch.dtype,
        defer: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._defer = defer
        self._dtype = dtype
        self._scheme = scheme
        self._stored = scheme.tensors(out_features, in_features, dtype)
        self._prepared: dict[str, Tensor] = {}
        for suffix, (shape, stored_dtype) in self._stored.items():
            self.register_parameter(suffix, parameter(shape, stored_dtype))
        self.register_parameter("bias", parameter((out_features,), dtype) if bias else None)

    def prepare(self) -> None:
        """After loading: hands the stored tensors to the scheme and keeps only what it returns. Again: does nothing."""
        if self._prepared:
            return
        self._prepared = self._scheme.prepare({suffix: getattr(self, suffix).data for suffix in self._stored})
        for suffix in self._stored:
            self.register_parameter(suffix, None)

    @property
    def scheme(self) -> PrecisionScheme:
        """How this layer is stored and multiplied."""
        return self._scheme

    @property
    def prepared(self) -> dict[str, Tensor]:
        """What the scheme multiplies with, after `prepare`."""
        return self._prepared

    def forward(self, x: Activation) -> Product:
        return self._product(x, self.bias)

    def multiply(self, x: Activation) -> Product:
        """What this rank computes, without the others."""
        return self._product(x, self.bias)

    @property
    def _deferrable(self) -> bool:
        return self._defer

    def _product(self, x: Activation, bias: Tensor | None) -> Product:
        apply = self._scheme.apply_deferred if self._deferrable else self._scheme.apply
        out = apply(self._prepared, x, bias, self._dtype)
        if out.shape[1] == self.out_features:
            return out
        return out.first_columns(self.out_features) if isinstance(out, DeferredScale) else out[:, : self.out_features]


class ColumnParallelLinear(Linear):
    """Output features are split: every rank has all of x and gives its own columns of the result. Fused products (q, k
    and v; gate and up) are one such layer whose rank share holds the rank's share of each part, in order."""


class RowParallelLinear(Linear):
    """Input features are split: ranks give partial sums that are added up, so the result is whole on every rank, or, if
    deferred, a `PartialSum` that whoever takes it adds up.

    A weight with an order of its inputs is split in that order, so that groups stay whole; a rank then multiplies
    inputs that any rank may have, and the ranks exchange them first."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        scheme: PrecisionScheme,
        dtype: torch.dtype,
        tp: TensorParallel,
        defer: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, scheme=scheme, dtype=dtype, defer=defer)
        self._tp = tp
        self._order: Tensor | None = None  # int64 [in]: which of all ranks' inputs are multiplied here

    def prepare(self) -> None:
        if self._tp.size > 1 and _ORDER in self._stored and not self._prepared:
            self._order = getattr(self, _ORDER).data.long()
            self.register_parameter(_ORDER, None)
            del self._stored[_ORDER]
        super().prepare()

    def forward(self, x: Activation) -> Product:
        if self._tp.size == 1:
            return self._product(x, self.bias)
        product = self._summand(x)
        if self._deferrable:
            return PartialSum.of(product, self._tp.own_reducer)  # added up by whoever takes it
        return self._tp.all_reduce(materialize(product, self._dtype))

    def begin(self, x: Activation) -> Callable[[], Tensor]:
        """The same, added up while what is enqueued next runs; call what is returned to wait for it."""
        return self._tp.begin_all_reduce(materialize(self._summand(x), self._dtype))

    def _summand(self, x: Activation) -> Product:
        """This rank's, of several."""
        if self._order is not None:
            assert isinstance(x, Tensor), "only weights whose inputs are not quantized have an order"
            x = self._tp.all_gather(x).index_select(1, self._order)
        # Every rank holds the whole bias; it must count once.
        return self._product(x, self.bias if self._tp.rank == 0 else None)

    @property
    def _deferrable(self) -> bool:
        """The library adds up numbers that are complete."""
        return self._defer and (self._tp.size == 1 or self._tp.own_reducer is not None)
