"""Qwen3, dense (Yang et al., 2025): Llama with an RMS norm over each head of q and k before the rotary embedding.

Its head_dim does not follow from the hidden size; config.json does not mention the norms. With "use_sliding_window",
layers from "max_window_layers" on have a window.
"""

from __future__ import annotations

from appliance.layers.decoder import Decoder
from appliance.layers.weights import decoder_weights

PLUGIN = {
    "name": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "config": {"head_dim": 128, "qk_norm": True},
}

weight_specs = decoder_weights


class Model(Decoder):
    """The shared decoder; its attention layers have head norms where `ModelConfig.qk_norm` says so."""
