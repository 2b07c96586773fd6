"""Checkpoints that others quantized: what they are (torch-free), and their weights as `QuantizedWeight`s.

`read_quantization` judges a checkpoint by its configuration and the names of its tensors; `source.py` reads it. One
file per published layout, each with a class derived from `layout.Layout`. Nothing here knows of engines or kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

from appliance.checkpoint.files import read_header, weight_files
from appliance.checkpoint.quantized.auto_awq import AutoAwq
from appliance.checkpoint.quantized.compressed_tensors import CompressedTensors
from appliance.checkpoint.quantized.fp8 import Fp8
from appliance.checkpoint.quantized.gptq import Gptq
from appliance.checkpoint.quantized.layout import USE_ORIGINAL, Layout
from appliance.checkpoint.quantized.modelopt import ModelOpt
from appliance.errors import CheckpointError
from appliance.types import Quantization

LAYOUTS: dict[str, Layout] = {
    layout.method: layout for layout in (CompressedTensors(), AutoAwq(), Gptq(), ModelOpt(), Fp8())
}
# Engine names of the fused products of a layer, and the modules that Hugging Face's decoders have for them.
_PARTS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.o": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


def read_quantization(
    path: Path, config: dict[str, Any] | None, num_layers: int, *, tied_head: bool
) -> Quantization | None:
    """Facts of the checkpoint in `path`; None if it is not quantized. `config`: the section of config.json, or what one
    of `files.QUANTIZATION_FILES` holds. Which layers are quantized is what the weights' headers show; where there are
    no weights yet, what the configuration says.

    Raises CheckpointError: an unknown method or layout, a part of it that is not supported, a fused product of which
    only a part is quantized.
    """
    if config is None:
        return None
    method = str(config.get("quant_method") or "unknown")
    layout = LAYOUTS.get(method)
    if layout is None:
        raise CheckpointError(
            f"{path}: the checkpoint is quantized with {method!r}, allowed: {', '.join(LAYOUTS)}", hint=USE_ORIGINAL
        )
    facts = layout.facts(config, path)
    names = _tensor_names(path)

    def is_plain(module: str) -> bool:
        marked = any(f"{module}.{mark}" in names for mark in layout.marks)
        if marked or f"{module}.weight" in names:
            return not marked
        return layout.ignores(config, module)

    plain = _unquantized(is_plain, num_layers, tied_head, path)
    if {"lm_head", *(f"layers.*.{part}" for part in _PARTS)} <= set(plain):
        raise CheckpointError(
            f"{path}: its configuration says that the checkpoint is quantized ({method}), but none of its layers is",
            hint="take the quantization out of its configuration, or download the checkpoint again",
        )
    return msgspec.structs.replace(facts, unquantized=plain)


def is_unquantized(facts: Quantization, name: str) -> bool:
    """Whether the linear layer with that engine name was left alone."""
    return any(fnmatchcase(name, pattern) for pattern in facts.unquantized)


def _tensor_names(path: Path) -> set[str]:
    try:
        return {name for file in weight_files(path) for name in read_header(file)}
    except CheckpointError:  # not downloaded yet, or damaged: whoever reads the weights says so
        return set()


def _unquantized(is_plain: Callable[[str], bool], num_layers: int, tied_head: bool, path: Path) -> tuple[str, ...]:
    """Engine names of what is plain; "layers.*.…" where every layer is."""
    found: list[str] = []
    for part, modules in _PARTS.items():
        plain = []
        for i in range(num_layers):
            kinds = {module: is_plain(f"model.layers.{i}.{module}") for module in modules}
            if len(set(kinds.values())) == 2:
                quantized = ", ".join(module for module, kind in kinds.items() if not kind)
                raise CheckpointError(
                    f"{path}: of {', '.join(modules)} of layer {i}, which are one product here, only {quantized} "
                    "is quantized, allowed: all of them or none",
                    hint=USE_ORIGINAL,
                )
            if kinds[modules[0]]:
                plain.append(i)
        found += [f"layers.*.{part}"] if len(plain) == num_layers else [f"layers.{i}.{part}" for i in plain]
    if tied_head or is_plain("lm_head"):
        found.append("lm_head")
    return tuple(found)
