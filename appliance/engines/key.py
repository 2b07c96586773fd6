"""The content address of an engine: everything that changes its bytes, and nothing else.

Batch size, context length and page count are chosen at load from the memory that is free, so they are not in the key
and changing them rebuilds nothing. Knows nothing of disks.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from appliance import registry
from appliance.errors import EngineBuildError
from appliance.types import Precision, Struct

# Raised by hand when the builder writes other bytes for the same inputs; other releases share engines.
BUILDER_VERSION = "1"


class KeyInputs(Struct, frozen=True):
    """What an engine is made from and for."""

    checkpoint_digest: str  # of the content, `checkpoint.digest`
    precision: Precision
    scheme: str  # name of the quantization plug-in
    scheme_parameters: dict[str, Any]  # its PLUGIN literal
    dtype: str  # of what is not quantized: "float32", "float16", "bfloat16"
    tp_size: int
    pp_size: int
    backend: str
    backend_version: str  # PLUGIN["version"] of the backend: raised when it wants other bytes in its engines
    builder_version: str
    compute_capability: tuple[int, int] | None  # None: the backend does not run on a GPU


def engine_key(inputs: KeyInputs) -> str:
    """SHA-256 (hex, 64 characters) over the inputs as JSON with sorted keys, each written out even where it has a
    default."""
    canonical = msgspec.json.encode(msgspec.structs.asdict(inputs), order="deterministic")
    return hashlib.sha256(canonical).hexdigest()


def scheme_of(precision: Precision) -> registry.Plugin:
    """The quantization plug-in that serves a precision. Raises EngineBuildError, naming those there are."""
    known: dict[str, registry.Plugin] = {}
    for plugin in registry.plugins("quantization").values():
        for served in plugin.facts["precisions"]:
            known.setdefault(served, plugin)
    if precision not in known:
        raise EngineBuildError(
            f"precision {precision} cannot be built; allowed: {', '.join(known)}",
            hint="choose one of them with --precision, or another profile",
        )
    return known[precision]


def engine_dtype(precision: Precision) -> str:
    """dtype of everything a precision leaves unquantized. Quantized engines compute in bfloat16, whose range holds
    the activations of any checkpoint."""
    return {"fp32": "float32", "fp16": "float16"}.get(precision, "bfloat16")


def make_key_inputs(
    checkpoint_digest: str,
    precision: Precision,
    backend: str,
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    compute_capability: tuple[int, int] | None = None,
) -> KeyInputs:
    """Key inputs from what a selected profile and the detected GPU say; the rest is looked up in the registry, without
    importing a plug-in. Raises EngineBuildError for a precision or backend that does not exist."""
    backends = registry.plugins("backends")
    if backend not in backends:
        raise EngineBuildError(f"no backend {backend!r}; allowed: {', '.join(backends)}", hint="choose one of them")
    facts = backends[backend].facts
    scheme = scheme_of(precision)
    return KeyInputs(
        checkpoint_digest=checkpoint_digest,
        precision=precision,
        scheme=scheme.name,
        scheme_parameters=scheme.facts,
        dtype=engine_dtype(precision),
        tp_size=tp_size,
        pp_size=pp_size,
        backend=backend,
        backend_version=str(facts.get("version", "1")),
        builder_version=BUILDER_VERSION,
        compute_capability=compute_capability if facts.get("device") == "gpu" else None,
    )
