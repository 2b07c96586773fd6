"""What machine is this: GPUs, CPU and memory, detected or read from a recorded file.

Knows NVML, psutil, cgroups and the recorded-file format. Creates no CUDA context, never imports torch, and knows
nothing of models or profiles. The caller passes the value of CUDA_VISIBLE_DEVICES in.
"""

from __future__ import annotations

from appliance.hardware.detect import detect
from appliance.hardware.limits import (
    MIN_COMPUTE_CAPABILITY,
    REQUIRED_CUDA,
    apply_limits,
    built_cuda_version,
    require_gpu,
)
from appliance.hardware.record import dump, load

__all__ = [
    "MIN_COMPUTE_CAPABILITY",
    "REQUIRED_CUDA",
    "apply_limits",
    "built_cuda_version",
    "detect",
    "dump",
    "load",
    "require_gpu",
]
