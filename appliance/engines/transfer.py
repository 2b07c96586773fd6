"""Fetch engines from, and publish them to, any fsspec URL: a directory, s3://, hf://, memory://, https:// (fetch only).

At URL/<key>/ lie the files of the engine directory; engine.json is written last, so what can be seen is whole.
Fetched files are digest-checked, kept as <name>.part while incomplete and gone on with after an interruption. Knows
nothing of how engines are built or loaded.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from appliance.engines.digest import hash_file
from appliance.engines.disk import fsync_path, full_disk_explained, is_full, remove_tree
from appliance.engines.manifest import MANIFEST_NAME, EngineFile, EngineManifest, decode_manifest
from appliance.engines.meter import ByteMeter, ProgressFn
from appliance.engines.store import EngineStore, LockHolder
from appliance.engines.verify import verify_engine
from appliance.errors import EngineBuildError, EngineDamagedError

CONNECT_TIMEOUT = 10.0  # seconds until the first answer of a URL
STALL_TIMEOUT = 60.0  # seconds without a byte
_PARALLEL_FILES = 4
_PLAN_NAME = MANIFEST_NAME + ".partial"  # of an unfinished publish: the manifest whose files are being written
# Object stores have no directories to make; asking some of them to would try to make a bucket.
_NO_DIRECTORIES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "hf", "http", "https"})
_EXTRA_PACKAGE = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}

T = TypeVar("T")


class EngineTransferError(EngineBuildError):
    """An engine could not be fetched or published."""


class EngineNotFoundError(EngineTransferError):
    """There is no engine of that key at the URL; build it."""


def _redact(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", url)


class _Remote:
    """One engine's folder at a URL, and errors that name it."""

    def __init__(self, url: str, key: str, connect_timeout: float) -> None:
        import fsspec

        self.protocol = url.partition("://")[0] if "://" in url else "file"
        self.shown = f"{_redact(url).rstrip('/')}/{key}"
        self.http = self.protocol in ("http", "https")
        options: dict[str, Any] = {}
        try:
            if self.http:
                import aiohttp

                options["client_kwargs"] = {
                    "timeout": aiohttp.ClientTimeout(
                        total=None, sock_connect=connect_timeout, sock_read=max(STALL_TIMEOUT, connect_timeout)
                    )
                }
            elif self.protocol in ("s3", "s3a"):
                options["config_kwargs"] = {"connect_timeout": connect_timeout, "read_timeout": STALL_TIMEOUT}
            self.fs, base = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            package = _EXTRA_PACKAGE.get(self.protocol)
            raise EngineTransferError(
                f"{_redact(url)} cannot be used: {error}",
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


def _within(seconds: float, work: Callable[[], T], what: str) -> T:
    """The result of `work`, given up on after `seconds` whatever it hangs in. Raises EngineTransferError."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="connect", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise EngineTransferError(f"{what} did not answer within {seconds:g} s", hint="check the URL and the network")
    if failure:
        if isinstance(failure[0], EngineBuildError | EngineDamagedError):
            raise failure[0]
        raise EngineTransferError(f"{what} cannot be reached: {_describe(failure[0])}") from failure[0]
    return result[0]


def _describe(error: BaseException) -> str:
    return _redact(f"{type(error).__name__}: {error}")


# ---------------------------------------------------------------- fetch


def fetch(
    url: str,
    key: str,
    store: EngineStore,
    *,
    progress: ProgressFn | None = None,
    on_wait: Callable[[LockHolder | None], None] | None = None,
    connect_timeout: float = CONNECT_TIMEOUT,
    attempts: int = 4,
    block: int = 16 << 20,
) -> Path:
    """Bring the engine of `key` from `url` into the store; at once if it is there. Every file's digest is checked.

    `attempts` per file without a new byte; `block` is what one request reads and the most that an interruption loses.
    Raises EngineNotFoundError, EngineTransferError, EngineDamagedError (what lies at the URL is not what its manifest
    says), NoSpaceError, CacheNotWritableError.
    """
    with full_disk_explained(store.engines, f"engine {key[:12]}"), store.build_lock(key, on_wait):
        present = store.find(key)
        if present is not None:
            return present
        remote = _within(connect_timeout, lambda: _Remote(url, key, connect_timeout), _redact(url))
        data = _within(connect_timeout, lambda: remote.read_small(MANIFEST_NAME), remote.shown)
        if data is None:
            raise EngineNotFoundError(f"no engine at {remote.shown}", hint="build it, or publish it there first")
        manifest = decode_manifest(data, f"{remote.shown}/{MANIFEST_NAME}")
        if manifest.key != key:
            raise EngineDamagedError(f"{remote.shown} holds an engine of another key, {manifest.key}")
        staging = _prepare(store.fetch_staging(key), data, manifest)
        missing = manifest.nbytes - sum(_present(staging, file) for file in manifest.files)
        store.reserve(missing, f"fetching engine {key[:12]}")
        with ByteMeter(manifest.nbytes, progress) as meter, ThreadPoolExecutor(_PARALLEL_FILES) as pool:
            jobs = [pool.submit(_fetch_file, remote, file, staging, meter, attempts, block) for file in manifest.files]
            try:
                for job in jobs:
                    job.result()
            finally:
                pool.shutdown(cancel_futures=True)
        return store.publish(key, staging)


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


def _fetch_file(remote: _Remote, file: EngineFile, staging: Path, meter: ByteMeter, attempts: int, block: int) -> None:
    target, part = staging / file.name, staging / f"{file.name}.part"
    if target.exists() and target.stat().st_size == file.size and hash_file(target) == file.digest:
        meter.skip(file.size, file.name)
        return
    target.unlink(missing_ok=True)
    meter.skip(_present(staging, file), file.name)
    resumed = part.exists()
    _download(remote, file, part, meter, attempts, block)
    if resumed and hash_file(part) != file.digest:  # what was left may be damaged: once more from the beginning
        meter.skip(-file.size)
        part.unlink()
        _download(remote, file, part, meter, attempts, block)
    if hash_file(part) != file.digest:
        part.unlink()
        raise EngineDamagedError(
            f"{remote.shown}/{file.name} does not match the digest in its {MANIFEST_NAME}",
            hint="publish the engine again, or build it here",
        )
    fsync_path(part)
    part.rename(target)


def _download(remote: _Remote, file: EngineFile, part: Path, meter: ByteMeter, attempts: int, block: int) -> None:
    """Append to `part` until it has the file's size, going on after errors."""
    failures, streaming = 0, False
    part.touch()
    while (have := part.stat().st_size) < file.size:
        try:
            _append(remote, file, part, meter, block, streaming)
        except FileNotFoundError as error:
            raise EngineDamagedError(f"{remote.shown}/{file.name} is missing at its URL") from error
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


def _append(remote: _Remote, file: EngineFile, part: Path, meter: ByteMeter, block: int, streaming: bool) -> None:
    have = part.stat().st_size
    if have > file.size or (streaming and have):
        meter.skip(-min(have, file.size))
        part.write_bytes(b"")
        have = 0
    with remote.open(file.name, "rb", block=block, streaming=streaming) as source, part.open("ab") as sink:
        if have:
            source.seek(have)
        while have < file.size:
            data = source.read(min(block, file.size - have))
            if not data:
                raise OSError(f"{remote.shown}/{file.name} ends at byte {have}; {file.size} are expected")
            sink.write(data)
            have += len(data)
            meter.advance(len(data), file.name)


# ---------------------------------------------------------------- publish


def publish(
    engine_dir: Path,
    url: str,
    *,
    progress: ProgressFn | None = None,
    overwrite: bool = False,
    connect_timeout: float = CONNECT_TIMEOUT,
    block: int = 16 << 20,
) -> str:
    """Copy an engine to URL/<key>/ and return that URL. The local files' digests are checked first. Nothing is done
    if the same build is there; an interrupted publish goes on after its last whole file. Raises DamagedFileError,
    EngineTransferError (also if another build of the key is there and `overwrite` is not set)."""
    manifest = verify_engine(engine_dir, "full").manifest
    if url.startswith(("http://", "https://")):
        raise EngineTransferError(
            f"{_redact(url)}: http is only for fetching", hint="publish to a directory, s3:// or hf://"
        )
    remote = _within(connect_timeout, lambda: _Remote(url, manifest.key, connect_timeout), _redact(url))
    there = _within(connect_timeout, lambda: _published(remote, MANIFEST_NAME), remote.shown)
    if there is not None and there.files == manifest.files:
        return remote.shown
    if there is not None and not overwrite:
        raise EngineTransferError(
            f"{remote.shown} holds another build of this key, of {there.created}", hint="allow it to be overwritten"
        )
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
