"""The digest of a checkpoint: of its content, wherever it lies. Torch-free."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

from appliance.checkpoint.expected import check_sha256, expected_sha256
from appliance.checkpoint.files import content_files
from appliance.engines.digest import DigestMemory, FileStamp, hash_files
from appliance.engines.meter import ByteMeter, ProgressFn
from appliance.errors import CheckpointError


@dataclass(frozen=True)
class CheckpointDigest:
    value: str  # SHA-256, hex
    hashed_bytes: int  # read now
    remembered_bytes: int  # of files unchanged since they were hashed (size, mtime, ctime, inode)
    seconds: float


def is_remembered(path: Path, cache: Path) -> bool:
    """Whether `digest` would read nothing. Raises CheckpointError."""
    memory = _memory(path, cache)
    try:
        return all(memory.get(file.name, file) is not None for file in content_files(path))
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror}") from error


def _memory(path: Path, cache: Path) -> DigestMemory:
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    return DigestMemory(cache / "digests" / f"{place}.json")


def digest(
    path: Path,
    *,
    cache: Path | None = None,
    full: bool = False,
    check: bool = False,
    progress: ProgressFn | None = None,
    threads: int | None = None,
) -> CheckpointDigest:
    """SHA-256 over name, size and tree digest (`engines.digest`) of every weight, configuration and tokenizer file.

    With `cache` (the cache directory), digests of files are remembered there by size, times and inode, so a second
    start reads nothing; `full` reads everything all the same. `check` compares files that are not remembered with what
    is written down of them (`expected.py`), for those that came without a hub to ask. Raises CheckpointError.
    """
    started = time.monotonic()
    known_content = expected_sha256(path) if check else {}
    files = content_files(path)
    memory = _memory(path, cache) if cache is not None else None
    try:
        stamps = {file: FileStamp.of(file) for file in files}
        known = {file: memory.get(file.name, file) for file in files} if memory is not None and not full else {}
        unknown = [file for file in files if known.get(file) is None]
        if check:
            check_sha256(known_content, unknown, progress)
        total = sum(stamps[file].size for file in unknown)
        with ByteMeter(total, progress if unknown else None, detail="hashing the checkpoint") as meter:
            fresh = dict(zip(unknown, hash_files(unknown, meter=meter, threads=threads)))
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    root = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        root.update(f"{file.name}\0{stamps[file].size}\0{fresh.get(file) or known[file]}\n".encode())
    if memory is not None and fresh:
        for file, value in fresh.items():
            memory.put(file.name, value, stamps[file])
        memory.save()
    everything = sum(stamp.size for stamp in stamps.values())
    return CheckpointDigest(root.hexdigest(), total, everything - total, time.monotonic() - started)
