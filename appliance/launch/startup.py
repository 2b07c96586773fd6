"""The start-up sequence: detect, find the checkpoint, select, obtain the engine; another profile if it is no good.

`Startup.prepare` reads top to bottom. Blocking steps run in daemon threads, the build in a child process, so that the
server answers all along; every step shows its progress in the lifecycle. How an engine is found, fetched or built is in
obtain.py. Knows nothing of signals or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from appliance.launch.node_hub import NodeHub

import appliance
from appliance import hardware, profiles
from appliance.builder import BuildRequest
from appliance.checkpoint import Checkpoint, read_model_config, resolve
from appliance.checkpoint.expected import expected_sha256
from appliance.checkpoint.files import require_tokenizer
from appliance.checkpoint.scale_numbers import check_scale_numbers
from appliance.engines import EngineStore, VerifyLevel, read_manifest, verify_engine
from appliance.engines.manifest import MANIFEST_NAME
from appliance.errors import EngineDamagedError, EngineQualityError, ProfileError
from appliance.launch.obtain import EngineSupply
from appliance.launch.phases import Phases, in_thread
from appliance.launch.plan import (
    Plan,
    choose,
    config_only,
    devices_of_directory,
    devices_of_node,
    engine_options,
    make_plan,
    options_of_directory,
)
from appliance.profiles import Selection
from appliance.server.state import ServerState
from appliance.settings import Settings, cuda_visible_devices, export_hub_environment
from appliance.types import EngineOptions, Hardware

log = logging.getLogger("appliance.launch")


class Startup:
    """`directory` is for the builder's socket. `adapt` may change what is built, as benchmarks of schemes do that no
    profile names. `serves`: a server follows, and not a command that only makes an engine or runs one itself. `nodes`:
    node 0's way to the others, which obtain the same engine meanwhile."""

    def __init__(
        self,
        settings: Settings,
        state: ServerState,
        directory: Path,
        adapt: Callable[[BuildRequest], BuildRequest] = lambda request: request,
        *,
        serves: bool = True,
        nodes: NodeHub | None = None,
    ) -> None:
        self._settings = settings
        self._state = state
        self._phases = Phases(state.lifecycle)
        self._store = EngineStore(settings.cache_dir)
        self._supply = EngineSupply(settings, state, directory, self._store, self._phases, adapt)
        self._serves = serves
        self._nodes = nodes
        self._plan: Plan | None = None
        self._machine: Hardware | None = None

    async def prepare(self) -> EngineOptions:
        """Everything up to a verified engine. Raises what the steps raise, each with its exit code."""
        given = Path(self._settings.model).expanduser()
        if not (given / MANIFEST_NAME).is_file():  # such a directory needs no cache
            await self._check_cache()
        machine = await self._detect()
        if (given / MANIFEST_NAME).is_file():
            return await self._open_engine(given, machine)
        early = await in_thread(lambda: config_only(self._settings))
        if early is not None:  # before the weights are downloaded: what cannot run need not come
            await self._select(machine, early)
        checkpoint = await self._find_checkpoint()
        self._plan = await self._select(machine, checkpoint)
        engine_dir = await self._obtain_good_engine(self._plan, machine)
        await self._supply.load_tokenizer(engine_dir)
        await self._others_have(engine_dir)
        return engine_options(self._plan, engine_dir)

    async def obtain_as_told(
        self, selection: Selection | None, *, repair: bool = False
    ) -> tuple[Path, tuple[str, ...]]:
        """On another node than 0: the engine of what node 0 has selected (None: of the directory that is the model),
        verified, and the devices of its ranks here. `repair`: one that is damaged is made anew. Raises as `prepare`
        does, and HardwareError if this machine cannot run its part."""
        machine = self._machine = self._machine or await self._detect()
        given = Path(self._settings.model).expanduser()
        if selection is None:
            await self._open_engine(given, machine)
            return given, devices_of_directory(read_manifest(given), self._settings, machine)
        await self._check_cache()
        plan = self._plan = make_plan(self._settings, selection, await self._find_checkpoint())
        devices = devices_of_node(plan, machine)
        if repair:
            await self._supply.set_aside_if_damaged(plan)
        return await self._supply.obtain(plan), devices

    async def _others_have(self, engine_dir: Path) -> None:
        if self._nodes is not None:
            self._phases.enter("verifying", "the engine of the other nodes")
            await self._nodes.obtained(read_manifest(engine_dir).key)

    async def repair(self, error: EngineDamagedError) -> EngineOptions:
        """The engine process found a damaged file: check all, move the engine aside, obtain it anew."""
        if self._plan is None:
            raise error  # an engine directory that the user gave: nothing to build it from
        if self._nodes is None:
            await self._supply.discard(self._plan)
        else:  # it may be one of theirs that is damaged, and this one whole
            await self._supply.set_aside_if_damaged(self._plan)
            self._nodes.select(self._plan.selection, repair=True)
        engine_dir = await self._supply.obtain(self._plan)
        await self._others_have(engine_dir)
        return engine_options(self._plan, engine_dir)

    @property
    def publication(self) -> asyncio.Task[None] | None:
        """The copy of the engine to its source, which goes on beside the start."""
        return self._supply.publication

    # ------------------------------------------------------------ steps

    async def _check_cache(self) -> None:
        problem = await in_thread(self._store.ensure_useful)
        if problem is not None:
            log.warning("only engines that are in the cache already can be served: %s", problem)

    async def _detect(self) -> Hardware:
        self._phases.enter("detecting")
        machine = await in_thread(lambda: hardware.detect(cuda_visible_devices()))
        for gpu in machine.usable_gpus:
            log.info("GPU %d: %s, %.0f GiB free", gpu.index, gpu.name, gpu.free_memory / 2**30)
        for note in machine.notes:
            log.warning("%s", note)
        if self._settings.require_gpu:
            hardware.require_gpu(machine)
        if not machine.usable_gpus:
            what = "SERVING ON THE CPU" if self._serves else "no GPU is used"
            log.warning("%s: %s", what, machine.problem or "no GPU was found")
        return machine

    async def _find_checkpoint(self) -> Path:
        settings = self._settings
        export_hub_environment(settings)
        self._phases.enter("downloading", settings.model)
        progress = self._phases.progress()
        path = await in_thread(
            lambda: resolve(
                settings.model,
                settings.cache_dir,
                offline=settings.offline,
                token=settings.hf_token,
                progress=progress,
            )
        )
        await in_thread(lambda: _check_checkpoint(path, settings.offline))
        self._state.license_path = _license_of(path)
        return path

    async def _select(self, machine: Hardware, checkpoint: Path, refused: Mapping[str, str] | None = None) -> Plan:
        self._phases.enter("selecting")
        model = await in_thread(lambda: read_model_config(checkpoint))
        selection = await in_thread(lambda: choose(self._settings, machine, model, refused))
        self._state.selection = profiles.explain_json(selection)
        plan = make_plan(self._settings, selection, checkpoint)
        outcome = plan.outcome
        labels = {"name": outcome.name, "precision": outcome.precision, "kv_cache": outcome.kv_cache}
        self._state.metrics.profile = labels | {
            "tp_size": str(outcome.tp_size),
            "pp_size": str(outcome.pp_size),
            "backend": outcome.backend,
        }
        log.info("profile %s (id %s); `select --explain` says why", outcome.name, outcome.id[:12])
        return plan

    async def _obtain_good_engine(self, plan: Plan, machine: Hardware) -> Path:
        """The engine of the plan; if its quality is refused and the settings allow it, that of the next profile of
        another precision, until one is good enough. EngineQualityError if there is none."""
        refused: dict[str, str] = {}
        while True:
            if self._nodes is not None:
                self._nodes.select(plan.selection)
            try:
                return await self._supply.obtain(plan)
            except EngineQualityError as error:
                if self._settings.on_quality_failure != "fallback":
                    raise
                bad = plan.outcome
                for outcome in plan.selection.outcomes:
                    if (outcome.precision, outcome.backend) == (bad.precision, bad.backend):
                        refused[outcome.profile] = f"was refused: {error.message}"
                try:
                    self._plan = plan = await self._select(machine, plan.checkpoint, refused)
                except ProfileError:
                    raise error from None  # nothing else may run: what was asked for is not replaced
                log.error("QUALITY: %s", error.message)
                log.error("FALLING BACK from %s to %s", bad.name, plan.outcome.name)

    async def _open_engine(self, engine_dir: Path, machine: Hardware) -> EngineOptions:
        """An engine directory as the model: nothing to select and nothing to build."""
        self._phases.enter("verifying", str(engine_dir))
        progress = self._phases.progress()
        level: VerifyLevel = "full" if self._settings.verify_digests else "size"
        checked = await in_thread(lambda: verify_engine(engine_dir, level, progress=progress))
        self._state.manifest = msgspec.to_builtins(checked.manifest)
        self._state.metrics.engine_cache_hit = True
        if self._nodes is not None:
            self._nodes.select(None)
        await self._supply.load_tokenizer(engine_dir)
        await self._others_have(engine_dir)
        return options_of_directory(engine_dir, checked.manifest, self._settings, machine)


def _check_checkpoint(path: Path, offline: bool) -> None:
    """Raises CheckpointError for what a look at the files shows, before the minutes of hashing and converting them: a
    missing, truncated or pickled shard; scales that are no numbers; no tokenizer; offline also any file that is known
    to have been there."""
    if offline:
        expected_sha256(path)
    with Checkpoint(path) as checkpoint:
        if read_model_config(path).quantization is not None:
            check_scale_numbers(checkpoint)
    require_tokenizer(path)


def _license_of(checkpoint: Path) -> Path | None:
    """The license text that came with the model, else the appliance's own; None if neither is there."""
    own = Path(appliance.__file__).parent.parent / "LICENSE"
    given = sorted(path for path in checkpoint.glob("LICENSE*") if path.is_file())
    return next(iter([*given, *([own] if own.is_file() else [])]), None)
