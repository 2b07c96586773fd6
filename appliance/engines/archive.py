"""Bundles: files of a cache directory as one tar file, for machines without a network.

The first member, bundle.json, lists every further one with size and SHA-256; then the files follow in that order, plain
and uncompressed (weights do not compress), so that a bundle is written and read as a stream, through a pipe too. What
is read goes to a staging directory, each file checked before it counts, so a damaged or cut archive leaves nothing in
the cache, and the same import goes on after the files that it has. Only regular files with listed names are taken.

Knows nothing of models; what goes in and where it belongs is `commands.bundle`'s.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

import msgspec

from appliance.engines.digest import default_threads
from appliance.engines.disk import fsync_path
from appliance.engines.meter import ByteMeter
from appliance.errors import EngineDamagedError
from appliance.types import Struct

MANIFEST = "bundle.json"
SCHEMA_VERSION = 1
ROOTS = ("hub", "models", "engines")  # directories of a cache that a bundle may hold files of
ROOTS_OF_MODELS = ("models/", "engines/")  # of what `serve --model` takes by its place in the cache
_MAX_MANIFEST = 64 << 20  # bytes
_BLOCK = 4 << 20  # bytes read at once


class BundleError(EngineDamagedError):
    """The archive is damaged, cut off, or none of ours."""


class BundleFile(Struct, frozen=True):
    name: str  # below the cache directory, with "/"
    size: int  # bytes
    sha256: str  # hex


class BundleManifest(Struct, frozen=True):
    schema_version: int
    appliance: str  # version that wrote it
    created: str  # UTC, ISO 8601
    model: (
        str  # what `serve --model` takes where it was imported; below the cache directory if it begins with "models/"
    )
    engines: tuple[str, ...]  # keys
    files: tuple[BundleFile, ...]
    links: dict[str, str] = msgspec.field(default_factory=dict)  # name -> name of the file that it stands for

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


# ---------------------------------------------------------------- writing


def sha256_files(paths: Iterable[Path], meter: ByteMeter) -> list[str]:
    """SHA-256 of files, in order, several at a time. Raises OSError."""
    with ThreadPoolExecutor(default_threads(), thread_name_prefix="sha256") as pool:
        return list(pool.map(partial(_sha256, meter=meter), paths))


def _sha256(path: Path, meter: ByteMeter) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            meter.advance(count)
    return digest.hexdigest()


def write_bundle(sink: IO[bytes], manifest: BundleManifest, sources: Mapping[str, Path], meter: ByteMeter) -> None:
    """Write the archive; `sources` has the file of each name. Raises BundleError if one changed since it was listed,
    OSError."""
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        head = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        tar.addfile(_member(MANIFEST, len(head)), BytesIO(head))
        for file in manifest.files:
            with sources[file.name].open("rb") as content:
                reader = _CheckedReader(content, file, meter)
                try:
                    tar.addfile(_member(file.name, file.size), reader)  # type: ignore[arg-type]
                except OSError as error:
                    if "unexpected end of data" in str(error):
                        raise BundleError(f"{sources[file.name]} changed while it was written") from error
                    raise
                if reader.digest.hexdigest() != file.sha256:
                    raise BundleError(f"{sources[file.name]} changed while it was written", hint="start again")


def _member(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info


class _CheckedReader:
    """A file that is hashed and counted as it is read."""

    def __init__(self, content: BinaryIO, file: BundleFile, meter: ByteMeter) -> None:
        self.digest = hashlib.sha256()
        self._content, self._name, self._meter = content, file.name, meter

    def read(self, count: int) -> bytes:
        data = self._content.read(count)
        self.digest.update(data)
        self._meter.advance(len(data), self._name)
        return data


# ---------------------------------------------------------------- reading


@contextmanager
def open_bundle(source: IO[bytes]) -> Iterator[tuple[BundleManifest, tarfile.TarFile]]:
    """The manifest, and the archive behind it for `extract`. Raises BundleError also for what goes wrong inside."""
    try:
        with tarfile.open(fileobj=source, mode="r|") as tar:
            first = tar.next()
            if first is None or first.name != MANIFEST or not _is_plain(first) or first.size > _MAX_MANIFEST:
                raise BundleError("this is no bundle: its first member is not bundle.json", hint="see `bundle export`")
            yield decode(_content(tar, first).read()), tar
    except (tarfile.TarError, EOFError) as error:
        raise BundleError(f"the archive is damaged or cut off: {error}", hint="copy it again") from error


def decode(data: bytes) -> BundleManifest:
    """Parse and check bundle.json. Raises BundleError."""
    try:
        version = msgspec.json.decode(data).get("schema_version")
        if version != SCHEMA_VERSION:
            raise BundleError(f"the bundle has schema version {version}; this program reads {SCHEMA_VERSION}")
        manifest = msgspec.json.decode(data, type=BundleManifest)
    except (msgspec.DecodeError, AttributeError) as error:
        raise BundleError(f"bundle.json is damaged: {error}", hint="copy the archive again") from error
    names = [file.name for file in manifest.files]
    for name in [*names, *manifest.links]:
        _check_name(name)
    if manifest.model.startswith(ROOTS_OF_MODELS):
        _check_name(manifest.model)
    if any(not re.fullmatch(r"[0-9a-f]{64}", key) for key in manifest.engines):
        raise BundleError("bundle.json names an engine that is none")
    for target in manifest.links.values():
        if target not in names:
            raise BundleError(f"bundle.json has a link to {target!r}, which is none of its files")
    if len({*names, *manifest.links}) != len(names) + len(manifest.links):
        raise BundleError("bundle.json names a file twice")
    return manifest


def _check_name(name: str) -> None:
    """Nothing may be written outside of the cache's own directories, nor into what they keep for themselves."""
    path = PurePosixPath(name)
    plain = str(path) == name and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    if not plain or len(path.parts) < 2 or path.parts[0] not in ROOTS or path.parts[1].startswith("."):
        raise BundleError(f"bundle.json names a file that does not belong into a cache: {name!r}")


def extract(tar: tarfile.TarFile, manifest: BundleManifest, staging: Path, meter: ByteMeter) -> None:
    """Every file into `staging`, checked. Files that an earlier call finished are kept and skipped. Raises BundleError
    naming the first file that is wrong or missing, OSError."""
    for file in manifest.files:
        member = tar.next()
        if member is None:
            raise BundleError(f"the archive ends before {file.name}", hint="copy it again")
        if member.name != file.name or not _is_plain(member) or member.size != file.size:
            raise BundleError(f"the archive has {member.name!r} where {file.name} should be", hint="copy it again")
        target = staging / file.name
        if target.is_file() and target.stat().st_size == file.size:
            meter.skip(file.size, file.name)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        digest = hashlib.sha256()
        with part.open("wb") as sink:
            content = _content(tar, member)
            while data := content.read(_BLOCK):
                sink.write(data)
                digest.update(data)
                meter.advance(len(data), file.name)
        if digest.hexdigest() != file.sha256:
            part.unlink()
            raise BundleError(f"{file.name} in the archive does not match its SHA-256", hint="copy the archive again")
        fsync_path(part)
        part.rename(target)


def _is_plain(member: tarfile.TarInfo) -> bool:
    return member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    assert content is not None, "a regular file"
    return content
