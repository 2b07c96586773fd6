"""What this build really contains: precisions, backends and their limits, read from the plug-ins' literals.

Selection gets it as a value, so that it stays a pure function and never claims what is not built.
"""

from __future__ import annotations

import msgspec

from appliance import registry
from appliance.profiles.load import parse_capability
from appliance.types import Struct

# Whether the launcher serves several copies of an engine behind one endpoint. It is above this layer, so it cannot be
# asked; whoever builds that says so here.
REPLICAS_BUILT = True


class SchemeFacts(Struct, frozen=True):
    """A precision that a quantization plug-in builds and runs."""

    min_compute_capability: tuple[int, int] = (0, 0)
    dimension_multiple: int = 1
    # How lm_head is stored where it is not as the rest: "bf16" or "fp8", by the compute capability from which on;
    # (0, 0) stands for the CPU too.
    head: tuple[tuple[tuple[int, int], str], ...] = ()

    def head_on(self, compute_capability: tuple[int, int] | None) -> str | None:
        """The precision of lm_head; None: that of the other layers."""
        return next((head for start, head in reversed(self.head) if (compute_capability or (0, 0)) >= start), None)


class BackendFacts(Struct, frozen=True):
    device: str  # "gpu" or "cpu"
    precisions: tuple[str, ...]
    kv_cache: tuple[str, ...]
    max_tp: int = 1
    max_pp: int = 1
    min_compute_capability: tuple[int, int] = (0, 0)
    packed: tuple[str, ...] = ()  # precisions whose weights the CPU multiplies as stored; it widens others to float32
    kv_cache_capability: dict[str, tuple[int, int]] = msgspec.field(default_factory=dict)  # of KV caches that need more


class Capabilities(Struct, frozen=True):
    schemes: dict[str, SchemeFacts]  # by precision
    backends: dict[str, BackendFacts]  # by plug-in name
    named: dict[str, SchemeFacts] = msgspec.field(default_factory=dict)  # schemes by plug-in name
    replicas: bool = False  # several copies of an engine behind one endpoint

    def scheme_of(self, precision: str, name: str | None) -> SchemeFacts | None:
        """The scheme of that name, or the one that serves a precision; None if this build has none."""
        return self.schemes.get(precision) if name is None else self.named.get(name)


def _oldest(plugin: registry.Plugin) -> tuple[int, int]:
    major, minor = plugin.facts.get("min_compute_capability", (0, 0))
    return major, minor


def _scheme_facts(plugin: registry.Plugin) -> SchemeFacts:
    starts = [(0, 0), *sorted(parse_capability(start) for start in plugin.facts.get("parameters_from", {}))]
    heads = [(start, plugin.parameters_on(start).get("head")) for start in starts]
    return SchemeFacts(
        min_compute_capability=_oldest(plugin),
        dimension_multiple=plugin.facts.get("dimension_multiple", 1),
        head=tuple((start, head) for start, head in heads if head is not None),
    )


def capabilities() -> Capabilities:
    """Of the installed plug-ins. Imports none of them."""
    named = {name: _scheme_facts(plugin) for name, plugin in registry.plugins("quantization").items()}
    schemes: dict[str, SchemeFacts] = {}
    for name, plugin in registry.plugins("quantization").items():
        for precision in plugin.facts["precisions"]:
            schemes.setdefault(precision, named[name])
    backends = {
        name: BackendFacts(
            device=plugin.facts["device"],
            precisions=tuple(plugin.facts["precisions"]),
            kv_cache=tuple(plugin.facts["kv_cache"]),
            max_tp=plugin.facts.get("max_tp", 1),
            max_pp=plugin.facts.get("max_pp", 1),
            min_compute_capability=_oldest(plugin),
            packed=tuple(plugin.facts.get("packed", ())),
            kv_cache_capability={
                name: (major, minor) for name, (major, minor) in plugin.facts.get("kv_cache_capability", {}).items()
            },
        )
        for name, plugin in registry.plugins("backends").items()
    }
    return Capabilities(schemes=schemes, backends=backends, named=named, replicas=REPLICAS_BUILT)
