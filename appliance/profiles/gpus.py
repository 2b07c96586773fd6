"""Which facts belong to a GPU: by compute capability, PCI id and memory, never by its marketing name.

A GPU without a file of its own falls to the generic file of its generation, so an unknown GPU is served, not refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from appliance.profiles.load import GpuFacts, Measured, parse_capability
from appliance.types import Gpu


def facts_of(gpu: Gpu, known: Sequence[GpuFacts]) -> GpuFacts:
    """The most exact facts that match; for a MIG slice scaled to its share. `known` holds at least one generic file."""
    exact = [facts for facts in known if not facts.generic and _matches(gpu, facts)]
    if exact:
        # More conditions are more exact; the name only makes the order certain.
        facts = max(exact, key=lambda f: (bool(f.match.pci_ids), f.match.memory_gib is not None, f.name))
    else:
        facts = _generic(gpu, known)
    return _slice_of(gpu, facts) if gpu.mig_profile is not None else facts


def _matches(gpu: Gpu, facts: GpuFacts) -> bool:
    match = facts.match
    if parse_capability(match.compute_capability) != gpu.compute_capability:
        return False
    if match.pci_ids and gpu.pci_id.lower() not in match.pci_ids:
        return False
    if match.memory_gib is not None and gpu.mig_profile is None:
        low, high = match.memory_gib
        return low <= gpu.total_memory / 2**30 <= high
    return True


def _generic(gpu: Gpu, known: Sequence[GpuFacts]) -> GpuFacts:
    generic = sorted(
        (parse_capability(f.match.compute_capability[2:]), f.name, f) for f in known if f.generic
    )  # names are unique, so facts are never compared
    older = [entry for entry in generic if entry[0] <= gpu.compute_capability]
    return (older[-1] if older else generic[0])[2]


def _slice_of(gpu: Gpu, facts: GpuFacts) -> GpuFacts:
    """A MIG slice "3g.40gb" has 3 of 7 compute slices, and its memory's share of the bandwidth."""
    memory = min(1.0, gpu.total_memory / (facts.memory_gib * 2**30))
    compute = (gpu.mig_profile or "").partition("g")[0]
    share = min(7, int(compute)) / 7 if compute.isdigit() else memory
    measured = facts.measured
    if measured is not None:
        measured = Measured(
            source=measured.source,
            memory_bandwidth_gbs=(measured.memory_bandwidth_gbs or 0.0) * memory or None,
            tflops={precision: value * share for precision, value in measured.tflops.items()},
        )
    return msgspec.structs.replace(
        facts,
        name=f"{facts.name} MIG {gpu.mig_profile}",
        memory_gib=gpu.total_memory / 2**30,
        memory_bandwidth_gbs=facts.memory_bandwidth_gbs * memory,
        tflops={precision: value * share for precision, value in facts.tflops.items()},
        nvlink_gbs=0.0,
        measured=measured,
    )
