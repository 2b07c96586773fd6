"""The directory of one run's sockets, and the removal of those that killed runs left behind.

Each is locked (flock) for as long as its process lives; the kernel frees the lock however the process ends. Not told by
process ids: containers that share a /tmp number their processes each for itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from appliance.engines.disk import full, is_full
from appliance.errors import NoSpaceError, SettingsError

_PREFIX = "appliance-run-"


@contextlib.contextmanager
def socket_directory() -> Iterator[Path]:
    """A fresh directory with a short path, gone afterwards. Raises SettingsError, or NoSpaceError, where there can be
    none."""
    try:
        directory, lock = _make()
    except OSError as error:
        raise _explained(error) from error
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _make() -> tuple[Path, int]:
    _remove_stale(Path(tempfile.gettempdir()))
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if directory.exists():
                return directory, lock
            os.close(lock)
        # Another start took it for a stale one before it was locked: once more.


def _remove_stale(parent: Path) -> None:
    for directory in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours
            if directory.lstat().st_uid != os.getuid() or directory.is_symlink():
                continue
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: in use
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(lock)


def _explained(error: OSError) -> SettingsError | NoSpaceError:
    if is_full(error):
        return full(Path(error.filename or "/tmp"), "a temporary directory for sockets")
    return SettingsError(
        f"there is no place for temporary files: {error.strerror or error}",
        hint="mount a writable /tmp with free space, or set TMPDIR to such a directory",
    )
