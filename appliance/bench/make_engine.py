"""Makes an engine with random weights in a process of its own, so that a server that is measured has the GPUs alone.

python -m appliance.bench.make_engine ENGINE CACHE [--tried]     its directory is the last line

ENGINE is a `RandomEngine` as JSON. With `--tried` it is loaded once and takes every kind of step, unless an earlier
load has left its kernels there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from appliance.bench import random_engine
from appliance.bench.random_engine import RandomEngine
from appliance.bench.subject import load_random
from appliance.builder.warmup import run_steps
from appliance.engines.manifest import read_manifest
from appliance.errors import ApplianceError
from appliance.types import EngineOptions


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m appliance.bench.make_engine")
    parser.add_argument("engine")
    parser.add_argument("cache", type=Path)
    parser.add_argument("--tried", action="store_true")
    arguments = parser.parse_args()
    engine = msgspec.json.decode(arguments.engine, type=RandomEngine)
    try:
        path = random_engine.make(engine, arguments.cache)
        if arguments.tried and engine.backend == "cuda" and not read_manifest(path).kernels:
            subject = load_random(engine, EngineOptions(engine_dir="", backend=engine.backend), arguments.cache)
            run_steps(subject.core, subject.config)
            subject.close()
    except ApplianceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
