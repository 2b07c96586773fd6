"""An engine for a model, in one blocking call: what `LLM(...)` and `bench offline` start from. No server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import msgspec

from appliance.builder import BuildRequest
from appliance.errors import SettingsError
from appliance.launch.replicas import split
from appliance.launch.report import report_progress
from appliance.launch.scratch import socket_directory
from appliance.launch.startup import Startup
from appliance.server.lifecycle import Lifecycle
from appliance.server.state import ServerState
from appliance.settings import Settings, load, specs
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
    adapt: Callable[[BuildRequest], BuildRequest] = lambda request: request,
) -> EngineOptions:
    """Options that load `model`: an engine directory as it is, anything else (directory, hub id, "builtin") through the
    same steps as a server's start, building the engine if need be.

    None leaves a choice to the environment's settings and the selection. `overrides`: names of settings or of fields of
    EngineOptions. `adapt` may change what is built. Raises SettingsError for an unknown option, and what the steps
    raise.
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
    if settings.nnodes > 1:
        raise SettingsError(f"nnodes is {settings.nnodes}: only `serve` runs an engine on several nodes")
    return msgspec.structs.replace(prepare(settings, adapt=adapt), **direct)


def prepare(
    settings: Settings,
    watch: Callable[[Lifecycle], Coroutine[Any, Any, None]] = report_progress,
    adapt: Callable[[BuildRequest], BuildRequest] = lambda request: request,
) -> EngineOptions:
    """The start-up sequence in a thread with an event loop: the caller may be inside of one, as in a notebook. The
    options are those of one engine, also where a server would have replicas. `watch` shows how far it is, and is
    cancelled in the end. Raises what the steps raise."""
    result: list[EngineOptions] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            with socket_directory() as directory:
                result.append(asyncio.run(_prepare(settings, directory, watch, adapt)))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="prepare-engine", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


async def _prepare(
    settings: Settings,
    directory: Path,
    watch: Callable[[Lifecycle], Coroutine[Any, Any, None]],
    adapt: Callable[[BuildRequest], BuildRequest],
) -> EngineOptions:
    state = ServerState((settings.model,))
    reporter = asyncio.create_task(watch(state.lifecycle))
    try:
        startup = Startup(settings, state, directory, adapt, serves=False)
        options = msgspec.structs.replace(split(await startup.prepare())[0], replicas=1)
        if startup.publication is not None:
            await startup.publication
        return options
    finally:
        reporter.cancel()
        await asyncio.wait({reporter})  # a bar takes itself off the terminal
