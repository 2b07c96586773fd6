"""W4A16 products against their reference: Triton kernels interpreted where there is no GPU, dequantization in front of
the library, activation order, and the choice among the ways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantized_helpers import DEVICE, randn, strided
from torch import Tensor

from appliance.kernels import int4_linear, int4_native, int4_triton, int4_wide
from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.int4_linear import dequantize_reference, dequantized_linear, int4_linear_reference, ways
from appliance.kernels.int4_triton import TileConfig, dequantize_triton, tile_linear
from appliance.kernels.skinny_linear import _counters
from appliance.quantization.int4_storage import from_stored, to_stored
from appliance.quantization.weights import round_to_nearest

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
# The interpreter multiplies the bit patterns of bfloat16 matrices: there, float16 stands in.
DTYPES = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def stored(n: int, k: int, group: int, *, order: bool = False) -> dict[str, Tensor]:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    tensors = to_stored(round_to_nearest(weight, group))
    if order:
        tensors["order"] = torch.randperm(k, generator=torch.Generator().manual_seed(2)).to(torch.int32)
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def test_the_reference_is_the_weight_as_numbers() -> None:
    tensors = stored(24, 96, 32, order=True)
    x = randn(5, 96, dtype=torch.float32)
    expected = x @ from_stored(tensors).dequantize().T  # columns in the order of the input channels
    got = int4_linear_reference(x, tensors["weight"], tensors["scale_zero"], None, tensors["order"])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k", "group", "config"),
    [
        (5, 90, 256, 128, TileConfig(32, 128, 2, 4, 3)),
        (17, 70, 192, 32, TileConfig(32, 64, 3, 4, 3)),  # steps as long as a group
        (1, 64, 96, 16, None),
        (40, 64, 256, 64, TileConfig(64, 64, 1, 4, 3, 16)),  # several tiles of x
        (3, 33, 192, 96, TileConfig(16, 128, 8, 4, 3)),  # more shares than steps
    ],
)
def test_tiles(m: int, n: int, k: int, group: int, config: TileConfig | None, dtype: torch.dtype) -> None:
    tensors = stored(n, k, group)
    arguments = (tensors["weight"], tensors["scale_zero"])
    x, bias = randn(m, k, dtype=dtype), randn(n, dtype=dtype, seed=3)
    tolerance = 5e-4 if dtype == torch.float16 else 4e-3
    got = tile_linear(strided(x), *arguments, bias, config)
    assert got.dtype == dtype and error(got, int4_linear_reference(x, *arguments, bias)) < tolerance
    assert error(tile_linear(x, *arguments, None, config), int4_linear_reference(x, *arguments, None)) < tolerance
    assert torch.equal(tile_linear(x, *arguments, bias, config), got)
    assert all((ring == 0).all() for counters in _counters.values() for ring in counters._rings)


@needs_triton
@pytest.mark.parametrize(("n", "k", "group"), [(20, 1024, 128), (3, 96, 32), (33, 40, 8), (17, 4096, 4096)])
def test_dequantization_is_exact_but_for_rounding(n: int, k: int, group: int) -> None:
    tensors = stored(n, k, group)
    arguments = (tensors["weight"], tensors["scale_zero"])
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    assert torch.equal(dequantize_triton(*arguments, torch.float32), dequantize_reference(*arguments, torch.float32))
    assert torch.equal(dequantize_triton(*arguments, dtype), dequantize_reference(*arguments, dtype))


@pytest.mark.parametrize("slice_bytes", [None, 256 * 64 * 2, 1])
@pytest.mark.parametrize("biased", [True, False])
def test_products_of_slices(slice_bytes: int | None, biased: bool) -> None:
    tensors = stored(600, 64, 32)
    arguments = (tensors["weight"], tensors["scale_zero"])
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    x, bias = randn(7, 64, dtype=dtype), randn(600, dtype=dtype, seed=3) if biased else None
    expected = int4_linear_reference(x, *arguments, bias)
    assert error(dequantized_linear(x, *arguments, bias, slice_bytes), expected) < 5e-3


def test_order_bias_and_no_rows() -> None:
    tensors = stored(48, 96, 32, order=True)
    arguments = (tensors["weight"], tensors["scale_zero"])
    x, bias = randn(4, 96, dtype=torch.float16), randn(48, dtype=torch.float32, seed=3)
    expected = int4_linear_reference(x, *arguments, bias, tensors["order"])
    for way in (None, dequantized_linear):
        got = int4_linear.int4_linear(strided(x), *arguments, bias, tensors["order"], way)
        assert got.dtype == torch.float16 and error(got, expected) < 2e-3
    assert int4_linear.int4_linear(x[:0], *arguments, bias, tensors["order"]).shape == (0, 48)


@pytest.mark.parametrize("rows", [1, 8, 16, 64, 256, 512, 2048, 8192])
def test_the_default_comes_first_among_the_ways(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_native, "shared_limit", lambda index: 227 << 10)
    for native, wide in ((True, True), (True, False), (False, False)):
        monkeypatch.setattr(int4_native, "takes", lambda group, device, native=native: native)
        monkeypatch.setattr(int4_wide, "takes", lambda group, device, wide=wide: wide)
        found = ways(28672, 4096, 128, rows, torch.device("cpu"))
        first, way = next(iter(found.items()))
        assert getattr(way, "func", way) is int4_linear.default_way(rows, 128, torch.device("cpu"))
        kinds = {name.split()[0] for name in found}
        assert kinds <= {"stream", "dequantize", "wide" if wide else "tile"}
        assert first.startswith("stream") == (native and rows <= (16 if wide else 64))
        assert first.startswith("wide") == (wide and 16 < rows <= 512)
        assert ("dequantize" in found) == (rows >= 256 or not wide)
        assert ("dequantize sliced" in found) == (not wide)
        assert not wide or len(found) <= 12  # all are timed in a build, of every shape at every number of rows


def test_tiles_fit_the_shared_memory_of_small_gpus() -> None:
    for m in (1, 16, 64, 256):
        for limit in (64 << 10, 99 << 10, 227 << 10):
            listed = int4_triton.candidates(4096, 4096, m, 40, limit)
            assert listed and all(config.shared_bytes(m) <= limit for config in listed)


@needs_triton
def test_kernels_compile_for_ampere_ada_and_hopper(tmp_path: Path) -> None:
    """On tensor cores, with nothing spilled at the default sizes; on Hopper each waits once for the kernel in front."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    command = [sys.executable, "-W", "ignore", str(HERE / "compile_int4_kernels.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["arch"] for line in compiled} == {80, 86, 89, 90}
    for line in compiled:
        assert line["waits"] == (line["arch"] == 90), line
        assert line["stack"] <= 64, line
        assert line["kernel"] == "_dequantize_kernel" or line["tensor_products"] > 0, line


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 64, 256])
def test_all_ways_agree_on_a_gpu(m: int) -> None:
    tensors = stored(6144, 4096, 128)
    arguments = (tensors["weight"], tensors["scale_zero"])
    x = randn(m, 4096, dtype=torch.bfloat16)
    expected = int4_linear_reference(x, *arguments, None)
    for name, way in ways(6144, 4096, 128, m, x.device).items():
        assert error(way(x, *arguments, None), expected) < 4e-3, name
