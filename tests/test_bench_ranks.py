"""Benchmarks of several ranks, with random weights made on each rank's device: commands at two ranks on the CPU, and
what they are made of."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import distributed

from appliance.bench import driver, random_engine, tune
from appliance.bench.floors import Ceilings, Floors
from appliance.bench.predictions import predictions_of
from appliance.bench.random_engine import RandomEngine
from appliance.bench.shapes import SHAPES, shape_config
from appliance.builder.made_up import describe_model, make_up
from appliance.cli import main
from appliance.distributed import TensorParallel
from appliance.engines import read_manifest
from appliance.engines.manifest import TimedTactic
from appliance.kernels.tactics import TABLE
from appliance.runtime import random_weights
from appliance.runtime.loading import build_model
from appliance.runtime.weights import load_weights
from appliance.types import EngineOptions, EngineOutput

TINY = SHAPES["tiny"]
SMALL = ("--shape", "tiny", "--backend", "cpu", "--precision", "fp8", "--max-num-seqs", "4")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bench", *arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(result, dict)
    return result


# ---------------------------------------------------------------- commands


def test_offline(cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ("--batch-sizes", "1,4", "--isl", "8", "--osl", "8", "--prefill", "2x32", "--throughput", "6:8/8")
    result = bench(capsys, "offline", *SMALL, *rows, "--tp-size", "2", "--cache", cache)
    assert (result["tp_size"], result["pp_size"], result["scheme"]) == (2, 1, "fp8")
    assert [row["batch"] for row in result["decode"]] == [1, 4] and all(row["step_ms"] for row in result["decode"])
    (whole,) = result["throughput"]
    assert whole["output_tokens_per_second_per_rank"] == pytest.approx(whole["output_tokens_per_second"] / 2, abs=0.6)
    assert whole["predicted_ms"] > 0 and whole["floor_reduced_ms"] is None, "nobody has timed the sums here"
    assert not distributed.is_initialized(), "the ranks have parted"


def test_a_scheme_by_its_name(cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ("--batch-sizes", "1", "--isl", "8", "--osl", "8", "--prefill=", "--throughput=")
    result = bench(capsys, "offline", "--shape", "tiny", "--precision", "int4_gptq", *rows, "--cache", cache)
    assert (result["precision"], result["scheme"]) == ("int4", "int4_gptq")
    assert main(["bench", "offline", "--shape", "tiny", "--precision", "int4_nf4"]) == 2
    assert "--precision is 'int4_nf4'; allowed: " in capsys.readouterr().err


def test_trace(cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--tp-size", "2", "--batch-sizes", "2", "--steps", "4", "--isl", "8")
    result = bench(capsys, "trace", *SMALL, *sizes, "--cache", cache, "--output", str(tmp_path))
    assert result["tp_size"] == 2 and result["traces"][0]["step_ms"] > 0
    assert (tmp_path / "trace-tiny-fp8-batch-2.json.gz").is_file()


@pytest.mark.timeout(120)
def test_serve_and_its_prediction(cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    load = ("--concurrency", "3", "--requests", "6", "--isl", "8", "--osl", "8", "--processes", "1", "--warmup", "1")
    result = bench(capsys, "serve", *SMALL, "--tp-size", "2", "--cache", cache, *load, "--start-timeout", "60")
    assert (result["completed"], result["replicas"], result["tp_size"], result["pp_size"]) == (6, 1, 2, 1)
    rate = result["output_tokens_per_second"]
    assert result["output_tokens_per_second_per_rank"] == pytest.approx(rate / 2, rel=0.01)
    assert result["predicted_tokens_per_second"] > 0 and result["predicted_ratio"] > 0
    replicas = bench(capsys, "serve", *SMALL, "--replicas", "2", "--cache", cache, *load, "--start-timeout", "60")
    assert (replicas["completed"], replicas["replicas"], replicas["tp_size"]) == (6, 2, 1)


@pytest.mark.timeout(120)
def test_start_of_an_engine_with_weights_in_files(cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--shape", "tiny", "--backend", "cpu", "--precision", "fp8", "--tp-size", "2", "--timeout", "50")
    result = bench(capsys, "start", "--engine-only", *options, "--cache", cache)
    assert set(result["starts"]) == {"engine built, 1", "engine built, 2"}
    assert all(0 < row["live_seconds"] < row["first_token_seconds"] for row in result["starts"].values())
    (engine,) = Path(cache, "bench").glob("tiny-*-files")
    files = [engine / name for name in read_manifest(engine).rank_files]
    assert len(files) == 2 and files[0].samefile(files[1]), "in memory once"
    assert random_weights.seed_of(files[0]) is None
    model = build_model(TINY, "fp8", torch.bfloat16, None, TensorParallel(1, 2))
    assert load_weights(model, files[1], "cpu") > 300_000
    assert 0.015 < float(model.embedding.weight.float().std()) < 0.025


def test_all_reduce(capsys: pytest.CaptureFixture[str]) -> None:
    result = bench(capsys, "all-reduce", "--ranks", "2", "--hidden", "64", "--rows", "1,8", "--backend", "cpu")
    assert (result["bench"], result["own"], result["wrong"], result["element_bytes"]) == ("all-reduce", False, [], 4)
    assert [row["rows"] for row in result["rows"]] == [1, 8]
    for row in result["rows"]:
        assert set(row["us"]) == {"library"}, "own kernels are for GPUs"
        assert row["predicted_ratio"] == pytest.approx(row["predicted_us"] / row["us"]["library"], abs=0.001)


def test_a_rank_that_fails_ends_all(capfd: pytest.CaptureFixture[str]) -> None:
    """A row that no memory holds: said within seconds, with no rank left waiting for another."""
    begin = time.monotonic()
    options = ("--ranks", "2", "--hidden", str(1 << 40), "--rows", str(1 << 20), "--backend", "cpu")
    assert main(["bench", "all-reduce", *options]) == 1
    assert "error: rank" in capfd.readouterr().err and time.monotonic() - begin < 60


@pytest.mark.gpu
def test_all_reduce_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    result = bench(capsys, "all-reduce", "--ranks", "2", "--rows", "1,64")
    assert result["own"] and not result["wrong"]
    assert {"library", "one-shot", "two-shot", "norm separate"} <= set(result["rows"][0]["us"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("offline --shape tiny --backend cpu --tp-size 0", "--tp-size is 0; it must be at least 1"),
        ("offline --shape tiny --backend cpu --tp-size 3", "can neither be split evenly over 3 ranks"),
        ("serve --shape tiny --weights disk", "--weights is 'disk'; allowed: device, checkpoint"),
        ("serve --model builtin --precision int4_gptq", "a server takes a precision"),
        ("serve --shape tiny --replicas 0", "--replicas is 0; it must be at least 1"),
        ("all-reduce --ranks 1", "--ranks is 1; it must be at least 2"),
        ("all-reduce --backend cpu --rows=", "--rows is empty"),
        ("start --engine-only", "--engine-only is of random weights: give --shape"),
        ("start --cache .", "--cache is for --engine-only"),
        ("start --engine-only --shape tiny --repeats 0", "--repeats is 0; it must be at least 1"),
        ("compare --shape tiny --precision bf16,fp8 --tp-size 2", "one precision at a time"),
    ],
)
def test_mistakes_are_one_clear_line(
    arguments: str, message: str, cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--cache", cache] if "offline" in arguments else []
    assert main(["bench", *arguments.split(), *more]) != 0
    assert message in capsys.readouterr().err


def test_an_engine_has_its_own_size(cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = random_engine.make(RandomEngine("tiny", "bf16", "cpu", tp_size=2), Path(cache))
    assert main(["bench", "offline", "--model", str(path), "--tp-size", "4"]) == 2
    assert f"tp_size 4 was asked for, and the engine in {path} was built for tp_size 2" in capsys.readouterr().err


# ---------------------------------------------------------------- random engines


def test_an_engine_is_made_once_and_anew_where_it_would_be_another(tmp_path: Path) -> None:
    engine = RandomEngine("tiny", "int4", "cpu", scheme="int4_gptq")
    path = random_engine.make(engine, tmp_path)
    manifest = read_manifest(path)
    assert (manifest.scheme, manifest.tp_size, manifest.model) == ("int4_gptq", 1, TINY)
    assert random_engine.make(engine, tmp_path) == path and read_manifest(path) == manifest
    assert random_engine.make(msgspec.structs.replace(engine, scheme="int4_awq"), tmp_path) != path
    random_engine.write_manifest(path, msgspec.structs.replace(manifest, model=SHAPES["llama-3.2-1b"]))
    assert random_engine.make(engine, tmp_path) == path and read_manifest(path).model == TINY


@pytest.mark.parametrize("scheme", ["none", "fp8", "int8_smoothquant", "int4_awq"])
def test_random_weights_fill_a_share(scheme: str, tmp_path: Path) -> None:
    """Every parameter; ranks agree on what all of them hold and differ in what they share."""
    models = []
    for rank in range(2):
        random_weights.write_random_file(tmp_path / f"{rank}", rank)
        groups = {"group_size": 32} if scheme == "int4_awq" else None
        models.append(build_model(TINY, scheme, torch.bfloat16, groups, TensorParallel(rank, 2)))
        nbytes = load_weights(models[rank], tmp_path / f"{rank}", "cpu")
        assert nbytes == sum(p.numel() * p.element_size() for p in models[rank].parameters())
    first, second = (dict(model.named_parameters()) for model in models)
    assert not any(p.is_meta for p in first.values())
    assert torch.equal(first["embedding.weight"], second["embedding.weight"])
    down = [name for name in first if name.startswith("layers.0.mlp.down.")]
    assert down and any(not _equal(first[name], second[name]) for name in down)
    for name in down:  # made once for all layers, but read from memory like any other
        other = first[name.replace("layers.0.", "layers.1.")]
        assert _equal(first[name], other) and first[name].data_ptr() != other.data_ptr()
    norms = [p for p in first.values() if p.dim() == 1 and p.dtype == torch.bfloat16]
    assert norms and all(bool((p == 1).all()) for p in norms)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_large_tensors_repeat_their_numbers() -> None:
    few = random_weights.normal((3, 5), torch.float32, torch.Generator().manual_seed(1))
    assert len(few.unique()) == 15
    count = random_weights._DISTINCT + 2
    many = random_weights.normal((2, count // 2), torch.float32, torch.Generator().manual_seed(1))
    assert torch.equal(many[1, -2:], many[0, :2]) and 0.019 < float(many.std()) < 0.021


def test_what_a_load_found_out_is_kept(tmp_path: Path) -> None:
    """How ranks add up, timed at a load, replaces what an earlier load has timed, and nothing else."""
    path = random_engine.make(RandomEngine("tiny", "bf16", "cpu", tp_size=2), tmp_path)

    def timed(scheme: str, rows: int, us: float) -> TimedTactic:
        return TimedTactic("all_reduce", scheme, 128, 2, rows, "one-shot", us)

    old = (timed("all_reduce bfloat16", 1, 9.0), timed("fp8 qkv", 1, 3.0))
    random_engine.write_manifest(path, msgspec.structs.replace(read_manifest(path), tactics=old))
    model = build_model(TINY, "none", torch.bfloat16)
    random_weights.fill(model, "cpu", 0)
    new = timed("all_reduce bfloat16", 1, 7.0)
    random_engine.keep(path, SimpleNamespace(model=model, reductions=(new,)))  # type: ignore[arg-type]
    assert read_manifest(path).tactics == (old[1], new)
    random_engine.keep(path, SimpleNamespace(model=model, reductions=()))  # type: ignore[arg-type]
    assert read_manifest(path).tactics == (old[1], new)


def test_products_of_a_rank_are_timed_as_in_a_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the CPU there is one way each, so nothing is chosen; what matters is that all of it can be asked."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for precision, ranks in (("fp8", 2), ("bf16", 1)):
        engine = RandomEngine("tiny", precision, "cpu", tp_size=ranks)  # type: ignore[arg-type]
        manifest = read_manifest(random_engine.make(engine, tmp_path))
        try:
            found = tune.time_products(manifest, tmp_path, device)
            assert f"{len(found)} tactics chosen" in capsys.readouterr().out
            assert bool(found) == torch.cuda.is_available() == any(tmp_path.glob("timings/*.json"))
        finally:
            TABLE.clear()


# ---------------------------------------------------------------- floors, predictions, steps


def test_floors_of_ranks() -> None:
    config = shape_config("llama-3-70b")
    one = Floors(config, Ceilings(4e12, 1e15, 1e15), weight_bytes=70_000_000_000, kv_token_bytes=327680)
    sums = {1: 7e-6, 64: 13e-6, 256: 29e-6}
    four = Floors(config, one.ceilings, 17_500_000_000, 327680 / 4, tp_size=4, reductions=sums)
    for batch in (1, 64, 4096):
        assert four.decode(batch, 1000) == pytest.approx(one.decode(batch, 1000) / 4)
        assert not one.knows_reductions and four.knows_reductions
    for rows, seconds in ((1, 7e-6), (64, 13e-6), (160, 21e-6), (512, 58e-6)):
        added = four.decode(rows, 10, reduced=True) - four.decode(rows, 10)
        assert added == pytest.approx(2 * 80 * seconds)
    assert four.prefill(8, 4096) == pytest.approx(one.prefill(8, 4096) / 4)
    added = four.prefill(8, 4096, reduced=True) - four.prefill(8, 4096)
    assert added == pytest.approx(4 * 2 * 80 * 29e-6 * 8192 / 256), "four steps of 8192 rows"
    whole = four.throughput(256, 1024, 1025, 256, reduced=True)
    assert whole == pytest.approx(
        four.prefill(256, 1024, reduced=True) + 1024 * four.decode(256, 1024 + 512.5, reduced=True)
    )


def test_floors_of_stages() -> None:
    """A sequence goes through all of them, and each reads its part for every part of the batch."""
    config = shape_config("llama-3-70b")
    two = Floors(config, Ceilings(4e12, 1e18, 1e18), 35_000_000_000, 163840, pp_size=2, reductions={1: 1e-6})
    assert two.weights == two.decode(1, 0) == pytest.approx(70e9 / 4e12)
    assert two.decode(2, 0) == two.decode(1, 0)
    assert two.decode(64, 1000) == pytest.approx((70e9 + 64 * 1000 * 163840) / 4e12)


def test_predictions_are_the_selections_own(tmp_path: Path) -> None:
    """On recorded machines: faster with more ranks, where there are links; none without GPUs to tell."""
    from selection_cases import machine

    here = machine("h200-x4")
    manifest = read_manifest(random_engine.make(RandomEngine("tiny", "fp8", "cpu"), tmp_path))
    changes: dict[str, Any] = {"backend": "cuda", "compute_capability": (9, 0), "model": shape_config("llama-3-70b")}
    one = msgspec.structs.replace(manifest, **changes)
    four = msgspec.structs.replace(one, tp_size=4)
    options = EngineOptions("", "cuda")
    slow, fast = (predictions_of(m, options, machine=here) for m in (one, four))
    assert slow is not None and fast is not None
    assert 2 < slow.decode(1, 128) / fast.decode(1, 128) < 4
    assert fast.prefill(8, 4096) < slow.prefill(8, 4096) and fast.output_rate(64, 100, 100) < 64 / fast.decode(64, 150)
    assert predictions_of(four, options, machine=machine("none")) is None
    full = predictions_of(one, options, machine=here, kv_tokens=32 * 1536)
    assert full is not None and full.output_rate(256, 1024, 1024) == slow.output_rate(32, 1024, 1024)


class Stages:
    """A core that gives each half of the requests a token in turn, once their prompts are computed one by one."""

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.ids: list[str] = []
        self.left: dict[str, int] = {}
        self.turn = 0

    def add_request(self, request: Any) -> None:
        self.waiting.append(request.request_id)
        self.left[request.request_id] = request.params.max_tokens

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.ids)

    def step(self) -> list[EngineOutput]:
        if self.waiting:
            self.ids.append(self.waiting.pop(0))
            chosen = list(self.ids)
        else:
            self.turn ^= 1
            chosen = self.ids[self.turn :: 2]
        outputs = []
        for name in chosen:
            self.left[name] -= 1
            outputs.append(EngineOutput(name, [0], finish_reason=None if self.left[name] else "length"))
        self.ids = [name for name in self.ids if self.left[name]]
        return outputs


def test_a_decode_step_is_one_token_for_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(driver.time, "perf_counter", lambda: float(next(ticks)))
    requests = driver.make_requests(4, 2, 20, 100, seed="x")
    timing = driver.run(Stages(), requests)  # type: ignore[arg-type]
    assert timing.output_tokens == 80
    assert timing.decode_steps and set(timing.decode_steps) == {2.0}, "two steps of half the requests each"


def test_kernels_are_added_to_those_of_a_sibling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new engine begins with the kernels of another one; what is there already is not written to, as it may be
    mapped."""
    first = random_engine.make(RandomEngine("tiny", "bf16", "cpu"), tmp_path)
    (first / "kernels" / "native").mkdir(parents=True)
    (first / "kernels" / "native" / "old").write_bytes(b"old")
    manifest = read_manifest(first)
    random_engine.write_manifest(first, msgspec.structs.replace(manifest, kernels={"native": "13.0"}))
    second = random_engine.make(RandomEngine("tiny", "fp8", "cpu", tp_size=2), tmp_path)
    assert read_manifest(second).kernels == {"native": "13.0"}
    assert "kernels/native/old" in [file.name for file in read_manifest(second).files]

    def gather(directory: Path) -> dict[str, str]:
        (directory / "native").mkdir()
        (directory / "native" / "old").write_bytes(b"changed")
        (directory / "native" / "new").write_bytes(b"new")
        return {"native": "13.0"}

    monkeypatch.setattr(random_engine.KERNELS, "gather", gather)
    monkeypatch.setattr(random_engine.KERNELS, "compiled", 1)
    embedding = SimpleNamespace(weight=SimpleNamespace(is_cuda=True))
    random_engine.keep(second, SimpleNamespace(model=SimpleNamespace(embedding=embedding), reductions=()))  # type: ignore[arg-type]
    kept = {file.name: file.size for file in read_manifest(second).files if file.name.startswith("kernels/")}
    assert kept == {"kernels/native/old": 3, "kernels/native/new": 3}
    assert (second / "kernels" / "native" / "old").read_bytes() == b"old"


def test_products_are_timed_as_ranks_with_own_kernels_compute_them() -> None:
    """Those in front of a sum leave their scales to whoever adds up."""
    seen = []
    for ranks in (1, 2):
        model = describe_model(TINY, "fp8", torch.bfloat16, {}, ranks, 1)
        make_up(model, torch.device("cpu"))
        down = next(module for name, module in model.named_modules() if name.endswith("mlp.down"))
        seen.append((down.in_features, down._deferrable))
        x = down.scheme.tactic_input(torch.zeros(2, down.in_features, dtype=torch.bfloat16))
        assert down.multiply(x).shape == (2, TINY.hidden_size)
    assert seen == [(256, True), (128, True)]
