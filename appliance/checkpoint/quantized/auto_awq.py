"""AutoAWQ's GEMM layout (`quant_method: awq`), https://github.com/casper-hansen/AutoAWQ; the method: Lin et al., AWQ:
Activation-aware Weight Quantization, arXiv:2306.00978.

A layer: `qweight` int32 [in, out / 8], `qzeros` int32 [in / group, out / 8], `scales` float16 [in / group, out]:
weight = (value - zero) * scale. A word's nibble i holds output channel [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from appliance.checkpoint.quantized.layout import (
    FLOATS,
    Expected,
    Layer,
    Layout,
    Raw,
    names_part_of,
    stored_group_size,
    unsupported,
)
from appliance.types import Quantization

if TYPE_CHECKING:
    from torch import Tensor

    from appliance.quantization.weights import QuantizedWeight

_NIBBLE_OF_CHANNEL = (0, 4, 1, 5, 2, 6, 3, 7)  # the inverse of the order above


class AutoAwq(Layout):
    method = "awq"
    marks = ("qweight",)
    scales = ("scales",)

    def facts(self, config: Raw, where: Path) -> Quantization:
        bits = config.get("bits", config.get("w_bit", 4))
        if bits != 4:
            raise unsupported(where, f"AWQ in {bits!r} bits", "4 bits")
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm":
            raise unsupported(where, f"AWQ's {version!r} layout", "gemm")
        if config.get("zero_point") is False:
            raise unsupported(where, "AWQ without zero points", "zero_point: true")
        size = stored_group_size(config.get("group_size", config.get("q_group_size")), where)
        return Quantization("awq", "gemm", "int4", group_size=size, symmetric=False)

    def ignores(self, config: Raw, module: str) -> bool:
        """AutoAWQ never quantizes the head, whatever the list says."""
        head = module == "lm_head" and not config.get("lm_head")
        return head or names_part_of(config.get("modules_to_not_convert"), module)

    def expected(self, out_features: int, in_features: int, facts: Quantization) -> list[Expected]:
        words = -(-out_features // 8)
        groups = {in_features // facts.group_size, 1}
        return [
            Expected("qweight", ((in_features, words),), ("int32",)),
            Expected("qzeros", tuple((n, words) for n in groups), ("int32",)),
            Expected("scales", tuple((n, out_features) for n in groups), FLOATS),
        ]

    def read(self, layer: Layer, facts: Quantization) -> QuantizedWeight:
        from appliance.checkpoint.quantized.unpack import float16_scales, grouped_weight

        scales = float16_scales(layer, "scales", layer["scales"]).t()
        values, zeros = (_channels(layer[name], layer.out_features) for name in ("qweight", "qzeros"))
        return grouped_weight(layer, values, scales, zeros, None, facts)


def _channels(words: Tensor, out_features: int) -> Tensor:
    """int32 [n, out / 8] -> uint8 [out, n]."""
    from appliance.checkpoint.quantized.unpack import nibbles

    return nibbles(words)[..., list(_NIBBLE_OF_CHANNEL)].flatten(1)[:, :out_features].t()
