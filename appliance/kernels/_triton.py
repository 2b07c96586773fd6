"""Triton, or an inert stand-in where it is not installed (CPU-only platforms): kernel modules import everywhere.

Knows nothing of any kernel. With the stand-in a kernel stays a plain function that nobody may launch: every dispatcher
takes the torch path for tensors that are not on a GPU.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    from appliance.kernels import prebuilt

    prebuilt.install()
    HAS_TRITON = True
except ImportError:

    class _Absent:
        """Accepts `@triton.jit`, with options or without, and `tl.constexpr` at import time, nothing else."""

        constexpr = Any

        @staticmethod
        def jit(fn: Any = None, **options: Any) -> Any:
            return fn if fn is not None else lambda decorated: decorated

    triton = tl = _Absent()
    HAS_TRITON = False

__all__ = ["HAS_TRITON", "tl", "triton"]
