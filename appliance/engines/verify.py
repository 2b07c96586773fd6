"""Does an engine directory still hold what was built? Sizes at every start, content when there is any doubt.

Levels: "size" looks at every file's length; "full" reads and hashes every byte; "auto", the default, is "size" plus a
comparison with the stamps (size, mtime, ctime, inode) of the last full check, and a full check of each file whose stamp
differs or is missing. So the first load after a build or fetch reads everything, later ones nothing; a file that was
truncated is found by its length, one that was written to by its times.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from appliance.engines.digest import DigestMemory, FileStamp, hash_files
from appliance.engines.manifest import MANIFEST_NAME, EngineFile, EngineManifest, read_manifest
from appliance.engines.meter import ByteMeter, ProgressFn
from appliance.errors import EngineDamagedError

VerifyLevel = Literal["auto", "size", "full"]


class DamagedFileError(EngineDamagedError):
    """A file of an engine is not what was built. `identity` is the engine directory's (device, inode), so that what is
    moved aside is this engine and not a fresh one that another process put there meanwhile."""

    def __init__(self, engine_dir: Path, name: str, problem: str) -> None:
        super().__init__(f"{engine_dir / name} is damaged: {problem}", hint="the engine is moved aside and built anew")
        self.engine_dir = engine_dir
        self.name = name
        self.identity = identity_of(engine_dir)


def identity_of(directory: Path) -> tuple[int, int] | None:
    try:
        stat = directory.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


@dataclass(frozen=True)
class Verified:
    manifest: EngineManifest
    bytes_read: int  # 0: all stamps matched, or level "size"
    bytes_total: int


def _check_size(engine_dir: Path, file: EngineFile) -> FileStamp:
    try:
        stamp = FileStamp.of(engine_dir / file.name)
    except OSError as error:
        raise DamagedFileError(engine_dir, file.name, f"it cannot be read: {error.strerror}") from error
    if stamp.size != file.size:
        raise DamagedFileError(engine_dir, file.name, f"{stamp.size} bytes, built with {file.size}")
    return stamp


def verify_engine(
    engine_dir: Path,
    level: VerifyLevel = "auto",
    *,
    stamps: Path | None = None,
    progress: ProgressFn | None = None,
    threads: int | None = None,
) -> Verified:
    """Check every file of the manifest, sizes first. `stamps`: where checked stamps are remembered (None: nowhere, so
    "auto" reads everything). Raises DamagedFileError naming the first bad file."""
    try:
        manifest = read_manifest(engine_dir)
    except EngineDamagedError as error:
        raise DamagedFileError(engine_dir, MANIFEST_NAME, error.message) from error
    checked = {file.name: _check_size(engine_dir, file) for file in manifest.files}
    if level == "size":
        return Verified(manifest, 0, manifest.nbytes)
    memory = DigestMemory(stamps) if stamps is not None else None
    doubtful = [
        file
        for file in manifest.files
        if level == "full" or memory is None or memory.get(file.name, engine_dir / file.name) != file.digest
    ]
    total = sum(file.size for file in doubtful)
    with ByteMeter(total, progress if doubtful else None, detail="verifying digests") as meter:
        try:
            digests = hash_files([engine_dir / file.name for file in doubtful], meter=meter, threads=threads)
        except OSError as error:
            raise DamagedFileError(engine_dir, Path(error.filename or "").name, f"unreadable: {error}") from error
    for file, digest in zip(doubtful, digests):
        if digest != file.digest:
            raise DamagedFileError(engine_dir, file.name, "its content does not match its digest")
        if memory is not None:
            memory.put(file.name, digest, checked[file.name])
    if memory is not None and doubtful:
        memory.save()
    return Verified(manifest, total, manifest.nbytes)
