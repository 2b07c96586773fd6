"""Kernels compile for Hopper, which Triton does without a GPU: what its interpreter accepts, the compiler may not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.kernels._triton import HAS_TRITON

HERE = Path(__file__).parent


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
def test_kernels_compile_wait_once_and_spill_nothing(tmp_path: Path) -> None:
    """Each with deferred scales and dependent launch on: one wait for the kernel in front, at its start."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-W", "ignore", str(HERE / "compile_kernels.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(compiled) == 19
    assert [kernel for kernel in compiled if kernel["waits"] != 1 or kernel["stack"] != 0] == []
