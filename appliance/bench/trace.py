"""`appliance bench trace`: a profiler trace of decode steps, and how busy they keep the GPU.

Writes one trace per batch size that Perfetto (ui.perfetto.dev) or chrome://tracing opens. A profiler slows steps down,
most where they are short, so three figures stand beside each other: the share of the profiled window that kernels fill,
the wall time of steps without a profiler, and the device's own time of the replayed graphs against it, by CUDA events.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.bench import driver
from appliance.bench.options import add_engine_arguments, at_least, open_subject
from appliance.bench.report import Table, environment, numbers, say
from appliance.bench.timeline import Timeline, host_operations, read_trace, timeline
from appliance.errors import RequestFailedError, SettingsError

if TYPE_CHECKING:
    from appliance.bench.subject import Subject

_MARKER = "measured decode steps"  # the range in the trace
_WARM_STEPS = 8  # before each measurement
_PHASES = 3  # without anything, with events, with the profiler
_TOP, _GAPS = 12, 5  # rows shown

Steps = Callable[[int], float]  # runs that many decode steps of the whole batch, gives the seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    parser.add_argument("--batch-sizes", default="1,256", help="N,… (default: %(default)s)")
    parser.add_argument("--input-len", "--isl", type=int, default=128, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=32, help="in each measurement (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(), help="directory of the traces (default: this one)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    at_least(args, {"input_len": 1, "steps": 4})
    batches = [row[0] for row in numbers("--batch-sizes", args.batch_sizes, "N")]
    output_len = _PHASES * (args.steps + _WARM_STEPS) + 2 * _WARM_STEPS
    subject = open_subject(args, args.input_len + output_len)
    limit = subject.core.limits.max_length
    if not batches or max(batches) > subject.max_num_seqs or args.input_len + output_len > limit:
        raise SettingsError(
            f"--batch-sizes {args.batch_sizes} of {args.input_len} + {output_len} tokens does not fit an engine of "
            f"{subject.max_num_seqs} sequences and {limit} tokens",
            hint="raise --max-num-seqs, or lower --steps or --input-len",
        )
    args.output.mkdir(parents=True, exist_ok=True)
    if subject.device.type == "cpu":
        say("no GPU here: its busy share is not applicable, the trace shows the CPU's operations")
    rows = [_measure(subject, batch, output_len, args) for batch in batches]
    print(
        json.dumps({"bench": "trace", **subject.description, **environment(), "steps": args.steps, "traces": rows}),
        flush=True,
    )
    subject.close()
    return 0


def _measure(subject: Subject, batch: int, output_len: int, args: argparse.Namespace) -> dict[str, Any]:
    """One batch size: three measurements of the same decoding requests."""
    name = subject.description.get("shape") or Path(subject.description["model"]).name
    path = args.output / f"trace-{name}-{subject.description['precision']}-batch-{batch}.json.gz"
    count = args.steps
    with _decoding(subject, batch, args.input_len, output_len, args.seed) as steps:
        steps(_WARM_STEPS)
        wall = steps(count) / count
        graphs = _time_graphs(subject, steps, count)
        profiled = _profile(subject, steps, count, path)
    floor = subject.floors.decode(batch, args.input_len + output_len / 2)
    row: dict[str, Any] = {
        "batch": batch,
        "input_len": args.input_len,
        "step_ms": round(wall * 1e3, 4),
        "floor_share": round(floor / wall, 3),
        **graphs,
        "graph_share": round(graphs["graph_ms"] / (wall * 1e3), 4) if graphs["graph_ms"] else None,
        "step_ms_profiled": round(profiled / count * 1e3, 4),
        "trace": str(path),
    }
    events = read_trace(path)
    row |= _device(timeline(events, _MARKER), count) if subject.device.type == "cuda" else _host(events, count)
    _show(row)
    return row


# ---------------------------------------------------------------- measuring


@contextmanager
def _decoding(subject: Subject, batch: int, input_len: int, output_len: int, seed: int) -> Iterator[Steps]:
    """`batch` requests past their prefill; whatever is left of them in the end is aborted."""
    core = subject.core
    requests = driver.make_requests(
        batch, input_len, output_len, subject.config.vocab_size, seed=f"trace {seed} {batch}"
    )

    def steps(count: int) -> float:
        begin = time.perf_counter()
        done = 0
        while done < count:
            if not core.has_work:
                raise RequestFailedError(f"the KV cache is too small to decode {batch} sequences at once")
            done += len(core.step()) == batch
        return time.perf_counter() - begin

    for request in requests:
        core.add_request(request)
    try:
        steps(1)
        yield steps
    finally:
        core.abort([request.request_id for request in requests])
        while core.has_work:
            core.step()


def _time_graphs(subject: Subject, steps: Steps, count: int) -> dict[str, Any]:
    """The device's time of replayed graphs, by events."""
    from appliance.bench.graph_timer import GraphTimer

    timer = GraphTimer()
    if subject.device.type == "cuda":
        with timer:
            steps(count)
    return timer.result(count)


def _profile(subject: Subject, steps: Steps, count: int, path: Path) -> float:
    """Write the trace of `count` steps; seconds that they took under the profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    cuda = subject.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        steps(_WARM_STEPS)  # the profiler's own start is in these
        with record_function(_MARKER):
            seconds = steps(count)
        if cuda:
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return seconds


# ---------------------------------------------------------------- reading


def _device(found: Timeline, count: int) -> dict[str, Any]:
    """What the trace says of the GPU."""
    gaps = found.gaps()[:_GAPS]
    return {
        "busy_share_profiled": round(found.busy / found.window, 4) if found.kernels else None,
        "busy_ms_profiled": round(found.busy / 1e3 / count, 4),
        "kernels_per_step": round(len(found.kernels) / count, 1),
        "gaps": [{"us": round(gap.microseconds, 2), "after": gap.after, "before": gap.before} for gap in gaps],
        "top": _top(found.by_name(), count),
    }


def _host(events: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """What the trace says of a CPU."""
    nothing: dict[str, Any] = {
        "busy_share_profiled": None,
        "busy_ms_profiled": None,
        "kernels_per_step": None,
        "gaps": [],
    }
    return {**nothing, "top": _top(host_operations(events, _MARKER), count)}


def _top(costly: list[tuple[str, int, float]], count: int) -> list[dict[str, Any]]:
    total = sum(microseconds for _, _, microseconds in costly)
    return [
        {"name": name, "launches": launches, "us_per_step": round(us / count, 2), "share": round(us / total, 4)}
        for name, launches, us in costly[:_TOP]
    ]


def _show(row: dict[str, Any]) -> None:
    table = Table("µs a step", "launches", "share", "kernel" if row["kernels_per_step"] is not None else "operation")
    for top in row["top"]:
        table.row(f"{top['us_per_step']:,.1f}", top["launches"], f"{top['share']:.1%}", top["name"][:70])
    table.show(f"batch {row['batch']}, prompts of {row['input_len']} tokens: what a step's time goes to")
    say(f"step {row['step_ms']:.3f} ms without a profiler, {row['step_ms_profiled']:.3f} with; {row['trace']}")
    if row["graph_ms"] is not None:
        between = row["between_graphs_ms"]
        say(
            f"replayed graphs take {row['graph_ms']:.3f} ms of a step by CUDA events: {row['graph_share']:.1%} of its "
            f"wall time; between replays {between['p50'] * 1e3:.0f} µs, {between['max'] * 1e3:.0f} at most; "
            f"{row['launched_ahead_share']:.0%} launched while the GPU was still busy"
        )
    if row["busy_share_profiled"] is not None:
        say(
            f"under the profiler kernels run in {row['busy_share_profiled']:.1%} of the time, "
            f"{row['kernels_per_step']:.0f} of them a step"
        )
    for gap in row["gaps"]:
        say(f"  gap of {gap['us']:.1f} µs between {gap['after'][:40]} and {gap['before'][:40]}")
