"""`build`, `download-to-cache`, `create-model-store` and `engines`: engines in the cache and on their way."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from appliance import engines
from appliance.commands import progress
from appliance.commands.common import add_json_flag, columns, obtain, print_paths, resolved, settings_of
from appliance.commands.selection import NAMES, selection_of
from appliance.engines import EngineStore, StoredEngine
from appliance.engines.disk import ensure_writable, free_bytes, full_disk_explained, no_space
from appliance.errors import EngineBuildError, SettingsError
from appliance.settings import Settings, add_flags, load
from appliance.sizes import counted
from appliance.strict import nearest

_NAMES = [
    *NAMES,
    "engine_source",
    "engine_source_timeout",
    "engine_publish",
    "verify_digests",
    "tactics",
    "calibration_data",
    "calibration_samples",
    "calibration_length",
    "log_level",
    "log_json",
]


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", dest="profile", metavar="PROFILE", default=argparse.SUPPRESS, help="same as --profile")
    parser.add_argument("--publish", metavar="URL", help="copy the engine to this fsspec URL too")
    add_json_flag(parser)
    add_flags(parser, _NAMES)


def add_download_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("-p", dest="profile", metavar="PROFILE", default=argparse.SUPPRESS, help="same as --profile")
    which.add_argument("--all", action="store_true", help="engines of every profile that can run here")
    which.add_argument("--model-only", action="store_true", help="no engine [where a GPU is at hand, the one selected]")
    add_json_flag(parser)
    add_flags(parser, _NAMES)


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", dest="profile", metavar="PROFILE", default=argparse.SUPPRESS, help="same as --profile")
    parser.add_argument("-m", "--model-store", metavar="DIR", type=Path, required=True, help="where to; empty or new")
    add_json_flag(parser)
    add_flags(parser, _NAMES)


def run_build(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    engine_dir = obtain(settings)
    published = _publish(engine_dir, args.publish) if args.publish else None
    print_paths(args, published=published, engine=engine_dir)
    return 0


def _publish(engine_dir: Path, url: str, *, overwrite: bool = False) -> str:
    with progress.shown("publishing") as show:
        return engines.publish(engine_dir, url, progress=show, overwrite=overwrite)


def run_download(args: argparse.Namespace) -> int:
    """The checkpoint, which a start without network needs to know the engine by; and engines: of the named profile, of
    all that can run here, else where a GPU is at hand of the one that would be selected."""
    settings = settings_of(args)
    checkpoint = resolved(settings)
    built: list[Path] = []
    if args.all:
        runnable = [o.name for o in selection_of(settings, None).outcomes if o.status == "runnable"]
        if not runnable:
            raise EngineBuildError("no profile can run here", hint="`list-model-profiles` says why")
        built += [obtain(load({**vars(args), "profile": name})) for name in runnable]
    elif settings.profile is not None or settings.tags is not None or (not args.model_only and _has_gpu(settings)):
        built.append(obtain(settings))
    print_paths(args, checkpoint=checkpoint, engines=built)
    return 0


def _has_gpu(settings: Settings) -> bool:
    """Whether an engine made here would be for a GPU: one for the CPU is quickly made where it is wanted."""
    selected = selection_of(settings, None).selected
    return selected is not None and selected.backend != "cpu"


def run_create_store(args: argparse.Namespace) -> int:
    """A directory that `serve --model DIR` serves without cache, download or build."""
    settings, target = settings_of(args), args.model_store.expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SettingsError(f"{target} is not an empty directory", hint="name a new one with -m")
    source = obtain(settings)
    size = engines.read_manifest(source).nbytes
    ensure_writable(target)
    if free_bytes(target) < size:
        raise no_space(target, size, free_bytes(target), "the model store")
    with full_disk_explained(target, "the model store"):
        shutil.copytree(source, target, dirs_exist_ok=True)
    engines.verify_engine(target, "full")
    print_paths(args, store=target)
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
        add_json_flag(action)
        if name != "list":
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
        with progress.shown("fetching") as show:
            print_paths(args, engine=engines.fetch(args.url, args.key, store, progress=show))
        return 0
    stored = _find(store, args.key)
    if args.action == "verify":
        _verify(args, store, stored)
    elif args.action == "publish":
        print_paths(args, published=_publish(stored.path, args.url, overwrite=args.overwrite))
    else:
        store.remove(stored.key)
        print(json.dumps({"removed": stored.key}) if args.json else f"{stored.key} removed")
    return 0


def _verify(args: argparse.Namespace, store: EngineStore, stored: StoredEngine) -> None:
    with progress.shown("hashing") as show:
        checked = store.verify(stored.key, "full", show)
    files = len(checked.manifest.files)
    if args.json:
        print(json.dumps({"key": stored.key, "files": files, "bytes": checked.bytes_total}))
    else:
        print(f"{stored.key}: {counted(files, 'file')}, {checked.bytes_total} bytes, all as built")


def _find(store: EngineStore, beginning: str) -> StoredEngine:
    found = [engine for engine in store.list_engines() if engine.key.startswith(beginning)]
    if len(found) != 1:
        raise SettingsError(
            f"{'no engine' if not found else f'{len(found)} engines'} in {store.engines} with a key like {beginning!r}"
            + _did_you_mean(beginning, [engine.key for engine in store.list_engines()] if not found else []),
            hint="`engines list` shows the keys",
        )
    return found[0]


def _did_you_mean(beginning: str, keys: list[str]) -> str:
    near = nearest(beginning, [key[: max(len(beginning), 12)] for key in keys])
    return f", did you mean {near}?" if near else ""


def _list(store: EngineStore, *, as_json: bool) -> int:
    rows = []
    for engine in store.list_engines():
        manifest = engine.manifest
        row: dict[str, object] = {"key": engine.key, "bytes": engine.nbytes, "damaged": manifest is None}
        if manifest is not None:
            capability = manifest.compute_capability
            row |= {
                "source": manifest.build.source,
                "precision": manifest.precision,
                "scheme": manifest.scheme,
                "tp_size": manifest.tp_size,
                "pp_size": manifest.pp_size,
                "backend": manifest.backend,
                "compute_capability": None if capability is None else ".".join(map(str, capability)),
                "created": manifest.created,
            }
        rows.append(row)
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0
    for line in columns([_shown(row) for row in rows]):
        print(line)
    if not rows:
        print(f"no engines in {store.engines}")
    return 0


def _shown(row: dict[str, object]) -> list[str]:
    """Key, size, model, precision with its scheme, sizes, what it is for, when it was built."""
    start = [str(row["key"])[:16], f"{int(str(row['bytes'])) / 2**20:9.1f} MiB"]
    if row["damaged"]:
        return [*start, "damaged"]
    precision, scheme = row["precision"], row["scheme"]
    kind = str(precision) if scheme in (precision, "none") else f"{precision} ({scheme})"
    ranks = f"tp{row['tp_size']}" + (f"-pp{row['pp_size']}" if row["pp_size"] != 1 else "")
    device = f"{row['backend']} {row['compute_capability'] or ''}".strip()
    return [*start, str(row["source"]), kind, ranks, device, str(row["created"])]
