"""Times the products of a rank of a random engine, as a build does, without loading the whole of it: a timing goes
through as many layers as fill a cache several times, so a few are enough."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import torch

from appliance.bench.report import say
from appliance.builder.made_up import describe_model, make_up
from appliance.builder.tactics import Tuner
from appliance.builder.timings import Timings
from appliance.engines.manifest import EngineManifest, TimedTactic
from appliance.kernels.tactics import TABLE

_LAYERS = 32  # as many as make the smallest product of a large model's eighth as large as a timing's round


def time_products(manifest: EngineManifest, cache: Path, device: torch.device) -> tuple[TimedTactic, ...]:
    """The choices, which are in `TABLE` as well; timings are read from and kept in `cache`."""
    begin = time.perf_counter()
    dtype, parameters = getattr(torch, manifest.dtype), manifest.key_inputs.scheme_parameters
    layers = min(manifest.model.num_hidden_layers, _LAYERS)
    model = describe_model(manifest.model, manifest.scheme, dtype, parameters, manifest.tp_size, layers)
    make_up(model, device)
    TABLE.clear()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    tuner = Tuner(dtype, device, Timings(cache, name))
    found = tuple(tuner.tune(model))
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    say(f"{len(found)} tactics chosen, {tuner.measured} timed now, in {time.perf_counter() - begin:.1f} s")
    return found
