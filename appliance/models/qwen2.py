"""Qwen2 and Qwen2.5 (Yang et al., 2024): Llama with biases on q, k and v; small ones tie the output to the embedding.

config.json does not mention the biases. With "use_sliding_window", layers from "max_window_layers" on have a window.
"""

from __future__ import annotations

from appliance.layers.decoder import Decoder
from appliance.layers.weights import decoder_weights

PLUGIN = {
    "name": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "config": {"attention_bias": True, "output_bias": False},
}

weight_specs = decoder_weights


class Model(Decoder):
    """The shared decoder; biases and windows come with the configuration."""
