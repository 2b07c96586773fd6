"""The gated feed-forward block (SwiGLU): fused gate-and-up product, silu(gate) * up, down product."""

from __future__ import annotations

import torch
from torch import nn

from appliance.distributed import TensorParallel
from appliance.kernels.deferred_scale import Product
from appliance.layers.linear import ColumnParallelLinear, RowParallelLinear
from appliance.quantization.scheme import Activation, PrecisionScheme
from appliance.types import ModelConfig


class GatedMLP(nn.Module):
    """Shazeer, "GLU Variants Improve Transformer" (2020). x [n, hidden] as the scheme takes it -> [n, hidden].

    `name`: of the block in the engine, "layers.3.mlp", by which `scheme` tells how each product is stored."""

    def __init__(
        self, config: ModelConfig, name: str, *, scheme: PrecisionScheme, dtype: torch.dtype, tp: TensorParallel
    ) -> None:
        super().__init__()
        size = tp.share(config.intermediate_size, "feed-forward columns")
        self.gate_up = ColumnParallelLinear(
            config.hidden_size,
            2 * size,
            bias=config.mlp_bias,
            scheme=scheme.of(f"{name}.gate_up"),
            dtype=dtype,
            defer=True,
        )
        self.down = RowParallelLinear(
            size,
            config.hidden_size,
            bias=config.mlp_bias,
            scheme=scheme.of(f"{name}.down"),
            dtype=dtype,
            tp=tp,
            defer=True,
        )

    def forward(self, x: Activation) -> Product:
        """The result goes to the norm behind it, which takes a deferred product too."""
        out: Product = self.down(self.inner(x))
        return out

    def inner(self, x: Activation) -> Activation:
        """What the down product takes."""
        return self.down.scheme.silu_mul(self.gate_up(x), self.down.prepared)
