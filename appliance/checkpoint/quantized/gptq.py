"""GPTQ checkpoints as AutoGPTQ and GPTQModel write them (`quant_method: gptq`), https://github.com/ModelCloud/GPTQModel;
the method: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
arXiv:2210.17323.

A layer: `qweight` int32 [in / 8, out], `qzeros` int32 [groups, out / 8], `scales` float16 [groups, out], `g_idx` int32
[in], the group of each input: weight = (value - zero) * scale. Nibble i of a word is the i-th of its eight. The layout
"gptq" stores zero points less one, "gptq_v2" as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from appliance.quantization.weights import QuantizedWeight

_LAYOUTS = ("gptq", "gptq_v2")
_RULES = ("bits", "group_size", "sym", "desc_act")  # what a rule of `dynamic` may change for some layers


class Gptq(Layout):
    method = "gptq"
    marks = ("qweight",)
    scales = ("scales",)

    def facts(self, config: Raw, where: Path) -> Quantization:
        bits = config.get("bits")
        if bits != 4:
            raise unsupported(where, f"GPTQ in {bits!r} bits", "4 bits")
        layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
        if config.get("is_marlin_format"):
            layout = "marlin"
        if layout not in _LAYOUTS:
            raise unsupported(where, f"GPTQ's {layout!r} layout", ", ".join(_LAYOUTS))
        for pattern, rule in _dynamic(config).items():
            changed = [key for key in _RULES if key in rule and rule[key] != config.get(key)]
            if not pattern.startswith("-:") and changed:
                raise unsupported(where, f"another {changed[0]} for {pattern!r}", "one for all layers, or none ('-:')")
        channelwise = config.get("group_size") in (None, -1)
        return Quantization(
            "gptq",
            layout,
            "int4",
            group_size=stored_group_size(config.get("group_size"), where),
            symmetric=bool(config.get("sym", True)),
            # With one group for all inputs their order is of no consequence.
            act_order=bool(config.get("desc_act", False)) and not channelwise,
        )

    def ignores(self, config: Raw, module: str) -> bool:
        if module == "lm_head" and not config.get("lm_head"):
            return True
        rules = [pattern.removeprefix("-:") for pattern in _dynamic(config) if pattern.startswith("-:")]
        inside = config.get("modules_in_block_to_quantize")
        if isinstance(inside, list) and module != "lm_head":
            chosen = [name for block in inside for name in (block if isinstance(block, list) else [block])]
            if not any(module.endswith(f".{name}") for name in chosen):
                return True
        return names_part_of(config.get("modules_to_not_convert"), module) or any(re.match(r, module) for r in rules)

    def expected(self, out_features: int, in_features: int, facts: Quantization) -> list[Expected]:
        words = -(-out_features // 8)
        groups = {in_features // facts.group_size, 1}
        return [
            Expected("qweight", ((in_features // 8, out_features),), ("int32",)),
            Expected("qzeros", tuple((n, words) for n in groups), ("int32",)),
            Expected("scales", tuple((n, out_features) for n in groups), FLOATS),
            Expected("g_idx", ((in_features,),), ("int32", "int64"), optional=not facts.act_order),
        ]

    def read(self, layer: Layer, facts: Quantization) -> QuantizedWeight:
        from appliance.checkpoint.quantized.unpack import float16_scales, grouped_weight, nibbles

        values = nibbles(layer["qweight"]).permute(1, 0, 2).flatten(1)  # [in / 8, out, 8] -> [out, in]
        zeros = (
            nibbles(layer["qzeros"]).flatten(1)[:, : layer.out_features].t()
        )  # [groups, out / 8, 8] -> [out, groups]
        if facts.layout == "gptq":
            zeros = (zeros + 1) & 15
        scales = float16_scales(layer, "scales", layer["scales"]).t()
        return grouped_weight(layer, values, scales, zeros, "g_idx" if "g_idx" in layer else None, facts)


def _dynamic(config: Raw) -> dict[str, dict[str, Any]]:
    """GPTQModel's rules by regular expression of a module's name; "-:" in front: not quantized."""
    rules = config.get("dynamic")
    return {str(k): v if isinstance(v, dict) else {} for k, v in rules.items()} if isinstance(rules, dict) else {}
