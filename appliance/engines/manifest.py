"""engine.json: what an engine is, what it was made from, and the digest of each of its files.

The manifest carries a digest of itself, so a damaged one is noticed like any other file. Knows nothing of where engines
are kept.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import msgspec
from msgspec import field

from appliance.engines.disk import write_atomically
from appliance.engines.key import KeyInputs, engine_key
from appliance.engines.quality import Quality
from appliance.errors import EngineDamagedError
from appliance.types import ModelConfig, Precision, Struct

MANIFEST_NAME = "engine.json"
SCHEMA_VERSION = 4


class EngineFile(Struct, frozen=True):
    name: str  # relative to the engine directory, with "/"
    size: int  # bytes
    digest: str  # engines.digest


class SelfCheck(Struct, frozen=True):
    """One thing that the builder checked on the finished files."""

    name: str  # e.g. "layers.0.mlp.down against its checkpoint tensors"
    passed: bool
    value: float | None = None  # what was measured
    limit: float | None = None  # the largest value that passes
    note: str = ""


class TimedTactic(Struct, frozen=True):
    """The way to compute a product that was quickest on the GPU of the build."""

    product: str  # for people: "qkv"
    scheme: str  # as the scheme calls itself in `kernels.tactics.TABLE`
    out_features: int  # of the weight as prepared for products
    in_features: int
    rows: int  # serves up to so many rows
    tactic: str
    microseconds: float
    runner_up: str = ""
    runner_up_microseconds: float | None = None


class CalibrationSummary(Struct, frozen=True):
    """What the weights were quantized with. Errors are relative, of a product's output over the calibration text, the
    mean of all blocks, by product."""

    data: str  # for people: "the text that ships", a path
    digest: str  # SHA-256 of the text
    samples: int
    tokens: int
    seconds: float
    resumed_blocks: int  # finished by an earlier build that was interrupted
    nearest_error: dict[str, float]  # "qkv" -> with weights rounded to nearest
    error: dict[str, float]  # as they are stored
    choices: dict[str, str]  # "layers.0" -> what the search chose there, for people


class BuildSummary(Struct, frozen=True):
    """What a person wants to know of a build afterwards."""

    seconds: float
    source: str  # name of the model, for people: its hub id, or the last part of its path
    source_bytes: int
    engine_bytes: int
    peak_memory: int  # bytes of resident memory of the building process, highest
    device: str  # where weights were converted: "cpu", "cuda:0"
    gpu: str = ""  # the type of GPU that kernels were compiled and timed on; "": neither was done
    notes: tuple[str, ...] = ()
    phases: dict[str, float] = field(default_factory=dict)  # seconds by part of the build, in order (builder/phases.py)


class EngineManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of engine.json. Every field is written, also where it has its default."""

    schema_version: int
    key: str  # engine_key(key_inputs)
    key_inputs: KeyInputs
    model: ModelConfig
    precision: Precision
    scheme: str
    dtype: str
    tp_size: int
    pp_size: int
    backend: str
    backend_version: str
    builder_version: str
    compute_capability: tuple[int, int] | None
    created: str  # UTC, ISO 8601
    files: tuple[EngineFile, ...]  # all but engine.json
    kernels: dict[str, str]  # families of compiled code below kernels/ -> versions that it was compiled with
    tactics: tuple[TimedTactic, ...]
    self_check: tuple[SelfCheck, ...]
    build: BuildSummary
    calibration: CalibrationSummary | None = None  # None: there was none
    quality: Quality | None = None  # None: the weights are the checkpoint's own numbers
    kv_scales: tuple[tuple[float, float], ...] = ()  # of an FP8 KV cache, (K, V) per layer, if the checkpoint has them
    digest: str = ""  # of this manifest with this field empty

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def rank_files(self) -> tuple[str, ...]:
        """Weight files, by rank."""
        return tuple(rank_file_name(rank) for rank in range(self.tp_size * self.pp_size))


def new_manifest(
    inputs: KeyInputs,
    model: ModelConfig,
    files: tuple[EngineFile, ...],
    build: BuildSummary,
    *,
    kernels: dict[str, str] | None = None,
    tactics: tuple[TimedTactic, ...] = (),
    self_check: tuple[SelfCheck, ...] = (),
    calibration: CalibrationSummary | None = None,
    quality: Quality | None = None,
    kv_scales: tuple[tuple[float, float], ...] = (),
) -> EngineManifest:
    """Of an engine made now: what the key's inputs say is said by the manifest too."""
    return EngineManifest(
        schema_version=SCHEMA_VERSION,
        key=engine_key(inputs),
        key_inputs=inputs,
        model=model,
        precision=inputs.precision,
        scheme=inputs.scheme,
        dtype=inputs.dtype,
        tp_size=inputs.tp_size,
        pp_size=inputs.pp_size,
        backend=inputs.backend,
        backend_version=inputs.backend_version,
        builder_version=inputs.builder_version,
        compute_capability=inputs.compute_capability,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=files,
        kernels=kernels or {},
        tactics=tactics,
        self_check=self_check,
        build=build,
        calibration=calibration,
        quality=quality,
        kv_scales=kv_scales,
    )


def rank_file_name(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def _self_digest(manifest: EngineManifest) -> str:
    blank = msgspec.structs.replace(manifest, digest="")
    return hashlib.sha256(msgspec.json.encode(blank, order="deterministic")).hexdigest()


def seal(manifest: EngineManifest) -> EngineManifest:
    """The manifest with its own digest filled in."""
    return msgspec.structs.replace(manifest, digest=_self_digest(manifest))


def decode_manifest(data: bytes, where: str) -> EngineManifest:
    """Parse and check engine.json. Raises EngineDamagedError naming `where`."""
    try:
        version = msgspec.json.decode(data).get("schema_version")
        if version != SCHEMA_VERSION:
            raise EngineDamagedError(
                f"{where} has schema version {version}; this program reads {SCHEMA_VERSION}",
                hint="it was written by another version of the appliance; it is built anew",
            )
        manifest = msgspec.json.decode(data, type=EngineManifest)
    except (msgspec.DecodeError, AttributeError, UnicodeDecodeError) as error:
        raise EngineDamagedError(f"{where} is damaged: {error}", hint="the engine is built anew") from error
    if manifest.digest != _self_digest(manifest):
        raise EngineDamagedError(f"{where} is damaged: it does not match its own digest", hint="it is built anew")
    for file in manifest.files:
        name = PurePosixPath(file.name)
        if name.is_absolute() or ".." in name.parts or str(name) != file.name or file.name == MANIFEST_NAME:
            raise EngineDamagedError(f"{where} names a file outside of its engine: {file.name!r}")
    return manifest


def read_manifest(engine_dir: Path) -> EngineManifest:
    """Raises EngineDamagedError if there is none, or a damaged one."""
    path = engine_dir / MANIFEST_NAME
    try:
        return decode_manifest(path.read_bytes(), str(path))
    except OSError as error:
        raise EngineDamagedError(
            f"{path} cannot be read: {error.strerror}", hint="is this the directory of an engine?"
        ) from error


def write_manifest(engine_dir: Path, manifest: EngineManifest) -> EngineManifest:
    """Seal and write durably; returns what was written."""
    sealed = seal(manifest)
    write_atomically(engine_dir / MANIFEST_NAME, msgspec.json.format(msgspec.json.encode(sealed), indent=1))
    return sealed
