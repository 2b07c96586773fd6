"""The rules that reject a candidate in a place, each with one plain line. Fit in memory is judged elsewhere.

`reject` says what can never work here; `unbuilt` what would work but this build does not contain.
"""

from __future__ import annotations

import math

import msgspec

from appliance.profiles.capabilities import Capabilities
from appliance.profiles.load import parse_capability
from appliance.profiles.names import Candidate, Named
from appliance.profiles.overrides import Overrides
from appliance.profiles.places import Place
from appliance.sizes import counted
from appliance.types import Hardware, ModelConfig, Struct

_ORIGINAL = "serve the original, unquantized checkpoint"
_NOT_TWICE = f"leave --precision (or the profile) out, or {_ORIGINAL}"
_INT4_WORD = 8  # INT4 values of an int32, in which engines store them
_LAST = 6  # depth of what is looked at after every rule


class Rejection(Struct, frozen=True):
    """`depth`: how many rules were passed before, so that the deepest is the most telling. `field`: the override that
    the rule is about; `hint`: what to do if somebody set it."""

    reason: str
    depth: int
    field: str | None = None
    hint: str | None = None


class Question(Struct, frozen=True):
    """What every rule may look at, besides candidate and place."""

    hardware: Hardware
    model: ModelConfig
    capabilities: Capabilities
    overrides: Overrides
    named: Named | None
    refused: dict[str, str] = msgspec.field(default_factory=dict)  # profiles that were tried and failed -> why

    def ranks_here(self, candidate: Candidate) -> int:
        """Of an engine, on one of its nodes."""
        return candidate.tp_size * candidate.pp_size // self.overrides.nodes

    @property
    def cpu_asked_for(self) -> bool:
        return self.overrides.backend == "cpu" or (self.named is not None and self.named.profile.endswith("-cpu"))


def reject(candidate: Candidate, place: Place, question: Question, kv_cache: str) -> Rejection | None:
    """Why it cannot run there whatever memory is free and whatever is built; None if nothing speaks against it.
    `kv_cache` is a concrete precision."""
    if reason := _not_asked(candidate, question):
        return Rejection(reason, 0)
    if reason := _wrong_device(candidate, place, question):
        hint = "serve where there is a GPU, or leave out the profile, backend or precision that needs one"
        return Rejection(reason, 1, "backend", hint)
    if reason := question.refused.get(candidate.profile.name):
        return Rejection(reason, 2)
    if reason := _quantized_otherwise(candidate, question):
        return Rejection(reason, 2, "precision", _NOT_TWICE)
    if reason := _gpu_lacks(candidate, place, question):
        published = question.model.quantization
        if published is not None:
            reason = f"the checkpoint is already quantized to {published.label}; {published.precision} {reason}"
        hint = "leave --precision out, or choose another" if published is None else _ORIGINAL
        return Rejection(reason, 3, "precision", hint)
    if reason := _no_such_kv_cache(candidate, place, question, kv_cache):
        hint = "leave --kv-cache-dtype (or its profile) out, or choose auto"
        return Rejection(reason, 3, "kv_cache_dtype", hint)
    return _model_lacks(candidate, question) or _too_few(candidate, place, question)


def activations(candidate: Candidate, place: Place) -> str:
    """The precision in which it computes there: float32 on the CPU, 16 bits that the GPU has, unless it is FP32."""
    if candidate.profile.backend == "cpu":
        return "fp32"
    if candidate.profile.precision in ("fp32", "fp16"):
        return candidate.profile.precision
    return "bf16" if place.facts is None or "bf16" in place.facts.precisions else "fp16"


def unbuilt(candidate: Candidate, kv_cache: str, question: Question) -> Rejection | None:
    """What of it this build does not contain yet."""
    profile, capabilities = candidate.profile, question.capabilities

    def missing(reason: str, field: str, allowed: str) -> Rejection:
        flag = f"--{field.replace('_', '-')}"
        return Rejection(reason, _LAST, field, f"leave {flag} (or its profile) out, or choose {allowed}")

    backend = capabilities.backends.get(profile.backend)
    if backend is None:
        known = " or ".join(capabilities.backends)
        return missing(f"the {profile.backend} backend is not built yet", "backend", known)
    precisions = " or ".join(p for p in backend.precisions if p in capabilities.schemes)
    if profile.scheme is not None and profile.scheme not in capabilities.named and profile.precision in precisions:
        return missing(f"the scheme {profile.scheme} is not built yet", "precision", precisions)
    if profile.precision not in capabilities.schemes:
        return missing(f"{profile.precision} is not built yet", "precision", precisions)
    if profile.precision not in backend.precisions:
        reason = f"{profile.precision} is not built yet for the {profile.backend} backend"
        return missing(reason, "precision", precisions)
    if candidate.tp_size > backend.max_tp:
        most = "one device" if backend.max_tp == 1 else f"{backend.max_tp} devices"
        reason = f"tensor parallelism over {candidate.tp_size} is not built yet: {profile.backend} serves on {most}"
        return missing(reason, "tp_size", _at_most(backend.max_tp))
    if candidate.pp_size > backend.max_pp:
        reason = f"pipeline parallelism over {candidate.pp_size} is not built yet"
        return missing(reason, "pp_size", _at_most(backend.max_pp))
    replicas = question.overrides.replicas or 1
    if replicas > 1 and not capabilities.replicas:
        return missing(f"{replicas} replicas behind one endpoint are not built yet", "replicas", "1")
    if kv_cache not in backend.kv_cache:
        have = ", ".join(backend.kv_cache)
        reason = f"a {kv_cache} KV cache is not built yet for the {profile.backend} backend, which has {have}"
        return missing(reason, "kv_cache_dtype", " or ".join(backend.kv_cache))
    return None


def _at_most(size: int) -> str:
    return "1" if size == 1 else f"{size} or less"


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
    if "auto" not in (asked.kv_cache_dtype, profile.kv_cache) and asked.kv_cache_dtype != profile.kv_cache:
        return f"not what was asked for: kv_cache_dtype {asked.kv_cache_dtype}"
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


def _quantized_otherwise(candidate: Candidate, question: Question) -> str | None:
    """A checkpoint that is quantized already serves as it is, and is never quantized again."""
    facts, profile = question.model.quantization, candidate.profile
    if facts is None or profile.precision == facts.precision:
        return None
    return f"the checkpoint is already quantized to {facts.label}, which only {facts.precision} profiles serve"


def _gpu_lacks(candidate: Candidate, place: Place, question: Question) -> str | None:
    have, facts = place.compute_capability, place.facts
    if have is None or facts is None:
        return None
    precision = candidate.profile.precision
    scheme = question.capabilities.scheme_of(precision, candidate.profile.scheme)
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


def _no_such_kv_cache(candidate: Candidate, place: Place, question: Question, kv_cache: str) -> str | None:
    """On a GPU a KV cache has the precision of the activations, or FP8 where the GPU converts it."""
    have = place.compute_capability
    if have is None:
        return None
    natural = activations(candidate, place)
    if kv_cache not in (natural, "fp8"):
        return f"computes in {natural} here, with which a {kv_cache} KV cache does not go: only {natural} or fp8"
    backend = question.capabilities.backends.get(candidate.profile.backend)
    need = backend.kv_cache_capability.get(kv_cache, (0, 0)) if backend else (0, 0)
    if have < need:
        gpu = place.gpus[0].name
        return f"a KV cache in {kv_cache} needs compute capability {_dotted(need)}, and {gpu} has {_dotted(have)}"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _model_lacks(candidate: Candidate, question: Question) -> Rejection | None:
    model, tp = question.model, candidate.tp_size
    shared = {"heads": model.num_attention_heads, "intermediate size": model.intermediate_size}
    size_hint = f"leave --tp-size out, or choose {_sizes_of(model)}"
    undivided = [f"{what} ({size})" for what, size in shared.items() if size % tp]
    if undivided:
        return Rejection(f"{tp} ranks do not divide the model's {' and '.join(undivided)}", 4, "tp_size", size_hint)
    if model.num_key_value_heads % tp and tp % model.num_key_value_heads:
        reason = f"{tp} ranks and the model's {counted(model.num_key_value_heads, 'KV head')} do not divide each other"
        return Rejection(reason, 4, "tp_size", size_hint)
    if candidate.pp_size > model.num_hidden_layers:
        reason = f"{candidate.pp_size} pipeline stages are more than the model's {model.num_hidden_layers} layers"
        return Rejection(reason, 4, "pp_size", f"choose {model.num_hidden_layers} or less for --pp-size")
    scheme = question.capabilities.scheme_of(candidate.profile.precision, candidate.profile.scheme)
    for multiple in (_profile_multiple(candidate, question), scheme.dimension_multiple if scheme else 1):
        for name, size in (
            ("hidden_size", model.hidden_size),
            ("intermediate_size per rank", model.intermediate_size // tp),
            ("heads × head_dim per rank", model.num_attention_heads * model.head_dim // tp),
        ):
            if size % multiple:
                precision = candidate.profile.precision
                reason = f"{precision} needs multiples of {multiple}, and the model's {name} is {size}"
                smaller = ", or a smaller --tp-size" if tp > 1 and not size * tp % multiple else ""
                hint = f"leave --precision out, or choose another, for example bf16{smaller}"
                return Rejection(reason, 4, "precision", hint)
    return None


def _sizes_of(model: ModelConfig) -> str:
    """The powers of two that `_model_lacks` takes of this model: "1, 2 or 4"."""
    kv_heads = model.num_key_value_heads
    whole = math.gcd(model.num_attention_heads, model.intermediate_size)
    sizes = [str(n) for n in (1, 2, 4, 8) if whole % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
    return " or ".join([", ".join(sizes[:-1]), sizes[-1]] if len(sizes) > 1 else sizes)


def _profile_multiple(candidate: Candidate, question: Question) -> int:
    """What the profile says of dimensions; for INT4 it speaks of the groups that a build makes, and a checkpoint that
    is quantized already has its own."""
    published = question.model.quantization
    if published is None or published.precision != "int4":
        return candidate.profile.requires.dimension_multiple
    return math.lcm(_INT4_WORD, published.group_size or 1)


def _too_few(candidate: Candidate, place: Place, question: Question) -> Rejection | None:
    ranks, replicas = question.ranks_here(candidate), question.overrides.replicas or 1
    need, have = ranks * replicas, len(place.gpus)
    field = "tp_size" if candidate.tp_size > 1 else "pp_size" if ranks > 1 else "replicas"
    hint = f"leave --{field.replace('_', '-')} (or its profile) out"
    if candidate.profile.backend == "cpu":
        backend = question.capabilities.backends.get("cpu")
        able = backend is not None and candidate.tp_size <= backend.max_tp and candidate.pp_size <= backend.max_pp
        return None if able or ranks == 1 else Rejection("the CPU backend serves on one device", 5, field, hint)
    if candidate.tp_size * candidate.pp_size > 1 and place.gpus[0].mig_profile is not None:
        return Rejection("MIG slices cannot be joined: one slice serves one rank", 5, field, hint)
    if need > have:
        each = " on each node" if question.overrides.nodes > 1 else ""
        reason = f"needs {need} identical GPUs{each}, and {have} can be used"
        if replicas > 1:
            size = "1 GPU" if ranks == 1 else f"{ranks} GPUs"
            reason = f"{replicas} replicas of {size} need {need} identical GPUs, and {have} can be used"
            field, hint = "replicas", f"choose {have // ranks} or less for --replicas" if have >= ranks else hint
        hint = f"{hint}, or serve where there are {need}"
        return Rejection(reason, 5, field, hint)
    return None
