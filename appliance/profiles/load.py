"""Profiles and GPU facts as YAML files: their fields, and strict loading. Knows nothing of hardware or policy.

`profiles/README.md` describes the format for people. An unknown key or a wrong value is a SettingsError that names the
file, the key and the nearest known one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from appliance.errors import SettingsError
from appliance.strict import check_keys, read_yaml
from appliance.types import KvCacheDtype, Objective, Precision, Struct

T = TypeVar("T", bound=Struct)


class Requires(Struct, frozen=True):
    """What a profile demands of GPU and model, beyond what its precision scheme demands itself."""

    compute_capability: str = "0.0"  # at least
    dimension_multiple: int = 1  # hidden_size, and heads * head_dim and intermediate_size per rank, are multiples of it


class Batching(Struct, frozen=True):
    max_num_seqs: int
    max_num_batched_tokens: int


class QualityLimits(Struct, frozen=True):
    """What an engine of the profile must keep of its checkpoint's predictions to be served; see engines/quality.py."""

    max_kl: float  # KL divergence to the checkpoint, nats per token


class Profile(Struct, frozen=True):
    """One file of `profiles/`. Its candidates are itself with each of `tp_sizes`."""

    name: str
    description: str
    precision: Precision
    backend: str  # plug-in name
    batching: dict[Literal["latency", "throughput"], Batching]
    # Higher is tried first. Keys: a compute capability ("9.0"), a major version ("9"), "cpu", and "default".
    priority: dict[str, int]
    scheme: str | None = None  # quantization plug-in; None: the first that serves the precision
    kv_cache: KvCacheDtype = "auto"
    tp_sizes: tuple[int, ...] = (1,)
    requires: Requires = Requires()
    quality: QualityLimits | None = None  # None: whatever comes out is served

    def limits(self, objective: Objective) -> Batching:
        return self.batching["latency" if objective == "latency" else "throughput"]

    def priority_on(self, compute_capability: tuple[int, int] | None) -> int:
        """Priority on a GPU, or on the CPU for None; the most exact key wins."""
        keys = ["cpu"]
        if compute_capability is not None:
            keys = [f"{compute_capability[0]}.{compute_capability[1]}", str(compute_capability[0])]
        return next((self.priority[key] for key in keys if key in self.priority), self.priority["default"])


class Match(Struct, frozen=True):
    """Which GPUs a facts file is about. Everything given must hold."""

    compute_capability: str  # "9.0": exactly; ">=9.0": from there on, as a fallback for GPUs without facts of their own
    pci_ids: tuple[str, ...] = ()  # "10de:2330"
    memory_gib: tuple[float, float] | None = None  # total memory as NVML reports it, in this range; not for MIG slices


class Measured(Struct, frozen=True):
    """What kernels reach on such a GPU, where somebody measured it. Whatever is left out is a share of the data sheet,
    the share that the H200 reaches (`GpuFacts`)."""

    source: str  # where the numbers come from, for people
    memory_bandwidth_gbs: float | None = None
    tflops: dict[Precision, float] = msgspec.field(default_factory=dict)
    # Microseconds of a small message over NVLink, by ranks: the fixed cost.
    all_reduce_us: dict[int, float] = msgspec.field(default_factory=dict)
    all_reduce_gbs: float | None = None  # GB/s of a rank's traffic over NVLink, 2 (n - 1) / n of a large message


# Measured over data sheet on the H200 (profiles/gpus/h200-sxm.yaml), assumed of GPUs that nobody measured.
_BANDWIDTH_SHARE = 0.875
_TFLOPS_SHARE: dict[str, float] = {"fp8": 0.755, "int8": 0.672}
_HALF_SHARE = 0.8  # of 16-bit products, and of all others
_NVLINK_SHARE = 2 / 3  # of the one-way bandwidth, by all-reduces


class GpuFacts(Struct, frozen=True):
    """One file of `profiles/gpus/`: figures of the maker's data sheet, and what was measured; the arithmetic is dense
    (no sparsity)."""

    name: str  # for people; never matched
    match: Match
    memory_gib: float  # of the whole GPU; a MIG slice has its memory's share of the bandwidth
    memory_bandwidth_gbs: float  # GB/s
    tflops: dict[Precision, float]  # TFLOP/s of matrix products with operands of this precision
    precisions: tuple[Precision, ...]  # weights that this GPU can work with
    nvlink_gbs: float = 0.0  # GB/s one way to its peers, 0: none
    pcie_gbs: float = 16.0  # GB/s one way: 16 lanes of PCIe 3
    measured: Measured | None = None

    @property
    def generic(self) -> bool:
        return self.match.compute_capability.startswith(">=")

    @property
    def reached_bandwidth(self) -> float:
        """Bytes/s that kernels reach."""
        known = self.measured.memory_bandwidth_gbs if self.measured is not None else None
        return (known or self.memory_bandwidth_gbs * _BANDWIDTH_SHARE) * 1e9

    def reached_flops(self, precision: str) -> float:
        """FLOP/s that matrix products with operands of a precision reach; of one without a peak of its own: in 16
        bits, of fp32 an eighth of that."""
        half = "bf16" if "bf16" in self.tflops else "fp16"
        by_name: dict[str, float] = {str(name): value for name, value in self.tflops.items()}
        kind = precision if precision in by_name else half
        known = {str(name): value for name, value in self.measured.tflops.items()} if self.measured is not None else {}
        value = known.get(kind) or by_name[kind] * _TFLOPS_SHARE.get(kind, _HALF_SHARE)
        return value * 1e12 / (8 if precision == "fp32" and precision not in by_name else 1)

    @property
    def reached_nvlink(self) -> float:
        """Bytes/s of one rank's traffic in an all-reduce over NVLink; 0: there is none."""
        known = self.measured.all_reduce_gbs if self.measured is not None else None
        return (known or self.nvlink_gbs * _NVLINK_SHARE) * 1e9


def default_directory() -> Path:
    """`profiles/` at the top of the project."""
    return Path(__file__).resolve().parents[2] / "profiles"


def parse_capability(text: str) -> tuple[int, int]:
    """(9, 0) of "9.0". ValueError otherwise."""
    major, _, minor = text.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise ValueError(f'{text!r} is not a compute capability: write it as text, "9.0"')
    return int(major), int(minor)


def load_profiles(directory: Path | None = None) -> tuple[Profile, ...]:
    """All profiles, by name. SettingsError for a wrong file, a duplicate name, or none at all."""
    return _load_all(directory or default_directory(), Profile, "profile", _check_profile)


def load_gpu_facts(directory: Path | None = None) -> tuple[GpuFacts, ...]:
    """All facts files of `directory`/gpus, by name. Errors as `load_profiles`."""
    return _load_all((directory or default_directory()) / "gpus", GpuFacts, "GPU facts", _check_facts)


def _load_all(directory: Path, kind: type[T], what: str, check: Any) -> tuple[T, ...]:
    paths = sorted(directory.glob("*.yaml"))
    if not paths:
        raise SettingsError(f"no {what} files (*.yaml) in {directory}", hint="the project's profiles/ folder is needed")
    found: dict[str, T] = {}
    for path in paths:
        try:
            value = _decode(read_yaml(path, what), kind, "the file")
            check(value)
        except ValueError as error:  # msgspec.ValidationError is one
            raise SettingsError(f"the {what} file {path} is wrong: {error}") from error
        name = str(getattr(value, "name"))  # noqa: B009  (T has no `name` for mypy)
        if name in found:
            raise SettingsError(f"the {what} file {path} is wrong: another one is named {name!r} too")
        found[name] = value
    return tuple(found[name] for name in sorted(found))


def _decode(raw: Any, kind: type[T], where: str) -> T:
    check_keys(raw, kind.__struct_fields__, where)
    nested: dict[str, type[Struct]] = {
        "requires": Requires,
        "match": Match,
        "quality": QualityLimits,
        "measured": Measured,
    }
    for key, inner in nested.items():
        if key in raw and key in kind.__struct_fields__:
            check_keys(raw[key], inner.__struct_fields__, key)
    if kind is Profile and isinstance(raw.get("batching"), dict):
        for objective, entry in raw["batching"].items():
            check_keys(entry, Batching.__struct_fields__, f"batching.{objective}")
    return msgspec.convert(raw, kind)


def _check_profile(profile: Profile) -> None:
    parse_capability(profile.requires.compute_capability)
    missing = {"throughput", "latency"} - profile.batching.keys()
    if missing:
        raise ValueError(f"batching lacks {', '.join(sorted(missing))}")
    _positive("batching", (n for b in profile.batching.values() for n in (b.max_num_seqs, b.max_num_batched_tokens)))
    _positive("requires.dimension_multiple", [profile.requires.dimension_multiple])
    _positive("tp_sizes", profile.tp_sizes)
    if profile.quality is not None:
        _positive("quality.max_kl", [profile.quality.max_kl])
    if not profile.tp_sizes:
        raise ValueError("tp_sizes is empty")
    if "default" not in profile.priority:
        raise ValueError("priority lacks the key 'default'")
    for key in profile.priority:
        if key not in ("default", "cpu") and not key.isdigit():
            parse_capability(key)


def _check_facts(facts: GpuFacts) -> None:
    parse_capability(facts.match.compute_capability.removeprefix(">="))
    _positive("memory_gib and memory_bandwidth_gbs", (facts.memory_gib, facts.memory_bandwidth_gbs))
    _positive("tflops", facts.tflops.values())
    _positive("pcie_gbs", [facts.pcie_gbs])
    if facts.measured is not None:
        found = facts.measured
        _positive("measured.tflops", found.tflops.values())
        _positive("measured.all_reduce_us", found.all_reduce_us.values())
        speeds = (found.memory_bandwidth_gbs, found.all_reduce_gbs)
        _positive("measured bandwidths", (speed for speed in speeds if speed is not None))
        if unknown := found.tflops.keys() - facts.tflops.keys():
            raise ValueError(f"measured.tflops has {', '.join(sorted(unknown))}, which tflops lacks")
    if not facts.tflops.keys() & {"fp16", "bf16"}:
        raise ValueError("tflops needs fp16 or bf16")


def _positive(what: str, values: Iterable[float]) -> None:
    if any(value <= 0 for value in values):
        raise ValueError(f"{what} must be above 0")
