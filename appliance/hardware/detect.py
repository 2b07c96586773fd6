"""Detection through NVML and psutil. Asks and never touches: no CUDA context is created, nothing is reset or set.

NVML is reached through one object with pynvml's functions (`nvml`), so tests hand in a fake. A question that a driver
or GPU does not support (`NVMLError`) has a default; a GPU that is lost becomes an unhealthy entry, never a crash.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from appliance.hardware.health import health_problem
from appliance.hardware.host import Host, host
from appliance.hardware.limits import apply_limits, built_cuda_version
from appliance.hardware.links import link_between, path_between
from appliance.hardware.visible import apply_visible
from appliance.types import Gpu, Hardware, MigSlice

T = TypeVar("T")
_INSTALLED = "installed"  # sentinel: ask the installed torch


def detect(
    environ_visible: str | None = None,
    *,
    nvml: Any = None,
    host_facts: Host | None = None,
    cuda_build: str | None = _INSTALLED,
) -> Hardware:
    """Describe this machine.

    environ_visible: the value of CUDA_VISIBLE_DEVICES, None when it is not set. nvml: a module or object like pynvml.
    host_facts: CPU and memory, measured when None. cuda_build: CUDA version torch was built for ("13.0"), None for a
    CPU-only torch; by default that of the installed torch. Raises nothing: what is wrong is said in `Hardware.problem`
    (no GPU can be used), `Gpu.problem` and `Hardware.notes`.
    """
    facts = host_facts or host()
    empty = Hardware(gpus=(), cpu_cores=facts.cpu_cores, memory=facts.memory, free_memory=facts.free_memory)
    if nvml is None:
        nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return msgspec.structs.replace(empty, problem=_driver_line(nvml, error))
    try:
        found = _with_gpus(empty, nvml, facts, environ_visible)
    except nvml.NVMLError as error:
        return msgspec.structs.replace(empty, problem=_driver_line(nvml, error))
    finally:
        _ask(nvml, nvml.nvmlShutdown, None)
    return apply_limits(found, built_cuda_version() if cuda_build == _INSTALLED else cuda_build)


def expand_mig(gpu: Gpu) -> list[Gpu]:
    """A GPU as devices: itself, or its slices when MIG is on (a process can use one slice, never the whole)."""
    if not gpu.mig_enabled or gpu.mig_profile is not None:
        return [gpu]
    if not gpu.mig_slices:
        reason = "MIG is on but no slice exists: create one (nvidia-smi mig -cgi 0 -C) or turn MIG off"
        return [gpu if gpu.problem else msgspec.structs.replace(gpu, problem=reason)]
    return [
        msgspec.structs.replace(
            gpu,
            name=f"{gpu.name} MIG {part.profile}",
            uuid=part.uuid,
            mig_profile=part.profile,
            total_memory=part.total_memory,
            free_memory=part.free_memory,
            mig_slices=(),
            links={},
            paths={},
        )
        for part in gpu.mig_slices
    ]


def _ask(nvml: Any, question: Callable[[], T], default: T) -> T:
    """The answer, or the default where NVML has none."""
    try:
        return question()
    except nvml.NVMLError:
        return default


def _driver_line(nvml: Any, error: Exception) -> str:
    code = getattr(error, "value", None)
    if code == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return (
            "no NVIDIA driver found (libnvidia-ml.so.1 is missing): on a GPU machine install the driver, "
            "and start containers with --gpus all"
        )
    if code == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return "the NVIDIA driver is installed but not loaded: load it (modprobe nvidia) or reboot"
    if code == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return "the NVIDIA driver was updated but the old one is still running: reboot, or restart the container"
    if code == nvml.NVML_ERROR_NO_PERMISSION:
        return "this user may not talk to the NVIDIA driver: check the permissions of /dev/nvidia*"
    return f"the NVIDIA driver fails: {error}; see `nvidia-smi` and `dmesg`"


def _with_gpus(empty: Hardware, nvml: Any, facts: Host, visible: str | None) -> Hardware:
    cuda: int = _ask(nvml, nvml.nvmlSystemGetCudaDriverVersion, 0)
    devices, handles = [], {}
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handles[index] = nvml.nvmlDeviceGetHandleByIndex(index)
            gpu = _gpu(nvml, index, handles[index], facts)
        except nvml.NVMLError as error:
            handles.pop(index, None)
            gpu = _lost(nvml, index, error)
        devices.append(gpu)
    offered, notes = apply_visible([d for gpu in devices for d in expand_mig(gpu)], visible)
    offered = _with_links(nvml, offered, handles)
    problem = None
    if not offered:
        problem = (
            notes[-1] if devices else "the NVIDIA driver runs, but no GPU is visible: start containers with --gpus all"
        )
        notes = notes[:-1]
    return msgspec.structs.replace(
        empty,
        gpus=tuple(offered),
        driver_version=_ask(nvml, nvml.nvmlSystemGetDriverVersion, None),
        cuda_version=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
        problem=problem,
        notes=tuple(notes),
    )


def _lost(nvml: Any, index: int, error: Exception) -> Gpu:
    if getattr(error, "value", None) == nvml.NVML_ERROR_GPU_IS_LOST:
        problem = "the GPU is lost (it fell off the bus): reboot the machine, see Xid messages in dmesg"
    else:
        problem = f"the driver cannot reach it: {error}"
    return Gpu(
        index=index,
        name="unknown GPU",
        uuid=f"GPU-unreachable-{index}",
        pci_id="10de:0000",
        compute_capability=(0, 0),
        total_memory=0,
        free_memory=0,
        healthy=False,
        problem=problem,
    )


def _memory(nvml: Any, handle: Any) -> tuple[int, int] | None:
    """(total, free) bytes; None where the GPU has no memory of its own (GB10)."""
    try:
        info = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as error:
        if error.value == nvml.NVML_ERROR_NOT_SUPPORTED:
            return None
        raise
    return (int(info.total), int(info.free)) if info.total else None


def _gpu(nvml: Any, index: int, handle: Any, facts: Host) -> Gpu:
    pci = int(nvml.nvmlDeviceGetPciInfo(handle).pciDeviceId)  # device in the upper 16 bits, vendor in the lower
    memory = _memory(nvml, handle)
    total, free = memory or (facts.memory, facts.free_memory)
    problem = health_problem(nvml, handle)
    mig_on: bool = _ask(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle)[0] == 1, False)
    return Gpu(
        index=index,
        name=nvml.nvmlDeviceGetName(handle),
        uuid=nvml.nvmlDeviceGetUUID(handle),
        pci_id=f"{pci & 0xFFFF:04x}:{pci >> 16 & 0xFFFF:04x}",
        compute_capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        total_memory=total,
        free_memory=free,
        utilization=_ask(nvml, lambda: int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu), 0),
        healthy=problem is None,
        problem=problem,
        mig_enabled=mig_on,
        mig_slices=_mig_slices(nvml, handle) if mig_on else (),
        unified_memory=memory is None,
    )


def _mig_slices(nvml: Any, handle: Any) -> tuple[MigSlice, ...]:
    slices = []
    for number in range(_ask(nvml, lambda: int(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)), 0)):
        try:
            part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except nvml.NVMLError:  # this position holds no slice
            continue
        memory = nvml.nvmlDeviceGetMemoryInfo(part)
        profile = _slice_profile(nvml, part, int(memory.total))
        slices.append(MigSlice(nvml.nvmlDeviceGetUUID(part), profile, int(memory.total), int(memory.free)))
    return tuple(slices)


def _slice_profile(nvml: Any, part: Any, total: int) -> str:
    """The profile's name, "3g.40gb", from the device name that NVML gives ("… MIG 3g.40gb"), or made from its size."""
    name: str = _ask(nvml, lambda: nvml.nvmlDeviceGetName(part), "")
    if " MIG " in name:
        return name.rsplit(" MIG ", 1)[1]
    compute: int = _ask(nvml, lambda: int(nvml.nvmlDeviceGetAttributes(part).gpuInstanceSliceCount), 1)
    return f"{compute}g.{round(total / 1e9)}gb"


def _with_links(nvml: Any, gpus: list[Gpu], handles: dict[int, Any]) -> list[Gpu]:
    whole = [gpu for gpu in gpus if gpu.mig_profile is None and gpu.index in handles]

    def to_others(gpu: Gpu, between: Callable[[Any, Any, Any], str | None]) -> dict[int, str]:
        others = [other.index for other in whole if other.index != gpu.index]
        answers = {other: between(nvml, handles[gpu.index], handles[other]) for other in others}
        return {other: answer for other, answer in answers.items() if answer is not None}

    found = {gpu.index: (to_others(gpu, link_between), to_others(gpu, path_between)) for gpu in whole}
    none: tuple[dict[int, str], dict[int, str]] = ({}, {})
    return [
        msgspec.structs.replace(gpu, links=links, paths=paths)
        for gpu in gpus
        for links, paths in [found.get(gpu.index, none)]
    ]
