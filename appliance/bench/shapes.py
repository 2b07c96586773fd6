"""Shapes of well-known models, for benchmarks with random weights: speed does not depend on the values."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from appliance.errors import SettingsError
from appliance.types import ModelConfig, RopeScaling

_LLAMA3_ROPE = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)

SHAPES: dict[str, ModelConfig] = {
    "llama-3.1-8b": ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=_LLAMA3_ROPE,
        bos_token_id=128000,
        eos_token_ids=(128001, 128009),
    ),
    "llama-3-70b": ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        bos_token_id=128000,
        eos_token_ids=(128001,),
    ),
    # For machines without a GPU.
    "llama-3.2-1b": ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=msgspec.structs.replace(_LLAMA3_ROPE, factor=32.0),
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_ids=(128001, 128009),
    ),
    # Small enough for a laptop's CPU and for tests of the benchmarks themselves.
    "tiny": ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_ids=(1,),
    ),
}


def shape_config(name: str) -> ModelConfig:
    """SettingsError, naming those there are, for an unknown shape."""
    if name not in SHAPES:
        raise SettingsError(f"--shape is {name!r}; allowed: {', '.join(SHAPES)}")
    return SHAPES[name]


def write_config(config: ModelConfig, path: Path) -> None:
    """config.json of a shape, as a checkpoint of it would have."""
    scaling = config.rope_scaling
    value = {
        "architectures": [config.architecture],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "hidden_act": config.hidden_act,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.dtype,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "rope_scaling": None
        if scaling is None
        else {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        },
    }
    path.write_text(json.dumps(value, indent=2) + "\n")
