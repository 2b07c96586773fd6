"""Whole builds with calibration, from a checkpoint with random weights on the disk. Run by hand:

    python -m tests.perf.calibrated_build --shape llama-3.1-8b [--schemes int4_awq,int4_gptq,int8_smoothquant]

Prints the log of each build (a line per block, then the seconds of each step), then a table: seconds of the build, of
calibration in it, GPU memory at most, errors rounded to nearest and as stored, averaged over the blocks. The last line
is JSON. With random weights the errors say little; the seconds are those of a real model. `--model DIR` takes one.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from appliance.bench.random_model import write_checkpoint
from appliance.bench.report import Table, say
from appliance.bench.shapes import SHAPES, shape_config
from appliance.builder.build import build
from appliance.builder.request import BuildRequest
from appliance.engines import read_manifest

PRECISIONS = {"int4_awq": "int4", "int4_gptq": "int4", "int8_smoothquant": "int8"}


def measure(checkpoint: Path, scheme: str, samples: int, length: int) -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as cache:
        request = BuildRequest(
            checkpoint=str(checkpoint),
            cache=cache,
            precision=PRECISIONS[scheme],  # type: ignore[arg-type]
            backend="cuda" if gpu else "cpu",
            compute_capability=torch.cuda.get_device_capability() if gpu else None,
            scheme=scheme,
            tactics=False,
            calibration_samples=samples,
            calibration_length=length,
            checkpoint_digest="0" * 64,  # hashing is no part of what is measured
        )
        begin = time.monotonic()
        engine = build(request)
        seconds = time.monotonic() - begin
        summary = read_manifest(engine).calibration
    assert summary is not None
    return {
        "build_seconds": round(seconds, 1),
        "calibration_seconds": round(summary.seconds, 1),
        "tokens": summary.tokens,
        "gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if gpu else None,
        "nearest_error": round(sum(summary.nearest_error.values()) / 4, 4),
        "error": round(sum(summary.error.values()) / 4, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("--model", type=Path, help="a checkpoint instead of random weights")
    parser.add_argument("--schemes", default=",".join(PRECISIONS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "calibrated_build")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    checkpoint = args.model or args.directory / args.shape
    if not (checkpoint / "config.json").is_file():
        write_checkpoint(shape_config(args.shape), checkpoint)
    found = {}
    for scheme in args.schemes.split(","):
        say(f"--- {scheme}")
        found[scheme] = measure(checkpoint, scheme, args.samples, args.length)
    table = Table("scheme", *next(iter(found.values())))
    for scheme, values in found.items():
        table.row(scheme, *(str(value) for value in values.values()))
    table.show(f"{checkpoint.name}, {args.samples} x {args.length} tokens")
    print(json.dumps({"bench": "calibrated_build", "model": checkpoint.name, "schemes": found}))


if __name__ == "__main__":
    main()
