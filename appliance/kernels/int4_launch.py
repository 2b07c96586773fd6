"""Own CUDA C++ of INT4 products: compiled by NVRTC, loaded, launched to torch's current stream.

NVRTC compiles a kernel in about a second, without headers; the cubin goes the way of all compiled kernels
(`kernels/compiled.py`). Knows nothing of what a kernel computes or how it is cut up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from appliance.kernels.compiled import KERNELS
from appliance.kernels.cuda_core import cuda_bindings, cuda_core, current_stream, load_kernel


def read_sources(*names: str) -> str:
    """Files of `int4/`, one after the other."""
    directory = Path(__file__).parent / "int4"
    return "\n".join((directory / name).read_text() for name in names)


class Kernel:
    """One compiled kernel, loaded."""

    def __init__(self, name: str, code: bytes, entry: str, threads: int, shared: int, index: int) -> None:
        """`name`: of its cubin, as `KERNELS` calls it."""
        self._name, self._code, self._record = name, code, KERNELS.record
        self._kernel = load_kernel(code, entry, shared, index)
        self._threads, self._shared = threads, shared
        self._configs: dict[tuple[int, bool], Any] = {}

    def note(self) -> None:
        """To be gathered with what was launched, launched or not."""
        if self._record != KERNELS.record:
            self._record = KERNELS.record
            KERNELS.used_native(self._name, self._code)

    def launch(self, blocks: int, dependent: bool, arguments: tuple[int, ...]) -> None:
        self.note()
        config = self._configs.get((blocks, dependent))
        if config is None:
            config = self._configs[blocks, dependent] = cuda_core().LaunchConfig(
                grid=blocks,
                block=self._threads,
                shmem_size=self._shared,
                programmatic_stream_serialization=dependent,
            )
        cuda_core().launch(current_stream(), config, self._kernel, *arguments)


def load(
    source: str,
    macros: Mapping[str, int],
    threads: int,
    shared: int,
    index: int,
    entry: str = "int4_linear",
    features: str = "",
) -> Kernel:
    """The kernel `entry` in `source` with compile-time constants `macros`, on the GPU of that index, which is current:
    blocks of so many threads and bytes of shared memory. `features`: "a" for instructions of this architecture alone.
    """
    name = _name(source, macros)
    code = KERNELS.native(name, lambda: _compile(source, macros, features))
    return Kernel(name, code, entry, threads, shared, index)


def _name(source: str, macros: Mapping[str, int]) -> str:
    """Of the cubin: a digest of all that it depends on but the architecture."""
    _, major, minor = cuda_bindings("nvrtc").nvrtcVersion()
    key = f"{source}\n{sorted(macros.items())}\nNVRTC {major}.{minor}"
    return f"int4-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"


def _compile(source: str, macros: Mapping[str, int], features: str) -> bytes:
    major, minor = torch.cuda.get_device_capability()
    options = cuda_core().ProgramOptions(
        std="c++17",
        arch=f"sm_{major}{minor}{features}",
        define_macro=[(name, str(value)) for name, value in macros.items()],
        use_fast_math=False,
    )
    return bytes(cuda_core().Program(source, "c++", options).compile("cubin").code)
