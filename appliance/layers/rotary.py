"""The rotary embedding's table of cosines and sines, with the scalings that long-context checkpoints ask for.

Knows frequencies only; rotating is `kernels/rope_cache.py`. The table is computed when a model is loaded, in float32,
for the positions that will be served, and shared by all layers; it is no part of an engine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from appliance.errors import CheckpointError
from appliance.types import ModelConfig, RopeScaling


class RotaryEmbedding(nn.Module):
    """Holds `cos_sin`, float32 [max_positions, head_dim]: cosines of the head_dim / 2 frequencies, then sines."""

    cos_sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._config = config
        self.register_buffer("cos_sin", torch.empty(0, config.head_dim), persistent=False)

    def build(self, max_positions: int, device: torch.device) -> None:
        """Compute the table for positions 0 .. max_positions - 1."""
        frequencies, amplitude = inverse_frequencies(self._config)
        angles = torch.arange(max_positions, dtype=torch.float32, device="cpu")[:, None] * frequencies[None, :]
        self.cos_sin = (torch.cat((angles.cos(), angles.sin()), dim=-1) * amplitude).to(device)


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angle per position of each pair of dimensions, float32 [head_dim / 2] on the CPU, and the factor by which cosines
    and sines are multiplied. CheckpointError for a scaling that is not known."""
    dim = config.head_dim
    base = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "dynamic":
        # Dynamic NTK scaling changes nothing within the trained length, and no more is served.
        return base, 1.0
    if scaling.kind == "linear":
        return base / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(base, scaling, config), 1.0
    if scaling.kind == "yarn":
        return _yarn(base, scaling, config)
    raise CheckpointError(
        f"rotary scaling {scaling.kind!r} is not supported; known are linear, dynamic, llama3 and yarn"
    )


def _llama3(base: Tensor, scaling: RopeScaling, config: ModelConfig) -> Tensor:
    """Llama 3.1's: long wavelengths are stretched by `factor`, short ones kept, those between blended linearly in the
    number of turns that they make over the original context."""
    original = scaling.original_max_position_embeddings or config.max_position_embeddings
    turns = original * base / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return base * kept + base / scaling.factor * (1 - kept)


def _yarn(base: Tensor, scaling: RopeScaling, config: ModelConfig) -> tuple[Tensor, float]:
    """Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023), §3.2 to §3.4."""
    original = scaling.original_max_position_embeddings or config.max_position_embeddings

    def pair_making(turns: float) -> float:
        """Index of the pair of dimensions that makes so many turns over the original context."""
        return config.head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_making(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_making(scaling.beta_slow)), config.head_dim - 1)
    ramp = (torch.arange(config.head_dim // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0.0, 1.0)
    amplitude = scaling.attention_factor
    if amplitude is None:
        amplitude = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return base / scaling.factor * stretched + base * (1 - stretched), amplitude
