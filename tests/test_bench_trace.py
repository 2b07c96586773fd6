"""`appliance bench trace`: what is read from a trace, against invented ones; the command itself on the CPU."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from appliance.bench.graph_timer import GraphTimer
from appliance.bench.timeline import host_operations, read_trace, timeline
from appliance.cli import main

MARKER = "steps"


def event(category: str, name: str, start: float, duration: float, tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": tid}


EVENTS = [
    event("user_annotation", MARKER, 100, 100),
    event("kernel", "before", 90, 5),
    event("kernel", "b", 130, 20),
    event("kernel", "a", 110, 10, tid=7),  # 10 idle behind it
    event("kernel", "inside b", 135, 5, tid=8),
    event("kernel", "a", 148, 12),  # overlaps b
    event("kernel", "c", 165, 5),  # 5 idle before it
    event("kernel", "late", 201, 50),
    event("gpu_memcpy", "copy", 120, 10),
    {"ph": "i", "name": "instant", "ts": 120},
]


def test_what_kernels_fill() -> None:
    found = timeline(EVENTS, MARKER)
    assert [kernel.name for kernel in found.kernels] == ["a", "b", "inside b", "a", "c"]
    assert (found.window, found.busy) == (60, 45)
    assert [(gap.microseconds, gap.after, gap.before) for gap in found.gaps()] == [(10, "a", "b"), (5, "a", "c")]
    assert found.by_name() == [("a", 2, 22), ("b", 1, 20), ("inside b", 1, 5), ("c", 1, 5)]


def test_a_trace_without_kernels_or_range() -> None:
    empty = timeline(EVENTS[:1], MARKER)
    assert (empty.window, empty.busy, empty.gaps(), empty.by_name()) == (0, 0, [], [])
    with pytest.raises(ValueError, match="no range 'steps'"):
        timeline(EVENTS[1:], MARKER)


def test_host_operations_count_their_own_time() -> None:
    events = [
        EVENTS[0],
        event("cpu_op", "linear", 110, 50),
        event("cpu_op", "mm", 115, 30),
        event("cpu_op", "empty", 116, 5),
        event("cpu_op", "add", 150, 8),
        event("cpu_op", "mm", 170, 7),
        event("cpu_op", "elsewhere", 170, 99, tid=2),
    ]
    assert host_operations(events, MARKER) == [("mm", 2, 32), ("linear", 1, 12), ("add", 1, 8), ("empty", 1, 5)]


def test_traces_are_read_compressed_or_not(tmp_path: Path) -> None:
    text = json.dumps({"traceEvents": EVENTS}).encode()
    (tmp_path / "plain.json").write_bytes(text)
    (tmp_path / "small.json.gz").write_bytes(gzip.compress(text))
    assert read_trace(tmp_path / "plain.json") == read_trace(tmp_path / "small.json.gz") == EVENTS


def test_graphs_are_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """With events of an invented device, on which each replay takes 2 ms and half a millisecond lies between."""
    clock = [0.0]
    replayed: list[object] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def query(self) -> bool:
            return clock[0] > 4.0  # from the third replay on the device is found idle

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

        def synchronize(self) -> None:
            pass

    class Graph:
        def replay(self) -> None:
            replayed.append(self)
            clock[0] += 2.0

    original = Graph.replay
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    graph = Graph()
    timer = GraphTimer()
    with timer:
        for _ in range(4):
            graph.replay()
            clock[0] += 0.5
    assert Graph.replay is original and replayed == [graph] * 4
    assert timer.result(4) == {
        "graph_ms": 2.0,
        "between_graphs_ms": {"p50": 0.5, "max": 0.5},
        "launched_ahead_share": 0.333,
    }
    assert set(GraphTimer().result(4).values()) == {None}


def test_trace_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", "tiny", "--backend", "cpu", "--batch-sizes", "1,3", "--isl", "8", "--steps", "4"]
    assert main(["bench", "trace", *options, "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert any("busy share is not applicable" in line for line in lines)
    assert [row["batch"] for row in result["traces"]] == [1, 3]
    for row in result["traces"]:
        assert row["busy_share_profiled"] is row["graph_ms"] is row["kernels_per_step"] is None
        assert row["step_ms"] > 0 and row["step_ms_profiled"] > 0 and 0 < row["floor_share"] < 1
        assert any(top["name"] == "aten::mm" for top in row["top"])
        assert sum(top["us_per_step"] for top in row["top"]) < 1.05e3 * row["step_ms_profiled"]
        assert timeline(read_trace(Path(row["trace"])), "measured decode steps").kernels == ()


@pytest.mark.gpu
def test_trace_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", "tiny", "--batch-sizes", "1,8", "--isl", "8", "--steps", "16", "--max-num-seqs", "8"]
    assert main(["bench", "trace", *options, "--output", str(tmp_path)]) == 0
    for row in json.loads(capsys.readouterr().out.splitlines()[-1])["traces"]:
        assert 0 < row["busy_share_profiled"] <= 1 and row["kernels_per_step"] > 3 and row["top"]
        assert 0 < row["graph_ms"] <= 1.1 * row["step_ms"]
        assert 0 <= row["launched_ahead_share"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch-sizes 5 --max-num-seqs 4", "does not fit an engine of 4 sequences"),
        ("--batch-sizes 0", "--batch-sizes has '0'"),
        ("--steps 1", "--steps is 1; it must be at least 4"),
        ("--isl 0", "--input-len is 0; it must be at least 1"),
    ],
)
def test_mistakes_are_one_clear_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "trace", "--shape", "tiny", "--backend", "cpu", *arguments.split()]) == 2
    assert message in capsys.readouterr().err
