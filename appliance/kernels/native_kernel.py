"""Own CUDA C++: compiled by NVRTC, loaded, launched to torch's current stream.

NVRTC compiles a kernel in about a second, without headers; the cubin goes the way of all compiled kernels
(`kernels/compiled.py`). Knows nothing of what a kernel computes or how it is cut up.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from appliance.kernels.compiled import KERNELS
from appliance.kernels.cuda_core import cuda_bindings, cuda_core, current_stream, load_kernel

_HERE = Path(__file__).parent


@functools.cache
def unavailable() -> str | None:
    """Why this process cannot run such kernels at all, or None."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "no CUDA GPU"
    try:
        cuda_core()
    except ImportError:
        return "cuda-core is not installed"
    return None


def read_sources(*paths: str) -> str:
    """Files of `kernels/`, one after the other."""
    return "\n".join((_HERE / path).read_text() for path in paths)


def cubin(family: str, source: str, macros: Mapping[str, int | str], features: str = "") -> tuple[str, bytes]:
    """A cubin's name, as `KERNELS` calls it, and its code, for the current GPU: `source` with compile-time constants
    `macros`. `family` begins the name; `features`: "a" for instructions of this architecture alone. RuntimeError or
    ImportError where it has to be compiled and cannot be."""
    name = _name(family, source, macros)
    return name, KERNELS.native(name, lambda: _compile(source, macros, features))


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
    family: str,
    source: str,
    macros: Mapping[str, int | str],
    threads: int,
    shared: int,
    index: int,
    entry: str,
    features: str = "",
) -> Kernel:
    """The kernel `entry` of a `cubin`, on the GPU of that index, which is current: blocks of so many threads and bytes
    of shared memory."""
    return Kernel(*cubin(family, source, macros, features), entry, threads, shared, index)


def _name(family: str, source: str, macros: Mapping[str, int | str]) -> str:
    """Of the cubin: a digest of all that it depends on but the architecture."""
    _, major, minor = cuda_bindings("nvrtc").nvrtcVersion()
    key = f"{source}\n{sorted(macros.items())}\nNVRTC {major}.{minor}"
    return f"{family}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"


def _compile(source: str, macros: Mapping[str, int | str], features: str) -> bytes:
    major, minor = torch.cuda.get_device_capability()
    options = cuda_core().ProgramOptions(
        std="c++17",
        arch=f"sm_{major}{minor}{features}",
        define_macro=[(name, str(value)) for name, value in macros.items()],
        use_fast_math=False,
    )
    return bytes(cuda_core().Program(source, "c++", options).compile("cubin").code)
