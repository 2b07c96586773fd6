"""Checks of the machine itself: packages, driver, GPUs, their links and kernels, shared memory, cache, port."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from appliance import profiles
from appliance.doctor.check import Check, Status
from appliance.engines.disk import ensure_writable
from appliance.errors import ApplianceError
from appliance.settings import Settings
from appliance.sizes import counted
from appliance.types import Gpu, Hardware

_SHM_NEEDED = 1 << 30  # bytes, for several GPUs: NCCL's buffers
_NVCC = Path("/usr/local/cuda/bin/nvcc")


def check_packages(hardware: Hardware) -> Check:
    """What computes: torch, and what is faster with a GPU."""
    found, missing = [], []
    for name in ("torch", "triton", "flashinfer-python", "transformers"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if "torch" in missing:
        return Check("packages", "failed", "torch is not installed", "make install")
    if "triton" in missing and hardware.usable_gpus:
        return Check("packages", "failed", "triton is not installed, and GPUs need it", "pip install triton")
    if "flashinfer-python" in missing and hardware.usable_gpus:
        fix = "pip install 'appliance[cuda]' for faster attention; the own Triton kernels serve without it"
        return Check("packages", "warning", f"{', '.join(found)}; no flashinfer-python", fix)
    return Check("packages", "ok", ", ".join(found))


def check_driver(settings: Settings, hardware: Hardware) -> Check:
    """Driver against the CUDA version that torch is built for."""
    if hardware.usable_gpus:
        facts = f"driver {hardware.driver_version or '?'}, CUDA up to {hardware.cuda_version or '?'}"
        return Check("driver", "ok", facts)
    status: Status = "failed" if settings.require_gpu else "warning"
    problem = hardware.problem or "no NVIDIA GPU was found"
    fix = "start the container with --gpus all on a machine with an NVIDIA driver; without, the CPU serves"
    return Check("driver", status, problem, fix if not hardware.gpus else "see the line of each GPU")


def check_gpus(hardware: Hardware) -> Check:
    """Compute capability against the built kernels, health, and memory that others hold."""
    if not hardware.gpus:
        return Check("gpus", "skipped", f"none; the CPU has {counted(hardware.cpu_cores, 'core')}")
    lines = []
    busy = False
    for gpu in hardware.gpus:
        capability = ".".join(map(str, gpu.compute_capability))
        line = f"GPU {gpu.index} {gpu.name} (compute capability {capability}"
        line += f", {gpu.free_memory / 2**30:.0f} of {gpu.total_memory / 2**30:.0f} GiB free)"
        lines.append(line + (f": {gpu.problem}" if gpu.problem else ""))
        busy = busy or gpu.free_memory < 0.5 * gpu.total_memory
    message = "; ".join([*lines, *hardware.notes])
    if any(not gpu.usable for gpu in hardware.gpus):
        fix = "do what its line says; a GPU with a problem stays unused, and the others serve"
        return Check("gpus", "warning" if hardware.usable_gpus else "failed", message, fix)
    if busy:
        return Check("gpus", "warning", message, "end what uses the memory: nvidia-smi lists the processes")
    return Check("gpus", "ok", message)


def check_links(hardware: Hardware) -> Check:
    """How the GPUs reach each other's memory, which decides whether ranks of one engine go together."""
    gpus = [gpu for gpu in hardware.usable_gpus if gpu.mig_profile is None]
    if len(gpus) < 2:
        return Check("links", "skipped", "there are no two whole GPUs")
    pairs: dict[str, list[str]] = {}
    for a, b in itertools.combinations(gpus, 2):
        pairs.setdefault(a.links.get(b.index, "none"), []).append(f"{a.index}-{b.index}")
    names = {"nvlink": "NVLink", "pcie": "PCIe, peer to peer", "none": "no peer access"}
    lines = [f"{names[link]}: GPUs {', '.join(pairs[link])}" for link in names if link in pairs]
    if pairs.keys() == {"none"}:
        fix = (
            "replicas need none; if the cards allow peer access, turn ACS off in the BIOS (IOMMU groups of "
            "virtual machines forbid it too): an engine over several of these GPUs would add up through host memory"
        )
        return Check("links", "warning", "; ".join(lines), fix)
    return Check("links", "ok", "; ".join(lines))


def check_kernels(settings: Settings, hardware: Hardware) -> Check:
    """Compute capability against what the backends and schemes of this build have kernels for, and compilers where
    kernels still have to be compiled."""
    if not hardware.usable_gpus:
        return Check("kernels", "skipped", "no GPU to have kernels for")
    lines, without = [], []
    for gpu in hardware.usable_gpus:
        precisions = _precisions_for(gpu)
        major, minor = gpu.compute_capability
        lines.append(f"GPU {gpu.index} ({major}.{minor}): {', '.join(precisions) or 'nothing'}")
        if not precisions:
            without.append(gpu)
    message = "; ".join(lines)
    if len(without) == len(hardware.usable_gpus):
        return Check("kernels", "failed", message, "use a GPU of a newer generation, or serve with --backend cpu")
    if without:
        return Check("kernels", "warning", message, "those GPUs stay unused: leave them to others")
    compiled = (settings.cache_dir / "kernels").is_dir() and any((settings.cache_dir / "kernels").iterdir())
    compiler = shutil.which("nvcc") or (str(_NVCC) if _NVCC.is_file() else None)
    if compiled or compiler or not _installed("flashinfer-python"):
        return Check("kernels", "ok", message + ("; compiled ones are in the cache" if compiled else ""))
    fix = (
        "install the CUDA toolkit's nvcc, or use a cache or an engine that has compiled kernels; Triton's serve without"
    )
    return Check("kernels", "warning", f"{message}; FlashInfer has none compiled, and there is no nvcc", fix)


def _precisions_for(gpu: Gpu) -> list[str]:
    """Precisions that a GPU backend of this build runs on it."""
    built = profiles.capabilities()
    return sorted(
        precision
        for precision, scheme in built.schemes.items()
        if gpu.compute_capability >= scheme.min_compute_capability
        and any(
            backend.device == "gpu"
            and precision in backend.precisions
            and gpu.compute_capability >= backend.min_compute_capability
            for backend in built.backends.values()
        )
    )


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def check_shared_memory(hardware: Hardware, shm: Path) -> Check:
    """/dev/shm, through which several GPUs talk where they have no direct links."""
    if not shm.is_dir():
        status: Status = "failed" if len(hardware.usable_gpus) > 1 else "skipped"
        return Check("shared memory", status, f"there is no {shm}", "docker run --shm-size=1g …")
    total = shutil.disk_usage(shm).total
    message = f"{shm} has {total / 2**20:.0f} MiB"
    if total < _SHM_NEEDED and len(hardware.usable_gpus) > 1:
        fix = "docker run --shm-size=1g …; in Kubernetes an emptyDir with medium: Memory at /dev/shm"
        return Check("shared memory", "failed", f"{message}, several GPUs need 1024 MiB", fix)
    return Check("shared memory", "ok", message)


def check_cache(settings: Settings) -> Check:
    """Whether this user can write the cache directory."""
    try:
        ensure_writable(settings.cache_dir)
    except ApplianceError as error:
        return Check("cache", "failed", error.message, error.hint or "")
    return Check("cache", "ok", f"{settings.cache_dir} is writable by user {os.getuid()}")


def check_temporary() -> Check:
    """Unix sockets to the child processes need a short, writable path."""
    try:
        with tempfile.TemporaryDirectory(prefix="appliance-") as directory:
            path = Path(directory) / "engine-100"
            if len(os.fsencode(path)) > 100:
                return Check("temporary files", "failed", f"{directory} is too long for a socket", "set TMPDIR=/tmp")
            return Check("temporary files", "ok", f"{Path(directory).parent} is writable")
    except OSError as error:
        fix = "mount a writable /tmp, or set TMPDIR to a writable directory"
        return Check("temporary files", "failed", str(error), fix)


def check_port(settings: Settings) -> Check:
    from appliance.launch.http import open_sockets

    try:
        for opened in open_sockets(settings):
            opened.close()
    except ApplianceError as error:
        return Check("port", "failed", error.message, error.hint or "")
    return Check("port", "ok", f"{settings.host} port {settings.port} is free")
