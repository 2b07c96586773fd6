"""A weight rounded by its scheme in blocks of rows, so that what it takes in between is bounded. Knows no scheme."""

from __future__ import annotations

import torch
from torch import Tensor

from appliance.quantization.scheme import PrecisionScheme

_AT_ONCE = 64 << 20  # weights; a scheme's float32 intermediates take some 12 bytes for each


def quantize(scheme: PrecisionScheme, weight: Tensor) -> dict[str, Tensor]:
    """`scheme.quantize` of weight [out, in] over blocks of rows, which are independent: stored tensors by suffix.
    Raises what it raises."""
    rows = max(1, _AT_ONCE // weight.shape[1])
    if weight.shape[0] <= rows:
        return scheme.quantize(weight)
    blocks = [scheme.quantize(block) for block in torch.split(weight, rows)]
    announced = scheme.tensors(weight.shape[0], weight.shape[1], weight.dtype)
    stacked = {}
    for suffix, (shape, _) in announced.items():
        parts = [block[suffix] for block in blocks]
        # What does not belong to rows, such as an order of the inputs, is the same in every block.
        stacked[suffix] = torch.cat(parts) if sum(map(len, parts)) == shape[0] else parts[0]
    return stacked


def quantizing_bytes(numel: int) -> int:
    """Of memory that `quantize` needs in between, at most."""
    return 12 * min(numel, _AT_ONCE)
