"""Dequantization in CUDA C++: run as C++ on the CPU, compiled, and on a GPU; always the bits of the reference."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch
from int4_helpers import emulated
from nvrtc import compile_cubin, unavailable
from test_int4_native import stored

from appliance.kernels import int4_dequantize
from appliance.kernels.int4_dequantize import dequantize_native, macros
from appliance.kernels.int4_linear import dequantize_reference

HERE = Path(__file__).parent


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: dequantize.cu is not run")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k", "group"), [(5, 4096, 128), (33, 40, 8), (7, 96, 96)])
def test_every_thread_does_its_part(n: int, k: int, group: int, dtype: torch.dtype, tmp_path: Path) -> None:
    weight, scale_zero = stored(n, k, group)
    constants = macros(group, dtype) | {"DEQUANTIZE": 1, "WARPS": 8}
    library = emulated("dequantize.cu", constants, tmp_path / "dequantize.so")
    words = n * k // 8
    out = torch.full((n, k), float("nan"), dtype=dtype)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, scale_zero, out)]
    library.emulate(-(-words // 1024), *pointers, ctypes.c_int64(words))
    assert torch.equal(out, dequantize_reference(weight, scale_zero, dtype))


@pytest.mark.skipif(unavailable() is not None, reason=f"not compiled: {unavailable()}")
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
def test_it_compiles(arch: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert b"int4_dequantize" in compile_cubin(int4_dequantize.source(), arch, macros(128, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k", "group"), [(6144, 4096, 128), (33, 40, 8), (17, 4096, 4096), (129, 96, 32)])
def test_the_bits_of_the_reference_on_a_gpu(n: int, k: int, group: int, dtype: torch.dtype) -> None:
    weight, scale_zero = stored(n, k, group, "cuda")
    assert torch.equal(dequantize_native(weight, scale_zero, dtype), dequantize_reference(weight, scale_zero, dtype))
