"""`appliance bench ops`: what it does with timings, failures and bad options; the timing itself on a GPU."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest
import torch
from quantized_helpers import needs_fp8

from appliance.bench import int4_ops, ops
from appliance.errors import HardwareError, SettingsError
from appliance.kernels import int8_linear
from appliance.kernels import skinny_linear as skinny
from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.int4_linear import int4_linear_reference


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ops.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("argument", ["--products=kv", "--rows=0", "--rows=8193", "--rows=", "--precisions=fp8,int3"])
def test_options_that_are_not_known_are_refused(argument: str) -> None:
    with pytest.raises(SettingsError, match=argument.split("=")[0]):
        ops.run(options(argument))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_it_needs_a_gpu() -> None:
    with pytest.raises(HardwareError, match="found no CUDA GPU"):
        ops.run(options())


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
def test_every_config_is_checked_and_the_quickest_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the interpreter, with invented times: three configs, of which one cannot run and another is wrong."""
    needs_fp8()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    right = [skinny.Config(16, 64, split, 4, 3, False) for split in (1, 2)]
    impossible, wrong = skinny.Config(24, 64, 1, 4, 3, False), skinny.Config(32, 64, 1, 4, 3, False)
    real = skinny.skinny_linear

    def sometimes_wrong(*arguments: Any, config: skinny.Config) -> torch.Tensor:
        return real(*arguments, config=config) * (1.1 if config == wrong else 1)

    times = iter([3.0, 2.0])
    monkeypatch.setattr(ops, "PRODUCTS", {"small": (48, 128)})
    monkeypatch.setattr(ops, "ROTATED_BYTES", 4 * 48 * 128)
    monkeypatch.setattr(ops, "_library", lambda case: {})
    monkeypatch.setattr(ops, "_microseconds", lambda call, weights: next(times))
    monkeypatch.setattr(skinny, "candidates", lambda *shape: [right[0], impossible, wrong, right[1]])
    monkeypatch.setattr(skinny, "skinny_linear", sometimes_wrong)
    (case,) = ops._time_product("small", "fp8", [2], device)
    assert case.weights.shape == (4, 48, 128)
    assert [timing.get("us") for timing in case.timings] == [3.0, None, None, 2.0]
    assert case.timings[1]["failed"] and "relative error" in case.timings[2]["failed"]
    summary = ops._summary(case, bandwidth=48 * 128 / 1e-6)
    assert summary == {
        "precision": "fp8",
        "product": "small",
        "rows": 2,
        "default": 3.0,
        "skinny": 2.0,
        "share": 0.5,
        "config": [16, 64, 2, 4, 3, False],
    }
    ops._show([case], 1e12, every=False)
    printed = capsys.readouterr().out
    assert printed.count("left out: fp8 small of 2 rows") == 2
    assert "16, 64, 2, 4, 3, False" in printed and "16, 64, 1, 4, 3, False" not in printed


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
def test_int8_has_tiles_beside_the_kernel_for_few_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the interpreter, with invented times: the library's two, one config for few rows, two tiles."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    times = iter([9.0, 8.0, 3.0, 2.0, 4.0])
    monkeypatch.setattr(ops, "PRODUCTS", {"small": (48, 128)})
    monkeypatch.setattr(ops, "ROTATED_BYTES", 2 * 48 * 128)
    monkeypatch.setattr(ops, "_microseconds", lambda call, weights: call(weights[-1]) is not None and next(times))
    monkeypatch.setattr(skinny, "candidates", lambda *shape: [skinny.Config(16, 64, 2, 4, 3, False)])
    tiles = [int8_linear.TileConfig(32, 16, 64, 4, 3), int8_linear.TileConfig(32, 32, 64, 4, 3)]
    monkeypatch.setattr(int8_linear, "tiles_for", lambda rows, shared: tiles)
    monkeypatch.setattr(skinny, "shared_memory", lambda device: 1 << 17)
    (case,) = ops._time_product("small", "int8", [3], device)
    assert [timing["method"] for timing in case.timings] == ["deferred", "deferred, scaled", "skinny", "tiled", "tiled"]
    summary = ops._summary(case, bandwidth=1e12)
    assert (summary["default"], summary["tiled"], summary["config"]) == (3.0, 2.0, [32, 16, 64, 4, 3])
    ops._show([case], 1e12, every=True)
    assert "32, 32, 64, 4, 3" in capsys.readouterr().out


def test_every_way_of_int4_is_checked_and_the_quickest_own_kernel_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def right(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, bias: None) -> torch.Tensor:
        return int4_linear_reference(x, words, scales, bias)

    def wrong(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, bias: None) -> torch.Tensor:
        return right(x, words, scales * 1.1, bias)

    times = iter([3.0, 2.0, 5.0])
    listed = {"stream a b": right, "tile c": right, "tile d": wrong, "dequantize": right}
    monkeypatch.setattr(ops, "PRODUCTS", {"small": (48, 256)})
    monkeypatch.setattr(ops, "ROTATED_BYTES", 4 * 48 * 128)
    monkeypatch.setattr(ops, "_microseconds", lambda call, weights: call(weights[-1]) is not None and next(times))
    monkeypatch.setattr(int4_ops, "ways", lambda *shape: listed)
    int4_ops.compile_ahead(["small"], [2], torch.device("cpu"))
    (case,) = ops._time_product("small", "int4", [2], torch.device("cpu"))
    assert len(case.weights) == 4 and case.weight_bytes == 48 * 128 + 48 * 2 * 4
    summary = ops._summary(case, bandwidth=case.weight_bytes / 1e-6)
    assert summary == {
        "precision": "int4",
        "product": "small",
        "rows": 2,
        "default": 3.0,
        "tile": 2.0,
        "share": 0.5,
        "config": ["c"],
        "dequantize": 5.0,
    }
    ops._show([case], 1e12, every=True)
    printed = capsys.readouterr().out
    assert "left out: int4 small of 2 rows, tile ['d']: ArithmeticError" in printed and "a b" in printed


@pytest.mark.gpu
def test_times_a_product_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ops, "PRODUCTS", {"small": (512, 1024)})
    monkeypatch.setattr(ops, "ROTATED_BYTES", 8 * 512 * 1024)
    precisions = "fp8,bf16,int8,int4" if torch.cuda.get_device_capability() >= (8, 9) else "bf16,int8,int4"
    assert ops.run(options("--products=small", "--rows=1,32,256", f"--precisions={precisions}")) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["best"]) == 3 * len(precisions.split(","))
    plain = [case for case in result["best"] if case["precision"] in ("fp8", "bf16")]
    assert all(case["skinny"] > 0 for case in plain if case["rows"] <= 64)
    packed = [case for case in result["best"] if case["precision"] == "int4"]
    assert all(case["config"] and any(case.get(own, 0) > 0 for own in ("stream", "wide", "tile")) for case in packed)
    assert all(case["deferred"] > 0 for case in result["best"] if case["precision"] in ("fp8", "int8"))
