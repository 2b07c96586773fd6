"""What benchmarks without HTTP measure: a batching core, and the floors that its device sets for its model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from appliance import registry
from appliance.batching.core import EngineCore
from appliance.bench.ceilings import measure_ceilings
from appliance.bench.floors import Floors
from appliance.bench.report import say
from appliance.engines.manifest import read_manifest
from appliance.errors import HardwareError, SettingsError
from appliance.launch.prepare import prepare_engine
from appliance.runtime.executor import LocalExecutor
from appliance.runtime.loading import LoadedModel, PhaseTimer
from appliance.types import EngineInfo, EngineOptions, ModelConfig


@dataclass
class Subject:
    core: EngineCore
    config: ModelConfig
    floors: Floors
    max_num_seqs: int
    device: torch.device
    description: dict[str, Any]  # for the JSON line


def no_progress(phase: str, detail: str, percent: float) -> None:
    pass


def device_of(backend: str) -> torch.device:
    """The first device of a backend. SettingsError for an unknown backend, HardwareError if there is no device."""
    backends = registry.plugins("backends")
    if backend not in backends:
        raise SettingsError(f"--backend is {backend!r}; allowed: auto, {', '.join(backends)}")
    if backends[backend].facts["device"] == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise HardwareError(f"backend {backend} needs a GPU, and torch finds none", hint="run `appliance doctor`")
    return torch.device("cuda", 0)


def load_model(
    model: str,
    precision: str | None,
    backend: str | None,
    cache: str | None,
    options: EngineOptions,
    *,
    tactics: bool = True,
) -> Subject:
    """A batching core over a model directory, hub id, "builtin" or engine directory, built first if need be. Sizes and
    kernels are those of `options`, the context limit is the model's own. Without `tactics`, an engine that is built now
    has none. Raises what `prepare_engine` and the backend raise."""
    names = ["max_num_seqs", "max_num_batched_tokens", "cuda_graphs", "persistent_decode", "attention"]
    names += ["prefix_caching", "kv_cache_dtype", "batch_invariant"]
    wanted = {name: getattr(options, name) for name in names} | ({} if tactics else {"tactics": False})
    wanted |= {"num_pages": options.num_pages} if options.num_pages else {}
    chosen = prepare_engine(model, precision=precision, backend=backend, cache=cache, overrides=wanted)
    begin = time.perf_counter()
    plugin, timer = registry.load("backends", chosen.backend), PhaseTimer()
    loaded = plugin.load(chosen, no_progress, timer)
    executor, info = plugin.assemble(loaded, chosen, no_progress, timer)
    stored = read_manifest(Path(chosen.engine_dir)).precision
    description = {"model": model, "precision": stored, "backend": chosen.backend}
    return make_subject(loaded, executor, info, chosen, description, seconds=time.perf_counter() - begin)


def make_subject(
    loaded: LoadedModel,
    executor: LocalExecutor,
    info: EngineInfo,
    options: EngineOptions,
    description: dict[str, Any],
    *,
    seconds: float,
) -> Subject:
    """Around an assembled executor; `seconds`: how long loading took. What a start puts off is done, so that no step is
    measured beside it. Says what is going to be measured."""
    while executor.prepare_more():
        pass
    embedding = loaded.model.embedding.weight
    kv_tokens = info.num_pages * info.page_size
    say(
        f"{description.get('shape') or description['model']} {description['precision']} on {info.device_name}: "
        f"{kv_tokens:,} tokens of {info.kv_cache_dtype} KV cache, attention {info.attention}, ready in {seconds:.1f} s"
    )
    return Subject(
        core=EngineCore(executor, prefix_caching=options.prefix_caching),
        config=loaded.config,
        floors=Floors(
            loaded.config,
            measure_ceilings(embedding.device, description["precision"]),
            weight_bytes=loaded.weight_bytes - embedding.numel() * embedding.element_size(),
            kv_token_bytes=info.kv_cache_bytes / kv_tokens,
        ),
        max_num_seqs=info.max_num_seqs,
        device=embedding.device,
        description={
            **description,
            "attention": info.attention,
            "kv_cache_dtype": info.kv_cache_dtype,
            "cuda_graphs": options.cuda_graphs and embedding.is_cuda,
            "kv_cache_tokens": kv_tokens,
            "startup_seconds": {k: round(v, 2) for k, v in info.startup_seconds.items()},
        },
    )
