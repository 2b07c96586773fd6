"""INT8 weights with one scale per output channel, activations in INT8 with one scale per token, computed on the fly
(W8A8). Calibration moves the outliers of activations into the weights first: SmoothQuant (Xiao et al., "SmoothQuant:
Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023).

The search is `quantization/calibration`. On a GPU the operations in front of a product write INT8 and the product's
sums are exact, as they are on a CPU that has such products (`kernels/cpu_linear.py`). Else weights are dequantized once
after loading, and activations, quantized and dequantized, meet them in a float32 product: the same numbers but for the
order of summation.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.kernels import cpu_linear
from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.activation import silu_mul_quantize
from appliance.kernels.deferred_scale import DeferredScale, Product, materialize
from appliance.kernels.int8_linear import (
    MULTIPLE,
    TileConfig,
    int8_linear_deferred,
    int8_linear_triton,
    tiles_for,
)
from appliance.kernels.norm import rms_norm_quantize
from appliance.kernels.row_quantization import quantize_rows
from appliance.kernels.skinny_linear import MAX_ROWS, Config, likely, multiprocessors, shared_memory, skinny_linear
from appliance.kernels.tactics import TABLE, Tactic, Tactics
from appliance.quantization.calibration import smoothquant
from appliance.quantization.calibration.block import BlockWeights, QuantizedBlock
from appliance.quantization.calibration.statistics import BlockStatistics
from appliance.quantization.scheme import Activation, PrecisionScheme
from appliance.quantization.weights import ChannelWeight, QuantizedWeight, round_to_nearest_int8

PLUGIN = {
    "name": "int8_smoothquant",
    "precisions": ["int8"],
    "weight_bits": 8,
    "activation_bits": 8,
    "batch_invariant": True,
    "min_compute_capability": [7, 5],
    # hidden_size, intermediate_size and heads * head_dim, each divided by the ranks that share it, must be multiples.
    "dimension_multiple": 16,
    # Largest relative error of a product, per precision, that the builder's self-check accepts (builder/selfcheck.py).
    "tolerance": {"int8": 3e-2},
    "calibrated": True,
    "parameters": {"head": "bf16", "unquantized": []},
    # Parameters that are others on GPUs from a compute capability on.
    "parameters_from": {"8.9": {"head": "fp8"}},
}


class Scheme(PrecisionScheme):
    facts = PLUGIN

    def tensors(
        self, out_features: int, in_features: int, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            "weight": ((out_features, in_features), torch.int8),
            "weight_scale": ((out_features, 1), torch.float32),
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return self.store(round_to_nearest_int8(weight))

    def store(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        if not isinstance(weight, ChannelWeight):
            return super().store(weight)
        return {"weight": weight.values, "weight_scale": weight.scales}

    def calibrate(self, block: BlockWeights, statistics: BlockStatistics) -> QuantizedBlock:
        return smoothquant.calibrate(block, statistics)

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight, scales = tensors["weight"], tensors["weight_scale"]
        if not weight.is_cuda:
            if cpu_linear.packing() and cpu_linear.has_int8():
                return cpu_linear.pack_int8(weight, scales)
            return {"weight": weight.float() * scales}
        padding = -weight.shape[0] % MULTIPLE  # a vocabulary, say; `Linear` cuts the extra columns off
        padded = F.pad(weight, (0, 0, 0, padding)) if padding else weight
        return {"weight": padded, "weight_scale": F.pad(scales.view(1, -1), (0, padding))}

    def apply(self, tensors: dict[str, Tensor], x: Activation, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return materialize(self.apply_deferred(tensors, x, bias, dtype), dtype)

    def apply_deferred(
        self, tensors: dict[str, Tensor], x: Activation, bias: Tensor | None, dtype: torch.dtype
    ) -> Product:
        x = quantize_rows(x, torch.int8) if isinstance(x, Tensor) else x
        if "packed" in tensors:
            return cpu_linear.int8_linear(tensors, *x, bias).to(dtype)
        weight = tensors["weight"]
        if not weight.is_cuda:
            return F.linear(x[0].float() * x[1], weight, None if bias is None else bias.float()).to(dtype)
        (n, k), rows = weight.shape, x[0].shape[0]
        if bias is not None and bias.shape[0] < n:
            bias = F.pad(bias, (0, n - bias.shape[0]))
        if TABLE.batch_invariant:  # sums are exact, and scales are applied number by number
            return materialize(_deferred(tensors, x, bias, dtype), dtype)
        tactic = TABLE.find(str(PLUGIN["name"]), n, k, rows, lambda bucket: self.tactics(n, k, bucket, weight.device))
        product: Product = (tactic or _default(rows, weight.device))(tensors, x, bias, dtype)
        return product

    def tactics(self, out_features: int, in_features: int, rows: int, device: torch.device) -> Tactics:
        if device.type != "cuda":
            return {}
        found: dict[str, Tactic] = {"deferred": _deferred}
        if not _has_own_kernels(device):
            return found
        skinny: dict[str, Tactic] = {}
        if 0 < rows <= MAX_ROWS:
            for config in likely(out_features, in_features, rows, multiprocessors(device)):
                skinny[f"skinny {config.name}"] = functools.partial(_skinny, config=config)
        for tile in tiles_for(rows, shared_memory(device)):
            found[f"tiled {tile.name}"] = functools.partial(_tiled, config=tile)
        return skinny | found

    def tactic_input(self, x: Tensor) -> Activation:
        return quantize_rows(x, torch.int8)

    def rms_norm(
        self,
        x: Product,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        behind: Mapping[str, Tensor] | None = None,
    ) -> tuple[Activation, Tensor]:
        return rms_norm_quantize(x, residual, weight, eps, torch.int8)

    def silu_mul(self, gate_up: Product, behind: Mapping[str, Tensor] | None = None) -> Activation:
        return silu_mul_quantize(gate_up, torch.int8)


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


def _tiled(
    tensors: dict[str, Tensor], x: tuple[Tensor, Tensor], bias: Tensor | None, dtype: torch.dtype, config: TileConfig
) -> Tensor:
    """Own kernel for many rows, which applies the scales itself."""
    return int8_linear_triton(*x, tensors["weight"], tensors["weight_scale"], bias, dtype, config)


def _deferred(
    tensors: dict[str, Tensor], x: tuple[Tensor, Tensor], bias: Tensor | None, dtype: torch.dtype
) -> DeferredScale:
    """The library's exact sums, scales left to the next operation."""
    return int8_linear_deferred(*x, tensors["weight"], tensors["weight_scale"], bias, dtype)


def _default(rows: int, device: torch.device) -> Tactic:
    """Where nothing was timed."""
    return _skinny if 0 < rows <= MAX_ROWS and _has_own_kernels(device) else _deferred


@functools.cache
def _has_own_kernels(device: torch.device) -> bool:
    """Triton has no INT8 products for GPUs before Ampere."""
    return HAS_TRITON and torch.cuda.get_device_capability(device) >= (8, 0)
