"""How far a quantized product is from the original on sampled inputs: what searches minimize and builds print.

The outputs of products that are fused are judged apart, each in relation to its own size: q, k and v; gate and up by
silu(gate) * up, as nothing else reads them. Knows nothing of scales or roundings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.quantization.calibration.block import BlockWeights
from appliance.quantization.calibration.folding import row_chunks

_TINY = 1e-30


class OutputError:
    """Of one product of a block, on one sample of its inputs."""

    def __init__(self, block: BlockWeights, key: str, sample: Tensor) -> None:
        """`key` of `PRODUCTS`; `sample` float32 [n, in], inputs as the original model has them."""
        linear = getattr(block, key)
        self._block, self._key = block, key
        self.weight: Tensor = linear.weight
        self._bias: Tensor | None = linear.bias
        self.sample = sample
        self._reference = self._parts(self._outputs(self._original, sample))
        self._sizes = [part.square().sum().clamp_min(_TINY) for part in self._reference]

    def of(self, weight: Callable[[slice], Tensor], sample: Tensor | None = None) -> float:
        """Root of the mean over parts of ||y - reference||^2 / ||reference||^2, with weight(rows) float32 [rows, in]
        in place of the original's rows; `sample`: in place of the inputs, e.g. as rounded."""
        parts = self._parts(self._outputs(weight, self.sample if sample is None else sample))
        errors = [
            (part - reference).square_().sum() / size
            for part, reference, size in zip(parts, self._reference, self._sizes)
        ]
        return float(torch.stack(errors).mean().sqrt())

    def _original(self, rows: slice) -> Tensor:
        return self.weight[rows].float()

    def _outputs(self, weight: Callable[[slice], Tensor], sample: Tensor) -> Tensor:
        outputs = torch.empty(sample.shape[0], self.weight.shape[0], device=sample.device)
        for rows in row_chunks(self.weight):
            outputs[:, rows] = sample @ weight(rows).T
        return outputs

    def _parts(self, y: Tensor) -> list[Tensor]:
        block = self._block
        if self._key == "qkv":
            kv_size = block.num_kv_heads * block.head_dim
            return list(y.split((y.shape[1] - 2 * kv_size, kv_size, kv_size), dim=1))
        if self._key == "gate_up":
            gate, up = (y if self._bias is None else y + self._bias.float()).chunk(2, dim=1)
            return [F.silu(gate) * up]
        return [y]
