"""What the tests of INT4 kernels in CUDA C++ share: a kernel as a library of C++ functions, random packed weights."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from appliance.kernels import native_kernel

HERE = Path(__file__).parent


def emulated(source: str, macros: Mapping[str, int], library: Path) -> ctypes.CDLL:
    """`source`, a file of kernels/int4, compiled into `library` with int4_emulation.h in place of the GPU's
    instructions."""
    kernel = Path(native_kernel.__file__).parent / "int4" / source
    defines = [f"-D{name}={value}" for name, value in macros.items()]
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-w", f"-I{kernel.parent}", f'-DKERNEL="{kernel}"', "-x", "c++"]
    subprocess.run(["g++", *flags, *defines, str(HERE / "int4_emulation.h"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def random_stored(n: int, k: int, group: int) -> tuple[Tensor, Tensor]:
    """Words and scales with zero points on the GPU, made of random bits: for sizes that take long to round."""
    words = torch.randint(-(2**31), 2**31, (n, k // 8), dtype=torch.int64, device="cuda").int()
    scales = torch.stack([torch.rand(n, k // group, device="cuda") * 0.01 + 0.005] * 2, -1).half()
    scales[..., 1] = torch.randint(0, 16, (n, k // group), device="cuda").half()
    return words, scales
