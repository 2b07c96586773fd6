"""The CUDA C++ kernel for few rows: run as C++ on the CPU, thread by thread; compiled for the GPUs it is made for; and
on one of them."""

from __future__ import annotations

import ctypes
import random
import shutil
from pathlib import Path

import pytest
import torch
from int4_helpers import emulated, random_stored
from nvrtc import compile_cubin, spilled_bytes, unavailable
from quantized_helpers import randn, strided
from torch import Tensor

from appliance.kernels import int4_native, int4_wide
from appliance.kernels.int4_linear import int4_linear_reference
from appliance.kernels.int4_native import CONFIGS, Config, macros, stream_linear
from appliance.quantization.int4_storage import to_stored
from appliance.quantization.weights import round_to_nearest

HERE = Path(__file__).parent
LLAMA_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}


def stored(n: int, k: int, group: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    tensors = to_stored(round_to_nearest(torch.randn(n, k, generator=torch.Generator().manual_seed(1)), group))
    return tensors["weight"].to(device), tensors["scale_zero"].to(device)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


# ---------------------------------------------------------------- on the CPU


class Emulator:
    """linear.cu as a library of C++ functions, with int4_emulation.h in place of the GPU's instructions."""

    def __init__(self, config: Config, group: int, dtype: torch.dtype, directory: Path) -> None:
        self.config = config
        library = directory / f"{config.name.replace(' ', '-')}-{group}-{dtype}.so"
        self._emulate = emulated("linear.cu", macros(config, group, dtype), library).emulate

    def run(
        self, x: Tensor, weight: Tensor, scale_zero: Tensor, bias: Tensor | None, blocks: int, order: list[int]
    ) -> Tensor:
        """As `stream_linear`, by so many blocks, which run in that order, one (or cluster of them) after the other."""
        (m, k), n = x.shape, weight.shape[0]
        columns = 8 * self.config.column_tiles
        tiles = -(-n // self.config.rows) * -(-m // columns)
        if split := self.config.split:
            assert blocks == tiles * split and sorted(order) == list(range(tiles))
        else:
            assert blocks <= tiles * -(-k // self.config.chunk) and sorted(order) == list(range(blocks))
        out = torch.full((m, n), float("nan"), dtype=x.dtype)
        partial = torch.full((blocks * 2 * self.config.rows * columns,), float("nan"))
        counters = torch.zeros(tiles, dtype=torch.int32)
        pointers = [
            ctypes.c_void_p(None if t is None else t.data_ptr())
            for t in (weight, scale_zero, x, bias, out, partial, counters)
        ]
        sizes = [ctypes.c_int64(size) for size in (m, n, k, x.stride(0))]
        self._emulate((ctypes.c_int * len(order))(*order), blocks, *pointers, *sizes)
        assert not counters.any()
        return out


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: linear.cu is not run")
# (config, group, dtype, m, n, k, blocks): sizes that are no multiples of tiles and chunks; tiles of one block, of
# several, blocks with parts of several tiles; more rows of x than a tile has.
CASES = [
    (Config(8, 1, 256, 4, 2, 1), 128, torch.bfloat16, 5, 200, 640, 5),
    (Config(8, 1, 256, 4, 2, 1), 128, torch.float16, 8, 128, 512, 1),
    (Config(4, 1, 512, 3, 2, 2), 128, torch.bfloat16, 16, 130, 1152, 7),
    (Config(4, 2, 256, 4, 2, 2), 64, torch.bfloat16, 13, 200, 576, 4),
    (Config(4, 2, 256, 3, 2, 4), 32, torch.float16, 70, 200, 288, 3),
    (Config(4, 2, 256, 2, 1, 8), 256, torch.bfloat16, 70, 140, 768, 5),
    (Config(4, 1, 256, 3, 1, 1), 640, torch.bfloat16, 1, 70, 640, 2),
    (Config(4, 1, 256, 3, 2, 1, split=4), 128, torch.bfloat16, 5, 200, 1280, 16),  # shares of one chunk and of two
    (Config(4, 2, 256, 2, 1, 2, split=3), 64, torch.float16, 19, 130, 1408, 12),  # clusters of three, two tiles of x
    (Config(4, 1, 256, 3, 1, 1, split=1), 32, torch.bfloat16, 8, 66, 544, 2),
]


@needs_compiler
@pytest.mark.parametrize(
    ("config", "group", "dtype", "m", "n", "k", "blocks"),
    CASES,
    ids=[f"{c.name} g{g} {str(d)[6:]}" for c, g, d, *_ in CASES],
)
def test_every_thread_does_its_part(
    config: Config, group: int, dtype: torch.dtype, m: int, n: int, k: int, blocks: int, tmp_path: Path
) -> None:
    emulator = Emulator(config, group, dtype, tmp_path)
    weight, scale_zero = stored(n, k, group)
    wide = torch.full((m, k + 16), float("nan")).to(dtype)
    x = wide[:, 8 : 8 + k]
    x.copy_(torch.randn(m, k, generator=torch.Generator().manual_seed(0)))
    bias = torch.randn(n, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = int4_linear_reference(x, weight, scale_zero, bias)
    in_turn = list(range(blocks // max(config.split, 1)))
    first = emulator.run(x, weight, scale_zero, bias, blocks, in_turn)
    assert error(first, expected) < (1e-3 if dtype == torch.bfloat16 else 1e-4)
    order = random.Random(0).sample(in_turn, len(in_turn))
    assert torch.equal(emulator.run(x, weight, scale_zero, bias, blocks, order), first)  # whoever comes last
    without = emulator.run(x, weight, scale_zero, None, blocks, order)
    assert error(without, int4_linear_reference(x, weight, scale_zero, None)) < 2e-3


# ---------------------------------------------------------------- compiled


needs_nvrtc = pytest.mark.skipif(unavailable() is not None, reason=f"not compiled: {unavailable()}")


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90"])
@pytest.mark.parametrize("columns", CONFIGS)
def test_default_kernels_compile_and_spill_little(arch: str, columns: int) -> None:
    limit = 227 << 10 if arch == "sm_90" else 163 << 10 if arch == "sm_80" else 99 << 10
    config = next(config for config in CONFIGS[columns] if config.fits(8 * columns, 128, limit))
    for dtype in (torch.bfloat16, torch.float16):
        code = compile_cubin(int4_native.source(), arch, macros(config.resolved(8 * columns), 128, dtype))
        assert code[:4] == b"\x7fELF" and b"int4_linear" in code
        spilled = spilled_bytes(code)
        assert spilled is None or spilled <= 64


@needs_nvrtc
@pytest.mark.parametrize("m", [1, 16])
def test_kernels_with_clusters_compile_and_spill_little(m: int) -> None:
    for config in int4_native.hopper_candidates(4096, 4096, m, 128, 132, 227 << 10)[:6:2]:
        code = compile_cubin(int4_native.source(), "sm_90", macros(config.resolved(m), 128, torch.bfloat16))
        spilled = spilled_bytes(code)
        assert spilled is None or spilled <= 64, config


@needs_nvrtc
@pytest.mark.parametrize("group", [32, 64, 256, 4096])
def test_other_groups_compile(group: int) -> None:
    code = compile_cubin(int4_native.source(), "sm_90", macros(Config(4, 1, 256, 4, 2, 1), group, torch.bfloat16))
    assert b"int4_linear" in code


def test_every_config_fits_the_gpu_it_is_for() -> None:
    for columns, configs in CONFIGS.items():
        assert len(set(configs)) == len(configs)
        for config in configs:
            assert config.fits(8 * columns, 128, 227 << 10), config
            assert config.resolved(8 * columns).column_tiles in (columns, config.column_tiles)
        for limit in (99 << 10, 163 << 10):  # Ada and consumer Ampere; A100
            assert any(config.fits(8 * columns, 32, limit) for config in configs)
    for name, shape in LLAMA_8B.items():
        for m in (1, 8, 16, 32, 64):
            listed = int4_native.hopper_candidates(*shape, m, 128, 132, 227 << 10)
            assert len(set(listed)) == len(listed) <= 8 and bool(listed) == (m <= 32), name
            assert all(config.fits(m, 128, 227 << 10) for config in listed)
            assert m > 16 or listed[0].split
    assert not Config(16, 1, 256, 4, 1).fits(8, 128, 227 << 10)  # 16 rows of x at once, where there are 8
    assert Config(8, 1, 256, 4, 2).resolved(17).column_tiles == 4
    assert Config(8, 1, 256, 4, 2).resolved(200).column_tiles == 8


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("m", [1, 2, 8, 9, 16, 31, 64, 65, 200])
def test_rows_and_groups_on_a_gpu(m: int, group: int, dtype: torch.dtype) -> None:
    weight, scale_zero = stored(456, 1280 + group, group, "cuda")
    x = randn(m, 1280 + group, dtype=dtype)
    bias = randn(456, dtype=dtype, seed=3)
    expected = int4_linear_reference(x, weight, scale_zero, bias)
    for given in (x, strided(x)):
        got = stream_linear(given, weight, scale_zero, bias)
        assert error(got, expected) < (1e-3 if dtype == torch.bfloat16 else 2e-4)
    assert torch.equal(stream_linear(x, weight, scale_zero, bias), got)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LLAMA_8B)
@pytest.mark.parametrize("m", [1, 16, 32, 64])
def test_all_configs_agree_on_a_gpu(name: str, m: int) -> None:
    n, k = LLAMA_8B[name]
    words, scales = random_stored(n, k, 128)
    x = randn(m, k, dtype=torch.bfloat16)
    expected = int4_linear_reference(x, words, scales, None)
    device = torch.device("cuda", 0)
    configs = int4_native.candidates(m, 128, device)
    if int4_wide.takes(128, device):
        configs += int4_native.hopper_candidates(n, k, m, 128, 132, 227 << 10)
    for config in [None, *configs]:
        assert error(stream_linear(x, words, scales, None, config), expected) < 2e-3, config


@pytest.mark.gpu
def test_replays_of_a_graph_on_a_gpu() -> None:
    """Chained as in a model, each beginning while the one in front ends, and again and again."""
    weights = [stored(1024, 1024, 128, "cuda") for _ in range(4)]
    x = randn(3, 1024, dtype=torch.bfloat16)

    def chain() -> Tensor:
        y = x
        for weight, scale_zero in weights:
            y = stream_linear(y, weight, scale_zero, None)
            y = y / y.float().norm(dim=1, keepdim=True).to(y.dtype)
            y = stream_linear(y, weight, scale_zero, None)
        return y

    expected = chain().clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for _ in range(20):
        graph.replay()
        assert torch.equal(y, expected)
