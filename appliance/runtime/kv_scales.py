"""Scales of an FP8 KV cache: those that a checkpoint brought (the engine's manifest has them), else measured when an
engine is loaded: how large are the K and V that its model writes?

e4m3 keeps three bits after the point over fifteen powers of two, so a scale has to bring a layer's numbers into that
range and need not be exact: it is a power of two, which costs no accuracy of its own, and it is 1 unless numbers would
be cut off or fall where e4m3 has fewer bits. (1 is also cheapest: FlashInfer multiplies by another scale of V
afterwards.)

Knows the model's interface and where an engine keeps its tokenizer; what the bytes mean is in kernels/attention.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from appliance.engines.manifest import MANIFEST_NAME, read_manifest
from appliance.kernels.attention import KvScales
from appliance.kernels.fp8_linear import FP8_MAX
from appliance.layers.attention import Attention
from appliance.layers.decoder import Decoder
from appliance.runtime.sample_text import SAMPLE_TEXT
from appliance.runtime.single_prompt import run_prompt

_TOKENS = 512
_HEADROOM = 4.0  # other texts may have numbers that many times larger than any of the sample
_SMALLEST_RMS = 2.0**-5  # e4m3 has fewer than three bits below 2**-6


def set_kv_scales(model: Decoder, engine_dir: str) -> list[KvScales]:
    """Give the layers their scales and return them: the checkpoint's own, or measured over the first tokens of a sample
    text.

    After `Decoder.prepare`; runs one eager pass of at most 512 tokens. `engine_dir` without a tokenizer ("" or a
    directory without tokenizer.json): over token ids spread across the vocabulary.
    """
    found = _of_checkpoint(engine_dir) or _measured(model, engine_dir)
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.kv_scales = found[layer.index]
    return found


def _of_checkpoint(engine_dir: str) -> list[KvScales]:
    """Empty if there are none."""
    if not engine_dir or not (Path(engine_dir) / MANIFEST_NAME).is_file():
        return []
    return [KvScales(k=k, v=v) for k, v in read_manifest(Path(engine_dir)).kv_scales]


def _measured(model: Decoder, engine_dir: str) -> list[KvScales]:
    ids = sample_token_ids(engine_dir, model.config.vocab_size)[: min(_TOKENS, len(model.rotary.cos_sin))]
    _, caches = run_prompt(model, torch.tensor(ids, device=model.device))
    return [KvScales(k=_scale_of(cache[0]), v=_scale_of(cache[1])) for cache in caches]


def sample_token_ids(engine_dir: str, vocab_size: int) -> list[int]:
    """The sample text as the engine's tokenizer writes it, with special tokens, without ids that the model lacks."""
    file = Path(engine_dir) / "tokenizer" / "tokenizer.json"
    if engine_dir and file.is_file():
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(str(file)).encode(SAMPLE_TEXT).ids
        if known := [token for token in ids if token < vocab_size]:
            return known
    return [i * 7919 % vocab_size for i in range(_TOKENS)]


def _scale_of(x: Tensor) -> float:
    """x: all K or all V of a layer."""
    x = x.float()
    return choose_scale(float(x.abs().amax()), float(x.square().mean().sqrt()))


def choose_scale(largest: float, rms: float) -> float:
    """A power of two for numbers up to `largest` (absolute) with that root mean square."""
    if not 0 < largest < math.inf:  # nothing to see, or NaN, which no scale helps
        return 1.0
    if largest * _HEADROOM <= FP8_MAX and rms >= _SMALLEST_RMS:
        return 1.0
    return 2.0 ** math.ceil(math.log2(largest * _HEADROOM / FP8_MAX))
