"""Timings that outlive a build: microseconds by product and tactic, a file per type of GPU and version of the code.

    <cache>/timings/<gpu>-<digest>.json

The digest covers what may change a timing or the meaning of a name: sources of kernels and schemes, how they are timed,
torch and Triton.
Knows nothing of how anything is timed. An unreadable or unwritable file only costs timing again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import re
from pathlib import Path

import msgspec

import appliance
from appliance.engines.disk import write_atomically

log = logging.getLogger(__name__)

_FAILED = -1.0  # in the file: this tactic does not work here


class _File(msgspec.Struct):
    gpu: str
    versions: str
    microseconds: dict[str, dict[str, float]]  # product -> tactic -> µs, negative: does not work


@functools.cache
def code_version() -> str:
    """What a timing depends on besides the GPU: versions of the libraries, and a digest of our sources."""
    root = Path(appliance.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*root.glob("kernels/**/*"), *root.glob("quantization/*"), root / "builder" / "tactics.py"]):
        if path.suffix in (".py", ".cu", ".cuh"):
            digest.update(path.read_bytes())
    found = {}
    for name in ("torch", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return f"torch {found['torch']}, triton {found['triton']}, kernels {digest.hexdigest()[:12]}"


class Timings:
    """What is known of one type of GPU. `cache` None: nothing is remembered."""

    def __init__(self, cache: Path | None, gpu: str) -> None:
        self._gpu, self._versions = gpu, code_version()
        name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
        digest = hashlib.sha256(self._versions.encode()).hexdigest()[:12]
        self.path = None if cache is None else cache / "timings" / f"{name}-{digest}.json"
        self._known = self._read()
        self._new: dict[str, dict[str, float]] = {}

    def _read(self) -> dict[str, dict[str, float]]:
        if self.path is None:
            return {}
        try:
            content = msgspec.json.decode(self.path.read_bytes(), type=_File)
        except (OSError, msgspec.DecodeError):
            return {}
        return content.microseconds if (content.gpu, content.versions) == (self._gpu, self._versions) else {}

    def get(self, product: str, tactic: str) -> float | None:
        """µs; infinite for one that does not work; None if it was never timed."""
        known = self._known.get(product, {}).get(tactic)
        return float("inf") if known is not None and known < 0 else known

    def put(self, product: str, tactic: str, microseconds: float) -> None:
        value = _FAILED if microseconds == float("inf") else round(microseconds, 3)
        self._known.setdefault(product, {})[tactic] = value
        self._new.setdefault(product, {})[tactic] = value

    def save(self) -> None:
        """Add what was put to the file, beside what another build may have written meanwhile."""
        if self.path is None or not self._new:
            return
        merged = self._read()
        for product, tactics in self._new.items():
            merged.setdefault(product, {}).update(tactics)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(
                self.path, msgspec.json.format(msgspec.json.encode(_File(self._gpu, self._versions, merged)))
            )
        except OSError as error:
            log.warning("timings are not kept: %s cannot be written: %s", self.path, error.strerror)
        self._new = {}
