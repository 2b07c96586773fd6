"""`bundle export` and `bundle import`: all that a start without a network needs, as one file that people can carry.

Export takes the checkpoint (downloaded first if need be) and its engines; import puts both where `serve` looks for
them, in huggingface_hub's own layout for hub models. What the archive is made of is `engines.archive`'s.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import IO

import msgspec

from appliance import __version__, checkpoint, engines, logs
from appliance.commands import progress
from appliance.commands.common import obtain, resolved, settings_of
from appliance.commands.selection import NAMES
from appliance.engines import EngineStore
from appliance.engines.archive import (
    MANIFEST,
    ROOTS_OF_MODELS,
    SCHEMA_VERSION,
    BundleFile,
    BundleManifest,
    extract,
    open_bundle,
    sha256_files,
    write_bundle,
)
from appliance.engines.disk import (
    ensure_writable,
    free_bytes,
    fsync_tree,
    full_disk_explained,
    no_space,
    remove_tree,
    write_atomically,
)
from appliance.engines.manifest import MANIFEST_NAME, EngineManifest
from appliance.engines.meter import ByteMeter
from appliance.errors import SettingsError
from appliance.settings import Settings, add_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "write a model and its engines to one file"
    export = actions.add_parser("export", help=text, description=text)
    export.add_argument("file", metavar="FILE", help="where to; - is stdout")
    which = export.add_mutually_exclusive_group()
    which.add_argument(
        "-p", dest="profile", metavar="PROFILE", default=argparse.SUPPRESS, help="with the engine of this profile"
    )
    which.add_argument("--no-engine", action="store_true", help="the checkpoint without its engines")
    which.add_argument("--engine-only", action="store_true", help="no checkpoint: serves on the same kind of GPU only")
    add_flags(export, [*NAMES, "engine_source", "engine_source_timeout", "log_level", "log_json"])
    text = "check a bundle and put it into the cache"
    bring = actions.add_parser("import", help=text, description=text)
    bring.add_argument("file", metavar="FILE", help="the bundle; - is stdin")
    add_flags(bring, ["cache", "log_level", "log_json"])
    for action in (export, bring):
        action.add_argument("--json", action="store_true", help="what was done, for scripts")


def run(args: argparse.Namespace) -> int:
    return _export(args) if args.action == "export" else _import(args)


# ---------------------------------------------------------------- export


@dataclass
class _Contents:
    """What goes into a bundle."""

    model: str  # see BundleManifest
    sources: dict[str, Path] = field(default_factory=dict)  # name -> file
    links: dict[str, str] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)

    def add_engine(self, engine_dir: Path) -> None:
        manifest = engines.verify_engine(engine_dir, "full").manifest
        self.keys.append(manifest.key)
        for name in [MANIFEST_NAME, *(file.name for file in manifest.files)]:
            self.sources[f"engines/{manifest.key}/{name}"] = engine_dir / name

    def add_hub(self, snapshot: Path, hub: Path, revision: str) -> None:
        """The files of a snapshot; where they are links to blobs, both. `revision` leads to it, as a branch does."""
        repository = snapshot.parents[1]
        for file in sorted(path for path in snapshot.iterdir() if path.is_file()):
            name = f"hub/{file.relative_to(hub).as_posix()}"
            if file.is_symlink():
                blob = f"hub/{(repository / 'blobs' / file.resolve().name).relative_to(hub).as_posix()}"
                self.sources[blob], self.links[name] = file.resolve(), blob
            else:
                self.sources[name] = file
        ref = repository / "refs" / revision
        if ref.is_file():  # not there if the revision is a commit
            self.sources[f"hub/{ref.relative_to(hub).as_posix()}"] = ref

    def add_directory(self, directory: Path, name: str) -> None:
        files = [*checkpoint.content_files(directory), *directory.glob("LICENSE*")]
        self.sources |= {f"models/{name}/{file.name}": file for file in files}


def _export(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    target = None if args.file == "-" else Path(args.file).expanduser()
    if target is not None and (target.is_dir() or not target.absolute().parent.is_dir()):
        raise SettingsError(f"{target} is a directory, or lies in none", hint="name a file in a directory that exists")
    contents = _gather(settings, engine=not args.no_engine, model=not args.engine_only)
    if not contents.sources:
        raise SettingsError(
            "there is nothing to export: the model is part of the appliance, and no engine of it is in the cache",
            hint="name a profile with -p, whose engine is then built",
        )
    if not args.no_engine and not contents.keys:
        logs.say("no engine of this model is in the cache: the machine of the import builds it (or name one with -p)")
    with progress.shown("hashing") as show, ByteMeter(_bytes(contents), show) as meter:
        digests = sha256_files(contents.sources.values(), meter)
    files = [
        BundleFile(name, path.stat().st_size, digest) for (name, path), digest in zip(contents.sources.items(), digests)
    ]
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = BundleManifest(
        SCHEMA_VERSION, __version__, created, contents.model, tuple(contents.keys), tuple(files), contents.links
    )
    with (
        _writing(target, manifest.nbytes) as sink,
        progress.shown("writing") as show,
        ByteMeter(manifest.nbytes, show) as meter,
    ):
        write_bundle(sink, manifest, contents.sources, meter)
    if target is not None:  # else stdout has the bundle
        _say(args, manifest, str(target))
    return 0


def _bytes(contents: _Contents) -> int:
    return sum(path.stat().st_size for path in contents.sources.values())


def _gather(settings: Settings, *, engine: bool, model: bool) -> _Contents:
    """Files and engines of the model that the settings name; with a profile its engine, built if need be."""
    given = Path(settings.model).expanduser()
    name = given.resolve().name.lstrip(".") or "model"
    if (given / MANIFEST_NAME).is_file():  # an engine directory: nothing else belongs to it
        contents = _Contents("")
        contents.add_engine(given)
        contents.model = f"engines/{contents.keys[0]}"
        return contents
    named = engine and (settings.profile is not None or settings.tags is not None)
    engine_dir = obtain(settings) if named else None
    path = resolved(settings)
    contents = _Contents(settings.model)
    if settings.model != "builtin" and given.is_dir():
        contents.model = f"models/{name}"
    if model and settings.model != "builtin":
        if given.is_dir():
            contents.add_directory(path, name)
        else:
            revision = settings.model.partition("@")[2] or "main"
            contents.add_hub(path, settings.cache_dir / "hub", revision)
    if engine_dir is not None:
        contents.add_engine(engine_dir)
    elif engine:
        digest = checkpoint.digest(path, cache=settings.cache_dir).value
        for stored in EngineStore(settings.cache_dir).list_engines():
            found = stored.manifest
            if found is not None and found.key_inputs.checkpoint_digest == digest and _asked_for(found, settings):
                contents.add_engine(stored.path)
    if not model:
        if not contents.keys:
            raise SettingsError("no engine of this model is in the cache", hint="name a profile with -p to build one")
        contents.model = f"engines/{contents.keys[0]}"
    return contents


def _asked_for(engine: EngineManifest, settings: Settings) -> bool:
    """Whether an engine is as the settings say, as far as they say anything."""
    pairs = [
        (settings.precision, engine.precision),
        (settings.tp_size, engine.tp_size),
        (settings.pp_size, engine.pp_size),
        (settings.backend, engine.backend),
    ]
    return all(wanted in (None, has) for wanted, has in pairs)


@contextlib.contextmanager
def _writing(target: Path | None, nbytes: int) -> Iterator[IO[bytes]]:
    """The file to write, which appears whole or not at all."""
    if target is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if free_bytes(target.parent) < nbytes:
        raise no_space(target, nbytes, free_bytes(target.parent), "the bundle")
    part = target.with_name(f"{target.name}.part")
    try:
        with full_disk_explained(target, "the bundle"), part.open("wb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------- import


def _import(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    cache = settings.cache_dir
    ensure_writable(cache)
    with (
        _reading(args.file) as source,
        open_bundle(source) as (manifest, archive),
        _staging(cache, manifest) as staging,
    ):
        there = sum(_staged_bytes(staging, file) for file in manifest.files)
        needed = manifest.nbytes - there
        if free_bytes(cache) < needed:
            raise no_space(cache, needed, free_bytes(cache), "the bundle")
        with full_disk_explained(cache, "the bundle"):
            with progress.shown("importing") as show, ByteMeter(manifest.nbytes, show) as meter:
                extract(archive, manifest, staging, meter)
            _place(manifest, staging, EngineStore(cache))
        remove_tree(staging)
    model = manifest.model
    if model.startswith(ROOTS_OF_MODELS):
        model = str(cache / model)
    _say(args, manifest, model)
    if not args.json:
        logs.say(f"serve it with: HF_HUB_OFFLINE=1 APPLIANCE_CACHE={cache} appliance serve --model {model}")
    return 0


@contextlib.contextmanager
def _reading(name: str) -> Iterator[IO[bytes]]:
    if name == "-":
        yield sys.stdin.buffer
        return
    try:
        source = Path(name).expanduser().open("rb")
    except OSError as error:
        raise SettingsError(f"{name} cannot be read: {error.strerror}", hint="name the file of a bundle") from None
    with source:
        yield source


@contextlib.contextmanager
def _staging(cache: Path, manifest: BundleManifest) -> Iterator[Path]:
    """The directory in which imports of this bundle go on where they stopped, for one of them at a time."""
    name = sha256(msgspec.json.encode(manifest)).hexdigest()[:16]
    staging = cache / ".bundles" / name
    staging.mkdir(parents=True, exist_ok=True)
    lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield staging
    except BlockingIOError:
        raise SettingsError("another process imports this bundle", hint="wait for it") from None
    finally:
        os.close(lock)


def _staged_bytes(staging: Path, file: BundleFile) -> int:
    path = staging / file.name
    return file.size if path.is_file() and path.stat().st_size == file.size else 0


def _place(manifest: BundleManifest, staging: Path, store: EngineStore) -> None:
    """Move what was checked to where it belongs: engines whole, files before the links to them, references last."""
    for key in manifest.engines:
        engines.verify_engine(staging / "engines" / key, "full")
        with store.build_lock(key):
            if store.find(key) is None:
                store.publish(key, staging / "engines" / key)
    cache = store.root
    files = [file.name for file in manifest.files if not file.name.startswith("engines/")]
    references = [name for name in files if "/refs/" in name]
    for name in files:
        if name not in references:
            _move(staging / name, cache / name)
    for name, blob in manifest.links.items():
        _link(cache / name, cache / blob)
    for name in references:
        _move(staging / name, cache / name)
    if manifest.model.startswith("models/"):
        write_atomically(cache / manifest.model / MANIFEST, msgspec.json.encode(manifest))
    for root in {cache / Path(name).parts[0] / Path(name).parts[1] for name in files}:
        fsync_tree(root)


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(os.path.relpath(target, link.parent))
    new.replace(link)


def _say(args: argparse.Namespace, manifest: BundleManifest, result: str) -> None:
    if not args.json:
        print(result)
        return
    facts = {"result": result, "model": manifest.model, "engines": manifest.engines, "bytes": manifest.nbytes}
    print(json.dumps(facts | {"files": len(manifest.files)}))
