"""`quant_method: fp8`, one scale per tensor, as vLLM and others write it; and FP8 tensors, which other layouts share.

A layer: `weight` float8_e4m3fn [out, in], `weight_scale` (one number, or one per output channel), and with static
activations `input_scale` (one number): weight = value * weight_scale, and x is rounded as x / input_scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from appliance.checkpoint.quantized.layout import FLOATS, Expected, Layer, Layout, Raw, names_part_of, unsupported
from appliance.types import Quantization

if TYPE_CHECKING:
    from appliance.quantization.weights import QuantizedWeight

ONE_NUMBER: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))


class Fp8(Layout):
    method = "fp8"
    marks = ("weight_scale", "weight_scale_inv")
    scales = ("weight_scale", "input_scale")

    def facts(self, config: Raw, where: Path) -> Quantization:
        if config.get("weight_block_size") is not None:
            raise unsupported(where, f"FP8 in blocks of {config['weight_block_size']}", "one scale per tensor or row")
        activation = config.get("activation_scheme", "dynamic")
        if activation not in ("dynamic", "static"):
            raise unsupported(where, f"activation_scheme {activation!r}", "dynamic, static")
        if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
            raise unsupported(where, f"fmt {config['fmt']!r}", "e4m3")
        return Quantization("fp8", "fp8", "fp8", static_input=activation == "static")

    def ignores(self, config: Raw, module: str) -> bool:
        return any(names_part_of(config.get(key), module) for key in ("ignored_layers", "modules_to_not_convert"))

    def expected(self, out_features: int, in_features: int, facts: Quantization) -> list[Expected]:
        return fp8_tensors(out_features, in_features, facts)

    def read(self, layer: Layer, facts: Quantization) -> QuantizedWeight:
        return read_fp8(layer, facts)


def fp8_tensors(out_features: int, in_features: int, facts: Quantization) -> list[Expected]:
    per_row = ((out_features,), (out_features, 1))
    tensors = [
        Expected("weight", ((out_features, in_features),), ("float8_e4m3fn",)),
        Expected("weight_scale", (*ONE_NUMBER, *per_row), FLOATS),
    ]
    return [*tensors, Expected("input_scale", ONE_NUMBER, FLOATS)] if facts.static_input else tensors


def read_fp8(layer: Layer, facts: Quantization) -> QuantizedWeight:
    from appliance.quantization.weights import Fp8Weight

    scales = layer["weight_scale"].float().reshape(-1, 1).expand(layer.out_features, 1).contiguous()
    input_scale = layer["input_scale"].float().reshape(1) if facts.static_input else None
    return Fp8Weight(layer["weight"], scales, input_scale)
