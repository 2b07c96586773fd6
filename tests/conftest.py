"""What every test needs: a CPU-friendly environment, and loud skips of what needs a GPU.

The environment is set at import, before any test module can import torch or triton (which read it once).
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

# Start-up and settings tests must not depend on the developer's shell.
for _name in [name for name in os.environ if name.startswith(("APPLIANCE_", "NIM_"))]:
    del os.environ[_name]

# Threads of torch, also in child processes: the smallest machine has two cores, and xdist workers share them.
_threads = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
os.environ.setdefault("OMP_NUM_THREADS", _threads)
os.environ.setdefault("MKL_NUM_THREADS", _threads)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of several processes starve each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network says so by unsetting it


def visible_gpus(visible: str | None, nvml: Any = None) -> list[str]:
    """UUIDs of the NVIDIA GPUs that this process may use, in the order in which CUDA numbers them: those of
    CUDA_VISIBLE_DEVICES=`visible` (None: not set). Of MIG slices a process sees one. Asks the driver only, so neither
    torch nor a CUDA context is involved; none where there is no driver, or one that fails."""
    from appliance import hardware

    found = [gpu for gpu in hardware.detect(visible, nvml=nvml).gpus if gpu.healthy]
    whole = [gpu.uuid for gpu in found if gpu.mig_profile is None]
    return whole or [gpu.uuid for gpu in found[:1]]


os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # torch counts as the driver does
GPUS = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
GPU_COUNT = len(GPUS)
if GPU_COUNT == 0 and os.environ.get("TRITON_INTERPRET") != "1":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton kernels run in the interpreter, on the CPU
    assert "triton" not in sys.modules, "triton was imported before conftest could choose the interpreter"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if GPU_COUNT:
        return
    skip = pytest.mark.skip(reason="gpu test: no NVIDIA GPU here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(1 for report in skipped if "gpu test: no NVIDIA GPU here" in str(report.longrepr))
    if count:
        terminalreporter.write_line(f"{count} gpu tests skipped: no NVIDIA GPU here", yellow=True, bold=True)
