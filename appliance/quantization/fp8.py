"""FP8 (e4m3): weights with one scale per output channel, activations with one scale per token, computed on the fly.

On a GPU the product runs in FP8 and the operations in front of it write FP8. Elsewhere (the CPU reference) weights are
dequantized once after loading, and activations, quantized and dequantized, meet them in a float32 product: the same
numbers but for the order of summation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.kernels.activation import silu_mul_quantize
from appliance.kernels.fp8_linear import FP8, fp8_linear, quantize_rows, quantize_rows_reference
from appliance.kernels.norm import rms_norm_quantize
from appliance.kernels.skinny_linear import prefers_skinny, skinny_linear
from appliance.quantization.scheme import Activation, PrecisionScheme

PLUGIN = {
    "name": "fp8",
    "precisions": ["fp8"],
    "weight_bits": 8,
    "activation_bits": 8,
    "min_compute_capability": [8, 9],
    # hidden_size, intermediate_size and heads * head_dim, each divided by the ranks that share it, must be multiples.
    "dimension_multiple": 16,
    # Largest relative error of a product, per precision, that the builder's self-check accepts (builder/selfcheck.py).
    "tolerance": {"fp8": 6e-2},
}

_MULTIPLE = 16  # of both dimensions of a weight, by the FP8 product


class Scheme(PrecisionScheme):
    def tensors(
        self, out_features: int, in_features: int, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            "weight": ((out_features, in_features), FP8),
            "weight_scale": ((out_features, 1), torch.float32),
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        values, scales = quantize_rows_reference(weight)
        return {"weight": values, "weight_scale": scales}

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight, scales = tensors["weight"], tensors["weight_scale"]
        if not weight.is_cuda:
            return {"weight": weight.float() * scales}
        padding = -weight.shape[0] % _MULTIPLE  # a vocabulary, say; `Linear` cuts the extra columns off
        if padding:
            weight = F.pad(weight.view(torch.uint8), (0, 0, 0, padding)).view(FP8)
        return {"weight": weight, "weight_scale": F.pad(scales.view(1, -1), (0, padding))}

    def apply(self, tensors: dict[str, Tensor], x: Activation, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        values, scales = quantize_rows(x) if isinstance(x, Tensor) else x
        weight = tensors["weight"]
        if not weight.is_cuda:
            bias = None if bias is None else bias.float()
            return F.linear(values.float() * scales, weight, bias).to(dtype)
        if bias is not None and bias.shape[0] < weight.shape[0]:
            bias = F.pad(bias, (0, weight.shape[0] - bias.shape[0]))
        if prefers_skinny(values, weight):
            return skinny_linear(values, weight, bias, dtype, scales, tensors["weight_scale"])
        return fp8_linear(values, scales, weight, tensors["weight_scale"], bias, dtype)

    def rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Activation, Tensor]:
        return rms_norm_quantize(x, residual, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Activation:
        return silu_mul_quantize(gate_up)
