"""Scales of input channels, divided out of a product's inputs and multiplied into its weight, so that a block computes
what it did before: the division is folded into whatever makes those inputs.

    qkv, gate_up   the weight of the RMS norm in front
    o              the rows and bias of v: attention averages v, so a factor per channel goes through it; query heads
                   that share a key/value head share the scale
    down           the rows and bias of up: silu(gate) * up is linear in up; gate stays as it is

A norm over the heads of q and k (Qwen3) comes behind qkv, so it does not matter here. Knows nothing of how scales are
found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from appliance.quantization.calibration.block import PRODUCTS, BlockWeights

_CHUNK = 1 << 25  # numbers of a weight that are handled at a time: 128 MiB in float32
_NORM_OF = {"qkv": "input_norm", "gate_up": "post_attention_norm"}


def row_chunks(weight: Tensor) -> Iterator[slice]:
    """The rows of a weight [out, in], in parts whose float32 copies are small beside a large model's layer."""
    step = max(_CHUNK // weight.shape[1], 1)
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


class Folding:
    """A block with scales folded in. Weights are given in float32, part by part; nothing of the original is written."""

    def __init__(self, block: BlockWeights, scales: Mapping[str, Tensor]) -> None:
        """`scales`: by key of `PRODUCTS`, float32 > 0 on the block's device, [in] but for "o", where they are per row
        of v, [num_kv_heads * head_dim]. A product without an entry keeps its inputs."""
        self._block = block
        self.norms: dict[str, Tensor] = {}  # by key of `block.NORMS`, dtype as given
        self.inputs: dict[str, Tensor] = {}  # float32 [in]: the inputs of a product have been divided by these
        self._rows: dict[str, Tensor] = {}  # float32 [out]: rows of a product have been divided by these
        for key, norm_key in _NORM_OF.items():
            norm: Tensor = getattr(block, norm_key)
            self.norms[norm_key] = norm
            if key in scales:
                self.norms[norm_key], self.inputs[key] = _fold_norm(norm, scales[key])
        if "o" in scales:
            self.inputs["o"] = block.v_to_o_inputs(scales["o"].float())
            self._rows["qkv"] = _ones_but(block.qkv.weight, block.v_rows, scales["o"])
        if "down" in scales:
            self.inputs["down"] = scales["down"].float()
            self._rows["gate_up"] = _ones_but(block.gate_up.weight, block.up_rows, scales["down"])

    def weight(self, key: str, rows: slice = slice(None)) -> Tensor:
        """float32 [rows, in], a copy: the product's weight with all scales in it."""
        weight: Tensor = getattr(self._block, key).weight[rows]
        folded = weight * self.inputs[key] if key in self.inputs else weight.to(torch.float32, copy=True)
        return folded.div_(self._rows[key][rows, None]) if key in self._rows else folded

    def unfold_rows(self, key: str, folded: Tensor, rows: slice = slice(None)) -> Tensor:
        """A weight in the form of `weight`, changed in place to what it is for the original inputs and outputs."""
        if key in self.inputs:
            folded /= self.inputs[key]
        if key in self._rows:
            folded *= self._rows[key][rows, None]
        return folded

    def biases(self) -> dict[str, Tensor]:
        """By key of `PRODUCTS`, of those that have one; dtype as given."""
        found: dict[str, Tensor] = {}
        for key in PRODUCTS:
            bias: Tensor | None = getattr(self._block, key).bias
            if bias is not None:
                found[key] = (bias.float() / self._rows[key]).to(bias.dtype) if key in self._rows else bias
        return found


def _fold_norm(norm: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """(norm / scales in the norm's dtype, the scales that this really divides by). The weight gets the latter, so that
    rounding the norm to 16 bits costs nothing. Where the norm is zero, or would become so, nothing is folded."""
    folded = (norm.float() / scales).to(norm.dtype)
    possible = (folded != 0) & torch.isfinite(folded)
    folded = torch.where(possible, folded, norm)
    effective = norm.float() / folded.float()
    return folded, torch.where(possible, effective, torch.ones_like(effective))


def _ones_but(weight: Tensor, rows: slice, values: Tensor) -> Tensor:
    ones = torch.ones(weight.shape[0], device=weight.device)
    ones[rows] = values.float()
    return ones


def normalized(scales: Tensor, alive: Tensor) -> Tensor:
    """scales [n] > 0 over their geometric mean, which changes no rounding error but keeps numbers in range; 1 where a
    channel was not `alive` (bool [n]), i.e. always zero in the calibration text: nothing is known of it."""
    logs = torch.where(alive, scales.log(), torch.zeros_like(scales))
    mean = logs.sum() / alive.sum().clamp_min(1)
    return torch.where(alive, (logs - mean).exp(), torch.ones_like(scales))
