"""NVRTC for tests, also without a GPU: the library of the package nvidia-cuda-nvrtc, or one that the system has."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@functools.cache
def _library() -> Any:
    """The loaded library, or why there is none, as text."""
    found: list[Path] = []
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or [] if spec else []:
        found += sorted(Path(root).glob("*/lib/libnvrtc*.so*"), reverse=True)
    # What the compiler itself loads must be in the process already: its directory is not on any search path.
    for path in [path for path in found if "builtins" in path.name and ".alt." not in path.name]:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    libraries = [str(path) for path in found if "builtins" not in path.name and ".alt." not in path.name]
    for name in [*libraries, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return "NVRTC is not installed (package nvidia-cuda-nvrtc)"


def unavailable() -> str | None:
    """Why nothing can be compiled here, or None."""
    return _library() if isinstance(_library(), str) else None


def compile_cubin(source: str, arch: str, macros: Mapping[str, int | str]) -> bytes:
    """CUDA C++ without headers -> machine code for `arch`, "sm_90". Raises RuntimeError with the compiler's log."""
    library, program = _library(), ctypes.c_void_p()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    options = [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{name}={value}" for name, value in macros.items())]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = library.nvrtcCompileProgram(program, len(options), given)
    try:
        if failed:
            raise RuntimeError(_text(library, program, "ProgramLog").decode())
        return _text(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(library: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def spilled_bytes(cubin: bytes) -> int | None:
    """What a thread keeps in memory for lack of registers; None without the tool that tells (Triton brings it)."""
    usage = _told("cuobjdump", "-res-usage", cubin)
    return None if usage is None else max(int(stack) for stack in re.findall(r"STACK:(\d+)", usage))


def machine_code(cubin: bytes) -> str:
    """Instructions as text; nothing without the tool that tells."""
    return _told("nvdisasm", "-c", cubin) or ""


def _told(tool: str, option: str, cubin: bytes) -> str | None:
    """What one of the tools that Triton brings says of a cubin; None without it."""
    spec = importlib.util.find_spec("triton")
    path = Path(spec.origin).parent / "backends/nvidia/bin" / tool if spec and spec.origin else None
    if path is None or not path.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout
