"""`appliance bench start`: seconds from process start until the socket answers, and until one real token came out.

First with an empty cache, then with the engine built. Runs the real server as a child process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, get_args

from appliance.bench.options import shape_checkpoint
from appliance.bench.own_server import OwnServer, get_json
from appliance.bench.report import Table, environment, one_precision, say
from appliance.bench.shapes import SHAPES, shape_config
from appliance.builder.phases import describe
from appliance.engines import EngineStore
from appliance.types import Precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", default="builtin", help="model directory, hub id or builtin (default: %(default)s)")
    what.add_argument("--shape", help=f"{', '.join(SHAPES)}: writes a checkpoint with random weights first")
    names = ", ".join(get_args(Precision))
    parser.add_argument("--precision", help=f"{names} (default: what selection chooses)")
    parser.add_argument("--work", help="directory; a checkpoint written there is used again (default: temporary)")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one start (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave the temporary directory, or the cache in --work")


def run(args: argparse.Namespace) -> int:
    if args.precision:
        one_precision(args.precision)
    if args.shape:
        shape_config(args.shape)
    work = Path(args.work or tempfile.mkdtemp(prefix="appliance-bench-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        model = str(shape_checkpoint(args.shape, work)) if args.shape else args.model
        cache = Path(tempfile.mkdtemp(prefix="cache-", dir=work))  # empty, also in a directory that was used before
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
    result = {"bench": "start", "model": args.shape or args.model, "precision": args.precision, "starts": starts}
    result["build"] = build
    print(json.dumps({**result, **environment()}))
    return 0


def _build_seconds(cache: Path) -> dict[str, float]:
    """Seconds by part of the build, as the engine in this cache has them; empty for an engine that was not built."""
    return next((engine.manifest.build.phases for engine in EngineStore(cache).list_engines() if engine.manifest), {})


def _start(args: argparse.Namespace, model: str, cache: Path) -> dict[str, Any]:
    with OwnServer(model, str(cache), args.precision) as server:
        live = server.until("/v1/health/live", args.timeout)
        ready = server.until("/v1/health/ready", args.timeout)
        phases = get_json(server.url + "/v1/health/startup")[1].get("phase_seconds", {})
    return {"live_seconds": round(live, 3), "first_token_seconds": round(ready, 3), "phases": phases}
