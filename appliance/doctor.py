"""Looks at a machine before anything is downloaded: what would go wrong at a start, each with its fix, in seconds.

Every check is a function of the settings (and the detected hardware) that gives one `Check`; none changes anything but
the cache directory, which is made if it is missing, as a start would.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import msgspec

from appliance.engines.disk import ensure_writable, free_bytes
from appliance.errors import ApplianceError
from appliance.settings import Settings
from appliance.types import Hardware, Struct

Status = Literal["ok", "warning", "failed", "skipped"]

_SHM_NEEDED = 1 << 30  # bytes, for several GPUs: NCCL's buffers
_DISK_NEEDED = 2 << 30  # bytes: less than this holds no model worth serving
_DISK_WANTED = 40 << 30  # bytes: checkpoint and engine of an 8B model
_HUB_TIMEOUT = 5.0  # seconds


class Check(Struct, frozen=True):
    name: str
    status: Status
    message: str
    fix: str = ""


def examine(settings: Settings, hardware: Hardware, *, shm: Path = Path("/dev/shm")) -> list[Check]:
    """All checks, in the order in which a start would meet the problems. Takes a few seconds at most."""
    checks: list[Callable[[], Check]] = [
        lambda: check_packages(hardware),
        lambda: check_driver(settings, hardware),
        lambda: check_gpus(hardware),
        lambda: check_shared_memory(hardware, shm),
        lambda: check_cache(settings),
        lambda: check_disk(settings),
        lambda: check_temporary(),
        lambda: check_hub(settings),
        lambda: check_port(settings),
    ]
    return [check() for check in checks]


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
        return Check("gpus", "skipped", f"none; the CPU has {hardware.cpu_cores} cores")
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
        return Check(
            "gpus", "warning" if hardware.usable_gpus else "failed", message, "GPUs with a problem stay unused"
        )
    if busy:
        return Check("gpus", "warning", message, "end what uses the memory: nvidia-smi lists the processes")
    return Check("gpus", "ok", message)


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


def check_disk(settings: Settings) -> Check:
    free = free_bytes(settings.cache_dir)
    message = f"{free / 2**30:.1f} GiB free at {settings.cache_dir}"
    if free < _DISK_NEEDED:
        return Check("disk", "failed", message, "free some, or choose another directory with --cache")
    if free < _DISK_WANTED and settings.model != "builtin":
        return Check("disk", "warning", message, "checkpoint and engine of an 8B model take about 25 GiB")
    return Check("disk", "ok", message)


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


def check_hub(settings: Settings) -> Check:
    """Egress and token, by asking for the model that would be downloaded; nothing is asked when none would be."""
    if settings.offline:
        return Check("hub", "skipped", "offline: no outside socket is opened")
    name = settings.model.removeprefix("hf://").partition("@")[0]
    if settings.model == "builtin" or Path(settings.model).expanduser().is_dir():
        return Check("hub", "skipped", "the model is on this machine")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    with_token = "with the token" if settings.hf_token else "without a token"
    try:
        info = HfApi(token=settings.hf_token).model_info(name, timeout=_HUB_TIMEOUT)
    except GatedRepoError:
        return Check("hub", "failed", f"{name} is gated", "accept its terms on its page, and set HF_TOKEN")
    except RepositoryNotFoundError:
        fix = "check the name; for a private model set HF_TOKEN to a token that may read it"
        return Check("hub", "failed", f"{name} is not to be found {with_token}", fix)
    except Exception as error:  # whatever the network does: it is said, not raised
        fix = "allow HTTPS to the hub, set HTTPS_PROXY, or download elsewhere and set APPLIANCE_OFFLINE=1"
        return Check("hub", "failed", f"the hub cannot be asked: {type(error).__name__}: {error}", fix)
    return Check("hub", "ok", f"{info.id} can be read {with_token}")


def check_port(settings: Settings) -> Check:
    from appliance.launch.server import open_sockets

    try:
        for opened in open_sockets(settings):
            opened.close()
    except ApplianceError as error:
        return Check("port", "failed", error.message, error.hint or "")
    return Check("port", "ok", f"{settings.host} port {settings.port} is free")


def as_text(checks: list[Check]) -> str:
    marks = {"ok": "ok     ", "warning": "WARNING", "failed": "FAILED ", "skipped": "-      "}
    lines = []
    for check in checks:
        lines.append(f"{marks[check.status]} {check.name}: {check.message}")
        if check.fix and check.status in ("warning", "failed"):
            lines.append(f"        fix: {check.fix}")
    return "\n".join(lines)


def as_json(checks: list[Check]) -> str:
    body = {"ok": passed(checks), "checks": [msgspec.structs.asdict(check) for check in checks]}
    return msgspec.json.encode(body).decode()


def passed(checks: list[Check]) -> bool:
    return all(check.status != "failed" for check in checks)
