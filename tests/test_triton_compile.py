"""Kernels compile for GPUs that are not here, which Triton does without one: what its interpreter accepts, the compiler
may not. That they compile says nothing of how fast they are, nor that they were ever run there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from appliance.kernels._triton import HAS_TRITON

HERE = Path(__file__).parent


SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99}  # of a block, at most: CUDA C++ programming guide, compute capabilities
PRODUCTS = {"decode_kernel", "prefill_kernel", "_skinny_kernel", "_int4_linear_kernel", "_int8_linear_kernel"}


def lines_of(script: str, cache: Path, *arguments: str) -> list[dict[str, Any]]:
    """What a script of this directory prints, a JSON object a line, in a process where kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    command = [sys.executable, "-W", "ignore", str(HERE / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(300)
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
@pytest.mark.parametrize("arch", [75, 80, 86, 89])
def test_kernels_compile_for_other_architectures(arch: int, tmp_path: Path) -> None:
    """All Triton kernels of engines on Turing (float16), Ampere and Ada: they compile, and fit the shared memory of a
    block there. From 8.0 on products use tensor cores and hardly spill; on 7.5 Triton has no tensor cores."""
    compiled = lines_of("compile_for_architectures.py", tmp_path, str(arch))
    assert [line for line in compiled if "error" in line] == []
    assert PRODUCTS - ({"_int8_linear_kernel"} if arch < 80 else set()) <= {line["kernel"] for line in compiled}
    assert [line for line in compiled if line["shared"] > SHARED_KIB[arch] << 10] == []
    for line in compiled:
        if arch >= 80:
            assert line["stack"] <= 64, line
            assert (line["tensor_products"] > 0) == (line["kernel"] in PRODUCTS), line
        else:
            assert line["tensor_products"] == 0, "Triton learned to use the tensor cores of 7.5: say so in the README"


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
def test_kernels_compile_wait_once_and_spill_nothing(tmp_path: Path) -> None:
    """Each with deferred scales and dependent launch on: one wait for the kernel in front, at its start."""
    compiled = lines_of("compile_kernels.py", tmp_path)
    assert len(compiled) == 22
    assert [kernel for kernel in compiled if kernel["waits"] != 1 or kernel["stack"] != 0] == []
