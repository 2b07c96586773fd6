"""An engine for a model, in one blocking call: what `LLM(...)` and `bench offline` start from. No server."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from appliance import hardware
from appliance.engines import EngineManifest, read_manifest
from appliance.engines.manifest import MANIFEST_NAME
from appliance.errors import HardwareError, SettingsError
from appliance.launch.startup import Startup
from appliance.server.state import ServerState
from appliance.settings import Settings, cuda_visible_devices, load, specs
from appliance.strict import nearest
from appliance.types import EngineOptions


def prepare_engine(
    model: str,
    *,
    precision: str | None = None,
    backend: str | None = None,
    profile: str | None = None,
    cache: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> EngineOptions:
    """Options that load `model`: an engine directory as it is, anything else (directory, hub id, "builtin") through the
    same steps as a server's start, building the engine if need be.

    None leaves a choice to the environment's settings and the selection. `overrides`: names of settings or of fields of
    EngineOptions. Raises SettingsError for an unknown one, and what the steps raise.
    """
    given = {"model": model, "precision": precision, "backend": backend, "profile": profile, "cache": cache}
    flags: dict[str, Any] = {name: str(value) for name, value in given.items() if value}
    direct: dict[str, Any] = {}
    for name, value in (overrides or {}).items():
        if name in specs():
            flags[name] = value
        elif name in EngineOptions.__struct_fields__ and name != "engine_dir":
            direct[name] = value
        else:
            near = nearest(name, [*specs(), *EngineOptions.__struct_fields__])
            raise SettingsError(f"there is no option {name!r}" + (f", did you mean {near!r}?" if near else ""))
    settings = load(flags)
    engine_dir = Path(model).expanduser()
    if (engine_dir / MANIFEST_NAME).is_file():
        options = _open(engine_dir, settings)
    else:
        options = _run_in_thread(settings)
    return msgspec.structs.replace(options, **direct)


def _run_in_thread(settings: Settings) -> EngineOptions:
    """The start-up sequence in an event loop of its own: the caller may be inside of one, as in a notebook."""
    result: list[EngineOptions] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="appliance-") as directory:
                startup = Startup(settings, ServerState((settings.model,)), Path(directory))
                result.append(asyncio.run(startup.prepare()))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="prepare-engine", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def _open(engine_dir: Path, settings: Settings) -> EngineOptions:
    """An engine directory needs no selection: what it was built for is in its manifest."""
    manifest = read_manifest(engine_dir)
    options = EngineOptions(
        engine_dir=str(engine_dir),
        backend=manifest.backend,
        devices=_devices_for(manifest),
        max_model_len=settings.max_model_len or 0,
        memory_fraction=settings.memory_fraction,
        kv_cache_dtype=settings.kv_cache_dtype,
        prefix_caching=settings.prefix_caching,
        cuda_graphs=settings.cuda_graphs,
        attention=settings.attention,
        seed=settings.seed,
        verify_digests=settings.verify_digests,
    )
    chosen = {
        name: value
        for name in ("max_num_seqs", "max_num_batched_tokens")
        if (value := getattr(settings, name)) is not None
    }
    return msgspec.structs.replace(options, **chosen)


def _devices_for(manifest: EngineManifest) -> tuple[str, ...]:
    """GPUs of the engine's compute capability, one per rank, those with most free memory. Raises HardwareError."""
    if manifest.compute_capability is None:
        return ()
    found = hardware.detect(cuda_visible_devices())
    fitting = [gpu for gpu in found.usable_gpus if gpu.compute_capability == manifest.compute_capability]
    needed = manifest.tp_size * manifest.pp_size
    if len(fitting) < needed:
        capability = ".".join(map(str, manifest.compute_capability))
        raise HardwareError(
            f"the engine was built for {needed} GPU(s) of compute capability {capability}; here are {len(fitting)}",
            hint=found.problem or "build it here, from its checkpoint",
        )
    fitting.sort(key=lambda gpu: (-gpu.free_memory, gpu.index))
    return tuple(gpu.uuid for gpu in fitting[:needed])
