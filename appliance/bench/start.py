"""`appliance bench start`: seconds from process start until the socket answers, and until one real token came out.

First with an empty cache, then with the engine built. Runs the real server as a child process. With `--engine-only` a
shape is started as an engine whose weights, random ones, lie in files that were just written, so in the page cache;
ranks share one file, so that it is there once.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any, get_args

from appliance.bench.options import at_least, shape_checkpoint
from appliance.bench.own_server import OwnServer, get_json
from appliance.bench.report import Table, environment, one_precision, say
from appliance.bench.shapes import SHAPES, shape_config
from appliance.builder.phases import describe
from appliance.engines import EngineStore
from appliance.errors import SettingsError
from appliance.types import Precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", default="builtin", help="model directory, hub id or builtin (default: %(default)s)")
    what.add_argument("--shape", help=f"{', '.join(SHAPES)}: writes a checkpoint with random weights first")
    names = ", ".join(get_args(Precision))
    parser.add_argument("--precision", help=f"{names} (default: what selection chooses, bf16 with --engine-only)")
    parser.add_argument("--tp-size", type=int, help="ranks that share each layer (default: what selection chooses)")
    parser.add_argument("--backend", default="auto", help="auto, cuda or cpu (default: %(default)s)")
    parser.add_argument(
        "--engine-only", action="store_true", help="of a shape: only starts of an engine, with random weights in files"
    )
    parser.add_argument("--repeats", type=int, default=2, help="starts, with --engine-only (default: %(default)s)")
    parser.add_argument("--no-tactics", action="store_true", help="do not time the ways to compute each product")
    parser.add_argument(
        "--cache", help="with --engine-only: directory of that engine and of timings (default: temporary)"
    )
    parser.add_argument("--serve-flags", default="", help="further flags of `serve` (default: none)")
    parser.add_argument("--work", help="directory; a checkpoint written there is used again (default: temporary)")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one start (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave the temporary directory, or the cache in --work")


def run(args: argparse.Namespace) -> int:
    _check(args)
    work = Path(args.work or tempfile.mkdtemp(prefix="appliance-bench-"))
    work.mkdir(parents=True, exist_ok=True)
    build: dict[str, float] = {}
    try:
        cache = Path(tempfile.mkdtemp(prefix="cache-", dir=work))  # empty, also in a directory that was used before
        if args.engine_only:
            starts = _starts_of_engine(args, Path(args.cache) if args.cache else cache)
        else:
            model = str(shape_checkpoint(args.shape, work)) if args.shape else args.model
            starts = {name: _start(args, model, cache) for name in ("empty cache", "engine built")}
            build = _build_seconds(cache)
    finally:
        if not args.keep:
            for left in work.glob("cache-*") if args.work else [work]:
                shutil.rmtree(left, ignore_errors=True)
    table = Table("start", "live s", "first token s")
    for name, row in starts.items():
        table.row(name, f"{row['live_seconds']:.2f}", f"{row['first_token_seconds']:.2f}")
    table.show(f"start of {args.shape or args.model}, {args.precision or 'selected precision'}")
    for name, row in starts.items():
        say(f"{name}: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in row["phases"].items()))
    if build:
        say(f"build, parts in brackets may run side by side: {describe(build)}")
    result = {"bench": "start", "model": args.shape or args.model, "precision": args.precision, "tp_size": args.tp_size}
    result["starts"] = starts
    result["build"] = build
    print(json.dumps({**result, **environment()}))
    return 0


def _build_seconds(cache: Path) -> dict[str, float]:
    """Seconds by part of the build, as the engine in this cache has them; empty for an engine that was not built."""
    return next((engine.manifest.build.phases for engine in EngineStore(cache).list_engines() if engine.manifest), {})


def _check(args: argparse.Namespace) -> None:
    """SettingsError for what cannot be started."""
    at_least(args, {"repeats": 1} | ({"tp_size": 1} if args.tp_size is not None else {}))
    if args.precision:
        one_precision(args.precision)
    if args.shape:
        shape_config(args.shape)
    if args.engine_only and not args.shape:
        raise SettingsError("--engine-only is of random weights: give --shape")
    if args.cache and not args.engine_only:
        raise SettingsError("--cache is for --engine-only: a start with an empty cache has its own")


def _starts_of_engine(args: argparse.Namespace, cache: Path) -> dict[str, dict[str, Any]]:
    """Of an engine whose weights were just written, and which has been tried as a built one has."""
    from appliance.bench.random_engine import RandomEngine, best_backend, make_elsewhere

    engine = RandomEngine(
        shape=args.shape,
        precision=one_precision(args.precision or "bf16"),
        backend=best_backend() if args.backend == "auto" else args.backend,
        tp_size=args.tp_size or 1,
        files=True,
        tactics=not args.no_tactics,
    )
    path = make_elsewhere(engine, cache, tried=True)
    return {f"engine built, {n + 1}": _start(args, str(path), cache) for n in range(args.repeats)}


def _start(args: argparse.Namespace, model: str, cache: Path) -> dict[str, Any]:
    flags = shlex.split(args.serve_flags)
    if args.engine_only:  # its files are checked by their size, as those of an engine in the store that was checked
        flags += ["--no-verify-digests"]
    else:
        flags += ["--tp-size", str(args.tp_size)] if args.tp_size else []
        flags += ["--backend", args.backend] if args.backend != "auto" else []
        flags += ["--no-tactics"] if args.no_tactics else []
    with OwnServer(model, str(cache), None if args.engine_only else args.precision, flags) as server:
        live = server.until("/v1/health/live", args.timeout)
        ready = server.until("/v1/health/ready", args.timeout)
        phases = get_json(server.url + "/v1/health/startup")[1].get("phase_seconds", {})
    return {"live_seconds": round(live, 3), "first_token_seconds": round(ready, 3), "phases": phases}
