"""config.json of a Hugging Face checkpoint as a typed `ModelConfig`. Torch-free; opens no weights but one header.

Reads the older form (`rope_scaling` and `rope_theta`, `torch_dtype`) and that of transformers 5 (`rope_parameters`,
`dtype`). What an architecture leaves unsaid comes from its plug-in's `PLUGIN["config"]`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from appliance import registry
from appliance.checkpoint.files import QUANTIZATION_FILES, first_dtype
from appliance.checkpoint.quantized import read_quantization
from appliance.errors import CheckpointError
from appliance.types import ModelConfig, RopeScaling

_DTYPES = ("float32", "float16", "bfloat16")
_ROPE_KINDS = ("llama3", "linear", "dynamic", "yarn")
_ROPE_UNSUPPORTED = ("mscale", "mscale_all_dim", "short_factor", "long_factor", "mrope_section")
_Raw = dict[str, Any]


def read_json(path: Path, *, required: bool = True) -> _Raw:
    """An object from a JSON file; {} if it is absent and not required. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if not required:
            return {}
        raise CheckpointError(
            f"{path.parent} has no {path.name}", hint="is it the directory of a Hugging Face checkpoint?"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint="download the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object", hint="download the checkpoint again")
    return value


def read_model_config(path: Path, *, architectures: Mapping[str, registry.Plugin] | None = None) -> ModelConfig:
    """The model's shape. `architectures` is a seam for tests; by default those of `models/`.

    Raises CheckpointError: no or damaged config.json, unknown architecture (lists the known), remote code asked for,
    a missing or impossible value, a rotary scaling or layer type that is not supported, a quantized checkpoint whose
    layout is not read here.
    """
    raw = read_json(path / "config.json")
    known = registry.architectures() if architectures is None else architectures
    architecture = _architecture(raw, known, path)
    _refuse_remote_code(raw, path)
    defaults: _Raw = known[architecture].facts.get("config", {})
    heads = _count(raw, "num_attention_heads", path)
    hidden = _count(raw, "hidden_size", path)
    layers = _count(raw, "num_hidden_layers", path)
    kv_heads = _count(raw, "num_key_value_heads", path, heads)
    if heads % kv_heads:
        raise _bad(path, "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
    max_positions = _count(raw, "max_position_embeddings", path)
    window, window_layers = _window(raw, layers, defaults, path)
    # One attention_bias stands for all four projections unless the architecture says otherwise.
    attention_bias = bool(_get(raw, "attention_bias", defaults, False))
    theta, scaling = _rope(raw, defaults, max_positions, path)
    tied = bool(_get(raw, "tie_word_embeddings", defaults, False))
    return ModelConfig(
        architecture=architecture,
        vocab_size=_count(raw, "vocab_size", path),
        hidden_size=hidden,
        intermediate_size=_count(raw, "intermediate_size", path),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_count(raw, "head_dim", path, defaults.get("head_dim") or hidden // heads),
        max_position_embeddings=max_positions,
        rms_norm_eps=float(_get(raw, "rms_norm_eps", defaults, 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=window,
        sliding_window_layers=window_layers,
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
        output_bias=bool(defaults.get("output_bias", attention_bias)),
        mlp_bias=bool(_get(raw, "mlp_bias", defaults, False)),
        qk_norm=bool(defaults.get("qk_norm", False)),
        hidden_act=str(_get(raw, "hidden_act", defaults, "silu")),
        dtype=_dtype(raw, path),
        bos_token_id=_first_id(raw.get("bos_token_id")),
        eos_token_ids=_eos_ids(raw, path),
        quantization=read_quantization(path, _quantization(raw, path), layers, tied_head=tied),
    )


def _architecture(raw: _Raw, known: Mapping[str, registry.Plugin], path: Path) -> str:
    named = raw.get("architectures") or []
    for name in named:
        if name in known:
            return str(name)
    shown = ", ".join(map(str, named)) or f"none named (model_type {raw.get('model_type')!r})"
    raise CheckpointError(
        f"{path}: architecture {shown} is not supported; known: {', '.join(sorted(known)) or 'none'}",
        hint="choose a checkpoint of a known architecture; a new one is one file in appliance/models/",
    )


def _refuse_remote_code(raw: _Raw, path: Path) -> None:
    if raw.get("auto_map"):
        raise CheckpointError(
            f"{path} asks to run its own code (auto_map in config.json), which is never done here",
            hint="use the checkpoint in transformers' own format; if its architecture needs no own code, drop auto_map",
        )


def _bad(path: Path, key: str, value: object, allowed: str) -> CheckpointError:
    return CheckpointError(f"{path}/config.json: {key} is {value!r}, allowed: {allowed}")


def _get(raw: _Raw, key: str, defaults: _Raw, fallback: Any) -> Any:
    """A value that null leaves unsaid."""
    value = raw.get(key)
    return defaults.get(key, fallback) if value is None else value


def _count(raw: _Raw, key: str, path: Path, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _bad(path, key, raw.get(key), "a positive whole number")
    return value


def _rope(raw: _Raw, defaults: _Raw, max_positions: int, path: Path) -> tuple[float, RopeScaling | None]:
    """Base of the rotary embedding, and its scaling if there is one."""
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    rope: _Raw = new or old or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(f"{path}/config.json: rotary parameters that differ by layer are not supported")
    theta = float(rope.get("rope_theta") or _get(raw, "rope_theta", defaults, 10000.0))
    if float(rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError(f"{path}/config.json: a partial rotary embedding is not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    unsupported = [name for name in _ROPE_UNSUPPORTED if rope.get(name) is not None]
    if kind not in _ROPE_KINDS or unsupported:
        what = f"{kind} with {', '.join(unsupported)}" if unsupported else kind
        raise _bad(path, "rotary scaling", what, ", ".join(("default", *_ROPE_KINDS)))
    if kind == "yarn" and rope.get("truncate") is False:
        raise _bad(path, "rotary scaling", "yarn with truncate=false", "yarn with truncated correction range")
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or factor <= 0:
        raise _bad(path, "factor of the rotary scaling", factor, "a positive number")
    original = rope.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
    attention_factor = rope.get("attention_factor")
    return theta, RopeScaling(
        kind=kind,
        factor=float(factor),
        low_freq_factor=float(rope.get("low_freq_factor") or 1.0),
        high_freq_factor=float(rope.get("high_freq_factor") or 4.0),
        original_max_position_embeddings=int(original or max_positions),
        attention_factor=None if attention_factor is None else float(attention_factor),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
    )


def _window(raw: _Raw, layers: int, defaults: _Raw, path: Path) -> tuple[int | None, tuple[int, ...] | None]:
    """Sliding window in tokens, and its layers (None: all). A window that a switch turns off is none."""
    window = raw["sliding_window"] if "sliding_window" in raw else defaults.get("sliding_window")
    kinds = raw.get("layer_types")
    if kinds is not None:
        unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if unknown or len(kinds) != layers:
            problem = ", ".join(unknown) or f"{len(kinds)} entries"
            raise _bad(path, "layer_types", problem, f"{layers} of full_attention or sliding_attention")
    # Qwen2 and Qwen3 carry a window that is off unless use_sliding_window says so; Mistral has no such switch.
    if window is None or not raw.get("use_sliding_window", "max_window_layers" not in raw):
        return None, None
    window = _count(raw | {"sliding_window": window}, "sliding_window", path)
    if kinds is not None:
        chosen = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    else:
        chosen = tuple(range(int(raw.get("max_window_layers") or 0), layers))
    if not chosen:
        return None, None
    return window, None if len(chosen) == layers else chosen


def _dtype(raw: _Raw, path: Path) -> str:
    """Of the weights; where config.json is silent, that of the first tensor. float64 and others count as float32."""
    named = raw.get("dtype") or raw.get("torch_dtype") or first_dtype(path)
    name = str(named).removeprefix("torch.")
    return name if name in _DTYPES else "float32"


def _first_id(value: Any) -> int | None:
    return int(value[0]) if isinstance(value, list) and value else value if isinstance(value, int) else None


def _eos_ids(raw: _Raw, path: Path) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json, then of config.json, each once."""
    ids: list[int] = []
    for source in (read_json(path / "generation_config.json", required=False), raw):
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [value] if isinstance(value, int) else []
    return tuple(dict.fromkeys(ids))


def _quantization(raw: _Raw, path: Path) -> _Raw | None:
    """How the checkpoint was quantized, in its own words: a section of config.json or a file beside it; None: not."""
    for key in ("quantization_config", "compression_config"):
        config = raw.get(key)
        if isinstance(config, dict):
            return config
        if config is not None:
            raise _bad(path, key, config, "an object that says how the checkpoint was quantized, or none")
    for name, method in QUANTIZATION_FILES.items():
        if config := read_json(path / name, required=False):
            return {"quant_method": method, **config}
    return None
