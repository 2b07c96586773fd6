"""Fetch engines from, and publish them to, any fsspec URL: a directory, s3://, hf://, memory://, https:// (fetch only).

At URL/<key>/ lie the files of the engine directory; engine.json is written last, so what can be seen is whole.
Fetched files are digest-checked, kept as <name>.part while incomplete and gone on with after an interruption. A source
that gives nothing for `patience` seconds is given up on, whatever it hangs in, since a build can go on without it.
Knows nothing of how engines are built or loaded.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from appliance.engines.digest import hash_file
from appliance.engines.disk import fsync_path, full_disk_explained, is_full, remove_tree
from appliance.engines.manifest import MANIFEST_NAME, EngineFile, EngineManifest, decode_manifest
from appliance.engines.meter import ByteMeter, ProgressFn
from appliance.engines.patience import Abandoned, OutOfPatience, Patience
from appliance.engines.store import EngineStore, LockHolder
from appliance.engines.verify import verify_engine
from appliance.errors import EngineBuildError, EngineDamagedError

PATIENCE = 60.0  # seconds without a byte, of a transfer that somebody asked for
_PARALLEL_FILES = 4
_PLAN_NAME = MANIFEST_NAME + ".partial"  # of an unfinished publish: the manifest whose files are being written
# Object stores have no directories to make; asking some of them to would try to make a bucket.
_NO_DIRECTORIES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "hf", "http", "https"})
_EXTRA_PACKAGE = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}

T = TypeVar("T")


class EngineTransferError(EngineBuildError):
    """An engine could not be fetched or published."""


class EnginePublishedError(EngineTransferError):
    """Another build of the key is at the URL already; any will do."""


class EngineNotFoundError(EngineTransferError):
    """There is no engine of that key at the URL; build it."""


def redact(url: str) -> str:
    """A URL without the name and password that may be in it."""
    return re.sub(r"//[^/@]*@", "//***@", url)


def is_local(url: str) -> bool:
    """Whether no network is needed to reach it."""
    return "://" not in url or url.startswith(("file://", "memory://"))


class _Remote:
    """One engine's folder at a URL, and errors that name it."""

    def __init__(self, url: str, key: str, seconds: float) -> None:
        """`seconds`: what a connection may take, and a read. The library retries; `Patience` bounds the sum."""
        import fsspec

        self.protocol = url.partition("://")[0] if "://" in url else "file"
        self.shown = f"{redact(url).rstrip('/')}/{key}"
        self.http = self.protocol in ("http", "https")
        options: dict[str, Any] = {}
        try:
            if self.http:
                import aiohttp

                timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
                options["client_kwargs"] = {"timeout": timeout}
            elif self.protocol in ("s3", "s3a"):
                options["config_kwargs"] = {"connect_timeout": seconds, "read_timeout": seconds}
            self.fs, base = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            package = _EXTRA_PACKAGE.get(self.protocol)
            raise EngineTransferError(
                f"{redact(url)} cannot be used: {error}",
                hint=f"pip install {package}" if package else "allowed: a directory, s3://, hf://, https://, memory://",
            ) from error
        self.base = f"{base.rstrip('/')}/{key}"

    def path(self, name: str) -> str:
        return f"{self.base}/{name}"

    def read_small(self, name: str) -> bytes | None:
        """A whole small file, None if there is none."""
        try:
            data = self.fs.cat_file(self.path(name))
        except FileNotFoundError:
            return None
        return bytes(data)

    def open(self, name: str, mode: str, *, block: int, streaming: bool = False) -> Any:
        if not self.http:
            return self.fs.open(self.path(name), mode, block_size=block)
        return self.fs.open(self.path(name), mode, block_size=0 if streaming else block, cache_type="none")


def _ask(patience: Patience, work: Callable[[], T], what: str) -> T:
    """The result of `work`, given up on when patience ends, whatever it hangs in. Raises EngineTransferError."""
    try:
        return patience.run([work])[0]
    except (EngineBuildError, EngineDamagedError):
        raise
    except OutOfPatience:
        raise EngineTransferError(
            f"{what} did not answer within {patience.seconds:g} s", hint="check the URL and the network"
        ) from None
    except Exception as error:
        raise EngineTransferError(f"{what} cannot be reached: {_describe(error)}") from error


def _describe(error: BaseException) -> str:
    return redact(f"{type(error).__name__}: {error}")


def reach(url: str, patience: float) -> str:
    """Look whether a URL answers, whatever it holds; returns it without passwords. Raises EngineTransferError."""
    watch = Patience(patience)
    remote = _ask(watch, lambda: _Remote(url, "", patience), redact(url))

    def look() -> None:
        if remote.http:
            remote.read_small(MANIFEST_NAME)  # 404 is an answer
        elif not remote.fs.exists(remote.base.rstrip("/")) and remote.protocol == "file":
            raise EngineTransferError(f"there is no directory {redact(url)}", hint="make it, or mount it")

    _ask(watch, look, redact(url))
    return redact(url)


# ---------------------------------------------------------------- fetch


def fetch(
    url: str,
    key: str,
    store: EngineStore,
    *,
    progress: ProgressFn | None = None,
    on_wait: Callable[[LockHolder | None], None] | None = None,
    patience: float = PATIENCE,
    attempts: int = 4,
    block: int = 16 << 20,
) -> Path:
    """Bring the engine of `key` from `url` into the store; at once if it is there. Every file's digest is checked.

    `patience`: seconds without a new byte, from the call on, after which the source is given up on. `attempts` per file
    without a new byte; `block` is what one request reads and the most that an interruption loses. What has come is kept
    for the next fetch. Raises EngineNotFoundError, EngineTransferError, EngineDamagedError (what lies at the URL is not
    what its manifest says), NoSpaceError, CacheNotWritableError.
    """
    with full_disk_explained(store.engines, f"engine {key[:12]}"), store.build_lock(key, on_wait):
        present = store.find(key)
        if present is not None:
            return present
        watch = Patience(patience)
        remote = _ask(watch, lambda: _Remote(url, key, patience), redact(url))
        data = _ask(watch, lambda: remote.read_small(MANIFEST_NAME), remote.shown)
        if data is None:
            raise EngineNotFoundError(f"no engine at {remote.shown}", hint="build it, or publish it there first")
        watch.renew()
        manifest = decode_manifest(data, f"{remote.shown}/{MANIFEST_NAME}")
        if manifest.key != key:
            raise EngineDamagedError(f"{remote.shown} holds an engine of another key, {manifest.key}")
        staging = _prepare(store.fetch_staging(key), data, manifest)
        missing = manifest.nbytes - sum(_present(staging, file) for file in manifest.files)
        store.reserve(missing, f"fetching engine {key[:12]}")
        with ByteMeter(manifest.nbytes, progress) as meter:
            _fetch_files(remote, manifest, _Sink(staging, meter, watch), attempts, block)
        return store.publish(key, staging)


def _fetch_files(remote: _Remote, manifest: EngineManifest, sink: _Sink, attempts: int, block: int) -> None:
    files = sorted(manifest.files, key=lambda file: -file.size)
    jobs = [partial(_fetch_file, remote, file, sink, attempts, block) for file in files]
    try:
        sink.watch.run(jobs, parallel=_PARALLEL_FILES)
    except OutOfPatience:
        done = sum(_present(sink.staging, file) for file in manifest.files)
        raise EngineTransferError(
            f"{remote.shown} gave nothing for {sink.watch.seconds:g} s, at byte {done} of {manifest.nbytes}",
            hint="start again: it goes on from there",
        ) from None


@dataclass(frozen=True)
class _Sink:
    """Where a fetch writes to, who counts, and who may end it."""

    staging: Path
    meter: ByteMeter
    watch: Patience


def _prepare(staging: Path, data: bytes, manifest: EngineManifest) -> Path:
    """Keep what an interrupted fetch of the same build left; drop what another build left."""
    kept = staging / MANIFEST_NAME
    if kept.exists() and kept.read_bytes() != data:
        remove_tree(staging)
        staging.mkdir()
    kept.write_bytes(data)
    for file in manifest.files:
        (staging / file.name).parent.mkdir(parents=True, exist_ok=True)
    return staging


def _present(staging: Path, file: EngineFile) -> int:
    """Bytes of a file that are here already."""
    for path in (staging / file.name, staging / f"{file.name}.part"):
        if path.exists():
            return min(path.stat().st_size, file.size)
    return 0


def _fetch_file(remote: _Remote, file: EngineFile, sink: _Sink, attempts: int, block: int) -> None:
    staging, meter = sink.staging, sink.meter
    target, part = staging / file.name, staging / f"{file.name}.part"
    if target.exists() and target.stat().st_size == file.size and _digest(target, sink) == file.digest:
        meter.skip(file.size, file.name)
        return
    target.unlink(missing_ok=True)
    meter.skip(_present(staging, file), file.name)
    resumed = part.exists()
    _download(remote, file, part, sink, attempts, block)
    if resumed and _digest(part, sink) != file.digest:  # what was left may be damaged: once more from the beginning
        meter.skip(-file.size)
        part.unlink()
        _download(remote, file, part, sink, attempts, block)
    if _digest(part, sink) != file.digest:
        part.unlink()
        raise EngineDamagedError(
            f"{remote.shown}/{file.name} does not match the digest in its {MANIFEST_NAME}",
            hint="publish the engine again, or build it here",
        )
    with sink.watch.paused():
        fsync_path(part)
    with sink.watch.writing():
        part.rename(target)


def _digest(path: Path, sink: _Sink) -> str:
    """Hashing is work of this machine: the source's patience does not run meanwhile."""
    with sink.watch.paused():
        return hash_file(path)


def _download(remote: _Remote, file: EngineFile, part: Path, sink: _Sink, attempts: int, block: int) -> None:
    """Append to `part` until it has the file's size, going on after errors."""
    failures, streaming = 0, False
    part.touch()
    while (have := part.stat().st_size) < file.size:
        try:
            _append(remote, file, part, sink, block, streaming)
        except FileNotFoundError as error:
            raise EngineDamagedError(f"{remote.shown}/{file.name} is missing at its URL") from error
        except Abandoned:
            raise
        except Exception as error:
            if isinstance(error, ValueError) and remote.http and not streaming:
                streaming = True  # the server cannot serve a range: in one piece from the beginning
                continue
            if is_full(error):
                raise
            failures = failures + 1 if part.stat().st_size <= have else 1
            if failures >= attempts:
                raise EngineTransferError(
                    f"fetching {remote.shown}/{file.name} failed at byte {part.stat().st_size} of {file.size}: "
                    f"{_describe(error)}",
                    hint="start again: it goes on from there",
                ) from error
            time.sleep(min(0.25 * 2**failures, 8.0))


def _append(remote: _Remote, file: EngineFile, part: Path, sink: _Sink, block: int, streaming: bool) -> None:
    have = part.stat().st_size
    if have > file.size or (streaming and have):
        sink.meter.skip(-min(have, file.size))
        part.write_bytes(b"")
        have = 0
    with remote.open(file.name, "rb", block=block, streaming=streaming) as source, part.open("ab") as output:
        if have:
            source.seek(have)
        while have < file.size:
            data = source.read(min(block, file.size - have))
            if not data:
                raise OSError(f"{remote.shown}/{file.name} ends at byte {have}; {file.size} are expected")
            with sink.watch.writing():  # raises Abandoned: the part may be another's by now
                output.write(data)
                output.flush()
            have += len(data)
            sink.meter.advance(len(data), file.name)


# ---------------------------------------------------------------- publish


def publish(
    engine_dir: Path,
    url: str,
    *,
    progress: ProgressFn | None = None,
    overwrite: bool = False,
    patience: float = PATIENCE,
    block: int = 16 << 20,
) -> str:
    """Copy an engine to URL/<key>/ and return that URL. Nothing is done if the same build is there; else the local
    files' digests are checked first. An interrupted publish goes on after its last whole file. `patience`: seconds
    until the URL answers. Raises DamagedFileError, EngineTransferError (EnginePublishedError if another build of the
    key is there and `overwrite` is not set)."""
    manifest = verify_engine(engine_dir, "size").manifest
    if url.startswith(("http://", "https://")):
        raise EngineTransferError(
            f"{redact(url)}: http is only for fetching", hint="publish to a directory, s3:// or hf://"
        )
    watch = Patience(patience)
    remote = _ask(watch, lambda: _Remote(url, manifest.key, patience), redact(url))
    there = _ask(watch, lambda: _published(remote, MANIFEST_NAME), remote.shown)
    if there is not None and there.files == manifest.files:
        return remote.shown
    if there is not None and not overwrite:
        raise EnginePublishedError(
            f"{remote.shown} holds another build of this key, of {there.created}",
            hint="that one will do; `engines publish --overwrite` replaces it",
        )
    verify_engine(engine_dir, "full")
    try:
        _upload_all(remote, engine_dir, manifest, progress, block)
    except (EngineBuildError, EngineDamagedError):
        raise
    except Exception as error:
        raise EngineTransferError(
            f"publishing to {remote.shown} failed: {_describe(error)}", hint="publish again: it goes on from there"
        ) from error
    return remote.shown


def _published(remote: _Remote, name: str) -> EngineManifest | None:
    """The manifest at the URL; None if there is none or it is damaged."""
    data = remote.read_small(name)
    try:
        return decode_manifest(data, remote.shown) if data is not None else None
    except EngineDamagedError:
        return None


def _upload_all(
    remote: _Remote, engine_dir: Path, manifest: EngineManifest, progress: ProgressFn | None, block: int
) -> None:
    data = (engine_dir / MANIFEST_NAME).read_bytes()
    plan = _published(remote, _PLAN_NAME)
    resume = plan is not None and plan.digest == manifest.digest
    if remote.fs.exists(remote.path(MANIFEST_NAME)):
        remote.fs.rm_file(remote.path(MANIFEST_NAME))  # while files change, no engine is to be seen
    _put(remote, _PLAN_NAME, data)
    with ByteMeter(manifest.nbytes, progress) as meter:
        for file in manifest.files:
            if resume and _remote_size(remote, file.name) == file.size:
                meter.skip(file.size, file.name)
                continue
            _make_parent(remote, file.name)
            with (engine_dir / file.name).open("rb") as source, remote.open(file.name, "wb", block=block) as sink:
                while chunk := source.read(block):
                    sink.write(chunk)
                    meter.advance(len(chunk), file.name)
            size = _remote_size(remote, file.name)
            if size != file.size:
                raise EngineTransferError(f"{remote.shown}/{file.name} has {size} bytes there, {file.size} here")
    _put(remote, MANIFEST_NAME, data)
    remote.fs.rm_file(remote.path(_PLAN_NAME))


def _remote_size(remote: _Remote, name: str) -> int | None:
    remote.fs.invalidate_cache()
    try:
        size = remote.fs.size(remote.path(name))
    except FileNotFoundError:
        return None
    return None if size is None else int(size)


def _make_parent(remote: _Remote, name: str) -> None:
    if remote.protocol not in _NO_DIRECTORIES:
        remote.fs.makedirs(remote.path(name).rpartition("/")[0], exist_ok=True)


def _put(remote: _Remote, name: str, data: bytes) -> None:
    _make_parent(remote, name)
    remote.fs.pipe_file(remote.path(name), data)
