"""A decoder block as the calibration algorithms see it: four products, two norms, and what comes back.

    input_norm -> qkv -> (norm of heads, rotation) -> attention -> o
    post_attention_norm -> gate_up -> silu(gate) * up -> down

Knows which products read a norm's output and which rows of one product feed the input channels of another; nothing of
how scales are found, nor of models, engines or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from appliance.errors import CheckpointError, EngineBuildError
from appliance.quantization.weights import QuantizedWeight

# The products of a block, in the order in which they run, with their names in an engine, below the block's own.
PRODUCTS = {"qkv": "attention.qkv", "o": "attention.o", "gate_up": "mlp.gate_up", "down": "mlp.down"}
# The norms, likewise; `QuantizedBlock.norms` has these keys.
NORMS = {"input_norm": "input_norm.weight", "post_attention_norm": "post_attention_norm.weight"}


@dataclass(frozen=True)
class LinearWeights:
    """A product's weight and bias, float of any dtype, on one device."""

    weight: Tensor  # [out, in]
    bias: Tensor | None = None  # [out]


@dataclass(frozen=True)
class BlockWeights:
    """A decoder block's weights as in a checkpoint. Nothing here is written to."""

    name: str  # "layers.3": for messages
    input_norm: Tensor  # [hidden], float of the engine's dtype, which a folded one keeps
    qkv: LinearWeights  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden]: q, k and v on top of each other
    o: LinearWeights  # [hidden, num_heads * head_dim]
    post_attention_norm: Tensor  # [hidden]
    gate_up: LinearWeights  # [2 * intermediate, hidden]: gate on top of up
    down: LinearWeights  # [hidden, intermediate]
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def products(self) -> Iterator[tuple[str, LinearWeights]]:
        """(key of `PRODUCTS`, weights), in order."""
        for key in PRODUCTS:
            yield key, getattr(self, key)

    def check(self) -> None:
        """CheckpointError, naming the tensor, for NaN and infinite numbers."""
        for key, linear in self.products():
            _require_finite(f"{self.name}.{PRODUCTS[key]}.weight", linear.weight)
            if linear.bias is not None:
                _require_finite(f"{self.name}.{PRODUCTS[key]}.bias", linear.bias)
        for key, name in NORMS.items():
            _require_finite(f"{self.name}.{name}", getattr(self, key))

    @property
    def v_rows(self) -> slice:
        """The rows of qkv that give v: kv_head-major, head_dim each."""
        size = self.num_kv_heads * self.head_dim
        return slice(self.qkv.weight.shape[0] - size, self.qkv.weight.shape[0])

    @property
    def up_rows(self) -> slice:
        """The rows of gate_up that give up."""
        size = self.gate_up.weight.shape[0]
        return slice(size // 2, size)

    def o_inputs_by_v(self, per_input: Tensor) -> Tensor:
        """[num_heads * head_dim], a number per input channel of o -> [num_heads / num_kv_heads, num_kv_heads *
        head_dim]: column j has those of the channels that v's row j feeds."""
        group = self.num_heads // self.num_kv_heads
        return per_input.view(self.num_kv_heads, group, self.head_dim).transpose(0, 1).reshape(group, -1)

    def v_to_o_inputs(self, per_row: Tensor) -> Tensor:
        """[num_kv_heads * head_dim], a number per row of v -> [num_heads * head_dim]: repeated for all query heads that
        share the row."""
        group = self.num_heads // self.num_kv_heads
        rows = per_row.view(self.num_kv_heads, 1, self.head_dim)
        return rows.expand(-1, group, -1).reshape(-1)

    def per_input(self, key: str, scales: Tensor) -> Tensor:
        """Scales as they are folded (for "o" a number per row of v) -> [in], a number per input channel."""
        return self.v_to_o_inputs(scales) if key == "o" else scales


@dataclass(frozen=True)
class ProductError:
    """Relative error of a product's output on the sampled inputs; `output_error.py` says how it is measured."""

    nearest: float  # rounded to nearest, nothing else done
    result: float  # what came back


@dataclass(frozen=True)
class QuantizedBlock:
    """What an engine stores of a block. With these tensors it computes what the original does, but for rounding."""

    weights: dict[str, QuantizedWeight]  # by key of `PRODUCTS`
    norms: dict[str, Tensor]  # by key of `NORMS`; dtype as given
    biases: dict[str, Tensor]  # by key of `PRODUCTS`, of those that have one; dtype as given
    errors: dict[str, ProductError]  # by key of `PRODUCTS`
    choices: dict[str, str]  # by key of `PRODUCTS`: what a search chose, for the log: "ratio 0.45, clipped"


def require_groups(block: BlockWeights, group_size: int) -> None:
    """EngineBuildError for a group size that does not divide the inputs of every product."""
    for key, linear in block.products():
        if linear.weight.shape[1] % group_size:
            raise EngineBuildError(
                f"a group size of {group_size} does not divide the {linear.weight.shape[1]} input features of "
                f"{block.name}.{PRODUCTS[key]}",
                hint="choose a group size that does, or a precision without groups: int8, fp8 or bf16",
            )


def _require_finite(name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name} holds NaN or infinite numbers", hint="the checkpoint is damaged; fetch it again")
