"""Times the products of a rank of a random engine, as a build's trial does, without loading the whole of it.

A few layers are enough: a timing goes through those that fill a cache several times. Products are timed as the rank
computes them that leaves sums to kernels over several GPUs, where there are several.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from appliance.bench.report import say
from appliance.builder.tactics import Tuner
from appliance.builder.timings import Timings
from appliance.distributed import TensorParallel
from appliance.engines.manifest import EngineManifest, TimedTactic
from appliance.kernels.tactics import TABLE
from appliance.runtime import random_weights
from appliance.runtime.loading import build_model

_LAYERS = 32  # as many as make the smallest product of a large model's eighth as large as a timing's round
_MAX_POSITIONS = 16  # of the rotary table, which no product reads


class _Others:
    """Collective operations of ranks that are not there. None is called: products are timed without the others."""

    own: Any = object()  # a product leaves its scales to whoever adds up, as it does where own kernels do

    def all_reduce(self, x: Tensor) -> Tensor:
        raise AssertionError("there are no other ranks")

    def begin_all_reduce(self, x: Tensor) -> Callable[[], Tensor]:
        raise AssertionError("there are no other ranks")

    def all_gather(self, x: Tensor) -> Tensor:
        raise AssertionError("there are no other ranks")

    def all_to_all(self, x: Tensor) -> Tensor:
        raise AssertionError("there are no other ranks")

    def minimum(self, value: int) -> int:
        raise AssertionError("there are no other ranks")


def time_products(manifest: EngineManifest, cache: Path, device: torch.device) -> tuple[TimedTactic, ...]:
    """The choices, which are in `TABLE` as well; timings are read from and kept in `cache`."""
    begin = time.perf_counter()
    layers = min(manifest.model.num_hidden_layers, _LAYERS)
    config = msgspec.structs.replace(manifest.model, num_hidden_layers=layers)
    place = TensorParallel(0, manifest.tp_size, _Others()) if manifest.tp_size > 1 else TensorParallel()
    dtype = getattr(torch, manifest.dtype)
    model = build_model(config, manifest.scheme, dtype, manifest.key_inputs.scheme_parameters, place)
    random_weights.fill(model, device, 0)
    model.prepare(_MAX_POSITIONS)
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
