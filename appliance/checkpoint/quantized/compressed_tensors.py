"""compressed-tensors checkpoints (`quant_method: compressed-tensors`), as llm-compressor writes them,
https://github.com/neuralmagic/compressed-tensors.

Three formats are read, all for linear layers, with one quantization for all layers that are not ignored:

- float-quantized: FP8 weights per tensor or output channel, activations per token or with a static scale per tensor;
- int-quantized: INT8 weights likewise (`weight` int8, `weight_scale`), activations per token;
- pack-quantized: INT4 weights, 16-bit activations. `weight_packed` int32 [out, in / 8], nibble i the i-th of its eight
  inputs, value + 8; `weight_scale` [out, groups]; `weight_zero_point` int32 [out / 8, groups], packed over outputs;
  `weight_shape` int64 [2]; with actorder "group" `weight_g_idx` int32 [in].

A group's `targets` and the `ignore` list hold names of modules, classes ("Linear"), or regular expressions after "re:".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.checkpoint.quantized.fp8 import ONE_NUMBER, fp8_tensors, read_fp8
from appliance.checkpoint.quantized.layout import (
    FLOATS,
    Expected,
    Layer,
    Layout,
    Raw,
    stored_group_size,
    unsupported,
)
from appliance.types import Quantization

if TYPE_CHECKING:
    from appliance.quantization.weights import QuantizedWeight

_ALLOWED = (
    "float-quantized (FP8 weights and activations), int-quantized (INT8 weights and activations) and pack-quantized "
    "(INT4 weights)"
)
_FORMATS = ("float-quantized", "int-quantized", "pack-quantized", "naive-quantized")
_CLASS = "Linear"


class CompressedTensors(Layout):
    method = "compressed-tensors"
    marks = ("weight_packed", "weight_scale")
    scales = ("weight_scale", "input_scale")

    def facts(self, config: Raw, where: Path) -> Quantization:
        _refuse_sparsity(config, where)
        group = _only_group(config, where)
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        layout = str(group.get("format") or config.get("format"))
        if layout not in _FORMATS:
            raise unsupported(where, f"the format {layout!r} of compressed-tensors", _ALLOWED)
        if group.get("output_activations"):
            raise unsupported(where, "quantized outputs of layers", "quantized weights and inputs")
        kv_cache = _kv_cache(config, where)
        kind = (weights.get("type", "int"), weights.get("num_bits", 8))
        if kind == ("int", 4):
            return _int4(weights, inputs, layout, kv_cache, where)
        if kind not in (("float", 8), ("int", 8)) or layout == "pack-quantized":
            raise unsupported(where, f"{kind[1]}-bit {kind[0]} weights in the format {layout}", _ALLOWED)
        return _eight_bits(weights, inputs, layout, kv_cache, where)

    def ignores(self, config: Raw, module: str) -> bool:
        targets = [t for group in _groups(config) for t in group.get("targets") or []]
        return not _matches(targets, module) or _matches(config.get("ignore") or [], module)

    def expected(self, out_features: int, in_features: int, facts: Quantization) -> list[Expected]:
        if facts.precision == "fp8":
            return fp8_tensors(out_features, in_features, facts)
        if facts.precision == "int8":
            scales = (*ONE_NUMBER, (out_features,), (out_features, 1))
            return [
                Expected("weight", ((out_features, in_features),), ("int8",)),
                Expected("weight_scale", scales, FLOATS),
            ]
        groups = {in_features // facts.group_size, 1}
        zeros = tuple((-(-out_features // 8), n) for n in groups)
        return [
            Expected("weight_packed", ((out_features, in_features // 8),), ("int32",)),
            Expected("weight_scale", tuple((out_features, n) for n in groups), FLOATS),
            Expected("weight_shape", ((2,),), ("int64", "int32"), optional=True),
            *([] if facts.symmetric else [Expected("weight_zero_point", zeros, ("int32",))]),
            *([Expected("weight_g_idx", ((in_features,),), ("int32", "int64"))] if facts.act_order else []),
        ]

    def read(self, layer: Layer, facts: Quantization) -> QuantizedWeight:
        if facts.precision == "fp8":
            return read_fp8(layer, facts)
        return _read_int8(layer) if facts.precision == "int8" else _read_int4(layer, facts)


# ---------------------------------------------------------------- configuration


def _groups(config: Raw) -> list[dict[str, Any]]:
    groups = config.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _only_group(config: Raw, where: Path) -> dict[str, Any]:
    """The one way in which all layers are quantized; groups that differ in their targets only count as one."""
    groups = _groups(config)
    if not groups:
        raise unsupported(where, "compressed-tensors, but without config_groups", _ALLOWED)

    def essence(group: dict[str, Any]) -> list[object]:
        weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
        keys = ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "actorder", "block_structure")
        return [[part.get(key) for key in keys] for part in (weights, inputs)] + [group.get("format")]

    if any(essence(group) != essence(groups[0]) for group in groups):
        raise unsupported(where, f"{len(groups)} different ways in one model (config_groups)", "one for all layers")
    return groups[0]


def _refuse_sparsity(config: Raw, where: Path) -> None:
    sparsity = config.get("sparsity_config") or {}
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise unsupported(where, f"compressed sparse weights ({sparsity.get('format')})", "dense weights")
    if config.get("transform_config"):
        raise unsupported(where, "transforms of weights and activations (transform_config)", "none")


def _kv_cache(config: Raw, where: Path) -> str | None:
    scheme = config.get("kv_cache_scheme")
    if not scheme:
        return None
    static = isinstance(scheme, dict) and not scheme.get("dynamic") and scheme.get("symmetric", True)
    if not static or (scheme.get("type"), scheme.get("num_bits"), scheme.get("strategy")) != ("float", 8, "tensor"):
        raise unsupported(where, f"the kv_cache_scheme {scheme!r}", "static FP8 with one scale per tensor, or none")
    return "fp8"


def _eight_bits(weights: Raw, inputs: Raw | None, layout: str, kv_cache: str | None, where: Path) -> Quantization:
    is_float = weights.get("type") == "float"
    precision = "FP8" if is_float else "INT8"
    if weights.get("strategy", "tensor") not in ("tensor", "channel") or not weights.get("symmetric", True):
        kind = f"scales per {weights.get('strategy')}" if weights.get("symmetric", True) else "zero points"
        raise unsupported(where, f"{precision} weights with {kind}", "symmetric, a scale per tensor or channel")
    if not inputs or (inputs.get("type", "int"), inputs.get("num_bits", 8)) != (weights.get("type", "int"), 8):
        raise unsupported(where, f"{precision} weights but other activations", f"{precision} for both")
    if not inputs.get("symmetric", True):
        raise unsupported(where, "zero points of activations", "symmetric activations")
    strategy, dynamic = inputs.get("strategy", "tensor"), bool(inputs.get("dynamic"))
    if strategy not in ("tensor", "token") or not (dynamic or (is_float and strategy == "tensor")):
        what = f"{'dynamic' if dynamic else 'static'} scales of activations per {strategy}"
        raise unsupported(where, what, "dynamic per token" + (", static per tensor" if is_float else ""))
    return Quantization(
        "compressed-tensors",
        layout,
        "fp8" if is_float else "int8",
        static_input=not dynamic,
        kv_cache=kv_cache,
    )


def _int4(weights: Raw, inputs: Raw | None, layout: str, kv_cache: str | None, where: Path) -> Quantization:
    if inputs or layout != "pack-quantized":
        what = "quantized activations" if inputs else f"the format {layout}"
        raise unsupported(where, f"INT4 weights with {what}", "16-bit activations, pack-quantized")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if strategy not in ("group", "channel"):
        raise unsupported(where, f"INT4 weights with scales per {strategy}", "group, channel")
    return Quantization(
        "compressed-tensors",
        layout,
        "int4",
        group_size=stored_group_size(weights.get("group_size") if strategy == "group" else None, where),
        symmetric=bool(weights.get("symmetric", True)),
        act_order=strategy == "group" and weights.get("actorder") in ("group", "dynamic", True),
        kv_cache=kv_cache,
    )


def _matches(patterns: list[Any], module: str) -> bool:
    """Whether one of the names, classes or regular expressions means a linear layer."""
    return any(
        re.match(p[3:], module) is not None if p.startswith("re:") else p in (module, _CLASS)
        for p in map(str, patterns)
    )


# ---------------------------------------------------------------- tensors


def _read_int8(layer: Layer) -> QuantizedWeight:
    from appliance.quantization.weights import ChannelWeight

    # Older versions wrote the zero points of symmetric weights too.
    if "weight_zero_point" in layer and bool(layer["weight_zero_point"].any()):
        raise layer.wrong("weight_zero_point", "is not zero, but the configuration says symmetric")
    scales = layer["weight_scale"].float().reshape(-1, 1).expand(layer.out_features, 1).contiguous()
    return ChannelWeight(layer["weight"], scales)


def _read_int4(layer: Layer, facts: Quantization) -> QuantizedWeight:
    import torch

    from appliance.checkpoint.quantized.unpack import float16_scales, grouped_weight, nibbles

    if "weight_shape" in layer and layer["weight_shape"].tolist() != [layer.out_features, layer.in_features]:
        raise layer.wrong("weight_shape", f"is {layer['weight_shape'].tolist()}, not that of the layer")
    values = nibbles(layer["weight_packed"]).flatten(1)
    scales = float16_scales(layer, "weight_scale", layer["weight_scale"])
    zeros = torch.full(scales.shape, 8, dtype=torch.uint8, device=scales.device)
    if not facts.symmetric:
        packed = nibbles(layer["weight_zero_point"]).transpose(1, 2)  # [out / 8, 8, groups]
        zeros = packed.flatten(0, 1)[: layer.out_features]
    return grouped_weight(layer, values, scales, zeros, "weight_g_idx" if facts.act_order else None, facts)
