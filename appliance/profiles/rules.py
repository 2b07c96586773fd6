"""The rules that reject a candidate in a place, each with one plain line. Fit in memory is judged elsewhere.

`reject` says what can never work here; `unbuilt` what would work but this build does not contain.
"""

from __future__ import annotations

from appliance.profiles.capabilities import Capabilities
from appliance.profiles.load import parse_capability
from appliance.profiles.names import Candidate, Named
from appliance.profiles.overrides import Overrides
from appliance.profiles.places import Place
from appliance.types import Hardware, ModelConfig, Struct


class Question(Struct, frozen=True):
    """What every rule may look at, besides candidate and place."""

    hardware: Hardware
    model: ModelConfig
    capabilities: Capabilities
    overrides: Overrides
    named: Named | None

    @property
    def cpu_asked_for(self) -> bool:
        return self.overrides.backend == "cpu" or (self.named is not None and self.named.profile.endswith("-cpu"))


def reject(candidate: Candidate, place: Place, question: Question) -> str | None:
    """Why it cannot run there whatever memory is free and whatever is built; None if nothing speaks against it."""
    return (
        _not_asked(candidate, question)
        or _wrong_device(candidate, place, question)
        or _gpu_lacks(candidate, place, question)
        or _model_lacks(candidate, question)
        or _too_few(candidate, place)
    )


def unbuilt(candidate: Candidate, kv_cache: str, capabilities: Capabilities) -> str | None:
    """What of it this build does not contain yet."""
    profile = candidate.profile
    backend = capabilities.backends.get(profile.backend)
    if backend is None:
        return f"the {profile.backend} backend is not built yet"
    if profile.precision not in capabilities.schemes:
        return f"{profile.precision} is not built yet"
    if profile.precision not in backend.precisions:
        return f"{profile.precision} is not built yet for the {profile.backend} backend"
    if candidate.tp_size > backend.max_tp:
        most = "one device" if backend.max_tp == 1 else f"{backend.max_tp} devices"
        return f"tensor parallelism over {candidate.tp_size} is not built yet: {profile.backend} serves on {most}"
    if candidate.pp_size > backend.max_pp:
        return f"pipeline parallelism over {candidate.pp_size} is not built yet"
    if kv_cache not in backend.kv_cache:
        have = ", ".join(backend.kv_cache)
        return f"a {kv_cache} KV cache is not built yet for the {profile.backend} backend, which has {have}"
    return None


def _not_asked(candidate: Candidate, question: Question) -> str | None:
    asked, named, profile = question.overrides, question.named, candidate.profile
    if named is not None:
        sizes = (named.tp_size, named.pp_size)
        wrong_size = named.tp_size is not None and sizes != (candidate.tp_size, candidate.pp_size)
        if named.profile != profile.name or wrong_size:
            return f"not what was asked for: profile {asked.profile}"
    for field, have in (
        ("precision", profile.precision),
        ("backend", profile.backend),
        ("tp_size", candidate.tp_size),
        ("pp_size", candidate.pp_size),
    ):
        want = getattr(asked, field)
        if want is not None and want != have:
            return f"not what was asked for: {field} {want}"
    return None


def _wrong_device(candidate: Candidate, place: Place, question: Question) -> str | None:
    on_cpu = candidate.profile.backend == "cpu"
    if on_cpu and not place.is_cpu:
        return "runs on the CPU"
    if on_cpu and question.hardware.usable_gpus and not question.cpu_asked_for:
        return f"there is a GPU; to serve on the CPU all the same, ask for profile {candidate.name}"
    if not on_cpu and place.is_cpu:
        return question.hardware.problem or "there is no GPU"
    return None


def _gpu_lacks(candidate: Candidate, place: Place, question: Question) -> str | None:
    have, facts = place.compute_capability, place.facts
    if have is None or facts is None:
        return None
    precision = candidate.profile.precision
    scheme = question.capabilities.schemes.get(precision)
    backend = question.capabilities.backends.get(candidate.profile.backend)
    need = max(
        parse_capability(candidate.profile.requires.compute_capability),
        scheme.min_compute_capability if scheme else (0, 0),
        backend.min_compute_capability if backend else (0, 0),
    )
    if have < need:
        return f"needs compute capability {_dotted(need)}, and {place.gpus[0].name} has {_dotted(have)}"
    if precision not in facts.precisions:
        return f"{place.gpus[0].name} cannot work with {precision}"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _model_lacks(candidate: Candidate, question: Question) -> str | None:
    model, tp = question.model, candidate.tp_size
    if model.quantization is not None:
        return (
            f"the checkpoint is already quantized ({model.quantization}), which no scheme of this build reads: "
            "use the original, unquantized checkpoint"
        )
    if model.num_attention_heads % tp or model.intermediate_size % tp:
        return (
            f"{tp} ranks do not divide the model's {model.num_attention_heads} heads and its intermediate size "
            f"{model.intermediate_size}"
        )
    if model.num_key_value_heads % tp and tp % model.num_key_value_heads:
        return f"{tp} ranks and the model's {model.num_key_value_heads} KV heads do not divide each other"
    if candidate.pp_size > model.num_hidden_layers:
        return f"{candidate.pp_size} pipeline stages are more than the model's {model.num_hidden_layers} layers"
    scheme = question.capabilities.schemes.get(candidate.profile.precision)
    for multiple in (candidate.profile.requires.dimension_multiple, scheme.dimension_multiple if scheme else 1):
        for name, size in (
            ("hidden_size", model.hidden_size),
            ("intermediate_size per rank", model.intermediate_size // tp),
            ("heads × head_dim per rank", model.num_attention_heads * model.head_dim // tp),
        ):
            if size % multiple:
                return f"{candidate.profile.precision} needs multiples of {multiple}, and the model's {name} is {size}"
    return None


def _too_few(candidate: Candidate, place: Place) -> str | None:
    if candidate.profile.backend == "cpu":
        return "the CPU backend serves on one device" if candidate.tp_size * candidate.pp_size > 1 else None
    need, have = candidate.tp_size * candidate.pp_size, len(place.gpus)
    if need > 1 and place.gpus[0].mig_profile is not None:
        return "MIG slices cannot be joined: one slice serves one rank"
    if need > have:
        return f"needs {need} identical GPUs, and {have} can be used"
    return None
