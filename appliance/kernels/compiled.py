"""Compiled kernels: taken from the engine, else from the cache on disk, and only else compiled.

An engine carries the kernels that its warm-up used, in three families:

    kernels/triton/<key>/        cubin and metadata of a Triton kernel, or a launcher, which Triton compiles as C
    kernels/flashinfer/<name>/   <name>.so, a module of FlashInfer
    kernels/native/              <name>: cubins of our own CUDA C++

Each family is used as it lies there, read-only, if this process has the versions that it was compiled with; otherwise
one line says so and kernels come from the cache, where whatever is compiled also goes. Triton and FlashInfer find their
kernels by digests of sources and options themselves, so a kernel that was changed since is compiled, never mistaken.
Knows where compiled code lies and what was used; knows no kernel. One instance, `KERNELS`, serves a process.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from appliance.kernels._triton import HAS_TRITON

log = logging.getLogger(__name__)

DIRECTORY = "kernels"  # of an engine
_KEPT = {".json", ".cubin"}  # of a Triton kernel's files; the others are intermediate forms


def versions() -> dict[str, str]:
    """What compiled code of each family works with, here. Families that this installation lacks are left out."""
    arch = "sm_" + "".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else "no GPU"
    found = {"native": arch}
    if HAS_TRITON:
        abi = sysconfig.get_config_var("EXT_SUFFIX")
        found["triton"] = f"triton {_version('triton')}, {platform.system()}{abi}, {arch}"
    flashinfer = _version("flashinfer-python")
    if flashinfer:
        tvm = _version("apache-tvm-ffi")
        found["flashinfer"] = f"flashinfer {flashinfer}, tvm-ffi {tvm}, CUDA {torch.version.cuda}, {arch}"
    return found


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


class CompiledKernels:
    """Where compiled code is looked for, and which of it was used. `open` once, before the first kernel is launched."""

    def __init__(self) -> None:
        self._packaged: dict[str, Path] = {}  # family -> its directory in the engine
        self._groups: dict[tuple[str, str], dict[str, Path]] = {}  # (Triton's key, metadata file) -> files by name
        self._files: dict[tuple[str, str], Path] = {}  # single files of Triton: launchers
        self._native: dict[str, Path | bytes] = {}
        self.record = 0  # changes with `forget_launched`
        self._spare: Path | None = None  # instead of a cache that cannot be written
        self.from_engine = 0
        self.from_cache = 0
        self.compiled = 0

    # -------------------------------------------------- opening

    def open(self, engine_dir: Path | None = None, built_with: Mapping[str, str] | None = None) -> None:
        """Use the kernels of an engine that were compiled with versions equal to those here: `built_with`, by family,
        from its manifest. Without an engine: the cache only. Triton asks this object from now on."""
        self._packaged = {}
        here = versions() if built_with else {}
        for family, wanted in (built_with or {}).items():
            if here.get(family) == wanted and engine_dir is not None:
                self._packaged[family] = engine_dir / DIRECTORY / family
            else:
                log.info(
                    "%s kernels of the engine are not used: compiled with %s, here is %s; the cache has them, or they "
                    "are compiled",
                    family,
                    wanted,
                    here.get(family, "none"),
                )
        if HAS_TRITON:
            from appliance.kernels.triton_cache import install

            install(self)

    def attach_flashinfer(self) -> None:
        """Let FlashInfer, imported, take modules from the engine. Its own name for precompiled modules is AOT; neither
        ninja nor nvcc is asked for a module that lies in that directory. Checked against flashinfer-python 0.7.2."""
        directory = self._packaged.get("flashinfer")
        if directory is not None and directory.is_dir():
            from flashinfer.jit import env

            env.FLASHINFER_AOT_DIR = directory

    # -------------------------------------------------- Triton's files (triton_cache.py)

    def packaged_group(self, key: str, filename: str) -> dict[str, Path] | None:
        """The files of a Triton kernel in the engine, by name."""
        directory = self._packaged.get("triton")
        if directory is None or not (directory / key / filename).is_file():
            return None
        return {path.name: path for path in sorted((directory / key).iterdir())}

    def packaged_file(self, key: str, filename: str) -> Path | None:
        directory = self._packaged.get("triton")
        path = None if directory is None else directory / key / filename
        return path if path is not None and path.is_file() else None

    def used_group(self, key: str, filename: str, files: Mapping[str, str | Path]) -> None:
        self._groups[key, filename] = {name: Path(path) for name, path in files.items()}

    def used_file(self, key: str, filename: str, path: str | Path) -> None:
        self._files[key, filename] = Path(path)

    def spare_directory(self) -> Path:
        """A directory of this process, for code that the cache directory cannot take."""
        if self._spare is None:
            self._spare = Path(tempfile.mkdtemp(prefix="appliance-kernels-"))
            log.warning("compiled kernels are lost with this process: the cache directory cannot be written")
        return self._spare

    # -------------------------------------------------- own CUDA C++

    def native(self, name: str, make: Callable[[], bytes]) -> bytes:
        """The cubin called `name`: of the engine, of the cache, else `make()`, which is then kept. The name says all
        that the code depends on but the GPU's architecture: a digest of sources, options and compiler version."""
        packaged = self._packaged.get("native")
        if packaged is not None and (packaged / name).is_file():
            self.from_engine += 1
            self._native[name] = packaged / name
            return (packaged / name).read_bytes()
        cached = _native_cache() / versions()["native"] / name
        try:
            code = cached.read_bytes()
            self.from_cache += 1
        except OSError:
            code = make()
            self.compiled += 1
            _keep(cached, code)
        self._native[name] = code
        return code

    def used_native(self, name: str, code: bytes) -> None:
        """A cubin that this process has loaded before is launched, for the first time in this `record`."""
        self._native.setdefault(name, code)

    # -------------------------------------------------- gathering

    def forget_launched(self) -> None:
        """Start the record anew: only Triton kernels and cubins that are used from now on are gathered. Kernels that
        this process has loaded are looked up again at their next launch; launchers and modules stay on record."""
        self._groups.clear()
        self._native.clear()
        self.record += 1
        for module in [m for name, m in sys.modules.items() if name.startswith("appliance.kernels.")]:
            for value in vars(module).values():
                caches: Any = getattr(value, "device_caches", None)  # of a triton.JITFunction
                if isinstance(caches, dict):
                    caches.clear()

    def gather(self, directory: Path) -> dict[str, str]:
        """Copy everything that was used to `directory`, which becomes the engine's; the versions of each family there.
        Raises OSError."""
        here, found = versions(), {}
        for (key, filename), files in self._groups.items():
            for name, path in files.items():
                if path.suffix in _KEPT and not name.startswith("__grp__"):
                    _copy(path, directory / "triton" / key / name)
            if (directory / "triton" / key / filename).is_file():
                found["triton"] = here["triton"]
        for (key, filename), path in self._files.items():
            _copy(path, directory / "triton" / key / filename)
            found["triton"] = here["triton"]
        for name, path in _flashinfer_modules().items():
            _copy(path, directory / "flashinfer" / name / f"{name}.so")
            found["flashinfer"] = here["flashinfer"]
        for name, code in self._native.items():
            target = directory / "native" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(code if isinstance(code, bytes) else code.read_bytes())
            found["native"] = here["native"]
        return found

    def summary(self) -> str:
        """For the log: where kernels came from so far."""
        return f"{self.from_engine} from the engine, {self.from_cache} from the cache, {self.compiled} compiled"


def triton_key() -> str:
    """What Triton puts into every kernel's digest for itself: a digest over all its files, made once per process. The
    interpreter lock is free meanwhile."""
    if not HAS_TRITON:
        return ""
    from triton.runtime import cache

    return str(cache.triton_key())


KERNELS = CompiledKernels()  # of this process


def _flashinfer_modules() -> dict[str, Path]:
    """Libraries of the modules that FlashInfer has made known in this process, by name."""
    if "flashinfer.jit" not in sys.modules:
        return {}
    from flashinfer.jit.core import jit_spec_registry

    specs: Mapping[str, Any] = jit_spec_registry.get_all_specs()
    paths = {name: Path(spec.get_library_path()) for name, spec in specs.items()}
    return {name: path for name, path in paths.items() if path.suffix == ".so" and path.is_file()}


def _native_cache() -> Path:
    """Beside Triton's cache, whose place `settings.child_environment` chose."""
    if HAS_TRITON:
        from triton import knobs

        return Path(knobs.cache.dir).parent / "native"
    return Path(tempfile.gettempdir()) / f"appliance-native-{os.getuid()}"


def _keep(path: Path, code: bytes) -> None:
    """Into the cache, whole or not at all; an unwritable cache only costs the next start this compilation."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_bytes(code)
        part.replace(path)
    except OSError as error:
        log.warning("a compiled kernel could not be kept in %s: %s", path.parent, error)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
