"""Normalization layers: RMS norm of the residual stream, and per head of queries and keys.

The residual stream is carried beside the activations, so that "add, normalize, quantize for the next product" is one
operation: `x, residual = norm(x, residual)`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from appliance.kernels import norm
from appliance.kernels.deferred_scale import Product
from appliance.layers.linear import parameter
from appliance.quantization.scheme import Activation, PrecisionScheme


class ResidualRMSNorm(nn.Module):
    """RMS norm in front of a linear layer, whose own scheme `scheme` is."""

    def __init__(self, size: int, eps: float, scheme: PrecisionScheme, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter((size,), dtype)
        self._eps = eps
        self._scheme = scheme

    def forward(
        self, x: Product, residual: Tensor | None, behind: Mapping[str, Tensor] | None = None
    ) -> tuple[Activation, Tensor]:
        """x [n, size], its scales applied if that is still to be done, is added to the residual stream (None: it starts
        with x). Returns what the next linear layer takes, and the stream; the residual passed in is overwritten.
        `behind`: prepared tensors of that layer, among which may be the scale of its input."""
        return self._scheme.rms_norm(x, residual, self.weight, self._eps, behind)


class FinalRMSNorm(nn.Module):
    """RMS norm at the end of the decoder: its output leaves the model, so it is never quantized."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter((size,), dtype)
        self._eps = eps

    def forward(self, x: Product, residual: Tensor | None) -> Tensor:
        """norm(x + residual), [n, size]."""
        return norm.rms_norm(x, residual, self.weight, self._eps)[0]


class HeadRMSNorm(nn.Module):
    """Weight of the RMS norm over each head of q or k; applied to both at once by `kernels.norm.qk_rms_norm_`."""

    def __init__(self, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter((head_dim,), dtype)
