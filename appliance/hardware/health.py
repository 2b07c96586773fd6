"""Is a GPU fit for work: what NVML says of memory errors, pending resets, the NVLink fabric and the compute mode."""

from __future__ import annotations

import ctypes
from typing import Any

# Values of field NVML_FI_DEV_GET_GPU_RECOVERY_ACTION (drivers from 570 on), which is how NVML reports that an Xid
# error left the GPU in need of help.
_RECOVERY = {
    1: "reset the GPU",
    2: "reboot the machine",
    3: "stop all work on it and reset the GPUs that it is linked to",
    4: "stop all work on it, then reset the GPU",
    5: "recover the NVLink (IMEX) domain",
    6: "reset the GPU's bus",
    7: "reboot the machine",
}


def health_problem(nvml: Any, handle: Any) -> str | None:
    """One plain line on why a GPU must not be used, None when nothing speaks against it.

    Raises NVMLError only for a GPU that is lost.
    """
    for check in (_recovery, _row_remapping, _retired_pages, _ecc, _fabric, _compute_mode):
        try:
            problem = check(nvml, handle)
        except nvml.NVMLError as error:
            if error.value == nvml.NVML_ERROR_GPU_IS_LOST:
                raise
            continue  # this GPU or driver has no such thing
        if problem is not None:
            return problem
    return None


def _recovery(nvml: Any, handle: Any) -> str | None:
    answer = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])[0]
    action = int(answer.value.uiVal) if answer.nvmlReturn == nvml.NVML_SUCCESS else 0
    return f"the driver asks for recovery after an error: {_RECOVERY.get(action, 'see dmesg')}" if action else None


def _row_remapping(nvml: Any, handle: Any) -> str | None:
    _, _, pending, failed = nvml.nvmlDeviceGetRemappedRows(handle)
    if failed:
        return "remapping of faulty memory rows failed: the GPU must be replaced"
    return "faulty memory rows wait to be remapped: reset the GPU (nvidia-smi -r)" if pending else None


def _retired_pages(nvml: Any, handle: Any) -> str | None:
    pending = nvml.nvmlDeviceGetRetiredPagesPendingStatus(handle)
    return "faulty memory pages wait to be retired: reset the GPU (nvidia-smi -r)" if pending else None


def _ecc(nvml: Any, handle: Any) -> str | None:
    count = nvml.nvmlDeviceGetTotalEccErrors(handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
    return (
        f"{count} uncorrectable memory errors since the driver started: reset the GPU (nvidia-smi -r)"
        if count
        else None
    )


def _fabric(nvml: Any, handle: Any) -> str | None:
    info = nvml.c_nvmlGpuFabricInfo_t()
    # By reference: unlike in its other calls, pynvml hands this argument to the C function as it is, and a structure
    # passed by value there ends the process.
    nvml.nvmlDeviceGetGpuFabricInfo(handle, ctypes.byref(info))
    if info.state == nvml.NVML_GPU_FABRIC_STATE_NOT_SUPPORTED:
        return None
    if info.state != nvml.NVML_GPU_FABRIC_STATE_COMPLETED:
        return "the NVLink fabric is not ready, so CUDA cannot start: wait for, or start, nvidia-fabricmanager"
    if info.status != nvml.NVML_SUCCESS:
        return f"joining the NVLink fabric failed (status {info.status}): see the log of nvidia-fabricmanager"
    return None


def _compute_mode(nvml: Any, handle: Any) -> str | None:
    if nvml.nvmlDeviceGetComputeMode(handle) == nvml.NVML_COMPUTEMODE_PROHIBITED:
        return "its compute mode is 'prohibited': allow work with nvidia-smi -c DEFAULT"
    return None
