"""An engine for a plan: found in the store, else fetched from the engine source, else built; verified in each case.

Knows keys, the store, the source and the builder process; what is chosen, and what happens when an engine is refused,
is startup.py's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from appliance.builder import BuildRequest, key_of
from appliance.builder.request import is_calibrated
from appliance.checkpoint import digest, is_remembered, read_model_config, resolve_text
from appliance.engines import (
    DamagedFileError,
    EnginePublishedError,
    EngineStore,
    EngineTransferError,
    LockHolder,
    VerifyLevel,
    fetch,
    is_local,
    publish,
    redact,
)
from appliance.engines.disk import ensure_writable
from appliance.engines.quality import Quality, judge, numbers
from appliance.errors import EngineBuildError, EngineDamagedError
from appliance.launch.build import run_builder
from appliance.launch.engine import show_progress
from appliance.launch.phases import Phases, in_thread
from appliance.launch.plan import Plan, build_request, devices_of_build, needs_text
from appliance.server.state import ServerState
from appliance.server.tokenizer import load_tokenizer
from appliance.settings import Settings

log = logging.getLogger("appliance.launch")


class EngineSupply:
    """`directory` is for the builder's socket. `adapt` may change what is built. Fills `state` with what is known of
    the engine: manifest, tokenizer, whether it was found."""

    def __init__(
        self,
        settings: Settings,
        state: ServerState,
        directory: Path,
        store: EngineStore,
        phases: Phases,
        adapt: Callable[[BuildRequest], BuildRequest],
    ) -> None:
        self._settings = settings
        self._state = state
        self._directory = directory
        self._store = store
        self._phases = phases
        self._adapt = adapt
        self._digest = ""  # of the checkpoint, so that the builder need not hash it once more
        self.publication: asyncio.Task[None] | None = None  # the copy of the engine to its source, beside the start

    async def obtain(self, plan: Plan) -> Path:
        """The verified engine of the plan. Raises what the steps raise, EngineQualityError among it."""
        await self._find_text(plan)
        await in_thread(lambda: self._check_text(plan))
        self._phases.enter("verifying", "hashing the checkpoint")
        key = await self._key(plan)
        hit = await self._verified(plan, key)
        self._state.metrics.engine_cache_hit = hit is not None
        if hit is not None:
            log.info("engine %s found", key[:12])
            self._publish(hit)
            return hit
        source = self._engine_source
        fetched = source is not None and await self._fetch(source, key)
        if not fetched:
            await self._build(plan, key)
        engine_dir = await self._verified(plan, key)
        if engine_dir is None:
            raise EngineBuildError(f"engine {key[:12]} was damaged as soon as it was made", hint="check the disk")
        if not fetched:
            self._publish(engine_dir)
        quality = self._state.manifest.get("quality") if self._state.manifest else None
        if quality:
            log.info("against its checkpoint: %s", numbers(msgspec.convert(quality, Quality)))
        return engine_dir

    async def discard(self, plan: Plan) -> None:
        """Take an engine that could not be loaded out of the store."""
        key = await self._key(plan)
        try:
            await in_thread(lambda: self._store.verify(key, "full"))
        except DamagedFileError as damaged:
            log.warning("%s", damaged)
            await in_thread(partial(self._store.set_aside, damaged))
        else:
            # Its files are what was built, yet they cannot be loaded: another build is the only thing left to try.
            await in_thread(lambda: self._store.remove(key))

    async def set_aside_if_damaged(self, plan: Plan) -> None:
        """As `discard`, but an engine whose files are what was built stays."""
        key = await self._key(plan)
        if self._store.find(key) is None:
            return
        try:
            await in_thread(lambda: self._store.verify(key, "full"))
        except DamagedFileError as damaged:
            log.warning("%s", damaged)
            await in_thread(partial(self._store.set_aside, damaged))

    async def load_tokenizer(self, engine_dir: Path) -> None:
        template = self._settings.chat_template
        self._state.tokenizer = await in_thread(lambda: load_tokenizer(engine_dir, template))

    # ------------------------------------------------------------ steps

    async def _find_text(self, plan: Plan) -> None:
        """Text to calibrate with, if it is a data set of the hub."""
        settings = self._settings
        if settings.calibration_data is None or not needs_text(plan):
            return
        data = settings.calibration_data
        self._phases.enter("downloading", data)
        progress = self._phases.progress()
        await in_thread(
            lambda: resolve_text(
                data, settings.cache_dir, offline=settings.offline, token=settings.hf_token, progress=progress
            )
        )

    def _check_text(self, plan: Plan) -> None:
        """Too short a text is said before minutes of hashing; where these are spared, the builder says it soon."""
        from appliance.builder.calibration_data import tokens_for

        request = self._request(plan)
        if is_calibrated(request) and not is_remembered(plan.checkpoint, plan.settings.cache_dir):
            tokens_for(request, read_model_config(plan.checkpoint))

    async def _key(self, plan: Plan) -> str:
        progress = self._phases.progress()
        cache = plan.settings.cache_dir
        check = plan.settings.offline and plan.settings.verify_digests
        found = await in_thread(lambda: digest(plan.checkpoint, cache=cache, check=check, progress=progress))
        self._digest = found.value
        return await in_thread(lambda: key_of(self._request(plan)))

    def _request(self, plan: Plan) -> BuildRequest:
        return self._adapt(build_request(plan, self._digest))

    @property
    def _engine_source(self) -> str | None:
        """Where engines come from, unless that needs a network and there is to be none."""
        source = self._settings.engine_source
        if source is None or not self._settings.offline or is_local(source):
            return source
        log.warning("offline: the engine source %s is not asked", redact(source))
        return None

    async def _verified(self, plan: Plan, key: str) -> Path | None:
        """The engine if it is there and whole; a damaged one is moved aside."""
        if self._store.find(key) is None:
            return None
        self._phases.enter("verifying", f"engine {key[:12]}")
        progress = self._phases.progress()
        level: VerifyLevel = "auto" if self._settings.verify_digests else "size"
        try:
            checked = await in_thread(lambda: self._store.verify(key, level, progress))
        except DamagedFileError as damaged:
            log.warning("%s", damaged)
            await in_thread(partial(self._store.set_aside, damaged))
            return None
        manifest = checked.manifest
        if manifest.quality is not None:  # of another build, held against another limit perhaps
            judge(manifest.quality, self._request(plan).max_kl, manifest.model.vocab_size, f"engine {key[:12]}")
        self._state.manifest = msgspec.to_builtins(manifest)
        return self._store.path_of(key)

    async def _fetch(self, url: str, key: str) -> bool:
        """Whether the engine could be fetched; if not, the log says why, and it is built."""
        self._phases.enter("fetching", f"engine {key[:12]}")
        progress = self._phases.progress()
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

    async def _build(self, plan: Plan, key: str) -> None:
        self._phases.enter("building", f"engine {key[:12]}")
        await in_thread(lambda: ensure_writable(self._store.engines))
        if (plan.checkpoint / "tokenizer.json").is_file():  # what the server could not read is not worth building
            await self.load_tokenizer(plan.checkpoint)
        life, request = self._state.lifecycle, self._request(plan)
        built = await run_builder(
            request, self._settings, self._directory, lambda m: show_progress(life, m), devices_of_build(plan)
        )
        log.info("engine %s built in %.1f s", key[:12], built.seconds)


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
