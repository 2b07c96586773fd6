"""No quantization: weights stored and multiplied in float32, float16 or bfloat16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.kernels.skinny_linear import prefers_skinny, skinny_linear
from appliance.quantization.scheme import Activation, PrecisionScheme

PLUGIN = {
    "name": "none",
    "precisions": ["fp32", "fp16", "bf16"],
    "weight_bits": 16,  # of fp16 and bf16; fp32 is named by the precision itself
    "activation_bits": 16,
    "min_compute_capability": [7, 0],
    # Largest relative error of a product, per precision, that the builder's self-check accepts (builder/selfcheck.py).
    "tolerance": {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2},
}


class Scheme(PrecisionScheme):
    def tensors(
        self, out_features: int, in_features: int, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"weight": ((out_features, in_features), dtype)}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight}

    def apply(self, tensors: dict[str, Tensor], x: Activation, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        assert isinstance(x, Tensor), "this scheme takes activations in the model's dtype"
        weight = tensors["weight"]
        if prefers_skinny(x, weight):
            return skinny_linear(x, weight, bias, dtype)
        return F.linear(x, weight, bias)
