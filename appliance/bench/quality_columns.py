"""The columns of `bench quality`: which weights and which KV cache, and the engine that each is measured on.

Knows precisions, scheme names and how a build request is changed to get what no profile names; measures nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import msgspec

from appliance import registry
from appliance.builder import BuildRequest
from appliance.engines.key import scheme_of
from appliance.errors import SettingsError
from appliance.launch.prepare import prepare_engine
from appliance.types import EngineOptions, KvCacheDtype, Precision

ALL = ("bf16", "fp8", "fp8+fp8", "int8_smoothquant", "int8_rtn", "int4_awq", "int4_gptq", "int4_rtn")
NEAREST = "none"  # BuildRequest.calibration_data: rounded to nearest
_PLAIN = "none"  # the scheme that stores weights as they are


@dataclass(frozen=True)
class Column:
    name: str  # "fp8 + fp8 KV"
    precision: Precision
    scheme: str | None  # None: the one that serves the precision
    nearest: bool  # rounded to nearest, also where the scheme is usually calibrated
    kv_cache: str  # "auto" or a precision


def weights() -> dict[str, tuple[Precision, str | None, bool]]:
    """What `--precision` takes: precisions, schemes by name, and "<precision>_rtn" where a scheme is calibrated: its
    storage with every weight rounded to nearest. Name -> (precision, scheme, nearest)."""
    found: dict[str, tuple[Precision, str | None, bool]] = {}
    schemes = {name: plugin for name, plugin in registry.plugins("quantization").items() if name != _PLAIN}
    for plugin in registry.plugins("quantization").values():
        found |= {precision: (precision, None, False) for precision in plugin.facts["precisions"]}
    for name, plugin in schemes.items():
        precision: Precision = plugin.facts["precisions"][0]
        if name not in found:
            found[name] = (precision, name, False)
        if plugin.facts.get("calibrated"):
            found.setdefault(f"{precision}_rtn", (precision, scheme_of(precision).name, True))
    return found


def columns(precision_text: str, kv_cache_text: str) -> dict[str, Column]:
    """By name. Entries of `--precision`: of `weights`, each with each KV cache of `--kv-cache-dtype` unless it names
    its own ("fp8+fp8"); "all" is the project's whole table. SettingsError for an unknown one."""
    known, allowed = weights(), get_args(KvCacheDtype)
    kv_caches = [part.strip() for part in kv_cache_text.split(",") if part.strip()]
    if not kv_caches or not set(kv_caches) <= set(allowed):
        raise SettingsError(f"--kv-cache-dtype is {kv_cache_text!r}; allowed: {', '.join(allowed)}")
    entries = [part.strip() for part in precision_text.split(",") if part.strip()]
    if entries == ["all"]:
        entries, kv_caches = [entry for entry in ALL if entry.partition("+")[0] in known], ["auto"]
    found: dict[str, Column] = {}
    for entry in entries:
        name, plus, own = entry.partition("+")
        if name.strip() not in known or (plus and own.strip() not in allowed):
            raise SettingsError(
                f"--precision is {precision_text!r}; allowed: all, {', '.join(known)}, each also with the precision of "
                "its KV cache, as in fp8+fp8"
            )
        for kv_cache in [own.strip()] if plus else kv_caches:
            title = name.strip() if kv_cache == "auto" else f"{name.strip()} + {kv_cache} KV"
            found[title] = Column(title, *known[name.strip()], kv_cache)
    if not found:
        raise SettingsError(f"--precision is {precision_text!r}; allowed: all, {', '.join(known)}")
    return found


def open_column(args: argparse.Namespace, column: Column) -> EngineOptions:
    """Options that load the column's engine, built if need be, whatever its quality: that is what is measured here.
    Raises what `prepare_engine` raises."""

    def adapt(request: BuildRequest) -> BuildRequest:
        changes: dict[str, object] = {} if column.scheme is None else {"scheme": column.scheme}
        if column.nearest:
            changes["calibration_data"] = NEAREST
        return msgspec.structs.replace(request, **changes)

    overrides = {"attention": args.attention, "kv_cache_dtype": column.kv_cache, "on_quality_failure": "ignore"}
    return prepare_engine(
        args.model,
        precision=column.precision,
        backend=args.backend,
        cache=args.cache,
        overrides=overrides,
        adapt=adapt,
    )


def tokenizer_dir(options: EngineOptions) -> Path:
    return Path(options.engine_dir) / "tokenizer"
