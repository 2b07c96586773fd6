"""Mistral 7B and its relatives (Jiang et al., 2023): Llama with a sliding window over all layers.

Later versions set "sliding_window": null, which is full attention; a config.json that does not mention it means 4096.
"""

from __future__ import annotations

from appliance.layers.decoder import Decoder
from appliance.layers.weights import decoder_weights

PLUGIN = {
    "name": "mistral",
    "architectures": ["MistralForCausalLM"],
    "config": {"sliding_window": 4096},
}

weight_specs = decoder_weights


class Model(Decoder):
    """The shared decoder; its attention layers take their window from `ModelConfig.window_of`."""
