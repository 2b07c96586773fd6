"""Checkpoint to engine, start to end: look, lock, convert, check, try on its GPU, publish."""

from __future__ import annotations

import contextlib
import gc
import logging
import resource
import shutil
import time
from pathlib import Path

import msgspec
import torch

from appliance import registry
from appliance.builder.ahead import prepare_ahead
from appliance.builder.calibrate import CalibratedTensors
from appliance.builder.calibration_data import CalibrationTokens, tokens_for
from appliance.builder.convert import AnyOrder, InOrder, StoredTensors, convert
from appliance.builder.job import Job, LoadPlugin, checked_scheme, for_gpu
from appliance.builder.phases import Phases, describe
from appliance.builder.plain import PlainTensors
from appliance.builder.progress import SendFn, sender
from appliance.builder.published import PublishedTensors, check_tensors, kv_scales_of
from appliance.builder.quality import check_quality
from appliance.builder.request import BuildRequest, key_inputs_of
from appliance.builder.selfcheck import self_check
from appliance.builder.shards import plan_ranks
from appliance.builder.tokenizer import copy_tokenizer
from appliance.builder.warmup import WarmedUp, warm_up
from appliance.checkpoint import (
    Checkpoint,
    SafetensorsWriter,
    TensorPlan,
    model_name_of,
    planned_file_size,
    read_model_config,
)
from appliance.checkpoint.files import CONFIG_FILES, TOKENIZER_FILES, require_tokenizer
from appliance.engines import disk
from appliance.engines.digest import hash_files
from appliance.engines.key import engine_key
from appliance.engines.manifest import (
    MANIFEST_NAME,
    BuildSummary,
    EngineFile,
    EngineManifest,
    SelfCheck,
    new_manifest,
    rank_file_name,
    write_manifest,
)
from appliance.engines.meter import ByteMeter
from appliance.engines.quality import Quality, judge, recall
from appliance.engines.store import EngineStore, LockHolder
from appliance.engines.verify import DamagedFileError, verify_engine
from appliance.errors import CheckpointError, EngineBuildError
from appliance.ipc import Progress
from appliance.types import ModelConfig

log = logging.getLogger(__name__)

# At most, of compiled kernels in an engine: some 100 cubins and a few of FlashInfer's modules.
_KERNEL_BYTES = 256 << 20


def build(
    request: BuildRequest,
    progress: SendFn | None = None,
    *,
    store: EngineStore | None = None,
    load_plugin: LoadPlugin = registry.load,
    phases: Phases | None = None,
) -> Path:
    """The directory of the engine that `request` asks for; built unless it is in the store. If another process is
    building it, waits and takes its result. `phases`: what was counted before; `store` and `load_plugin` are seams for
    tests.

    `progress` is called at least every second from a thread of its own. Raises CheckpointError, EngineBuildError
    (EngineQualityError beyond `request.max_kl`), NoSpaceError (before writing), CacheNotWritableError.
    """
    send: SendFn = progress or (lambda message: None)
    source = Path(request.checkpoint)
    config = read_model_config(source)
    require_tokenizer(source)
    store = store or EngineStore(Path(request.cache))
    with disk.full_disk_explained(store.engines, f"the {request.precision} engine of {source.name}"):
        return _build(request, config, store, send, load_plugin, phases or Phases())


def _build(
    request: BuildRequest,
    config: ModelConfig,
    store: EngineStore,
    send: SendFn,
    load_plugin: LoadPlugin,
    phases: Phases,
) -> Path:
    source = Path(request.checkpoint)
    disk.ensure_writable(store.engines)
    with phases.phase("headers"), Checkpoint(source) as checkpoint:  # what they show comes before minutes of hashing
        specs = load_plugin("models", registry.architectures()[config.architecture].name).weight_specs(config)
        check_tensors(checkpoint, config, specs)
        checked_scheme(key_inputs_of(msgspec.structs.replace(request, checkpoint_digest="unknown")), specs, load_plugin)
        tokens = tokens_for(request, config)  # a text that is too short, too
    with phases.phase("digest"):
        inputs = key_inputs_of(request, sender("verify", send))
    key = engine_key(inputs)

    def waiting(holder: LockHolder | None) -> None:
        send(Progress(phase="build", detail=f"waiting for {holder or 'another process'}, which builds this engine"))

    with store.build_lock(key, waiting):
        present = store.find(key)
        if present is not None:
            try:
                verify_engine(present, "size")
                return present
            except DamagedFileError as error:
                store.set_aside(error)
        if (refused := recall(store.engines, key)) is not None:
            judge(refused, request.max_kl, config.vocab_size, f"the {request.precision} engine of {source.name}")
        with Checkpoint(source) as checkpoint:
            job = Job.start(request, inputs, config, checkpoint, load_plugin)
            weights = _source(job, tokens, store, send)
            _reserve(job, weights, store)
            with store.staging(key) as staging:
                try:
                    _write_engine(job, weights, staging, store, send, phases)
                except (CheckpointError, EngineBuildError):  # a second calibration would end alike
                    store.drop_calibration(key)
                    raise
                with phases.phase("publish"):
                    published = store.publish(key, staging)
                log.info("built: %s", describe(phases.seconds))
                return published


def _source(job: Job, tokens: CalibrationTokens | None, store: EngineStore, send: SendFn) -> AnyOrder | InOrder:
    """Where this engine's tensors come from. Raises what making the source raises."""
    if tokens is not None:
        directory = store.calibration_staging(engine_key(job.inputs))
        return CalibratedTensors(job, tokens, directory, sender("build", send))
    return PlainTensors(job) if job.config.quantization is None else PublishedTensors(job)


def _plans(job: Job) -> list[list[TensorPlan]]:
    """Of every rank's weight file."""
    return plan_ranks(job.specs, job.scheme, job.dtype, job.config, job.inputs.tp_size, job.inputs.pp_size)


def _reserve(job: Job, weights: StoredTensors, store: EngineStore) -> None:
    """NoSpaceError, with how much is needed, before anything is written."""
    source = job.checkpoint.path
    small = [p for name in (*CONFIG_FILES, *TOKENIZER_FILES) if (p := source / name).is_file()]
    needed = sum(planned_file_size(plan) for plan in _plans(job))
    needed += sum(p.stat().st_size for p in small)
    needed += _KERNEL_BYTES if for_gpu(job.inputs.backend) else 0
    needed += weights.scratch_bytes if isinstance(weights, CalibratedTensors) else 0
    store.reserve(needed, f"the {job.inputs.precision} engine of {source.name}")


def _write_engine(
    job: Job, weights: AnyOrder | InOrder, staging: Path, store: EngineStore, send: SendFn, phases: Phases
) -> None:
    """Everything of an engine into `staging`: the tokenizer first, since it may turn out to be none; the manifest
    last."""
    source = job.checkpoint.path
    note = copy_tokenizer(source, staging)
    for name in CONFIG_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, staging / name)

    def report(detail: str) -> None:
        send(Progress(phase="build", detail=detail, percent=100.0))

    with phases.phase("prepare"):  # a CUDA context, among others
        ahead = prepare_ahead(job, staging, report, rehearse=isinstance(weights, AnyOrder))
    with contextlib.ExitStack() as open_files:  # the disk is written to while the engine is checked and tried
        open_files.callback(ahead.stop)
        with ByteMeter(sum(map(weights.work, job.specs)), sender("build", send), detail="reading") as meter:
            rank_files = _write_weights(job, weights, staging, meter, phases, open_files)
            meter.advance(0, "checking the built engine")
            paths = [staging / file.name for file in rank_files]
            with phases.phase("self-check"), torch.inference_mode():
                checks = self_check(job, weights, paths)
            with phases.phase("quality"):
                quality = check_quality(job, paths, store.engines, report)
        notes = [f"torch {torch.__version__}", *([note] if note else [])]

        def write(warmed: WarmedUp) -> None:
            files = _files(staging, rank_files)
            write_manifest(staging, _manifest(job, weights, files, checks, quality, warmed, tuple(notes), phases))

        with phases.phase("waiting for tactics"):
            found = ahead.result()
        if job.device.type == "cuda":  # not before: while a graph is captured, torch gives no memory back
            gc.collect()
            torch.cuda.empty_cache()
        phases.add_parts("beside", found.seconds)
        # Loading reads the manifest, so there is one before the kernels that loading makes known.
        write(WarmedUp(tactics=found.tactics or ()))
        with phases.phase("trial"):
            warmed = warm_up(staging, job.request, report, found.tactics)
            phases.add_parts("trial", warmed.seconds)
        with phases.phase("disk"):
            open_files.close()
    notes += [warmed.note] if warmed.note else []
    write(warmed)


def _write_weights(
    job: Job,
    weights: AnyOrder | InOrder,
    staging: Path,
    meter: ByteMeter,
    phases: Phases,
    open_files: contextlib.ExitStack,
) -> list[EngineFile]:
    """The weight file of every rank, in one pass over the source. Closing `open_files` waits for the disk."""
    writers = [
        open_files.enter_context(SafetensorsWriter(staging / rank_file_name(rank), plan))
        for rank, plan in enumerate(_plans(job))
    ]
    with phases.phase("convert"), torch.inference_mode():
        convert(weights, writers, meter, phases, job.devices)
    with phases.phase("digest of the engine"):
        written = [(writer.path.name, *writer.finish()) for writer in writers]
    return [EngineFile(name=name, size=size, digest=digest) for name, size, digest in written]


def _files(staging: Path, rank_files: list[EngineFile]) -> tuple[EngineFile, ...]:
    """The manifest's list, of everything that is there; the weights' digests are known from writing them."""
    known = {MANIFEST_NAME, *(file.name for file in rank_files)}
    others = sorted(p for p in staging.rglob("*") if p.is_file() and p.name not in known)
    found = list(rank_files)
    for path, digest in zip(others, hash_files(others)):
        name = path.relative_to(staging).as_posix()
        found.append(EngineFile(name=name, size=path.stat().st_size, digest=digest))
    return tuple(found)


def _manifest(
    job: Job,
    weights: StoredTensors,
    files: tuple[EngineFile, ...],
    checks: tuple[SelfCheck, ...],
    quality: Quality | None,
    warmed: WarmedUp,
    notes: tuple[str, ...],
    phases: Phases,
) -> EngineManifest:
    return new_manifest(
        job.inputs,
        job.config,
        files,
        BuildSummary(
            seconds=round(time.monotonic() - job.started, 3),
            source=model_name_of(job.checkpoint.path),
            source_bytes=job.checkpoint.nbytes,
            engine_bytes=sum(file.size for file in files),
            peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            device=", ".join(map(str, job.devices)),
            gpu=warmed.gpu,
            notes=notes,
            phases=phases.seconds,
        ),
        kernels=warmed.kernels,
        tactics=warmed.tactics,
        self_check=checks,
        calibration=weights.summary() if isinstance(weights, CalibratedTensors) else None,
        quality=quality,
        kv_scales=kv_scales_of(job),
    )
