"""Kernels over FP8 KV caches compile for the GPUs that have FP8, and fit into their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.kernels._triton import HAS_TRITON

HERE = Path(__file__).parent
SHARED = {90: 227 << 10, 89: 99 << 10}  # bytes that a block may have


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
@pytest.mark.timeout(300)
def test_kernels_of_fp8_caches_compile_and_fit(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    command = [sys.executable, "-W", "ignore", str(HERE / "compile_fp8_cache.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(compiled) == 8
    for kernel in compiled:
        assert kernel["shared"] <= SHARED[kernel["capability"]], kernel
        assert kernel["stack"] <= 32, kernel  # prefill on Ada spills a few registers
