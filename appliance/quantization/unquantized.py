"""No quantization: weights stored and multiplied in float32, float16 or bfloat16."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.kernels.invariant_linear import invariant_linear
from appliance.kernels.skinny_linear import MAX_ROWS, Config, likely, multiprocessors, skinny_linear
from appliance.kernels.tactics import TABLE, Tactic, Tactics
from appliance.quantization.scheme import Activation, PrecisionScheme

PLUGIN = {
    "name": "none",
    "precisions": ["fp32", "fp16", "bf16"],
    "weight_bits": 16,  # of fp16 and bf16; fp32 is named by the precision itself
    "activation_bits": 16,
    "batch_invariant": True,
    "min_compute_capability": [7, 0],
    # Largest relative error of a product, per precision, that the builder's self-check accepts (builder/selfcheck.py).
    "tolerance": {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2},
}

_ELEMENT_SIZE = 2  # bytes of the numbers that there are several ways to multiply


class Scheme(PrecisionScheme):
    facts = PLUGIN

    def tensors(
        self, out_features: int, in_features: int, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"weight": ((out_features, in_features), dtype)}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight}

    def apply(self, tensors: dict[str, Tensor], x: Activation, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        assert isinstance(x, Tensor), "this scheme takes activations in the model's dtype"
        weight = tensors["weight"]
        if x.is_cuda and TABLE.batch_invariant:
            return invariant_linear(x, weight, bias, dtype)
        if not x.is_cuda or x.dtype.itemsize != _ELEMENT_SIZE:
            return F.linear(x, weight, bias)
        (n, k), rows = weight.shape, x.shape[0]
        tactic = TABLE.find(str(PLUGIN["name"]), n, k, rows, lambda bucket: self.tactics(n, k, bucket, weight.device))
        product: Tensor = (tactic or _library)(tensors, x, bias, dtype)
        return product

    def tactics(self, out_features: int, in_features: int, rows: int, device: torch.device) -> Tactics:
        """Of products in 16 bits. The library's is the default: on an H200 it reads a weight at 2.7 to 4.3 TB/s."""
        if device.type != "cuda":
            return {}
        found: dict[str, Tactic] = {"library": _library}
        if 0 < rows <= MAX_ROWS:
            for config in likely(out_features, in_features, rows, multiprocessors(device), _ELEMENT_SIZE):
                found[f"skinny {config.name}"] = functools.partial(_skinny, config=config)
        return found


def _library(tensors: dict[str, Tensor], x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(x, tensors["weight"], bias)


def _skinny(
    tensors: dict[str, Tensor], x: Tensor, bias: Tensor | None, dtype: torch.dtype, config: Config | None = None
) -> Tensor:
    """Own kernel for few rows, which streams the weight."""
    return skinny_linear(x, tensors["weight"], bias, dtype, config=config)
