"""What this build really contains: precisions, backends and their limits, read from the plug-ins' literals.

Selection gets it as a value, so that it stays a pure function and never claims what is not built.
"""

from __future__ import annotations

import msgspec

from appliance import registry
from appliance.types import Struct


class SchemeFacts(Struct, frozen=True):
    """A precision that a quantization plug-in builds and runs."""

    min_compute_capability: tuple[int, int] = (0, 0)
    dimension_multiple: int = 1


class BackendFacts(Struct, frozen=True):
    device: str  # "gpu" or "cpu"
    precisions: tuple[str, ...]
    kv_cache: tuple[str, ...]
    max_tp: int = 1
    max_pp: int = 1
    min_compute_capability: tuple[int, int] = (0, 0)
    kv_cache_capability: dict[str, tuple[int, int]] = msgspec.field(default_factory=dict)  # of KV caches that need more


class Capabilities(Struct, frozen=True):
    schemes: dict[str, SchemeFacts]  # by precision
    backends: dict[str, BackendFacts]  # by plug-in name


def _oldest(plugin: registry.Plugin) -> tuple[int, int]:
    major, minor = plugin.facts.get("min_compute_capability", (0, 0))
    return major, minor


def capabilities() -> Capabilities:
    """Of the installed plug-ins. Imports none of them."""
    schemes: dict[str, SchemeFacts] = {}
    for plugin in registry.plugins("quantization").values():
        facts = SchemeFacts(_oldest(plugin), plugin.facts.get("dimension_multiple", 1))
        schemes.update(dict.fromkeys(plugin.facts["precisions"], facts))
    backends = {
        name: BackendFacts(
            device=plugin.facts["device"],
            precisions=tuple(plugin.facts["precisions"]),
            kv_cache=tuple(plugin.facts["kv_cache"]),
            max_tp=plugin.facts.get("max_tp", 1),
            max_pp=plugin.facts.get("max_pp", 1),
            min_compute_capability=_oldest(plugin),
            kv_cache_capability={
                name: (major, minor) for name, (major, minor) in plugin.facts.get("kv_cache_capability", {}).items()
            },
        )
        for name, plugin in registry.plugins("backends").items()
    }
    return Capabilities(schemes=schemes, backends=backends)
