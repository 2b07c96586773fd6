"""cuda.core and cuda.bindings, imported under a lock: their modules import each other, so of two threads that import
them at once one can meet a half of them. How a cubin's kernel is loaded, and torch's stream, for launches. Knows no
kernel of its own."""

from __future__ import annotations

import functools
import importlib
import threading
from typing import Any

import torch

_LOCK = threading.Lock()


@functools.cache
def cuda_core() -> Any:
    """The module. ImportError if it is not installed."""
    with _LOCK:
        return importlib.import_module("cuda.core")


@functools.cache
def cuda_bindings(name: str) -> Any:
    """`driver` or `nvrtc`. ImportError if they are not installed."""
    with _LOCK:
        return importlib.import_module(f"cuda.bindings.{name}")


def load_kernel(code: bytes, entry: str, shared: int, index: int) -> Any:
    """The kernel `entry` of a cubin, launched with `shared` bytes of shared memory a block on the GPU of that index.
    More than 48 KB has to be asked for: RuntimeError if it is too much."""
    driver = cuda_bindings("driver")
    kernel = cuda_core().ObjectCode.from_cubin(code).get_kernel(entry)
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = driver.cuKernelSetAttribute(
        attribute, shared, driver.CUkernel(int(kernel.handle)), driver.CUdevice(index)
    )
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the kernel {entry} cannot have {shared} bytes of shared memory: {error}")
    return kernel


class _TorchStream:
    """Torch's current stream, in the protocol that cuda.core takes streams by."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, torch.cuda.current_stream().cuda_stream


def current_stream() -> Any:
    """Torch's current stream as cuda.core's, of the current device."""
    device = cuda_core().Device(torch.cuda.current_device())
    device.set_current()
    return device.create_stream(_TorchStream())
