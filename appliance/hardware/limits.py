"""Which GPUs this build can use: compute capability and driver against what torch was compiled for.

Pure, except `built_cuda_version`, which reads torch's version file without importing torch.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import msgspec

from appliance.errors import HardwareError
from appliance.types import Gpu, Hardware

# The CUDA that the container's torch is built for; older GPUs than this have no kernels in it (CUDA 13 dropped Volta).
REQUIRED_CUDA = "13.0"
MIN_COMPUTE_CAPABILITY = (7, 5)
# First driver branch of each CUDA major version (CUDA release notes, "minimum required driver"); any of the branch
# runs every minor version of that major.
_FIRST_DRIVER = {11: 450, 12: 525, 13: 580}


def built_cuda_version() -> str | None:
    """CUDA version of the installed torch ("13.0"), None for a CPU-only torch or none at all. Does not import torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version_file = Path(spec.origin).with_name("version.py")
    if not version_file.is_file():
        return None
    for node in ast.parse(version_file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "cuda" for target in targets):
            value = getattr(node, "value", None)
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                return value.value
    return None


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _driver_problem(hardware: Hardware, cuda_build: str | None) -> str | None:
    if cuda_build is None:
        return (
            "the installed torch has no CUDA support, so no GPU can be used: install a CUDA build of torch "
            "(the container image has one)"
        )
    if hardware.cuda_version is not None and _major(hardware.cuda_version) < _major(cuda_build):
        needed = _FIRST_DRIVER.get(_major(cuda_build))
        return (
            f"driver {hardware.driver_version or 'unknown'} supports CUDA {hardware.cuda_version} and this build needs "
            f"CUDA {cuda_build}: update the NVIDIA driver" + (f" to {needed} or newer" if needed else "")
        )
    return None


def _gpu_problem(gpu: Gpu) -> str | None:
    if gpu.compute_capability < MIN_COMPUTE_CAPABILITY:
        have, need = (".".join(map(str, cc)) for cc in (gpu.compute_capability, MIN_COMPUTE_CAPABILITY))
        return f"compute capability {have} is older than {need}, the oldest that this build has kernels for"
    return None


def apply_limits(hardware: Hardware, cuda_build: str | None = REQUIRED_CUDA) -> Hardware:
    """Mark the GPUs that this build cannot use (`Gpu.problem`), note each that is left out, and say in
    `Hardware.problem` if none remains.

    Idempotent. Health problems found by detection stay.
    """
    if not hardware.gpus:
        return hardware
    driver = _driver_problem(hardware, cuda_build)
    gpus = tuple(
        gpu if gpu.problem else msgspec.structs.replace(gpu, problem=driver or _gpu_problem(gpu))
        for gpu in hardware.gpus
    )
    left_out = [f"GPU {gpu.index} ({gpu.name}) is left out: {gpu.problem}" for gpu in gpus if not gpu.usable]
    problem = hardware.problem
    if problem is None and len(left_out) == len(gpus):
        problem = driver or "no GPU can be used: " + "; ".join(f"GPU {g.index} ({g.name}): {g.problem}" for g in gpus)
    notes = hardware.notes + tuple(line for line in left_out if line not in hardware.notes)
    return msgspec.structs.replace(hardware, gpus=gpus, problem=problem, notes=notes)


def require_gpu(hardware: Hardware) -> tuple[Gpu, ...]:
    """The usable GPUs; HardwareError with the plain reason if there is none (`--require-gpu`)."""
    if hardware.usable_gpus:
        return hardware.usable_gpus
    raise HardwareError(
        f"a GPU is required and none can be used: {hardware.problem or 'none was found'}",
        hint="run `doctor` for details, or leave --require-gpu out to serve on the CPU",
    )
