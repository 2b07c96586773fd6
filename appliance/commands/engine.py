"""`build`, `download-to-cache`, `create-model-store` and `engines`: engines in the cache and on their way."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from appliance import engines, logs
from appliance.checkpoint import resolve
from appliance.commands.selection import NAMES, selection_of
from appliance.engines import EngineStore, StoredEngine
from appliance.engines.disk import ensure_writable, free_bytes, full_disk_explained, no_space
from appliance.errors import EngineBuildError, SettingsError
from appliance.launch.prepare import prepare
from appliance.settings import Settings, add_flags, load

_NAMES = [*NAMES, "engine_source", "verify_digests", "log_level", "log_json"]


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--publish", metavar="URL", help="copy the engine to this fsspec URL too")
    add_flags(parser, _NAMES)


def add_download_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("-p", dest="profile", metavar="PROFILE", default=argparse.SUPPRESS, help="same as --profile")
    which.add_argument("--all", action="store_true", help="engines of every profile that can run here")
    add_flags(parser, _NAMES)


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", dest="profile", metavar="PROFILE", default=argparse.SUPPRESS, help="same as --profile")
    parser.add_argument("-m", "--model-store", metavar="DIR", type=Path, required=True, help="where to; empty or new")
    add_flags(parser, _NAMES)


def _settings(args: argparse.Namespace) -> Settings:
    settings = load(vars(args))
    logs.configure(settings.log_level, settings.json_logging, process="appliance")
    return settings


def _obtain(settings: Settings) -> Path:
    """The verified engine of these settings: found, fetched or built."""
    return Path(prepare(settings).engine_dir)


def run_build(args: argparse.Namespace) -> int:
    settings = _settings(args)
    engine_dir = _obtain(settings)
    if args.publish:
        print(engines.publish(engine_dir, args.publish))
    print(engine_dir)
    return 0


def run_download(args: argparse.Namespace) -> int:
    """Without a profile: the checkpoint, all that a start without network needs. With: the engine too."""
    settings = _settings(args)
    if args.all:
        runnable = [o.name for o in selection_of(settings, None).outcomes if o.status == "runnable"]
        if not runnable:
            raise EngineBuildError("no profile can run here", hint="`list-model-profiles` says why")
        for name in runnable:
            print(_obtain(load({**vars(args), "profile": name})))
        return 0
    if settings.profile is not None or settings.tags is not None:
        print(_obtain(settings))
        return 0
    token = settings.hf_token
    print(resolve(settings.model, settings.cache_dir, offline=settings.offline, token=token, progress=_Narrator()))
    return 0


class _Narrator:
    """Progress of a download on stderr, a line every few seconds."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def __call__(self, snapshot: engines.Snapshot) -> None:
        now = time.monotonic()
        if now - self._told >= 5.0:
            self._told = now
            left = "" if snapshot.eta_seconds is None else f", {snapshot.eta_seconds:.0f} s left"
            logs.say(f"{snapshot.detail}: {snapshot.percent:.0f}%{left}")


def run_create_store(args: argparse.Namespace) -> int:
    """A directory that `serve --model DIR` serves without cache, download or build."""
    settings, target = _settings(args), args.model_store.expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SettingsError(f"{target} is not an empty directory", hint="name a new one with -m")
    source = _obtain(settings)
    size = engines.read_manifest(source).nbytes
    ensure_writable(target)
    if free_bytes(target) < size:
        raise no_space(target, size, free_bytes(target), "the model store")
    with full_disk_explained(target, "the model store"):
        shutil.copytree(source, target, dirs_exist_ok=True)
    engines.verify_engine(target, "full")
    print(target)
    return 0


# ---------------------------------------------------------------- engines


def add_engines_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, help in (
        ("list", "what is in the cache"),
        ("verify", "hash every file and compare"),
        ("remove", "delete an engine"),
        ("publish", "copy an engine to a URL"),
        ("fetch", "bring an engine from a URL"),
    ):
        action = actions.add_parser(name, help=help, description=help)
        if name == "list":
            action.add_argument("--json", action="store_true", help="for scripts")
        else:
            action.add_argument("key", help="key of the engine" + ("" if name == "fetch" else ", or its beginning"))
        if name in ("publish", "fetch"):
            action.add_argument("url", help="any fsspec URL: a directory, s3://, hf://, https://")
        if name == "publish":
            action.add_argument("--overwrite", action="store_true", help="also if another build of this key is there")
        add_flags(action, ["cache"])


def run_engines(args: argparse.Namespace) -> int:
    store = EngineStore(load(vars(args)).cache_dir)
    if args.action == "list":
        return _list(store, as_json=args.json)
    if args.action == "fetch":
        print(engines.fetch(args.url, args.key, store))
        return 0
    stored = _find(store, args.key)
    if args.action == "verify":
        checked = store.verify(stored.key, "full")
        print(f"{stored.key}: {len(checked.manifest.files)} files, {checked.bytes_total} bytes, all as built")
    elif args.action == "publish":
        print(engines.publish(stored.path, args.url, overwrite=args.overwrite))
    else:
        store.remove(stored.key)
        print(f"{stored.key} removed")
    return 0


def _find(store: EngineStore, beginning: str) -> StoredEngine:
    found = [engine for engine in store.list_engines() if engine.key.startswith(beginning)]
    if len(found) != 1:
        raise SettingsError(
            f"{'no engine' if not found else f'{len(found)} engines'} in {store.engines} with a key like {beginning!r}",
            hint="`engines list` shows the keys",
        )
    return found[0]


def _list(store: EngineStore, *, as_json: bool) -> int:
    rows = []
    for engine in store.list_engines():
        manifest = engine.manifest
        row: dict[str, object] = {"key": engine.key, "bytes": engine.nbytes, "damaged": manifest is None}
        if manifest is not None:
            row |= {
                "source": manifest.build.source,
                "precision": manifest.precision,
                "tp_size": manifest.tp_size,
                "backend": manifest.backend,
                "created": manifest.created,
            }
        rows.append(row)
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        what = "damaged" if row["damaged"] else f"{row['source']} {row['precision']} {row['backend']} {row['created']}"
        print(f"{str(row['key'])[:16]}  {int(str(row['bytes'])) / 2**20:9.1f} MiB  {what}")
    if not rows:
        print(f"no engines in {store.engines}")
    return 0
