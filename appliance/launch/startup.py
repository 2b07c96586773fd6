"""The start-up sequence: detect, find the checkpoint, select, find or fetch or build the engine, verify it.

`Startup.prepare` reads top to bottom. Blocking steps run in daemon threads, the build in a child process, so that the
server answers all along; every step shows its progress in the lifecycle. Knows nothing of signals or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

import appliance
from appliance import hardware, profiles
from appliance.builder import BuildRequest, key_of
from appliance.checkpoint import Checkpoint, digest, read_model_config, resolve, resolve_text
from appliance.checkpoint.expected import expected_sha256
from appliance.checkpoint.files import require_tokenizer
from appliance.checkpoint.scale_numbers import check_scale_numbers
from appliance.engines import (
    DamagedFileError,
    EnginePublishedError,
    EngineStore,
    EngineTransferError,
    LockHolder,
    ProgressFn,
    Snapshot,
    VerifyLevel,
    fetch,
    is_local,
    publish,
    redact,
    verify_engine,
)
from appliance.engines.disk import ensure_writable
from appliance.engines.manifest import MANIFEST_NAME
from appliance.engines.quality import Quality, judge, numbers
from appliance.errors import EngineBuildError, EngineDamagedError, EngineQualityError, ProfileError
from appliance.launch.build import run_builder
from appliance.launch.engine import show_progress
from appliance.launch.plan import (
    Plan,
    build_request,
    choose,
    config_only,
    engine_options,
    make_plan,
    needs_text,
    options_of_directory,
)
from appliance.server.lifecycle import Lifecycle, Phase
from appliance.server.state import ServerState
from appliance.server.tokenizer import load_tokenizer
from appliance.settings import Settings, cuda_visible_devices, export_hub_environment
from appliance.types import EngineOptions, Hardware

log = logging.getLogger("appliance.launch")

T = TypeVar("T")


async def in_thread(work: Callable[[], T]) -> T:
    """The result of blocking work. Its thread is a daemon: cancelled or not, it never keeps the process alive."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if result.done():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        value, failure = None, None
        try:
            value = work()
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, value, failure)

    threading.Thread(target=run, daemon=True).start()
    return await result


class Startup:
    """`directory` is for the builder's socket. `adapt` may change what is built, as benchmarks of schemes do that no
    profile names."""

    def __init__(
        self,
        settings: Settings,
        state: ServerState,
        directory: Path,
        adapt: Callable[[BuildRequest], BuildRequest] = lambda request: request,
    ) -> None:
        self._adapt = adapt
        self._settings = settings
        self._state = state
        self._life: Lifecycle = state.lifecycle
        self._directory = directory
        self._store = EngineStore(settings.cache_dir)
        self._plan: Plan | None = None
        self._digest = ""  # of the checkpoint, so that the builder need not hash it once more
        self.publication: asyncio.Task[None] | None = None  # the copy of the engine to its source, beside the start

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
        engine_dir = await self._obtain_good_engine(machine, checkpoint)
        await self._load_tokenizer(engine_dir)
        return engine_options(self._plan, engine_dir)

    async def repair(self, error: EngineDamagedError) -> EngineOptions:
        """The engine process found a damaged file: check all, move the engine aside, obtain it anew."""
        if self._plan is None:
            raise error  # an engine directory that the user gave: nothing to build it from
        key = await self._key()
        try:
            await in_thread(lambda: self._store.verify(key, "full"))
        except DamagedFileError as damaged:
            log.warning("%s", damaged)
            await in_thread(partial(self._store.set_aside, damaged))
        else:
            # Its files are what was built, yet they cannot be loaded: another build is the only thing left to try.
            await in_thread(lambda: self._store.remove(key))
        return engine_options(self._plan, await self._obtain_engine())

    # ------------------------------------------------------------ steps

    def _enter(self, phase: Phase, detail: str = "") -> None:
        """A phase of the start; while an engine is repaired the server stays "restarting", or "ready" if other
        replicas serve."""
        if self._life.is_ready:
            log.info("%s%s", phase, f": {detail}" if detail else "")
        elif self._life.phase == "restarting":
            self._life.progress(detail=f"{phase}: {detail}" if detail else phase)
        else:
            self._life.enter(phase, detail)

    def _progress(self) -> ProgressFn:
        """For callbacks from other threads."""
        loop = asyncio.get_running_loop()

        def show(snapshot: Snapshot) -> None:
            if self._life.is_ready:
                return  # a repair while other replicas serve
            self._life.progress(
                percent=snapshot.percent,
                detail=snapshot.detail,
                bytes_done=snapshot.bytes_done,
                bytes_total=snapshot.bytes_total,
                eta_seconds=snapshot.eta_seconds,
            )

        def report(snapshot: Snapshot) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(show, snapshot)

        return report

    async def _check_cache(self) -> None:
        problem = await in_thread(self._store.ensure_useful)
        if problem is not None:
            log.warning("only engines that are in the cache already can be served: %s", problem)

    async def _detect(self) -> Hardware:
        self._enter("detecting")
        machine = await in_thread(lambda: hardware.detect(cuda_visible_devices()))
        for gpu in machine.usable_gpus:
            log.info("GPU %d: %s, %.0f GiB free", gpu.index, gpu.name, gpu.free_memory / 2**30)
        for note in machine.notes:
            log.warning("%s", note)
        if self._settings.require_gpu:
            hardware.require_gpu(machine)
        if not machine.usable_gpus:
            log.warning("SERVING ON THE CPU: %s", machine.problem or "no GPU was found")
        return machine

    async def _find_checkpoint(self) -> Path:
        settings = self._settings
        export_hub_environment(settings)
        self._enter("downloading", settings.model)
        progress = self._progress()
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

    async def _find_text(self) -> None:
        """Text to calibrate with, if it is a data set of the hub."""
        assert self._plan is not None
        settings = self._settings
        if settings.calibration_data is None or not needs_text(self._plan):
            return
        data = settings.calibration_data
        self._enter("downloading", data)
        progress = self._progress()
        await in_thread(
            lambda: resolve_text(
                data, settings.cache_dir, offline=settings.offline, token=settings.hf_token, progress=progress
            )
        )

    async def _select(self, machine: Hardware, checkpoint: Path, refused: Mapping[str, str] | None = None) -> Plan:
        self._enter("selecting")
        model = await in_thread(lambda: read_model_config(checkpoint))
        selection = await in_thread(lambda: choose(self._settings, machine, model, refused))
        self._state.selection = profiles.explain_json(selection)
        plan = make_plan(self._settings, selection, checkpoint)
        outcome = plan.outcome
        labels = {"name": outcome.name, "precision": outcome.precision, "kv_cache": outcome.kv_cache}
        self._state.metrics.profile = labels | {"tp_size": str(outcome.tp_size), "backend": outcome.backend}
        log.info("profile %s (id %s); `select --explain` says why", outcome.name, outcome.id[:12])
        return plan

    async def _obtain_good_engine(self, machine: Hardware, checkpoint: Path) -> Path:
        """The engine of the plan; if its quality is refused and the settings allow it, that of the next profile of
        another precision, until one is good enough. EngineQualityError if there is none."""
        refused: dict[str, str] = {}
        while True:
            assert self._plan is not None
            try:
                return await self._obtain_engine()
            except EngineQualityError as error:
                if self._settings.on_quality_failure != "fallback":
                    raise
                bad = self._plan.outcome
                for outcome in self._plan.selection.outcomes:
                    if (outcome.precision, outcome.backend) == (bad.precision, bad.backend):
                        refused[outcome.profile] = f"was refused: {error.message}"
                try:
                    self._plan = await self._select(machine, checkpoint, refused)
                except ProfileError:
                    raise error from None  # nothing else may run: what was asked for is not replaced
                log.error("QUALITY: %s", error.message)
                log.error("FALLING BACK from %s to %s", bad.name, self._plan.outcome.name)

    async def _open_engine(self, engine_dir: Path, machine: Hardware) -> EngineOptions:
        """An engine directory as the model: nothing to select and nothing to build."""
        self._enter("verifying", str(engine_dir))
        progress = self._progress()
        level: VerifyLevel = "full" if self._settings.verify_digests else "size"
        checked = await in_thread(lambda: verify_engine(engine_dir, level, progress=progress))
        self._state.manifest = msgspec.to_builtins(checked.manifest)
        self._state.metrics.engine_cache_hit = True
        await self._load_tokenizer(engine_dir)
        return options_of_directory(engine_dir, checked.manifest, self._settings, machine)

    async def _key(self) -> str:
        assert self._plan is not None
        plan, progress = self._plan, self._progress()
        cache = plan.settings.cache_dir
        check = plan.settings.offline and plan.settings.verify_digests
        found = await in_thread(lambda: digest(plan.checkpoint, cache=cache, check=check, progress=progress))
        self._digest = found.value
        return await in_thread(lambda: key_of(self._request()))

    def _request(self) -> BuildRequest:
        assert self._plan is not None
        return self._adapt(build_request(self._plan, self._digest))

    async def _obtain_engine(self) -> Path:
        """The verified engine of the plan: found, fetched or built."""
        await self._find_text()
        self._enter("verifying", "hashing the checkpoint")
        key = await self._key()
        hit = await self._verified(key)
        self._state.metrics.engine_cache_hit = hit is not None
        if hit is not None:
            log.info("engine %s found", key[:12])
            self._publish(hit)
            return hit
        source = self._engine_source
        fetched = source is not None and await self._fetch(source, key)
        if not fetched:
            await self._build(key)
        engine_dir = await self._verified(key)
        if engine_dir is None:
            raise EngineBuildError(f"engine {key[:12]} was damaged as soon as it was made", hint="check the disk")
        if not fetched:
            self._publish(engine_dir)
        quality = self._state.manifest.get("quality") if self._state.manifest else None
        if quality:
            log.info("against its checkpoint: %s", numbers(msgspec.convert(quality, Quality)))
        return engine_dir

    @property
    def _engine_source(self) -> str | None:
        """Where engines come from, unless that needs a network and there is to be none."""
        source = self._settings.engine_source
        if source is None or not self._settings.offline or is_local(source):
            return source
        log.warning("offline: the engine source %s is not asked", redact(source))
        return None

    async def _verified(self, key: str) -> Path | None:
        """The engine if it is there and whole; a damaged one is moved aside."""
        if self._store.find(key) is None:
            return None
        self._enter("verifying", f"engine {key[:12]}")
        progress = self._progress()
        level: VerifyLevel = "auto" if self._settings.verify_digests else "size"
        try:
            checked = await in_thread(lambda: self._store.verify(key, level, progress))
        except DamagedFileError as damaged:
            log.warning("%s", damaged)
            await in_thread(partial(self._store.set_aside, damaged))
            return None
        manifest = checked.manifest
        if manifest.quality is not None:  # of another build, held against another limit perhaps
            judge(manifest.quality, self._request().max_kl, manifest.model.vocab_size, f"engine {key[:12]}")
        self._state.manifest = msgspec.to_builtins(manifest)
        return self._store.path_of(key)

    async def _fetch(self, url: str, key: str) -> bool:
        """Whether the engine could be fetched; if not, the log says why, and it is built."""
        self._enter("fetching", f"engine {key[:12]}")
        progress = self._progress()
        try:
            patience = self._settings.engine_source_timeout
            await in_thread(
                lambda: fetch(url, key, self._store, progress=progress, on_wait=_say_holder, patience=patience)
            )
        except (EngineTransferError, EngineDamagedError) as error:
            log.warning("building the engine, since it could not be fetched: %s", error)
            return False
        log.info("engine %s fetched", key[:12])
        return True

    def _publish(self, engine_dir: Path) -> None:
        """Begin to copy the engine to its source, if that is allowed and it is not there. Delays nothing."""
        source = self._engine_source
        if self._settings.engine_publish and source is not None:
            self.publication = asyncio.create_task(in_thread(lambda: _copy_to_source(engine_dir, source)))

    async def _build(self, key: str) -> None:
        assert self._plan is not None
        self._enter("building", f"engine {key[:12]}")
        await in_thread(lambda: ensure_writable(self._store.engines))
        checkpoint = self._plan.checkpoint
        if (checkpoint / "tokenizer.json").is_file():  # what the server could not read is not worth building
            await self._load_tokenizer(checkpoint)
        request = self._request()
        built = await run_builder(request, self._settings, self._directory, lambda m: show_progress(self._life, m))
        log.info("engine %s built in %.1f s", key[:12], built.seconds)

    async def _load_tokenizer(self, engine_dir: Path) -> None:
        template = self._settings.chat_template
        self._state.tokenizer = await in_thread(lambda: load_tokenizer(engine_dir, template))


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


def _copy_to_source(engine_dir: Path, url: str) -> None:
    """Whatever goes wrong is said, not raised: the engine is served from here."""
    try:
        log.info("engine %s is at %s", engine_dir.name[:12], publish(engine_dir, url))
    except EnginePublishedError as error:
        log.info("%s", error)
    except Exception as error:
        log.warning("the engine could not be published: %s", error)


def _say_holder(holder: LockHolder | None) -> None:
    log.info("waiting for another process that makes the same engine (%s)", holder or "unknown")
