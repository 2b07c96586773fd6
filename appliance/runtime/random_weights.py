"""Weights that are made up on the device, for models whose speed is all that matters.

A rank's weight file without tensors, whose metadata say so, stands for random numbers: loading it takes no disk and no
host memory, and what runs afterwards is what would run with real weights. Only benchmarks write such files; builds make
weights up to find out beforehand what is quickest. Knows modules and their schemes; nothing of architectures, ranks or
stages: a model on the meta device says what it wants.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from appliance.checkpoint.files import read_metadata
from appliance.checkpoint.writer import SafetensorsWriter
from appliance.layers.decoder import Decoder
from appliance.layers.linear import Linear
from appliance.quantization.blocks import quantize
from appliance.quantization.scheme import PrecisionScheme

_SEED = "random_weights"  # key of the metadata; its value is the seed
STD = 0.02  # of the weights: keeps activations of the usual size through 80 layers
_DISTINCT = 1 << 24  # numbers of a tensor behind which they come again: making them should take no time on a CPU either


def write_random_file(path: Path, seed: int) -> tuple[int, str]:
    """A weight file that stands for random numbers; its (size in bytes, digest)."""
    with SafetensorsWriter(path, [], {_SEED: str(seed)}) as writer:
        return writer.finish()


def seed_of(path: Path) -> int | None:
    """The seed of a weight file that stands for random numbers; None: it holds weights. Raises CheckpointError."""
    value = read_metadata(path).get(_SEED)
    return None if value is None else int(value)


@torch.no_grad()
def fill(model: Decoder, device: torch.device | str, seed: int) -> int:
    """Give every parameter of a model on the meta device `tensors`, made on `device`. Returns the bytes."""
    model.load(tensors(model, torch.device(device), seed), device)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def tensors(model: Decoder, device: torch.device, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter: random numbers, as the model's schemes store them; norms are ones, biases
    zeros. Linear layers of one shape have the same numbers, each in memory of its own, and others for each `seed`; what
    is no share of anything, such as the embedding, knows no seed, so that ranks with seeds of their own agree on it.
    EngineBuildError for a scheme that cannot round a weight alone."""
    made: dict[tuple[int, int, PrecisionScheme], Mapping[str, Tensor]] = {}
    stored: set[str] = set()
    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear):
            continue
        key = (module.out_features, module.in_features, module.scheme)
        if key not in made:
            made[key] = quantize(module.scheme, normal(key[:2], model.dtype, _generator(device, f"{seed} {key[:2]}")))
        for suffix, tensor in made[key].items():
            stored.add(f"{name}.{suffix}")
            yield f"{name}.{suffix}", tensor.clone()
    for name, old in list(model.named_parameters()):
        if name in stored:
            continue
        if old.dim() > 1:
            yield name, normal(tuple(old.shape), old.dtype, _generator(device, name))
        else:
            make = torch.zeros if name.endswith(".bias") else torch.ones
            yield name, make(old.shape, dtype=old.dtype, device=device)


def _generator(device: torch.device, what: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(what.encode()))


def normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normally distributed numbers of a weight's usual size, on the generator's device. Those of large tensors come
    again, so that rows may be equal."""
    count = torch.Size(shape).numel()
    few = torch.randn(min(count, _DISTINCT), dtype=dtype, device=generator.device, generator=generator) * STD
    return few.repeat(-(-count // len(few)))[:count].view(shape)
