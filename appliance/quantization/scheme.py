"""What a precision scheme is: how a linear layer's weight is stored in an engine and multiplied at run time.

A scheme is one file here with a `PLUGIN` literal and a class `Scheme` derived from `PrecisionScheme`; its `tolerance`
is the largest relative error ||y - reference|| / ||reference|| of a product with random input. Rounding to half a unit
in the last place of weights, inputs and outputs gives about 2^-24 (fp32), 2^-11 (fp16), 2^-8 (bf16) and 2^-4 (fp8);
random signs make it less. The model and its layers do not know which one is in use. A scheme whose products take
quantized input overrides `rms_norm` and `silu_mul`, the operations that feed those products, so that quantizing costs
no kernel of its own. One whose products are quicker without their scales leaves those to the operation behind a
product, if the layer says that it may (`DeferredScale`): `rms_norm` and `silu_mul` again, the rotary embedding
(`kernels/rope_cache.py`) and the conversion of logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from appliance.kernels import activation, norm
from appliance.kernels.deferred_scale import Product
from appliance.kernels.tactics import Tactics

# What flows into a linear layer: [n, in] in the model's dtype, or quantized values [n, in] with float32 scales [n, 1].
Activation = Tensor | tuple[Tensor, Tensor]


class PrecisionScheme(ABC):
    """Stateless; one instance serves all layers of a model."""

    @abstractmethod
    def tensors(
        self, out_features: int, in_features: int, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Stored tensors of a linear layer: suffix -> (shape, dtype). `dtype` is the model's own."""

    @abstractmethod
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Stored tensors of a weight [out, in] (float, already in the engine's dtype), on the weight's device. Rows
        are independent of each other, so a scheme may be applied to a part of the rows or before ranks split them."""

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors as loaded on their device -> what `apply` wants there. Called once, after loading."""
        return tensors

    @abstractmethod
    def apply(self, tensors: dict[str, Tensor], x: Activation, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x @ weight.T + bias: [n, out], in `dtype`, the model's own. `tensors` are prepared; if `prepare` padded the
        weight, the result has extra columns, which the layer cuts off. Kernel on CUDA, plain torch elsewhere; never
        synchronizes, so it can be captured in a CUDA graph."""

    def apply_deferred(
        self, tensors: dict[str, Tensor], x: Activation, bias: Tensor | None, dtype: torch.dtype
    ) -> Product:
        """Like `apply`, for layers whose result goes to an operation that takes a `DeferredScale` too. Its values are
        in `dtype`, so that the operation can write over them."""
        return self.apply(tensors, x, bias, dtype)

    def tactics(self, out_features: int, in_features: int, rows: int, device: torch.device) -> Tactics:
        """Ways to compute `apply` on `device` for any number of rows up to `rows`, by a name that says what they do;
        the first is what `apply` does where `kernels.tactics.TABLE` has no choice. Empty: there is one way only.
        `out_features` counts what `prepare` padded. A scheme with several looks its choice up in `apply`; one that
        gives a `DeferredScale` serves `apply` too, which applies the scales then."""
        return {}

    def tactic_input(self, x: Tensor) -> Activation:
        """x [n, in], in the model's dtype, as the tactics take it: quantized, where the products take that."""
        return x

    def rms_norm(self, x: Product, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Activation, Tensor]:
        """The input of the next linear layer and the new residual stream; see `kernels.norm.rms_norm`."""
        return norm.rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: Product) -> Activation:
        """silu(gate) * up of [n, 2 * size]: the input of the next linear layer; see `kernels.activation.silu_mul`."""
        return activation.silu_mul(gate_up)
