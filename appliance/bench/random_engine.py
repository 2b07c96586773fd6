"""Engines of a shape with random weights: made in a moment, tuned like built ones, opened like any engine directory.

Weights are made on each rank's device while it loads (`runtime/random_weights.py`), or lie in files, where loading them
is to be measured; ranks of a stage then share one file, since they need not differ. Products are timed on the share of
one rank with as many layers as a timing goes through. What the first load finds out besides, how ranks add up and which
kernels ran, is kept for the next one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import torch

from appliance import registry
from appliance.bench.report import say
from appliance.bench.shapes import shape_config, write_config
from appliance.bench.vocabulary import write_tokenizer
from appliance.builder.shards import plan_tensors
from appliance.checkpoint.writer import SafetensorsWriter
from appliance.distributed import TensorParallel
from appliance.engines.digest import hash_files
from appliance.engines.key import KeyInputs, engine_key, make_key_inputs
from appliance.engines.manifest import (
    MANIFEST_NAME,
    BuildSummary,
    EngineFile,
    new_manifest,
    rank_file_name,
    read_manifest,
    write_manifest,
)
from appliance.errors import ApplianceError, EngineDamagedError, HardwareError, SettingsError
from appliance.kernels.compiled import DIRECTORY as KERNEL_DIRECTORY
from appliance.kernels.compiled import KERNELS
from appliance.runtime.loading import LoadedModel, build_model
from appliance.runtime.random_weights import tensors, write_random_file
from appliance.types import ModelConfig, Precision, Struct, WeightSpec

_WRITERS = 6  # threads that copy tensors from the device into a file


class RandomEngine(Struct, frozen=True):
    """Which one; `backend` is a plug-in's name, `scheme` None the one that serves the precision."""

    shape: str
    precision: Precision
    backend: str
    scheme: str | None = None
    tp_size: int = 1
    pp_size: int = 1
    files: bool = False  # weights lie in files, instead of being made while they load
    tactics: bool = True  # products are timed, on a GPU

    @property
    def ranks(self) -> int:
        return self.tp_size * self.pp_size


def devices_of(backend: str, ranks: int) -> list[torch.device]:
    """The first devices of a backend, one a rank. SettingsError for an unknown backend, HardwareError if there are
    fewer."""
    backends = registry.plugins("backends")
    if backend not in backends:
        raise SettingsError(f"--backend is {backend!r}; allowed: auto, {', '.join(backends)}")
    if backends[backend].facts["device"] == "cpu":
        return [torch.device("cpu")] * ranks
    if not torch.cuda.is_available():
        raise HardwareError(f"backend {backend} needs a GPU, and torch finds none", hint="run `appliance doctor`")
    if torch.cuda.device_count() < ranks:
        raise HardwareError(f"{ranks} ranks need as many GPUs; torch finds {torch.cuda.device_count()}")
    return [torch.device("cuda", index) for index in range(ranks)]


def best_backend() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def make(engine: RandomEngine, cache: Path) -> Path:
    """The engine's directory below `cache`/bench, made unless it is there; on a GPU its products are timed, which takes
    no time where all timings are remembered in `cache`. Raises what `devices_of` and the scheme raise, HardwareError
    for ranks that cannot share the model."""
    config, device = shape_config(engine.shape), devices_of(engine.backend, engine.ranks)[0]
    inputs = _inputs(engine, device)
    path = _directory(engine, inputs, cache)
    if not _is_there(path, engine_key(inputs), config):
        place = TensorParallel(0, engine.tp_size)  # ranks that cannot share the model are not started
        build_model(config, inputs.scheme, getattr(torch, inputs.dtype), inputs.scheme_parameters, place)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        _write(path, engine, config, inputs, device)
        _inherit(path, engine, inputs, cache)
    if engine.tactics and device.type == "cuda":
        _time_products(path, cache, device)
    return path


def _inputs(engine: RandomEngine, device: torch.device) -> KeyInputs:
    return make_key_inputs(
        f"random weights of {engine.shape}",
        engine.precision,
        engine.backend,
        tp_size=engine.tp_size,
        pp_size=engine.pp_size,
        compute_capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        scheme=engine.scheme,
    )


def _directory(engine: RandomEngine, inputs: KeyInputs, cache: Path) -> Path:
    kind = ("-files" if engine.files else "") + ("" if engine.tactics else "-untimed")
    return cache / "bench" / f"{engine.shape}-{inputs.scheme}-{engine_key(inputs)[:12]}{kind}"


def _inherit(path: Path, engine: RandomEngine, inputs: KeyInputs, cache: Path) -> None:
    """Tactics of the same engine with weights elsewhere, and compiled kernels of it or of any other one here: many are
    the same, and those that are not are found to be missing."""
    same = _directory(msgspec.structs.replace(engine, files=not engine.files), inputs, cache)
    changes: dict[str, Any] = {}
    for other in [same, *(cache / "bench").glob("*/")]:
        if other == path or not (other / MANIFEST_NAME).is_file():
            continue
        known = read_manifest(other)
        if other == same and known.key == engine_key(inputs):
            changes["tactics"] = known.tactics
        if known.kernels and known.compute_capability == inputs.compute_capability and "kernels" not in changes:
            shutil.copytree(other / KERNEL_DIRECTORY, path / KERNEL_DIRECTORY)
            changes["kernels"] = known.kernels
    if changes:
        manifest = read_manifest(path)
        changes["files"] = (*manifest.files, *_listed(path, [KERNEL_DIRECTORY]))
        write_manifest(path, msgspec.structs.replace(manifest, **changes))


def make_elsewhere(engine: RandomEngine, cache: Path, *, tried: bool = False) -> Path:
    """`make` in a process of its own, whose GPU memory is free afterwards; `tried`: loaded once, if no load has left
    its kernels yet. ApplianceError if it fails."""
    command = [sys.executable, "-m", "appliance.bench.make_engine", msgspec.json.encode(engine).decode(), str(cache)]
    done = subprocess.run([*command, *(["--tried"] if tried else [])], stdout=subprocess.PIPE, text=True)
    *said, last = done.stdout.splitlines() or [""]
    for line in said if done.returncode == 0 else [*said, last]:
        say(line)
    if done.returncode:
        raise ApplianceError("the engine with random weights could not be made", hint="its own messages are above")
    return Path(last)


def keep(path: Path, loaded: LoadedModel) -> None:
    """Into a random engine: how its ranks add up, if that was timed at this load, and the kernels that were used since,
    if it lacked any."""
    manifest = read_manifest(path)
    known = {(tactic.scheme, tactic.rows) for tactic in loaded.reductions}
    others = tuple(tactic for tactic in manifest.tactics if (tactic.scheme, tactic.rows) not in known)
    changes: dict[str, Any] = {"tactics": (*others, *loaded.reductions)} if known else {}
    lacked = not manifest.kernels or KERNELS.compiled or KERNELS.from_cache
    if loaded.model.embedding.weight.is_cuda and lacked:
        kernels = _gather(path / KERNEL_DIRECTORY)
        rest = [file for file in manifest.files if not file.name.startswith(f"{KERNEL_DIRECTORY}/")]
        changes |= {"kernels": manifest.kernels | kernels, "files": (*rest, *_listed(path, [KERNEL_DIRECTORY]))}
    if changes:
        write_manifest(path, msgspec.structs.replace(manifest, **changes))


def _gather(directory: Path) -> dict[str, str]:
    """Add the kernels that were used to those that are there, which this process may have mapped."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        versions = KERNELS.gather(Path(scratch))
        for file in Path(scratch).rglob("*"):
            target = directory / file.relative_to(scratch)
            if file.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                file.rename(target)
    return versions


# ---------------------------------------------------------------- writing


def _is_there(path: Path, key: str, config: ModelConfig) -> bool:
    try:
        manifest = read_manifest(path)
    except EngineDamagedError:
        return False
    return (manifest.key, manifest.model) == (key, config)


def _write(path: Path, engine: RandomEngine, config: ModelConfig, inputs: KeyInputs, device: torch.device) -> None:
    """Everything; the manifest last."""
    write_config(config, path / "config.json")
    (path / "tokenizer").mkdir()
    write_tokenizer(config.vocab_size, path / "tokenizer")
    weights = _write_files if engine.files else _write_stubs
    files = [*weights(path, engine, config, inputs, device), *_listed(path, ["config.json", "tokenizer"])]
    summary = BuildSummary(
        seconds=0.0,
        source=engine.shape,
        source_bytes=0,
        engine_bytes=sum(file.size for file in files),
        peak_memory=0,
        device=str(device),
        notes=("random weights, for benchmarks",),
    )
    write_manifest(path, new_manifest(inputs, config, tuple(files), summary))


def _listed(path: Path, names: list[str]) -> list[EngineFile]:
    """These files, and those in these directories, as a manifest has them."""
    found = sorted(file for name in names for file in [path / name, *(path / name).rglob("*")] if file.is_file())
    digests = hash_files(found)
    return [
        EngineFile(name=file.relative_to(path).as_posix(), size=file.stat().st_size, digest=digest)
        for file, digest in zip(found, digests, strict=True)
    ]


def _write_stubs(
    path: Path, engine: RandomEngine, config: ModelConfig, inputs: KeyInputs, device: torch.device
) -> Iterator[EngineFile]:
    """Weight files that stand for random numbers, others for each rank."""
    for rank in range(engine.ranks):
        name = rank_file_name(rank)
        size, digest = write_random_file(path / name, rank)
        yield EngineFile(name=name, size=size, digest=digest)


def _write_files(
    path: Path, engine: RandomEngine, config: ModelConfig, inputs: KeyInputs, device: torch.device
) -> Iterator[EngineFile]:
    """Weight files as a build writes them; all names stand for the same file."""
    if engine.pp_size > 1:
        raise SettingsError("random weights in files are those of one stage", hint="leave --pp-size out")
    specs = weight_specs(config)
    scheme = registry.load("quantization", inputs.scheme).Scheme(inputs.scheme_parameters)
    dtype = getattr(torch, inputs.dtype)
    first, writing = path / rank_file_name(0), deque[Future[None]]()
    plan = plan_tensors(specs, scheme, dtype, engine.tp_size)
    share = TensorParallel(0, engine.tp_size)
    model = build_model(config, inputs.scheme, dtype, inputs.scheme_parameters, share)
    with torch.no_grad(), SafetensorsWriter(first, plan) as writer, ThreadPoolExecutor(_WRITERS) as pool:
        for name, tensor in tensors(model, device, 0):
            writing.append(pool.submit(writer.write, name, tensor))
            if len(writing) > 2 * _WRITERS:
                writing.popleft().result()
        for job in writing:
            job.result()
        size, digest = writer.finish()
    say(f"wrote {size / 1e9:.1f} GB of random weights, which are those of every rank")
    for rank in range(engine.ranks):
        if rank:
            os.link(first, path / rank_file_name(rank))
        yield EngineFile(name=rank_file_name(rank), size=size, digest=digest)


def weight_specs(config: ModelConfig) -> list[WeightSpec]:
    """Of the architecture, in file order."""
    module = registry.load("models", registry.architectures()[config.architecture].name)
    specs: list[WeightSpec] = module.weight_specs(config)
    return specs


# ---------------------------------------------------------------- tuning


def _time_products(path: Path, cache: Path, device: torch.device) -> None:
    """Choose among the ways to compute each product of a rank, as a build does; into the manifest."""
    from appliance.bench.tune import time_products

    manifest = read_manifest(path)
    KERNELS.open(path, manifest.kernels)
    found = time_products(manifest, cache, device)
    products = {tactic.product for tactic in found}
    others = tuple(tactic for tactic in manifest.tactics if tactic.product not in products)  # of the ranks together
    if (*found, *others) != manifest.tactics:
        write_manifest(path, msgspec.structs.replace(manifest, tactics=(*found, *others)))
