"""Programmatic dependent launch: a kernel of ours is set up while the one before it in the stream still runs.

Knows when it can be used; knows no kernel. On Hopper and later GPUs a launch may carry an attribute that lets its
programs start before the kernel in front has ended (CUDA C++ Programming Guide, "Programmatic Dependent Launch and
Synchronization"). What keeps that correct is a rule for every kernel launched with `launch_options`: its first
statements are

    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

and nothing before the wait touches memory (bringing cache lines into L2 does not count). The wait ends when everything
in front has ended and is visible; and as each kernel of such a chain waits for the one before it, that holds for all
earlier ones too. The second statement lets the next kernel be set up; one that fills the GPU has it near its end. What
is won is the time to launch, 1 to 2 µs of a decode step's gap between two kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch

from appliance.kernels._triton import HAS_TRITON

_disabled = False


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """No dependent launches meanwhile, in the whole process, so that a benchmark can tell what they bring. Graphs keep
    what they were captured with."""
    global _disabled
    before, _disabled = _disabled, True
    try:
        yield
    finally:
        _disabled = before


def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a Triton launch on `device`: the constexpr PDL, which every kernel here has, and where it is
    true the compiler's option that asks for the attribute."""
    if _disabled or device.type != "cuda" or not _available(device.index or 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@functools.cache
def _available(index: int) -> bool:
    """Whether Triton and the GPU have it: NVIDIA's of compute capability 9.0 or newer."""
    if not HAS_TRITON or torch.version.hip is not None or torch.cuda.get_device_capability(index) < (9, 0):
        return False
    try:
        from triton.backends.nvidia.compiler import CUDAOptions
        from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    except ImportError:  # an older Triton
        return False
    fields = {field.name for field in dataclasses.fields(CUDAOptions)}
    return "launch_pdl" in fields and callable(gdc_wait) and callable(gdc_launch_dependents)
