"""`appliance bench kernels`: everything it times runs, on the CPU with invented times; the timing itself on a GPU."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from appliance import registry
from appliance.bench import kernels
from appliance.bench.shapes import SHAPES
from appliance.errors import HardwareError, SettingsError
from appliance.kernels.tactics import TABLE

CPU = torch.device("cpu")


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    return parser.parse_args(arguments)


def test_options_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(SettingsError, match="--rows"):
        kernels.run(options("--rows=1,many"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_it_needs_a_gpu() -> None:
    with pytest.raises(HardwareError, match="found no GPU"):
        kernels.run(options())


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_MODEL", SHAPES["tiny"])


def test_every_kernel_runs(tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def twice_as_long_without(call: object, launches: int) -> tuple[float, float]:
        assert call() is not None  # type: ignore[operator]
        return 2.0, 4.0

    monkeypatch.setattr(kernels, "_both_ways", twice_as_long_without)
    timings = list(kernels._time_kernels(3, CPU, bandwidth=1e9))
    names = [timing["kernel"] for timing in timings]
    assert len(set(names)) == len(names) == 13 and sum("deferred" in name for name in names) == 5
    quantize = next(timing for timing in timings if timing["kernel"] == "quantize")
    hidden = SHAPES["tiny"].hidden_size
    assert quantize == {
        "kernel": "quantize",
        "rows": 3,
        "us": 2.0,
        "us_without": 4.0,
        "share": round(3 * 3 * hidden / 2e-6 / 1e9, 3),
    }
    logits = [
        kernel.name for kernel in kernels._kernels(600, CPU) if "logits" in kernel.name or "argmax" in kernel.name
    ]
    assert logits == [], "logits are computed for a token of each sequence only"
    kernels._show_kernels(timings)
    assert "rope, cache write, deferred" in capsys.readouterr().out


def test_a_layer_runs(tiny: None) -> None:
    scheme = registry.load("quantization", "fp8").Scheme()
    layers = [kernels._weights(scheme, CPU) for _ in range(2)]
    out = kernels._chain(scheme, layers, 5, CPU)()
    assert isinstance(out, torch.Tensor)
    assert out.shape == (5, SHAPES["tiny"].hidden_size) and out.isfinite().all()


@pytest.mark.gpu
def test_times_on_a_gpu(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8 arithmetic")
    assert kernels.run(options("--rows=1,32,100")) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(timing["us"] > 0 and timing["us_without"] > 0 for timing in result["kernels"] + result["layers"])
    assert [timing["layer"] for timing in result["layers"]].count("skinny") == 2
    assert TABLE.chosen("fp8", 128, 128, 1) is None
