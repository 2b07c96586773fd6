"""FP8 (e4m3): weights with one scale per output channel, activations with one scale per token, computed on the fly; or,
with the parameter `static_input`, with the scale that a checkpoint brings for the input of each product.

On a GPU the product runs in FP8 and the operations in front of it write FP8. Elsewhere (the CPU reference) weights are
dequantized once after loading, and activations, quantized and dequantized, meet them in a float32 product: the same
numbers but for the order of summation.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.errors import EngineBuildError
from appliance.kernels.activation import silu_mul_quantize
from appliance.kernels.deferred_scale import DeferredScale, Product, materialize
from appliance.kernels.fp8_linear import FP8, fp8_linear, fp8_linear_deferred, quantize_rows
from appliance.kernels.invariant_linear import invariant_linear
from appliance.kernels.norm import rms_norm_quantize
from appliance.kernels.skinny_linear import MAX_ROWS, Config, likely, multiprocessors, skinny_linear
from appliance.kernels.tactics import TABLE, Tactic, Tactics
from appliance.quantization.scheme import Activation, PrecisionScheme
from appliance.quantization.weights import Fp8Weight, QuantizedWeight, round_to_nearest_fp8

PLUGIN = {
    "name": "fp8",
    "precisions": ["fp8"],
    "weight_bits": 8,
    "activation_bits": 8,
    "batch_invariant": True,
    "min_compute_capability": [8, 9],
    # hidden_size, intermediate_size and heads * head_dim, each divided by the ranks that share it, must be multiples.
    "dimension_multiple": 16,
    # Largest relative error of a product, per precision, that the builder's self-check accepts (builder/selfcheck.py).
    "tolerance": {"fp8": 6e-2},
    "parameters": {"static_input": False, "unquantized": []},
}

_MULTIPLE = 16  # of both dimensions of a weight, by the FP8 product


class Scheme(PrecisionScheme):
    facts = PLUGIN

    def tensors(
        self, out_features: int, in_features: int, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": ((out_features, in_features), FP8),
            "weight_scale": ((out_features, 1), torch.float32),
        }
        return stored | {"input_scale": ((1,), torch.float32)} if self.static_input else stored

    @property
    def static_input(self) -> bool:
        return bool(self.parameters["static_input"])

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """EngineBuildError with `static_input`: a weight alone has no scale of its input."""
        return self.store(round_to_nearest_fp8(weight))

    def store(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        if not isinstance(weight, Fp8Weight):
            return super().store(weight)
        stored = {"weight": weight.values, "weight_scale": weight.scales}
        if (weight.input_scale is not None) != self.static_input:
            given = "without" if weight.input_scale is None else "with"
            raise EngineBuildError(
                f"an FP8 weight {given} a scale of its input does not fit an engine with "
                f"static_input={self.static_input}",
                hint="the parameters of the scheme must be those of the weights",
            )
        return stored if weight.input_scale is None else stored | {"input_scale": weight.input_scale}

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight, scales = tensors["weight"], tensors["weight_scale"]
        static = {"input_scale": tensors["input_scale"]} if self.static_input else {}
        if not weight.is_cuda:
            return {"weight": weight.float() * scales, **static}
        padding = -weight.shape[0] % _MULTIPLE  # a vocabulary, say; `Linear` cuts the extra columns off
        if padding:
            weight = F.pad(weight.view(torch.uint8), (0, 0, 0, padding)).view(FP8)
        return {"weight": weight, "weight_scale": F.pad(scales.view(1, -1), (0, padding)), **static}

    def apply(self, tensors: dict[str, Tensor], x: Activation, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return materialize(self._product(tensors, x, bias, dtype, deferrable=False), dtype)

    def apply_deferred(
        self, tensors: dict[str, Tensor], x: Activation, bias: Tensor | None, dtype: torch.dtype
    ) -> Product:
        deferrable = dtype == torch.bfloat16  # what the unscaled product gives
        product = self._product(tensors, x, bias, dtype, deferrable)
        return product if deferrable else materialize(product, dtype)

    def _product(
        self, tensors: dict[str, Tensor], x: Activation, bias: Tensor | None, dtype: torch.dtype, deferrable: bool
    ) -> Product:
        x = quantize_rows(x, scale=tensors.get("input_scale")) if isinstance(x, Tensor) else x
        weight = tensors["weight"]
        if not weight.is_cuda:
            bias = None if bias is None else bias.float()
            return F.linear(x[0].float() * x[1], weight, bias).to(dtype)
        (n, k), rows = weight.shape, x[0].shape[0]
        if bias is not None and bias.shape[0] < n:
            bias = F.pad(bias, (0, n - bias.shape[0]))
        if TABLE.batch_invariant:
            return invariant_linear(x[0], weight, bias, dtype, x[1], tensors["weight_scale"])
        tactic = TABLE.find(str(PLUGIN["name"]), n, k, rows, lambda bucket: self.tactics(n, k, bucket, weight.device))
        product: Product = (tactic or _default(rows, deferrable))(tensors, x, bias, dtype)
        return product

    def tactics(self, out_features: int, in_features: int, rows: int, device: torch.device) -> Tactics:
        if device.type != "cuda":
            return {}
        library: dict[str, Tactic] = {"deferred": _deferred, "rowwise": _rowwise}
        own: dict[str, Tactic] = {}
        if 0 < rows <= MAX_ROWS:
            for config in likely(out_features, in_features, rows, multiprocessors(device)):
                own[f"skinny {config.name}"] = functools.partial(_skinny, config=config)
        return library | own if _default(rows, deferrable=True) is _deferred else own | library

    def tactic_input(self, x: Tensor) -> Activation:
        return quantize_rows(x)

    def rms_norm(
        self,
        x: Product,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        behind: Mapping[str, Tensor] | None = None,
    ) -> tuple[Activation, Tensor]:
        return rms_norm_quantize(x, residual, weight, eps, scale=(behind or {}).get("input_scale"))

    def silu_mul(self, gate_up: Product, behind: Mapping[str, Tensor] | None = None) -> Activation:
        return silu_mul_quantize(gate_up, scale=(behind or {}).get("input_scale"))


# ---------------------------------------------------------------- tactics


def _skinny(
    tensors: dict[str, Tensor],
    x: tuple[Tensor, Tensor],
    bias: Tensor | None,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """Own kernel for few rows, which streams the weight and applies the scales itself."""
    return skinny_linear(x[0], tensors["weight"], bias, dtype, x[1], tensors["weight_scale"], config)


def _rowwise(tensors: dict[str, Tensor], x: tuple[Tensor, Tensor], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The library's product with scales per row of either side."""
    return fp8_linear(*x, tensors["weight"], tensors["weight_scale"], bias, dtype)


def _deferred(
    tensors: dict[str, Tensor], x: tuple[Tensor, Tensor], bias: Tensor | None, dtype: torch.dtype
) -> DeferredScale:
    """The library's product of the stored numbers, scales left to the next operation."""
    return fp8_linear_deferred(*x, tensors["weight"], tensors["weight_scale"], bias)


def _default(rows: int, deferrable: bool) -> Tactic:
    """Where nothing was timed. On an H200 (`bench ops`) the own kernel is ahead up to 16 rows; up to 64 it still is
    where applying the scales would take a kernel of its own."""
    return _skinny if 0 < rows <= (16 if deferrable else MAX_ROWS) else _deferred
