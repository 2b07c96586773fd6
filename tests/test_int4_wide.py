"""The CUDA C++ kernel for Hopper: run as C++ on the CPU, thread by thread, cluster by cluster; compiled; on a GPU."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch
from int4_helpers import emulated, random_stored
from nvrtc import compile_cubin, machine_code, spilled_bytes, unavailable
from quantized_helpers import randn, strided
from test_int4_native import LLAMA_8B, error, stored
from torch import Tensor

from appliance.kernels import int4_wide
from appliance.kernels.int4_linear import int4_linear_reference
from appliance.kernels.int4_wide import WideConfig, candidates, columns_for, wide_linear

HERE = Path(__file__).parent
H200 = (132, 227 << 10)  # multiprocessors, shared memory of a block

# ---------------------------------------------------------------- on the CPU


def emulate(
    config: WideConfig, group: int, x: Tensor, weight: Tensor, scale_zero: Tensor, bias: Tensor | None, directory: Path
) -> Tensor:
    """As `wide_linear`, by wide.cu as C++ with int4_emulation.h in place of the GPU's instructions."""
    library = emulated("wide.cu", config.macros(group, x.dtype), directory / "wide.so")
    (m, k), n = x.shape, weight.shape[0]
    out = torch.full((m, n), float("nan"), dtype=x.dtype)
    blocks = -(-n // config.rows) * -(-m // config.columns) * config.split
    tensors = (weight, scale_zero, x, bias, out)
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    sizes = [ctypes.c_int64(size) for size in (m, n, k, x.stride(0))]
    library.emulate(blocks, *pointers, *sizes)
    return out


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: wide.cu is not run")
# (config, group, dtype, m, n, k): sizes that are no multiples of tiles and chunks, shares of different length and of
# nothing, fewer chunks than stages and more, several tiles of x, several scales of a chunk.
CASES = [
    (WideConfig(1, 8, 128, 3, 1, 1), 128, torch.bfloat16, 5, 64, 640),
    (WideConfig(2, 16, 128, 5, 2, 1), 128, torch.float16, 13, 130, 1408),
    (WideConfig(1, 32, 64, 6, 4, 1), 128, torch.bfloat16, 70, 70, 1152),
    (WideConfig(2, 64, 128, 4, 2, 1), 64, torch.bfloat16, 100, 200, 576),
    (WideConfig(2, 8, 256, 4, 8, 1), 32, torch.float16, 1, 133, 1056),
    (WideConfig(1, 128, 64, 4, 2, 1), 96, torch.float16, 130, 64, 288),
]


@needs_compiler
@pytest.mark.parametrize(
    ("config", "group", "dtype", "m", "n", "k"), CASES, ids=[f"{c.name} g{g} {str(d)[6:]}" for c, g, d, *_ in CASES]
)
def test_every_thread_does_its_part(
    config: WideConfig, group: int, dtype: torch.dtype, m: int, n: int, k: int, tmp_path: Path
) -> None:
    weight, scale_zero = stored(n, k, group)
    x = torch.full((m, k + 16), float("nan")).to(dtype)[:, 8 : 8 + k]
    x.copy_(torch.randn(m, k, generator=torch.Generator().manual_seed(0)))
    bias = torch.randn(n, generator=torch.Generator().manual_seed(2)).to(dtype)
    for given in (bias, None) if config.columns == 8 else (bias,):
        expected = int4_linear_reference(x, weight, scale_zero, given)
        got = emulate(config, group, x, weight, scale_zero, given, tmp_path)
        assert error(got, expected) < (4e-3 if dtype == torch.bfloat16 else 5e-4)


# ---------------------------------------------------------------- compiled


needs_nvrtc = pytest.mark.skipif(unavailable() is not None, reason=f"not compiled: {unavailable()}")


@needs_nvrtc
@pytest.mark.parametrize("m", [1, 16, 32, 64, 128, 256])
def test_kernels_for_hopper_compile_and_spill_nothing(m: int) -> None:
    configs = {config for shape in LLAMA_8B.values() for config in candidates(*shape, m, 128, *H200)[:1]}
    for config in configs:
        for dtype in (torch.bfloat16, torch.float16):
            code = compile_cubin(int4_wide.source(), "sm_90a", config.macros(128, dtype))
            assert code[:4] == b"\x7fELF" and b"int4_linear" in code
            assert not spilled_bytes(code)
            # All products are waited for once, in the end: not where the compiler does not see what lies between them.
            assert machine_code(code).count("WARPGROUP.DEPBAR.LE gsb0, 0x0") <= 1, config


@needs_nvrtc
@pytest.mark.parametrize("group", [32, 64, 96, 4096])
def test_other_groups_compile(group: int) -> None:
    code = compile_cubin(int4_wide.source(), "sm_90a", WideConfig(2, 32, 128, 4, 2, 1).macros(group, torch.bfloat16))
    assert b"int4_linear" in code


@pytest.mark.parametrize("m", [1, 7, 8, 9, 33, 64, 65, 129, 256])
def test_candidates_fit_a_multiprocessor(m: int) -> None:
    for n, k in [*LLAMA_8B.values(), (128, 128), (456, 96)]:
        group = 128 if k % 128 == 0 else 32
        configs = candidates(n, k, m, group, *H200)
        assert configs and all(config.columns == columns_for(m) for config in configs)
        for config in configs:
            assert config.stages >= 4 and config.split <= 8
            assert config.per_sm * (config.shared_bytes(group) + 1024) <= 228 << 10
            assert config.shared_bytes(group) >= config.columns * (config.rows + 4) * 4
        assert len(configs) == len(set(configs)) <= 4


# ---------------------------------------------------------------- on a GPU


@pytest.fixture
def on_hopper() -> None:
    if not int4_wide.takes(128, torch.device("cuda", 0)):
        pytest.skip("not a GPU of compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("m", [1, 9, 31, 64, 65, 200, 600])
def test_rows_and_groups_on_a_gpu(m: int, group: int, dtype: torch.dtype) -> None:
    for n in (456, 131):
        weight, scale_zero = stored(n, 1280 + group, group, "cuda")
        x = randn(m, 1280 + group, dtype=dtype)
        bias = randn(n, dtype=dtype, seed=3)
        expected = int4_linear_reference(x, weight, scale_zero, bias)
        for given in (x, strided(x)):
            got = wide_linear(given, weight, scale_zero, bias)
            assert error(got, expected) < (4e-3 if dtype == torch.bfloat16 else 5e-4)
        assert torch.equal(wide_linear(x, weight, scale_zero, bias), got)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("name", LLAMA_8B)
@pytest.mark.parametrize("m", [1, 16, 32, 64, 128, 256])
def test_all_configs_agree_on_a_gpu(name: str, m: int) -> None:
    n, k = LLAMA_8B[name]
    words, scales = random_stored(n, k, 128)
    x = randn(m, k, dtype=torch.bfloat16)
    expected = int4_linear_reference(x, words, scales, None)
    for config in candidates(n, k, m, 128, *H200):
        assert error(wide_linear(x, words, scales, None, config), expected) < 4e-3, config


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
def test_replays_of_a_graph_on_a_gpu() -> None:
    """Chained as in a model, each beginning while the one in front ends, and again and again."""
    weights = [stored(1024, 1024, 128, "cuda") for _ in range(4)]
    x = randn(40, 1024, dtype=torch.bfloat16)

    def chain() -> Tensor:
        y = x
        for weight, scale_zero in weights:
            y = wide_linear(y, weight, scale_zero, None)
            y = y / y.float().norm(dim=1, keepdim=True).to(y.dtype)
            y = wide_linear(y, weight, scale_zero, None)
        return y

    expected = chain().clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for _ in range(20):
        graph.replay()
        assert torch.equal(y, expected)
