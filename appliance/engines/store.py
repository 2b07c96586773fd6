"""The content-addressed store of engines below a cache directory.

    engines/<key>/            one engine; appears whole, by a rename, or not at all
    engines/.staging/         engines being built or fetched: <key>.<random> and <key>.fetch; what interrupted
                              calibrations go on with: <key>.calibration
    engines/.locks/<key>      held (flock) by whoever builds or fetches that key; the kernel frees it with the process
    engines/.stamps/<key>     file stamps of the last full check
    engines/.damaged/         engines moved aside, until their replacement is there

Knows nothing of how engines are built. Every public method may be called by several processes at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from appliance.engines import disk
from appliance.engines.manifest import MANIFEST_NAME, EngineManifest, read_manifest
from appliance.engines.meter import ProgressFn
from appliance.engines.verify import DamagedFileError, Verified, VerifyLevel, identity_of, verify_engine
from appliance.errors import CacheNotWritableError, EngineBuildError, EngineDamagedError, NoSpaceError

_KEPT = (".fetch", ".calibration")  # endings of staging directories that outlive their process
_MARGIN = 64 << 20  # bytes kept free beyond what is asked for: logs, stamps, compiled kernels


class LockHolder(msgspec.Struct, frozen=True):
    """Written into a lock file for those who wait."""

    pid: int
    host: str
    since: float  # time.time()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, for {time.time() - self.since:.0f} s"


@dataclass(frozen=True)
class StoredEngine:
    key: str
    path: Path
    manifest: EngineManifest | None  # None: unreadable
    nbytes: int


class EngineStore:
    """`root` is the cache directory. Nothing is written before it is needed, so a read-only store can be loaded from.
    `free_bytes` is a seam for tests."""

    def __init__(self, root: Path, *, free_bytes: Callable[[Path], int] = disk.free_bytes) -> None:
        self.root = root
        self.engines = root / "engines"
        self._staging = self.engines / ".staging"
        self._locks = self.engines / ".locks"
        self._damaged = self.engines / ".damaged"
        self._free_bytes = free_bytes
        self._held: set[str] = set()

    # -------------------------------------------------- reading

    def path_of(self, key: str) -> Path:
        return self.engines / key

    def stamps_of(self, key: str) -> Path:
        return self.engines / ".stamps" / f"{key}.json"

    def find(self, key: str) -> Path | None:
        """The engine of a key if it is there; not verified."""
        path = self.path_of(key)
        return path if (path / MANIFEST_NAME).is_file() else None

    def list_engines(self) -> list[StoredEngine]:
        """Every engine, by key."""
        found = []
        for path in sorted(self.engines.glob("[0-9a-f]*")) if self.engines.is_dir() else []:
            try:
                manifest = read_manifest(path)
            except EngineDamagedError:
                manifest = None
            found.append(StoredEngine(path.name, path, manifest, disk.tree_bytes(path)))
        return found

    def verify(self, key: str, level: VerifyLevel = "auto", progress: ProgressFn | None = None) -> Verified:
        """See `engines.verify`. Raises DamagedFileError; give it to `set_aside`, then build anew."""
        return verify_engine(self.path_of(key), level, stamps=self.stamps_of(key), progress=progress)

    def ensure_useful(self) -> str | None:
        """Look, before any work, whether engines can be added. None if so; else why not, which is no error as long as
        there are engines to serve. Raises CacheNotWritableError or NoSpaceError if there are none."""
        try:
            disk.ensure_writable(self.engines if self.engines.exists() else self.root)
        except (CacheNotWritableError, NoSpaceError) as error:
            if not any(self.engines.glob(f"[0-9a-f]*/{MANIFEST_NAME}")):
                raise
            return str(error)
        return None

    # -------------------------------------------------- locking

    @contextlib.contextmanager
    def build_lock(
        self, key: str, on_wait: Callable[[LockHolder | None], None] | None = None, poll_seconds: float = 0.2
    ) -> Iterator[None]:
        """Be the only one that builds, fetches, moves or removes this key. Waits for as long as another holds it,
        calling `on_wait` with the holder about once a second; look with `find` afterwards whether there is still work
        to do. A holder that dies frees it. Raises CacheNotWritableError. Not re-entrant."""
        assert key not in self._held, "not re-entrant"
        disk.ensure_writable(self._locks)
        try:
            fd = os.open(self._locks / key, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if disk.is_full(error):
                raise disk.full(self._locks, "the lock of the engine") from error
            raise disk.not_writable(self._locks / key, error) from error
        try:
            told = 0.0
            while not self._try(fd):
                if on_wait is not None and time.monotonic() - told >= 1.0:
                    told = time.monotonic()
                    on_wait(_read_holder(fd))
                time.sleep(poll_seconds)
            with contextlib.suppress(OSError):  # only those who wait read it; a full disk is `reserve`'s to report
                os.ftruncate(fd, 0)
                os.pwrite(fd, msgspec.json.encode(LockHolder(os.getpid(), socket.gethostname(), time.time())), 0)
            self._held.add(key)
            yield
        finally:
            self._held.discard(key)
            os.close(fd)  # frees the lock; the file stays, since removing it would let two hold "the" lock

    def _try(self, fd: int) -> bool:
        try:
            return _try_lock(fd)
        except OSError as error:
            raise CacheNotWritableError(
                f"the file system of {self.engines} cannot lock files ({error.strerror}), which sharing a cache needs",
                hint="choose a cache directory on a local disk with --cache, or mount this one with locks",
            ) from error

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """The lock, unless this store object holds it already."""
        if key in self._held:
            yield
        else:
            with self.build_lock(key):
                yield

    # -------------------------------------------------- writing

    def reserve(self, nbytes: int, what: str) -> None:
        """Check before writing that there is room. If there is not, first drop what is of no use any more: engines
        moved aside and what dead builders left. Raises NoSpaceError."""
        needed = nbytes + _MARGIN
        if self._free_bytes(self.engines) < needed:
            self.collect_garbage(damaged=True)
        free = self._free_bytes(self.engines)
        if free < needed:
            raise disk.no_space(self.engines, needed, free, what)

    def collect_garbage(self, *, damaged: bool = False) -> None:
        """Remove staging directories of keys that nobody works on (their builders were killed), save interrupted
        fetches and calibrations, which go on where they stopped; with `damaged` those and the engines moved aside
        too."""
        for path in sorted(self._staging.glob("*")):
            if not path.name.endswith(_KEPT) or damaged:
                self._remove_if_free(path)
        if damaged:
            for path in self._damaged.glob("*"):
                disk.remove_tree(path)

    def _remove_if_free(self, staging: Path) -> None:
        """Unless somebody, also this store object, works on its key."""
        key = staging.name.partition(".")[0]
        if key not in self._held:
            with _lock_if_free(self._locks / key) as free:
                if free:
                    disk.remove_tree(staging)

    @contextlib.contextmanager
    def staging(self, key: str) -> Iterator[Path]:
        """A fresh directory to build in, for the holder of the lock. What a killed builder of this key left is removed
        first; the directory is gone afterwards unless it was published."""
        assert key in self._held, "staging needs the build lock"
        disk.ensure_writable(self._staging)
        for left in self._staging.glob(f"{key}.*"):
            if not left.name.endswith(_KEPT):
                disk.remove_tree(left)
        self.collect_garbage()
        directory = self._staging / f"{key}.{secrets.token_hex(4)}"
        directory.mkdir()
        try:
            yield directory
        finally:
            disk.remove_tree(directory)

    def fetch_staging(self, key: str) -> Path:
        """The directory in which fetches of this key go on where they stopped, for the holder of the lock."""
        assert key in self._held, "fetching needs the build lock"
        directory = self._staging / f"{key}.fetch"
        disk.ensure_writable(directory)
        return directory

    def calibration_staging(self, key: str) -> Path:
        """The directory in which calibrations of this key go on where they stopped, for the holder of the lock. There
        is one such directory for every calibration that runs: what others left when they were killed is removed."""
        assert key in self._held, "calibrating needs the build lock"
        directory = self._staging / f"{key}.calibration"
        disk.ensure_writable(directory)
        for left in self._staging.glob("*.calibration"):
            self._remove_if_free(left)
        return directory

    def drop_calibration(self, key: str) -> None:
        """Remove what calibration of this key has finished, if there is any, for the holder of the lock."""
        assert key in self._held, "calibrating needs the build lock"
        disk.remove_tree(self._staging / f"{key}.calibration")

    def publish(self, key: str, directory: Path) -> Path:
        """Make a finished staging directory the engine of its key: sizes checked, everything fsynced, renamed. What
        stood there before is moved aside. Returns the engine's path."""
        assert key in self._held, "publishing needs the build lock"
        manifest = verify_engine(directory, "size").manifest
        if manifest.key != key:
            raise EngineBuildError(f"the engine in {directory} has key {manifest.key}, not {key}")
        disk.fsync_tree(directory)
        target = self.path_of(key)
        if target.exists():
            self._move_aside(key)
        directory.rename(target)
        disk.fsync_path(self.engines)
        self.stamps_of(key).unlink(missing_ok=True)
        for left in (*self._damaged.glob(f"{key}.*"), *self._staging.glob(f"{key}.*")):
            disk.remove_tree(left)
        return target

    def set_aside(self, error: DamagedFileError) -> Path | None:
        """Move a damaged engine out of the way, to be rebuilt. None if it is not there any more, which another process
        saw to. Raises CacheNotWritableError."""
        key = error.engine_dir.name
        with self._locked(key):
            if error.identity is None or identity_of(self.path_of(key)) != error.identity:
                return None
            return self._move_aside(key)

    def _move_aside(self, key: str) -> Path:
        disk.ensure_writable(self._damaged)
        aside = self._damaged / f"{key}.{time.time_ns()}"
        try:
            self.path_of(key).rename(aside)
        except OSError as error:
            if disk.is_full(error):
                raise disk.full(self._damaged, "the name of a damaged engine") from error
            raise disk.not_writable(self.engines, error) from error
        return aside

    def remove(self, key: str) -> bool:
        """Delete an engine; False if there was none. Running processes keep the files that they have open."""
        with self._locked(key):
            if not self.path_of(key).exists():
                return False
            shutil.rmtree(self._move_aside(key))
            self.stamps_of(key).unlink(missing_ok=True)
            return True


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_holder(fd: int) -> LockHolder | None:
    try:
        return msgspec.json.decode(os.pread(fd, 4096, 0), type=LockHolder)
    except msgspec.DecodeError:
        return None


@contextlib.contextmanager
def _lock_if_free(path: Path) -> Iterator[bool]:
    """Whether the lock was free; held inside the block if so. One that we may not open is not free."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        yield False
        return
    try:
        try:
            free = _try_lock(fd)
        except OSError:  # a file system without locks
            free = False
        yield free
    finally:
        os.close(fd)
