"""Checkpoints with random weights, on disk, for what starts from one: builds, and the peer of `bench compare`.

python -m appliance.bench.random_model SHAPE DIRECTORY     writes one
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from appliance.bench.random_engine import weight_specs
from appliance.bench.report import say
from appliance.bench.shapes import shape_config, write_config
from appliance.bench.vocabulary import write_tokenizer
from appliance.checkpoint.files import INDEX_NAME
from appliance.runtime.loading import DTYPES
from appliance.runtime.random_weights import STD
from appliance.types import ModelConfig


def write_checkpoint(config: ModelConfig, path: Path) -> None:
    """A Hugging Face checkpoint with random weights and a made-up tokenizer, sharded by about 4 GB. The index comes
    last: where it is, all is."""
    path.mkdir(parents=True, exist_ok=True)
    write_config(config, path / "config.json")
    write_tokenizer(config.vocab_size, path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[config.dtype]
    shapes = {
        source: shape for spec in weight_specs(config) for source, shape in zip(spec.sources, spec.shapes, strict=True)
    }
    index: dict[str, str] = {}
    shards = _split(shapes, dtype.itemsize, 4 << 30)
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for source, shape in shard.items():
            made = torch.randn(shape, dtype=dtype, device=device, generator=generator) * STD
            tensors[source] = (torch.ones(shape, dtype=dtype) if len(shape) == 1 else made).cpu()
            index[source] = name
        save_file(tensors, path / name, metadata={"format": "pt"})
        say(f"wrote {name}")
    (path / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _split(shapes: dict[str, tuple[int, ...]], itemsize: int, limit: int) -> list[dict[str, tuple[int, ...]]]:
    """Consecutive groups of at most `limit` bytes."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        nbytes = itemsize * torch.Size(shape).numel()
        if groups[-1] and size + nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += nbytes
    return groups


if __name__ == "__main__":
    write_checkpoint(shape_config(sys.argv[1]), Path(sys.argv[2]))
