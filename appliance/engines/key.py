"""The content address of an engine: everything that changes its bytes, and nothing else.

Batch size, context length and page count are chosen at load from the memory that is free, so they are not in the key
and changing them rebuilds nothing. Knows nothing of disks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from appliance import registry
from appliance.errors import EngineBuildError
from appliance.types import Precision, Struct

_FIRST_WITH_BFLOAT16 = (8, 0)  # compute capability whose tensor cores multiply bfloat16

# Raised by hand when the builder writes other bytes for the same inputs; other releases share engines.
BUILDER_VERSION = "3"


class KeyInputs(Struct, frozen=True):
    """What an engine is made from and for."""

    checkpoint_digest: str  # of the content, `checkpoint.digest`
    precision: Precision
    scheme: str  # name of the quantization plug-in
    scheme_parameters: dict[str, Any]  # all of them (PLUGIN["parameters"]), with the values they have here
    dtype: str  # of what is not quantized: "float32", "float16", "bfloat16"
    tp_size: int
    pp_size: int
    backend: str
    backend_version: str  # PLUGIN["version"] of the backend: raised when it wants other bytes in its engines
    builder_version: str
    compute_capability: tuple[int, int] | None  # None: the backend does not run on a GPU
    # Of a scheme that is calibrated: digest of the text, number of samples, their length. Empty: rounded to nearest.
    calibration: dict[str, Any] = msgspec.field(default_factory=dict)


def engine_key(inputs: KeyInputs) -> str:
    """SHA-256 (hex, 64 characters) over the inputs as JSON with sorted keys, each written out even where it has a
    default."""
    canonical = msgspec.json.encode(msgspec.structs.asdict(inputs), order="deterministic")
    return hashlib.sha256(canonical).hexdigest()


def scheme_of(precision: Precision, scheme: str | None = None) -> registry.Plugin:
    """The quantization plug-in of that name, or the first that serves a precision. Raises EngineBuildError, naming
    those there are."""
    plugins = registry.plugins("quantization")
    if scheme is not None:
        fitting = [name for name, plugin in plugins.items() if precision in plugin.facts["precisions"]]
        if scheme not in fitting:
            raise EngineBuildError(
                f"precision {precision} has no scheme {scheme!r}; allowed: {', '.join(fitting) or 'none'}",
                hint="choose another profile",
            )
        return plugins[scheme]
    known: dict[str, registry.Plugin] = {}
    for plugin in plugins.values():
        for served in plugin.facts["precisions"]:
            known.setdefault(served, plugin)
    if precision not in known:
        raise EngineBuildError(
            f"precision {precision} cannot be built; allowed: {', '.join(known)}",
            hint="choose one of them with --precision, or another profile",
        )
    return known[precision]


def parameters_of(
    scheme: registry.Plugin, compute_capability: tuple[int, int] | None, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """All parameters of a scheme: its defaults, what is different from a compute capability on (None: the CPU), and
    what is `given`. Raises EngineBuildError for one that it does not know or of another type."""
    parameters = scheme.parameters_on(compute_capability)
    for name, value in (given or {}).items():
        if name not in parameters or type(value) is not type(parameters[name]):
            allowed = ", ".join(f"{key} ({type(default).__name__})" for key, default in parameters.items())
            raise EngineBuildError(
                f"scheme {scheme.name} cannot have {name}={value!r}; its parameters: {allowed or 'none'}",
                hint="leave it out, or choose another profile",
            )
        parameters[name] = value
    return parameters


def engine_dtype(precision: Precision, compute_capability: tuple[int, int] | None = None) -> str:
    """dtype of everything a precision leaves unquantized. Quantized engines compute in bfloat16, whose range holds
    the activations of any checkpoint, but for GPUs before 8.0, which multiply in float16 only."""
    if precision in ("fp32", "fp16"):
        return {"fp32": "float32", "fp16": "float16"}[precision]
    old = compute_capability is not None and tuple(compute_capability) < _FIRST_WITH_BFLOAT16
    return "float16" if old and precision != "bf16" else "bfloat16"


def make_key_inputs(
    checkpoint_digest: str,
    precision: Precision,
    backend: str,
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    compute_capability: tuple[int, int] | None = None,
    scheme: str | None = None,
    scheme_parameters: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> KeyInputs:
    """Key inputs from what a selected profile and the detected GPU say; the rest is looked up in the registry, without
    importing a plug-in. `scheme_parameters`: those that are not as the scheme has them by itself; `calibration`: see
    `KeyInputs`. Raises EngineBuildError for a precision, scheme, parameter or backend that does not exist."""
    backends = registry.plugins("backends")
    if backend not in backends:
        raise EngineBuildError(f"no backend {backend!r}; allowed: {', '.join(backends)}", hint="choose one of them")
    facts = backends[backend].facts
    capability = compute_capability if facts.get("device") == "gpu" else None
    plugin = scheme_of(precision, scheme)
    return KeyInputs(
        checkpoint_digest=checkpoint_digest,
        precision=precision,
        scheme=plugin.name,
        scheme_parameters=parameters_of(plugin, capability, scheme_parameters),
        dtype=engine_dtype(precision, capability),
        tp_size=tp_size,
        pp_size=pp_size,
        backend=backend,
        backend_version=str(facts.get("version", "1")),
        builder_version=BUILDER_VERSION,
        compute_capability=capability,
        calibration=dict(calibration or {}),
    )
