"""The environment of child processes (engines, builder): what libraries read there when they are imported.

A function of the parent's environment and of a few settings; reads neither itself (settings.py does).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def child_environment(
    inherited: Mapping[str, str], cache_dir: Path, *, offline: bool, log_level: str, log_json: bool
) -> dict[str, str]:
    """`inherited` and what is added or replaced. Makes the directory for compiled kernels."""
    environment = dict(inherited)
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see settings.yield_idle_threads
    root = str(Path(__file__).resolve().parents[1])  # a clone that is not installed works from any directory
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # device numbers as NVML counts them
    # Kernels compiled at a start are found by the next one, also where only the cache outlives the container.
    kernels = _writable(cache_dir / "kernels")
    environment.setdefault("TRITON_CACHE_DIR", str(kernels / "triton"))
    environment.setdefault("CUDA_CACHE_PATH", str(kernels / "cuda"))  # the driver's, of PTX
    environment.setdefault("FLASHINFER_WORKSPACE_BASE", str(kernels))
    environment["PYTHONUNBUFFERED"] = "1"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    environment["APPLIANCE_LOG_LEVEL"] = log_level  # read back by `settings.child_logging`
    environment["APPLIANCE_LOG_JSON"] = str(log_json)
    if offline:
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return environment


def _writable(directory: Path) -> Path:
    """The directory, or a private one for temporary files where it cannot be written: libraries fail without."""
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK | os.X_OK):
            return directory
    spare = Path(tempfile.gettempdir()) / f"appliance-kernels-{os.getuid()}"
    spare.mkdir(mode=0o700, exist_ok=True)
    there = spare.stat()
    # Code is loaded from it, so nobody else may have made it or write into it.
    return spare if there.st_uid == os.getuid() and not there.st_mode & 0o022 else Path(tempfile.mkdtemp())
