"""`appliance bench …` on the CPU: the last line is one JSON object with its keys, and mistakes are one clear line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from appliance.bench import driver
from appliance.bench.offline import Rows
from appliance.bench.quality import against_nearest
from appliance.bench.quality_columns import columns, open_column
from appliance.bench.random_engine import RandomEngine
from appliance.bench.random_model import write_checkpoint
from appliance.bench.shapes import SHAPES, shape_config
from appliance.bench.subject import load_random
from appliance.checkpoint import read_model_config
from appliance.cli import main
from appliance.engines import read_manifest
from appliance.runtime.divergence import Divergence
from appliance.runtime.executor import LocalExecutor
from appliance.types import EngineOptions

WHERE = {"device", "torch", "date"}
OFFLINE = WHERE | {
    "bench", "precision", "backend", "attention", "kv_cache_dtype", "cuda_graphs", "kv_cache_tokens",
    "startup_seconds", "seed", "floor_ms", "ceilings", "decode", "prefill", "throughput",
    "scheme", "tp_size", "pp_size", "all_reduce_us",
}  # fmt: skip
BESIDE = {"floor_ms", "floor_share", "floor_reduced_ms", "predicted_ms", "predicted_ratio"}
SMALL = ("--backend", "cpu", "--max-num-seqs", "4", "--input-len", "8", "--output-len", "8", "--batch-sizes", "1,4,8")


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON object of the last line of a benchmark that went well."""
    assert main(["bench", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert isinstance(result, dict) and len(lines) > 1
    return result


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def check_rows(result: dict[str, Any], *, prefill: tuple[int, int], throughput: tuple[int, int, int]) -> None:
    assert [row["batch"] for row in result["decode"]] == [1, 4], "8 are more than --max-num-seqs"
    assert set(result["decode"][0]) == BESIDE | {"batch", "input_len", "step_ms", "tokens_per_second"}
    assert all(0 < row["floor_ms"] < row["step_ms"] for row in result["decode"])
    for row in result["decode"]:
        assert row["predicted_ratio"] == pytest.approx(row["predicted_ms"] / row["step_ms"], abs=0.002)
    assert [(row["count"], row["length"]) for row in result["prefill"]] == [prefill]
    assert set(result["prefill"][0]) == BESIDE | {"count", "length", "ms", "tokens_per_second"}
    (row,) = result["throughput"]
    assert (row["requests"], row["input_len"], row["output_len"]) == throughput
    assert set(row) - {"requests", "input_len", "output_len"} == BESIDE | {
        "seconds",
        "output_tokens_per_second",
        "output_tokens_per_second_per_rank",
        "total_tokens_per_second",
    }


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_offline_with_random_weights(precision: str, cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ("--prefill", "2x32,1x5000", "--throughput", "6:8/8")
    options = ("--precision", precision, "--cache", cache, "--seed", "3")
    result = bench(capsys, "offline", "--shape", "tiny", *options, *SMALL, *rows)
    assert set(result) == OFFLINE | {"shape"}
    assert (result["bench"], result["shape"], result["precision"], result["seed"]) == ("offline", "tiny", precision, 3)
    assert result["backend"] == "cpu" and result["attention"] == "reference" and result["cuda_graphs"] is False
    check_rows(result, prefill=(2, 32), throughput=(6, 8, 8))


def test_offline_with_a_model_and_with_its_engine(cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ("--prefill", "1x64", "--throughput", "4:8/8", *SMALL)
    built = bench(capsys, "offline", "--model", "builtin", "--precision", "fp8", "--cache", cache, *rows)
    assert set(built) == OFFLINE | {"model"} and (built["model"], built["precision"]) == ("builtin", "fp8")
    check_rows(built, prefill=(1, 64), throughput=(4, 8, 8))
    (engine,) = (path.parent for path in Path(cache).glob("engines/*/engine.json"))
    opened = bench(capsys, "offline", "--model", str(engine), *rows)
    assert opened["precision"] == "fp8" and opened["model"] == str(engine)
    check_rows(opened, prefill=(1, 64), throughput=(4, 8, 8))


def test_rows_that_do_not_fit_are_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    rows = Rows(((1, 50), (9, 50)), ((1, 64), (2, 99)), ((3, 60, 40), (3, 60, 41)), output_len=50)
    assert rows.longest == 101
    kept = rows.within(100, 8)
    assert kept == Rows(((1, 50),), ((1, 64), (2, 99)), ((3, 60, 40),), 50)
    assert "beyond 100 tokens or 8 sequences: decode batch 9 of 50, throughput 3:60/41" in capsys.readouterr().out
    assert rows.within(99, 9) == Rows((), ((1, 64),), (), 50)


def test_decode_rows_are_batches_by_prompt_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--shape", "tiny", "--backend", "cpu", "--kv-cache-dtype", "fp32", "--prefill=", "--throughput=")
    result = bench(capsys, "offline", *shape, "--batch-sizes", "1,2", "--isl", "8,40", "--osl", "8")
    assert [(row["batch"], row["input_len"]) for row in result["decode"]] == [(1, 8), (2, 8), (1, 40), (2, 40)]
    assert result["kv_cache_dtype"] == "fp32"
    assert set(result["ceilings"]) == {"bandwidth_tbs", "linear_tflops", "attention_tflops"}


def test_what_a_start_puts_off_is_done_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [1, 1, 1]
    monkeypatch.setattr(LocalExecutor, "prepare_more", lambda self: bool(left and left.pop()))
    options = EngineOptions(engine_dir="", backend="cpu", max_num_seqs=2, max_model_len=64)
    load_random(RandomEngine("tiny", "bf16", "cpu"), options, tmp_path)
    assert not left


def test_prompts_are_decided_by_the_seed() -> None:
    first, again, other = (driver.make_requests(2, 5, 8, 100, seed=seed) for seed in ("a", "a", "b"))
    assert first == again
    assert [r.prompt_token_ids for r in first] != [r.prompt_token_ids for r in other]
    assert len({r.request_id for r in first + other}) == 4
    assert all(len(r.prompt_token_ids) == 5 and r.params.max_tokens == 8 and r.params.ignore_eos for r in first)


def test_quality(cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--samples", "2", "--tasks", "addition,recall", "--recall-lengths", "256", "--cache", cache)
    more = ("--backend", "cpu", "--text-tokens", "128", *options)
    result = bench(capsys, "quality", "--precision", "bf16,fp8", "--kv-cache-dtype", "auto,fp8", *more)
    parts = {"accuracy", "mean", "text", "divergence", "divergence_answers", "seconds"}
    assert set(result) == WHERE | parts | {"bench", "model", "samples", "seed"}
    columns = ("bf16", "bf16 + fp8 KV", "fp8", "fp8 + fp8 KV")
    assert result["accuracy"] == {name: {"addition": 1.0, "recall 256": 1.0} for name in columns}
    assert result["mean"] == dict.fromkeys(columns, 1.0) and set(result["seconds"]) == set(columns)
    found = result["divergence"]
    assert result["text"] == "conversations of the built-in tasks" and set(found) == set(columns)
    assert found["bf16"]["kl_divergence"] == 0 and found["bf16"]["positions"] >= 128
    for name in columns[1:]:
        assert 0 < found[name]["kl_divergence"] < 0.05 and found[name]["top1_agreement"] > 0.9, name
        answers = result["divergence_answers"][name]
        assert 0 < answers["positions"] < found[name]["positions"] and answers["kl_divergence"] < 0.005, name
        assert answers["perplexity"] < 1.1 < found[name]["perplexity"], "it knows answers, and no questions"
    assert found["fp8"]["kl_divergence"] != found["fp8 + fp8 KV"]["kl_divergence"], "the cache counts, too"


def test_quality_columns() -> None:
    """Schemes by name, rounding to nearest beside them, KV caches of their own, and the whole table by one word."""
    table = columns("all", "fp8")
    names = ["bf16", "fp8", "fp8 + fp8 KV", "int8_smoothquant", "int8_rtn", "int4_awq", "int4_gptq", "int4_rtn"]
    assert list(table) == names
    assert [(c.precision, c.nearest, c.kv_cache) for c in table.values()] == [
        ("bf16", False, "auto"),
        ("fp8", False, "auto"),
        ("fp8", False, "fp8"),
        ("int8", False, "auto"),
        ("int8", True, "auto"),
        ("int4", False, "auto"),
        ("int4", False, "auto"),
        ("int4", True, "auto"),
    ]
    assert table["int4_gptq"].scheme == "int4_gptq" and table["int4_rtn"].scheme == "int4_awq"
    assert list(columns("int4, bf16+bf16", "auto,fp8")) == ["int4", "int4 + fp8 KV", "bf16 + bf16 KV"]


def test_what_calibration_gained_is_said() -> None:
    chosen = columns("bf16,int4_awq,int4_gptq,int4_rtn,int8,int8_rtn", "auto")
    kl = {"bf16": 0.0, "int4_awq": 0.02, "int4_gptq": 0.01, "int4_rtn": 0.04, "int8": 0.003, "int8_rtn": 0.002}
    found = {name: Divergence(positions=10, kl_sum=10 * value) for name, value in kl.items()}
    assert against_nearest(chosen, found) == [
        "KL as a share of int4_rtn's: int4_awq 0.50, int4_gptq 0.25",
        "KL as a share of int8_rtn's: int8 1.50",
    ]


def test_rounding_to_nearest_is_an_engine_of_its_own(cache: str) -> None:
    """Without any calibration, so quick; a scheme's usual engine has another key."""
    args = argparse.Namespace(model="builtin", backend="cpu", cache=cache, attention="auto")
    manifest = read_manifest(Path(open_column(args, columns("int4_rtn", "auto")["int4_rtn"]).engine_dir))
    assert manifest.scheme == "int4_awq" and manifest.key_inputs.calibration == {}
    assert manifest.quality is not None and manifest.quality.limit is None, "the bench looks at whatever comes out"
    assert 1e-3 < (manifest.quality.kl_divergence or 0) < 0.2


def test_quality_over_a_file(cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What is 12 + 30? The sum of 12 and 30 is 42. " * 20)
    options = ("--text", str(text), "--text-tokens", "100", "--window", "40", "--tasks", "none", "--cache", cache)
    result = bench(capsys, "quality", "--precision", "bf16,fp8", "--backend", "cpu", *options)
    assert result["accuracy"] == {} and result["text"] == "text.txt"
    assert result["divergence"]["fp8"]["positions"] == 98  # of 101 tokens in windows of 40, 40 and 21
    assert result["divergence"]["fp8"]["perplexity"] > 1


@pytest.mark.timeout(120)
def test_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    result = bench(capsys, "start", "--precision", "bf16", "--work", str(tmp_path), "--timeout", "50")
    assert set(result) == WHERE | {"bench", "model", "precision", "tp_size", "starts", "build"}
    assert 0 < result["build"]["convert"] < result["build"]["imports"] + sum(result["build"].values())
    assert set(result["starts"]) == {"empty cache", "engine built"}
    for row in result["starts"].values():
        assert 0 < row["live_seconds"] < row["first_token_seconds"]
    assert "building" in result["starts"]["empty cache"]["phases"]
    assert "building" not in result["starts"]["engine built"]["phases"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"], "the cache is gone, nothing else is"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("offline --shape huge", 2, "--shape is 'huge'; allowed: llama-3.1-8b, llama-3-70b, llama-3.2-1b, tiny"),
        (
            "quality --kv-cache-dtype auto,fp4",
            2,
            "--kv-cache-dtype is 'auto,fp4'; allowed: auto, fp32, fp16, bf16, fp8",
        ),
        ("offline --shape tiny --backend tpu", 2, "--backend is 'tpu'; allowed: auto, cpu, cuda"),
        ("offline --shape tiny --backend cpu --attention triton", 2, "allowed: auto, reference"),
        ("offline --shape tiny --precision fp7", 2, "--precision is 'fp7'; allowed: "),
        ("offline --shape tiny --precision bf16,fp8", 2, "only one is allowed here"),
        ("offline --shape tiny --prefill 8*16", 2, "--prefill has '8*16'; entries must be of the form NxN"),
        ("offline --shape tiny --throughput 8:0/4", 2, "--throughput has '8:0/4'; entries must be of the form N:N/N"),
        ("offline --shape tiny --batch-sizes one", 2, "--batch-sizes has 'one'"),
        (
            "offline --shape tiny --kv-cache-dtype fp7",
            2,
            "--kv-cache-dtype is 'fp7'; allowed: auto, fp32, fp16, bf16, fp8",
        ),
        ("offline --shape tiny --max-num-seqs 0", 2, "--max-num-seqs is 0; it must be at least 1"),
        ("offline --shape tiny --isl 1.5", 2, "--input-len has '1.5'"),
        ("offline --shape tiny --output-len 2", 2, "--output-len is 2; it must be at least 8"),
        ("offline --shape tiny --batch-sizes= --prefill= --throughput=", 2, "nothing to measure"),
        ("offline --model ./nothing-here", 4, "nothing-here"),
        ("quality --precision bf16,fp7", 2, "--precision is 'bf16,fp7'; allowed: "),
        ("quality --kv-cache-dtype bf61", 2, "--kv-cache-dtype is 'bf61'; allowed: "),
        ("quality --tasks addition,poetry", 2, "--tasks has 'poetry'; allowed: addition, "),
        ("quality --precision fp8+fp4", 2, "each also with the precision of its KV cache, as in fp8+fp8"),
        ("quality --text ./nothing-here", 2, "--text: there is no file ./nothing-here"),
        ("quality --window 1", 2, "--window is 1; it must be at least 2"),
        ("quality --samples 0", 2, "--samples is 0; it must be at least 1"),
        ("quality --samples 9999 --tasks small_talk", 2, "--samples is 9999: task small_talk has only about"),
        ("quality --recall-lengths 9999", 2, "--recall-lengths is '9999'; allowed: 256 to 3800"),
        ("start --precision fp7", 2, "--precision is 'fp7'; allowed: "),
        ("start --shape huge", 2, "--shape is 'huge'"),
        ("start --model ./nothing-here --timeout 50", 1, "the server ended with exit code 4"),
    ],
)
def test_mistakes_are_one_clear_line(
    arguments: str, code: int, message: str, cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--cache", cache] if arguments.startswith("offline --model") else []
    assert main(["bench", *arguments.split(), *more]) == code
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in line


@pytest.mark.parametrize("name", ["", "all-reduce", "offline", "quality", "serve", "start", "ops", "compare", "trace"])
def test_help_is_readable(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", *filter(None, [name]), "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "%(" not in text and "None" not in text and "==SUPPRESS==" not in text
    if not name:
        assert all(
            benchmark in text for benchmark in ("compare", "offline", "ops", "quality", "serve", "start", "trace")
        )
    else:
        assert text.count("default:") >= 3


def test_a_shape_on_disk_is_the_shape(tmp_path: Path) -> None:
    write_checkpoint(shape_config("tiny"), tmp_path)
    assert read_model_config(tmp_path) == SHAPES["tiny"]
