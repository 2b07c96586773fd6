"""`appliance bench all-reduce`: sums over ranks, by each way there is, checked and timed.

The library's (NCCL, gloo between CPUs), own kernels one-shot and two-shot where GPUs read each other's memory; then the
all-reduce with the norm and quantization behind it, by the best of these and a kernel for the rest, and in one kernel.
Every way is first compared with the sum in float32. Times are those of the slowest rank, inside CUDA graphs on GPUs;
beside them what the selection predicts of the best. Starts a process per rank and is none itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from appliance import hardware
from appliance.bench.options import at_least
from appliance.bench.own_server import free_port
from appliance.bench.report import Table, environment, numbers, say
from appliance.errors import ApplianceError, SettingsError
from appliance.profiles import facts_of, load_gpu_facts, speed
from appliance.profiles.places import worst_link
from appliance.settings import cuda_visible_devices

_SUMS = ("library", "one-shot", "two-shot")
_SHOTS = ("one-shot", "two-shot", "cluster one-shot", "cluster dealt")
_WAYS = (*_SUMS, "norm separate", *(f"norm {way}" for way in _SHOTS))
_POLL_SECONDS = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, help="processes, each with a GPU (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=8192, help="numbers of a row (default: %(default)s)")
    parser.add_argument(
        "--rows", default="1,2,4,8,16,32,64,128,256,512,1024,4096", help="of a sum, N,… (default: %(default)s)"
    )
    parser.add_argument("--backend", default="auto", help="auto, cuda or cpu (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for all (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    at_least(args, {"ranks": 2, "hidden": 16})
    rows = [row[0] for row in numbers("--rows", args.rows, "N")]
    if not rows:
        raise SettingsError("--rows is empty: nothing to measure")
    from appliance.bench.random_engine import best_backend, devices_of

    backend = best_backend() if args.backend == "auto" else args.backend
    devices_of(backend, args.ranks)  # or they are not there
    found = _measure(args, backend, rows)
    device = _device(backend, args.ranks)
    table = Table("rows", "KB", *_WAYS, "predicted", "ratio")
    for row in found["rows"]:
        best = min(row["us"][way] for way in _SUMS if way in row["us"])
        message = row["rows"] * args.hidden * device.element
        row["predicted_us"] = round(speed.all_reduce_seconds(device, args.ranks, message) * 1e6, 2)
        row["predicted_ratio"] = round(row["predicted_us"] / best, 3)
        cells = [f"{row['us'][way]:,.1f}" if way in row["us"] else "-" for way in _WAYS]
        size = row["rows"] * args.hidden * found["element_bytes"] / 1024
        table.row(row["rows"], f"{size:,.0f}", *cells, f"{row['predicted_us']:,.1f}", f"{row['predicted_ratio']:.2f}")
    table.show(f"sums of rows of {args.hidden} numbers over {args.ranks} ranks, µs")
    say("predicted: by the selection; ratio: predicted over the best of the first three")
    for wrong in found["wrong"]:
        say(f"WRONG: {wrong}")
    result = {"bench": "all-reduce", "ranks": args.ranks, "hidden": args.hidden, "backend": backend, **found}
    print(json.dumps({**result, **environment()}))
    return 1 if found["wrong"] else 0


def _measure(args: argparse.Namespace, backend: str, rows: list[int]) -> dict[str, Any]:
    """What rank 0 says. ApplianceError if a rank fails or all of it takes too long; none is left behind."""
    port = free_port()
    bootstrap = [sys.executable, "-m", "appliance.launch.bootstrap", str(os.getpid())]
    ranks: list[subprocess.Popen[str]] = []
    try:
        for rank in range(args.ranks):
            numbers_of = {"rank": rank, "world-size": args.ranks, "master-port": port, "hidden": args.hidden}
            words = [f"--{name}={value}" for name, value in numbers_of.items()]
            words += [f"--backend={backend}", f"--rows={','.join(map(str, rows))}"]
            command = [*bootstrap, f"rank-{rank}", "appliance.bench.all_reduce_rank", *words]
            out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            ranks.append(subprocess.Popen(command, stdout=out, text=True))
        return _answer(ranks, time.monotonic() + args.timeout)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _answer(ranks: list[subprocess.Popen[str]], deadline: float) -> dict[str, Any]:
    while True:
        codes = [process.poll() for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            raise ApplianceError(f"rank {failed[0]} failed", hint="its own messages are above")
        if None not in codes:
            break
        if time.monotonic() > deadline:
            raise ApplianceError("the ranks took too long", hint="raise --timeout, or ask for fewer --rows")
        time.sleep(_POLL_SECONDS)
    out = ranks[0].stdout
    assert out is not None
    lines = out.read().splitlines()
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _device(backend: str, ranks: int) -> speed.Device:
    """A rank's, as the selection takes it to be."""
    machine = hardware.detect(cuda_visible_devices())
    gpus = list(machine.usable_gpus[:ranks])
    if backend == "cpu" or not gpus:
        return speed.cpu_device(machine.cpu_cores, ranks)
    facts = facts_of(gpus[0], load_gpu_facts())
    return speed.gpu_device(facts, "bf16", worst_link(gpus), ranks, gpus[0].compute_capability)
