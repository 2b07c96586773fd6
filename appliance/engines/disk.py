"""Disk facts and moves that survive a crash: free space, who may write where, fsync, atomic replace.

Knows nothing of engines; its errors say what to do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from appliance.errors import ApplianceError, CacheNotWritableError, NoSpaceError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def nearest_existing(path: Path) -> Path:
    """The path itself or its closest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write on the file system of `path` (which need not exist yet)."""
    return shutil.disk_usage(nearest_existing(path)).free


def gib(count: int) -> str:
    """A size for people: "14.9 GiB", "3.2 MiB"."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def no_space(path: Path, needed: int, free: int, what: str) -> NoSpaceError:
    return NoSpaceError(
        f"{what} needs {gib(needed)} on the file system of {path}, {gib(free)} are free",
        hint=f"free {gib(max(needed - free, 0))} there, or choose another cache directory with --cache",
    )


def is_full(error: BaseException) -> bool:
    """Whether the file system or the user's quota had no room left: the error itself, or what it was raised from."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        if isinstance(at, OSError) and at.errno in _FULL:
            return True
        # Where the number is only in the text: shutil.Error of a tree, libraries written in Rust.
        if any(f"[Errno {code}]" in str(at) or f"(os error {code})" in str(at) for code in _FULL):
            return True
        seen.add(id(at))
        at = at.__cause__ or at.__context__
    return False


def full(path: Path, what: str) -> NoSpaceError:
    """For a write that failed though nobody could say beforehand how much it takes, or others took it meanwhile."""
    usage = shutil.disk_usage(nearest_existing(path))
    return NoSpaceError(
        f"{what} could not be written: no space is left on the file system of {path} "
        f"({gib(usage.free)} of {gib(usage.total)} are free)",
        hint="free some there (or raise the quota), or choose another cache directory with --cache",
    )


@contextlib.contextmanager
def full_disk_explained(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a full disk raises inside into a NoSpaceError; errors raised on purpose stay as they are."""
    try:
        yield
    except ApplianceError:
        raise
    except Exception as error:
        if is_full(error):
            raise full(path, what) from error
        raise


def not_writable(path: Path, error: OSError | None = None) -> CacheNotWritableError:
    """The error for a directory this user cannot write, with the exact commands that fix it."""
    at = nearest_existing(path)
    uid, gid = os.getuid(), os.getgid()
    info = at.stat()
    reason = f": {error.strerror}" if error is not None and error.strerror else ""
    if error is not None and error.errno == errno.EROFS:  # whoever owns it
        return CacheNotWritableError(
            f"the cache directory {path} cannot be written: {error.strerror}",
            hint=f"mount a writable directory there with `-v DIR:{path}`, or choose another directory with --cache",
        )
    facts = f"{at} belongs to {info.st_uid}:{info.st_gid} with mode {stat.S_IMODE(info.st_mode):o}"
    return CacheNotWritableError(
        f"the cache directory {path} cannot be written by user {uid}:{gid}{reason} ({facts})",
        hint=(
            f"do one of: `sudo chown -R {uid}:{gid} {at}` on the host; start the container with "
            f"`--user {info.st_uid}:{info.st_gid}`; mount a writable directory with `-v DIR:{path}`; "
            "or choose another directory with --cache"
        ),
    )


def ensure_writable(path: Path) -> None:
    """Create the directory if needed and prove that a file can be made in it. Raises CacheNotWritableError,
    NoSpaceError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".probe-"):
            pass
    except OSError as error:
        if is_full(error):
            raise full(path, "the cache directory") from error
        raise not_writable(path, error) from error


def fsync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(directory: Path) -> None:
    """Make every file and directory name below `directory`, itself included, durable."""
    for root, _, files in os.walk(directory, topdown=False):
        for name in files:
            fsync_path(Path(root) / name)
        fsync_path(Path(root))


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a small file so that a reader or a crash sees the old or the new content, never a part."""
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    try:
        with temporary.open("xb") as file:  # not mkstemp: others may read a shared cache, as the umask says
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_tree(path: Path) -> None:
    """Remove a directory or file if it is there; what another process removed meanwhile is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def tree_bytes(path: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
