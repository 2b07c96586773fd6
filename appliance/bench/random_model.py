"""Models with random weights: in device memory for what runs without HTTP, on disk for what starts a server.

python -m appliance.bench.random_model SHAPE DIRECTORY     writes the latter
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from appliance import registry
from appliance.bench.report import say
from appliance.bench.shapes import shape_config, write_config
from appliance.bench.subject import Subject, device_of, make_subject, no_progress
from appliance.bench.vocabulary import write_tokenizer
from appliance.builder.convert import quantize
from appliance.builder.tactics import Tuner
from appliance.builder.timings import Timings
from appliance.checkpoint.files import INDEX_NAME
from appliance.engines.key import engine_dtype, parameters_of, scheme_of
from appliance.kernels.compiled import KERNELS
from appliance.kernels.tactics import TABLE
from appliance.layers.decoder import Decoder
from appliance.runtime.loading import DTYPES, LoadedModel, PhaseTimer, build_model
from appliance.types import EngineOptions, ModelConfig, Precision, WeightSpec

_STD = 0.02  # of the weights: keeps activations of the usual size through 80 layers


def _specs(config: ModelConfig) -> list[WeightSpec]:
    module = registry.load("models", registry.architectures()[config.architecture].name)
    specs: list[WeightSpec] = module.weight_specs(config)
    return specs


def _random(spec: WeightSpec, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A weight of the shape that a spec's sources have together; norms are ones."""
    rows = sum(shape[0] for shape in spec.shapes)
    shape = (rows, *spec.shapes[0][1:])
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype, device=generator.device)
    return torch.randn(shape, dtype=dtype, device=generator.device, generator=generator) * _STD


def scheme_parameters(precision: Precision, device: torch.device) -> dict[str, Any]:
    """Of the precision's scheme, as an engine built for this device has them."""
    return parameters_of(
        scheme_of(precision), torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    )


def engine_tensors(config: ModelConfig, precision: Precision, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as in an engine of this precision, made on `device`."""
    plugin = registry.load("quantization", scheme_of(precision).name)
    scheme = plugin.Scheme(scheme_parameters(precision, device))
    dtype = DTYPES[engine_dtype(precision)]
    generator = torch.Generator(device).manual_seed(0)
    for spec in _specs(config):
        weight = _random(spec, dtype, generator)
        if spec.kind == "plain":
            yield spec.name, weight
        else:
            for suffix, tensor in quantize(scheme.of(spec.name), weight).items():
                yield f"{spec.name}.{suffix}", tensor


def load_random(shape: str, precision: Precision, options: EngineOptions, timings: Path | None = None) -> Subject:
    """A batching core over a model with random weights. `options.backend` may be "auto": the best there is.

    With `timings`, a cache directory, the ways to compute each product are timed on a GPU as in a build, and remembered
    there; without, each product is computed the way it is where nothing was timed.

    SettingsError for an unknown shape, EngineBuildError for a precision that has no scheme, HardwareError if the
    backend's device is not there.
    """
    config = shape_config(shape)
    scheme = scheme_of(precision).name
    name = options.backend if options.backend != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    device = device_of(name)
    backend = registry.load("backends", name)
    begin = time.perf_counter()
    dtype = DTYPES[engine_dtype(precision)] if device.type == "cuda" else torch.float32
    model = build_model(config, scheme, dtype, scheme_parameters(precision, device))
    model.load(engine_tensors(config, precision, device), device)
    loaded = LoadedModel(model, config, "random")
    if device.type == "cuda":
        KERNELS.open()
        TABLE.clear()
        if timings is not None:
            model.prepare(options.max_model_len or config.max_position_embeddings)
            choose_tactics(model, device, timings)
    executor, info = backend.assemble(loaded, options, no_progress, PhaseTimer())
    return make_subject(
        loaded,
        executor,
        info,
        options,
        {"shape": shape, "precision": precision, "backend": name},
        seconds=time.perf_counter() - begin,
    )


def choose_tactics(model: Decoder, device: torch.device, cache: Path) -> int:
    """Time the products of a prepared model, as a build does; how many choices `TABLE` then has."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    begin = time.perf_counter()
    tuner = Tuner(model.dtype, device, Timings(cache, name))
    found = tuner.tune(model)
    say(f"{len(found)} tactics chosen, {tuner.measured} timed now, in {time.perf_counter() - begin:.1f} s")
    return len(found)


def write_checkpoint(config: ModelConfig, path: Path) -> None:
    """A Hugging Face checkpoint with random weights and a made-up tokenizer, sharded by about 4 GB. The index comes
    last: where it is, all is."""
    path.mkdir(parents=True, exist_ok=True)
    write_config(config, path / "config.json")
    write_tokenizer(config.vocab_size, path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[config.dtype]
    shapes = {source: shape for spec in _specs(config) for source, shape in zip(spec.sources, spec.shapes, strict=True)}
    index: dict[str, str] = {}
    shards = _split(shapes, dtype.itemsize, 4 << 30)
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for source, shape in shard.items():
            spec = WeightSpec(name=source, kind="plain", sources=(source,), shapes=(shape,))
            tensors[source] = _random(spec, dtype, generator).cpu()
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
