"""The persistent kernel on a CPU (persistent_emulation.h) in place of the one on a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.kernels.fp8_linear import FP8
from appliance.kernels.persistent.kernel import THREADS, DecodeShape, kernel_source
from appliance.quantization import fp8
from appliance.quantization.int4_storage import Int4Scheme
from appliance.runtime import persistent_decode

HERE = Path(__file__).parent
MISSING = None if shutil.which("g++") else "g++ is not installed: the kernel is not run"


class EmulatedKernel:
    """In place of `DecodeKernel`. Ranks' kernels run together, once as many as there are `present` were launched."""

    def __init__(self, shape: DecodeShape, directory: Path) -> None:
        self.shape = shape
        self.present = shape.ranks
        library = directory / f"{abs(hash(shape))}.so"
        if not library.exists():
            _compile(shape, library)
        self._emulate = ctypes.CDLL(str(library)).emulate

    _waiting: ClassVar[dict[DecodeShape, list[list[int]]]] = {}

    def launch(self, *tensors: Tensor) -> None:
        ranks = self._waiting.setdefault(self.shape, [])
        ranks.append([tensor.data_ptr() for tensor in tensors])
        if len(ranks) == self.present:
            flat = [address for addresses in self._waiting.pop(self.shape) for address in addresses]
            assert self._emulate((ctypes.c_void_p * len(flat))(*flat), self.present) == 0, "the kernel does not end"


def _compile(shape: DecodeShape, library: Path) -> None:
    source = library.with_suffix(".cpp")
    kernel = kernel_source(emulated=True)
    source.write_text(f'#include "persistent_emulation.h"\n{kernel}')
    defines = [f"-D{name}={value}" for name, value in (shape.macros() | {"THREADS": str(THREADS)}).items()]
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-w", f"-I{HERE}", *defines]
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)


def emulate(monkeypatch: pytest.MonkeyPatch, directory: Path, blocks: int) -> None:
    """From now on a "GPU" of so many multiprocessors is what the kernel runs on, with weights as CUDA has them."""

    def prepare_fp8(_: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = -tensors["weight"].shape[0] % 16
        weight = F.pad(tensors["weight"].view(torch.uint8), (0, 0, 0, rows)).view(FP8)
        return {"weight": weight, "weight_scale": F.pad(tensors["weight_scale"].view(1, -1), (0, rows))}

    monkeypatch.setattr(fp8.Scheme, "prepare", prepare_fp8)
    monkeypatch.setattr(Int4Scheme, "prepare", lambda _, tensors: tensors)
    monkeypatch.setattr(persistent_decode, "unavailable", lambda: None)
    monkeypatch.setattr(persistent_decode, "compile_all", lambda shapes: None)
    monkeypatch.setattr(persistent_decode, "DecodeKernel", lambda shape: EmulatedKernel(shape, directory))
    properties = SimpleNamespace(multi_processor_count=blocks)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
