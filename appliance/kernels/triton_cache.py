"""Triton's cache, in two layers: the engine's kernels, which are only read, in front of Triton's own cache directory.

Triton asks a cache manager for each kernel (by a digest of source, options, compiler and GPU) and for each launcher.
This one answers from `CompiledKernels` first and notes what was used. Imported only where Triton is.
"""

from __future__ import annotations

import platform
import struct
from typing import Any

from triton import knobs
from triton.runtime import build
from triton.runtime.cache import CacheManager, FileCacheManager

from appliance.kernels.compiled import CompiledKernels

_kernels: CompiledKernels | None = None


def install(kernels: CompiledKernels) -> None:
    """Triton asks `kernels` from now on. Kernels that are loaded already stay loaded."""
    global _kernels
    _kernels = kernels
    knobs.cache.manager_class = LayeredCacheManager
    build.platform_key = _platform_key


def _platform_key() -> str:
    """Triton's own asks `platform.architecture`, which asks the program `file`: where that is missing, as in a slim
    container, its C modules would have other keys than where an engine was built."""
    return f"{platform.machine()},{platform.system()},{struct.calcsize('P') * 8}bit"


class LayeredCacheManager(CacheManager):  # type: ignore[misc]
    """What Triton makes for every key it looks up. `override` and `dump` are its own debugging aids, passed through."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self._key, self._override, self._dump = key, override, dump
        self._made: FileCacheManager | None = None

    @property
    def _cache(self) -> Any:
        """Triton's own manager, which makes a directory for the key when it is made: only when it is needed."""
        if self._made is None:
            try:
                self._made = FileCacheManager(self._key, override=self._override, dump=self._dump)
            except OSError:
                assert _kernels is not None
                knobs.cache.dir = str(_kernels.spare_directory())
                self._made = FileCacheManager(self._key, override=self._override, dump=self._dump)
        return self._made

    def get_file(self, filename: str) -> str | None:
        if _kernels is None or self._override or self._dump:
            found: str | None = self._cache.get_file(filename)
            return found
        packaged = _kernels.packaged_file(self._key, filename)
        if packaged is not None:
            _kernels.from_engine += 1
        path = self._cache.get_file(filename) if packaged is None else str(packaged)
        if path is not None:
            _kernels.from_cache += packaged is None
            _kernels.used_file(self._key, filename, path)
        return path

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        path: str = self._cache.put(data, filename, binary)
        if _kernels is not None and filename.endswith(
            ".so"
        ):  # a launcher; files of a kernel are put as a group as well
            _kernels.compiled += 1
            _kernels.used_file(self._key, filename, path)
        return path

    def get_group(self, filename: str) -> dict[str, str] | None:
        packaged = None if _kernels is None else _kernels.packaged_group(self._key, filename)
        if packaged is not None:
            group: dict[str, str] | None = {name: str(path) for name, path in packaged.items()}
        else:
            group = self._cache.get_group(filename)
        if group and _kernels is not None:
            _kernels.from_engine += packaged is not None
            _kernels.from_cache += packaged is None
            _kernels.used_group(self._key, filename, group)
        return group

    def put_group(self, filename: str, group: dict[str, str]) -> Any:
        if _kernels is not None:
            _kernels.compiled += 1
            _kernels.used_group(self._key, filename, group)
        return self._cache.put_group(filename, group)
