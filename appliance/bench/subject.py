"""What benchmarks without HTTP measure: a batching core, the floors that its devices set for its model, and what the
selection predicts of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from appliance import registry
from appliance.batching.core import EngineCore
from appliance.bench import random_engine
from appliance.bench.ceilings import measure_ceilings
from appliance.bench.floors import Floors
from appliance.bench.predictions import Predictions, predictions_of
from appliance.bench.random_engine import RandomEngine
from appliance.bench.report import say
from appliance.builder import BuildRequest
from appliance.engines.manifest import EngineManifest, read_manifest
from appliance.errors import SettingsError
from appliance.launch.prepare import prepare_engine
from appliance.meeting import leave
from appliance.runtime.executor import LocalExecutor
from appliance.runtime.loading import LoadedModel, PhaseTimer
from appliance.types import EngineInfo, EngineOptions, ModelConfig


@dataclass
class Subject:
    """`close` it where another one follows in this process."""

    core: EngineCore
    config: ModelConfig
    floors: Floors
    predictions: Predictions | None
    max_num_seqs: int
    device: torch.device  # of rank 0
    description: dict[str, Any]  # for the JSON line
    loaded: LoadedModel
    at_close: Callable[[LoadedModel], None]

    @property
    def ranks(self) -> int:
        return self.floors.tp_size * self.floors.pp_size

    def close(self) -> None:
        """End the other ranks, if there are any, and give the device's memory back. Nothing can be measured any more;
        once."""
        self.at_close(self.loaded)
        self.loaded.member.close()
        del self.core, self.loaded, self.at_close
        gc.collect()
        leave()


def no_progress(phase: str, detail: str, percent: float) -> None:
    pass


def load_random(engine: RandomEngine, options: EngineOptions, cache: Path) -> Subject:
    """A shape with random weights; the directory that stands for it is made below `cache`. Limits and kernels are those
    of `options`. SettingsError for an unknown shape, EngineBuildError for a precision that has no scheme, HardwareError
    if the backend's devices are not there."""
    path = random_engine.make(engine, cache)
    devices = random_engine.devices_of(engine.backend, engine.ranks)
    names = tuple(str(device.index) for device in devices if device.type == "cuda")
    chosen = msgspec.structs.replace(options, engine_dir=str(path), backend=engine.backend, devices=names)
    return _open(chosen, {"shape": engine.shape}, lambda loaded: random_engine.keep(path, loaded))


def load_model(
    model: str,
    precision: str | None,
    backend: str | None,
    cache: str | None,
    options: EngineOptions,
    *,
    tactics: bool = True,
    scheme: str | None = None,
    tp_size: int | None = None,
    pp_size: int | None = None,
) -> Subject:
    """A batching core over a model directory, hub id, "builtin" or engine directory, built first if need be. Sizes and
    kernels are those of `options`, the context limit is the model's own. Without `tactics`, an engine that is built now
    has none; sizes that are None are left to the selection. Raises what `prepare_engine` and the backend raise,
    SettingsError for an engine of other sizes."""
    names = ["max_num_seqs", "max_num_batched_tokens", "cuda_graphs", "persistent_decode", "attention"]
    names += ["prefix_caching", "kv_cache_dtype", "batch_invariant"]
    wanted = {name: getattr(options, name) for name in names} | ({} if tactics else {"tactics": False})
    wanted |= {"num_pages": options.num_pages} if options.num_pages else {}
    sizes = {"tp_size": tp_size, "pp_size": pp_size}
    wanted |= {name: size for name, size in sizes.items() if size is not None}

    def adapt(request: BuildRequest) -> BuildRequest:
        return request if scheme is None else msgspec.structs.replace(request, scheme=scheme)

    chosen = prepare_engine(model, precision=precision, backend=backend, cache=cache, overrides=wanted, adapt=adapt)
    manifest = read_manifest(Path(chosen.engine_dir))
    for name, size in sizes.items():
        if size not in (None, getattr(manifest, name)):
            raise SettingsError(
                f"--{name.replace('_', '-')} is {size}; {model} is an engine of {getattr(manifest, name)}"
            )
    return _open(chosen, {"model": model}, lambda loaded: None)


def _open(options: EngineOptions, what: dict[str, Any], at_close: Callable[[LoadedModel], None]) -> Subject:
    """Load an engine, with all of its ranks. What a start puts off is done, so that no step is measured beside it. Says
    what is going to be measured."""
    begin = time.perf_counter()
    manifest = read_manifest(Path(options.engine_dir))
    plugin, timer = registry.load("backends", options.backend), PhaseTimer()
    loaded: LoadedModel = plugin.load(options, no_progress, timer)
    executor: LocalExecutor
    executor, info = plugin.assemble(loaded, options, no_progress, timer)
    while executor.prepare_more():
        pass
    device = loaded.model.embedding.weight.device
    description = what | {"precision": manifest.precision, "scheme": manifest.scheme, "backend": options.backend}
    description |= {"tp_size": manifest.tp_size, "pp_size": manifest.pp_size}
    kv_tokens = info.num_pages * info.page_size
    ranks = manifest.tp_size * manifest.pp_size
    say(
        f"{what.get('shape') or what['model']} {manifest.precision} on {info.device_name}"
        f"{f' and {ranks - 1} more' if ranks > 1 and device.type == 'cuda' else ''}: {kv_tokens:,} tokens of "
        f"{info.kv_cache_dtype} KV cache, attention {info.attention}, ready in {time.perf_counter() - begin:.1f} s"
    )

    return Subject(
        core=EngineCore(executor, prefix_caching=options.prefix_caching),
        config=loaded.config,
        floors=_floors(loaded, info, manifest, device),
        predictions=predictions_of(manifest, info, options.devices, kv_tokens=kv_tokens),
        max_num_seqs=info.max_num_seqs,
        device=device,
        description={
            **description,
            "attention": info.attention,
            "kv_cache_dtype": info.kv_cache_dtype,
            "cuda_graphs": options.cuda_graphs and device.type == "cuda",
            "kv_cache_tokens": kv_tokens,
            "startup_seconds": {k: round(v, 2) for k, v in info.startup_seconds.items()},
        },
        loaded=loaded,
        at_close=at_close,
    )


def _floors(loaded: LoadedModel, info: EngineInfo, manifest: EngineManifest, device: torch.device) -> Floors:
    embedding = loaded.model.embedding.weight
    reductions = {t.rows: t.microseconds * 1e-6 for t in manifest.tactics if t.product == "all_reduce"}
    reductions |= {t.rows: t.microseconds * 1e-6 for t in loaded.reductions if t.product == "all_reduce"}
    return Floors(
        loaded.config,
        measure_ceilings(device, manifest.precision),
        weight_bytes=loaded.weight_bytes - embedding.numel() * embedding.element_size(),
        kv_token_bytes=info.kv_cache_bytes / (info.num_pages * info.page_size),
        tp_size=manifest.tp_size,
        pp_size=manifest.pp_size,
        reductions=reductions,
        max_num_batched_tokens=info.max_num_batched_tokens,
    )
