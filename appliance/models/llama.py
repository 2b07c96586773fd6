"""Llama 2 and 3 (Touvron et al., 2023; Dubey et al., 2024), and every checkpoint that says it is LlamaForCausalLM.

The plainest of the family: rotary grouped-query attention, SwiGLU, RMS norm; biases and Llama 3.1's rotary scaling
where config.json asks for them. All of it is in `ModelConfig` and the shared decoder.

To add an architecture, add one file like this one:

1. `PLUGIN`: its Hugging Face class names ("architectures"), and the values of `ModelConfig` that its config.json leaves
   unsaid ("config").
2. `Model`: derived from `Decoder`. Where its blocks differ, it builds others from `layers/`.
3. `weight_specs`: which checkpoint tensors make up each parameter. Where names differ, a list of its own, made from the
   pieces in `layers/weights.py`.
4. A row in `tests/test_models.py`, which compares it with `transformers`.
"""

from __future__ import annotations

from appliance.layers.decoder import Decoder
from appliance.layers.weights import decoder_weights

PLUGIN = {
    "name": "llama",
    "architectures": ["LlamaForCausalLM"],
    "config": {},
}

weight_specs = decoder_weights


class Model(Decoder):
    """The shared decoder as it is."""
