"""Small checkpoints that can be calibrated: groups of 128 divide their inputs, some channels are outliers, and there is
a tokenizer with a token per byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from model_helpers import make_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from appliance import registry
from appliance.builder import BuildRequest
from appliance.engines import read_manifest
from appliance.layers.decoder import Decoder
from appliance.runtime.weights import load_weights

SHAPE: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CASES: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=13, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
}


def byte_tokenizer() -> Tokenizer:
    """<s> in front of every prompt, then one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {character: 2 + i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def make_source(path: Path, config: Any, *, layers: int | None = None, seed: int = 0, outliers: float = 12.0) -> Path:
    """A random checkpoint with a tokenizer; a few channels of each norm are `outliers` times as large as the others."""
    from safetensors.torch import load_file, save_file

    if layers is not None:
        config = type(config)(**(config.to_dict() | {"num_hidden_layers": layers, "layer_types": None}))
    make_checkpoint(path, config, seed)
    file = path / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[torch.randperm(len(tensor), generator=generator)[:4]] *= outliers
    save_file(tensors, file, {"format": "pt"})
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


def request_of(source: Path, cache: Path, **changes: Any) -> BuildRequest:
    values: dict[str, Any] = {
        "checkpoint": str(source),
        "cache": str(cache),
        "precision": "int4",
        "backend": "cpu",
        "calibration_samples": 24,
        "calibration_length": 64,
    }
    return BuildRequest(**(values | changes))


def load_engine(engine: Path) -> Decoder:
    """As the CPU backend loads it."""
    manifest = read_manifest(engine)
    scheme = registry.load("quantization", manifest.scheme).Scheme(manifest.key_inputs.scheme_parameters)
    plugin = registry.load("models", registry.architectures()[manifest.model.architecture].name)
    with torch.device("meta"):
        model: Decoder = plugin.Model(manifest.model, scheme, torch.float32)
    load_weights(model, engine / "rank-0.safetensors", "cpu")
    model.prepare(manifest.model.max_position_embeddings)
    return model
