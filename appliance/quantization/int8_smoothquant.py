"""INT8 weights with one scale per output channel, activations in INT8 with one scale per token, computed on the fly
(W8A8). Calibration moves the outliers of activations into the weights first: SmoothQuant (Xiao et al., "SmoothQuant:
Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023).

The search is `quantization/calibration`. On the CPU weights are dequantized once after loading, and activations,
quantized and dequantized, meet them in a float32 product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.quantization.scheme import Activation, PrecisionScheme
from appliance.quantization.weights import ChannelWeight, QuantizedWeight, round_to_nearest_int8

PLUGIN = {
    "name": "int8_smoothquant",
    "precisions": ["int8"],
    "weight_bits": 8,
    "activation_bits": 8,
    "min_compute_capability": [7, 5],
    # hidden_size, intermediate_size and heads * head_dim, each divided by the ranks that share it, must be multiples.
    "dimension_multiple": 16,
    # Largest relative error of a product, per precision, that the builder's self-check accepts (builder/selfcheck.py).
    "tolerance": {"int8": 3e-2},
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

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if tensors["weight"].is_cuda:
            return tensors
        return {"weight": tensors["weight"].float() * tensors["weight_scale"]}

    def apply(self, tensors: dict[str, Tensor], x: Activation, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        values, scales = quantize_rows_reference(x) if isinstance(x, Tensor) else x
        weight = tensors["weight"].float()
        if "weight_scale" in tensors:
            weight = weight * tensors["weight_scale"]
        return F.linear(values.float() * scales, weight, None if bias is None else bias.float()).to(dtype)


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, size] -> (int8 [n, size], float32 [n, 1]) with x ≈ values * scales, in plain torch."""
    quantized = round_to_nearest_int8(x)
    return quantized.values, quantized.scales
