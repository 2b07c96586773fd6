"""The verdict on one candidate in one place: the rules, then free memory, then what is built; with the GPUs of each
replica, and predicted speed."""

from __future__ import annotations

from typing import Literal

import msgspec

from appliance.profiles import predict, speed
from appliance.profiles.names import Candidate
from appliance.profiles.overrides import Overrides
from appliance.profiles.places import LINK_RANK, Place, Team, worst_link, worst_path
from appliance.profiles.rules import Question, Rejection, activations, reject, unbuilt
from appliance.sizes import format_size
from appliance.types import Objective, Struct

# runnable: fits and is built. not_built: would fit. low_memory: built, and fits with a shorter context.
Status = Literal["runnable", "not_built", "low_memory", "incompatible"]
_LEN_STEP = 256  # suggested context limits are multiples of this, and not below it
_REPLICA_SHARE = 0.75  # of the first replica's context limit, that another must have room for: requests go to any


class Outcome(Struct, frozen=True):
    """What became of one candidate."""

    name: str
    id: str
    profile: str
    precision: str
    scheme: str | None  # quantization plug-in, where the profile names one
    kv_cache: str
    tp_size: int
    pp_size: int
    backend: str
    status: Status
    reason: str | None  # the rule that rejected it; None when runnable
    order: int  # of the place it was judged in, 0 is preferred
    priority: int
    rejection: Rejection | None = None  # the rule behind `reason`; None where memory is
    built: bool = False  # this build contains all that it needs; not looked at when a rule rejected it before
    requires_bytes_per_gpu: int | None = None  # free memory that the smallest useful KV cache needs, with all the rest
    memory: predict.Memory | None = None
    decode_ms: float | None = None  # predicted, one sequence
    tokens_per_second_per_gpu: float | None = None  # predicted output at full load, prompts of 1024 for 1024 tokens
    full_batch: int = 0  # sequences that then run at once in one replica
    score: float | None = None  # predicted output tokens/s: one sequence (latency) or full load on all replicas
    max_model_len: int = 0  # longest sequence that fits, up to the model's limit or what was asked for
    suggested_max_model_len: int = 0  # of a low-memory candidate: the context limit with which it would run
    suggested_bytes_per_gpu: int = 0  # and what it then needs
    kv_cache_tokens: int = 0  # that fit, in all
    roomy: bool = False  # they serve several users at once
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    activations: str = ""  # the precision in which it computes what is not quantized
    head: str | None = None  # how lm_head is stored ("fp8", "bf16": the model's own 16 bits); None: as the other layers
    max_kl: float | None = None  # the profile's limit on what quantization may do to the model's predictions
    devices: tuple[str, ...] = ()  # UUIDs of the first replica, one per rank; empty on the CPU
    gpu_indices: tuple[int, ...] = ()
    replicas: int = 1  # copies of the engine, each on GPUs of its own, behind one endpoint
    device_groups: tuple[tuple[str, ...], ...] = ()  # UUIDs of each replica, the first being `devices`
    gpu_groups: tuple[tuple[int, ...], ...] = ()
    nodes: int = 1  # machines like this one, over which its stages are spread; the GPUs above are this one's
    link: str = "nvlink"  # the slowest inside an engine: "nvlink" (or one GPU), "pcie", "none"
    path: str | None = None  # the longest way over PCIe inside an engine; see `Gpu.paths`

    @property
    def ranks(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def through_host(self) -> bool:
        """Its all-reduces go through host memory: chosen only where nothing else fits."""
        return self.tp_size > 1 and self.link == "none"

    @property
    def bytes_per_rank(self) -> int | None:
        """Memory that one rank is predicted to hold: weights, activations, the rest, and the KV cache that fits."""
        return None if self.memory is None else self.memory.fixed + self.kv_cache_tokens * self.memory.kv_per_token


def judge(candidate: Candidate, place: Place, question: Question, objective: Objective) -> Outcome:
    """The verdict, with the first rule that rejects it as its reason."""
    asked, on_cpu = question.overrides, candidate.profile.backend == "cpu"
    draft = _draft(candidate, place, question, objective)
    if draft.reason is not None:
        return draft
    stored = _stored(candidate, place, question)
    need = predict.memory(
        question.model,
        stored=stored,
        kv_cache=draft.kv_cache,
        tp_size=draft.tp_size,
        pp_size=draft.pp_size,
        max_num_seqs=draft.max_num_seqs,
        max_num_batched_tokens=draft.max_num_batched_tokens,
        on_cpu=on_cpu,
    )
    useful = predict.useful_tokens(question.model, asked.max_model_len, draft.max_num_batched_tokens)
    required = need.required(useful, asked.memory_fraction)
    missing = unbuilt(candidate, draft.kv_cache, question)
    draft = msgspec.structs.replace(draft, memory=need, requires_bytes_per_gpu=required, built=missing is None)
    asked_replicas = asked.replicas or 1
    sharing = question.ranks_here(candidate) * asked_replicas  # GPUs, or processes that the CPU's memory is for
    free = question.hardware.free_memory // sharing if on_cpu else place.free(sharing)
    if free < required:
        unmet = None if missing is None else missing.reason
        return _too_big(draft, need, useful, free, question.overrides.memory_fraction, unmet)
    cpu: list[Team] = [()] * asked_replicas
    teams = cpu if on_cpu else _teams(draft, need, useful, place, question, objective)
    free = free if on_cpu else min(gpu.free_memory for team in teams for gpu in team)
    tokens = need.kv_tokens(free, asked.memory_fraction)
    draft = msgspec.structs.replace(
        draft,
        status="runnable" if missing is None else "not_built",
        reason=None if missing is None else missing.reason,
        rejection=missing,
        max_model_len=_longest(question, tokens),
        kv_cache_tokens=tokens,
        roomy=tokens >= max(useful, predict.ROOMY_TOKENS),
        devices=tuple(gpu.uuid for gpu in teams[0]),
        gpu_indices=tuple(gpu.index for gpu in teams[0]),
        replicas=len(teams),
        device_groups=tuple(tuple(gpu.uuid for gpu in team) for team in teams),
        gpu_groups=tuple(tuple(gpu.index for gpu in team) for team in teams),
        link=max(map(worst_link, teams), key=LINK_RANK.__getitem__),
        path=worst_path(teams[0]),
    )
    return _with_speed(draft, need, stored, place, question, objective)


def _draft(candidate: Candidate, place: Place, question: Question, objective: Objective) -> Outcome:
    """What is known of it without looking at memory; rejected, if a rule does that."""
    asked, profile = question.overrides, candidate.profile
    on_cpu = profile.backend == "cpu"
    kv_cache = _kv_cache(candidate, place, asked)
    rejection = reject(candidate, place, question, kv_cache)
    return Outcome(
        name=candidate.name,
        id=candidate.id,
        profile=profile.name,
        precision=profile.precision,
        scheme=profile.scheme,
        kv_cache=kv_cache,
        tp_size=candidate.tp_size,
        pp_size=candidate.pp_size,
        backend=profile.backend,
        status="incompatible",
        reason=None if rejection is None else rejection.reason,
        rejection=rejection,
        order=place.order,
        priority=profile.priority_on(None if on_cpu else place.compute_capability),
        max_num_seqs=asked.max_num_seqs or profile.limits(objective).max_num_seqs,
        max_num_batched_tokens=asked.max_num_batched_tokens or profile.limits(objective).max_num_batched_tokens,
        nodes=asked.nodes,
        activations=activations(candidate, place),
        head=_head(candidate, place, question),
        max_kl=profile.quality.max_kl if profile.quality is not None else None,
    )


def _longest(question: Question, tokens: int) -> int:
    """The context limit with a KV cache of that many tokens."""
    return question.overrides.max_model_len or min(question.model.max_position_embeddings, tokens)


def _teams(
    draft: Outcome, need: predict.Memory, useful: int, place: Place, question: Question, objective: Objective
) -> list[Team]:
    """The GPUs of each replica; at least one, which fits. As many replicas as were asked for; else, for throughput,
    those that the place has room for, but none with a much smaller KV cache than the first."""
    asked, ranks = question.overrides, draft.ranks // draft.nodes
    required = draft.requires_bytes_per_gpu or 0
    if asked.replicas is not None or objective == "latency" or not question.capabilities.replicas or draft.nodes > 1:
        return place.teams(ranks, required, asked.replicas or 1)
    first = need.kv_tokens(min(gpu.free_memory for gpu in place.take(ranks, required)), asked.memory_fraction)
    tokens = max(useful, int(_REPLICA_SHARE * min(first, _longest(question, first))))
    roomy = max(useful, predict.ROOMY_TOKENS)
    tokens = max(tokens, roomy) if first >= roomy else tokens
    return place.teams(ranks, required, len(place.gpus), need.required(tokens, asked.memory_fraction))


def _stored(candidate: Candidate, place: Place, question: Question) -> predict.Stored:
    """How its weights lie in memory there; of a scheme that this build does not contain, all alike."""
    profile = candidate.profile
    backend = question.capabilities.backends.get(profile.backend)
    return predict.stored_as(
        profile.precision,
        on_cpu=profile.backend == "cpu",
        head=_head(candidate, place, question),
        packed=backend.packed if backend is not None else (),
    )


def _head(candidate: Candidate, place: Place, question: Question) -> str | None:
    scheme = question.capabilities.scheme_of(candidate.profile.precision, candidate.profile.scheme)
    return None if scheme is None else scheme.head_on(place.compute_capability)


def _kv_cache(candidate: Candidate, place: Place, asked: Overrides) -> str:
    """What was asked for, else what the profile says; of "auto" the concrete precision, that of the activations."""
    named = asked.kv_cache_dtype if asked.kv_cache_dtype != "auto" else candidate.profile.kv_cache
    return activations(candidate, place) if named == "auto" else named


def _too_big(
    draft: Outcome, need: predict.Memory, tokens: int, free: int, fraction: float, missing: str | None
) -> Outcome:
    on_cpu, ranks = draft.backend == "cpu", draft.ranks
    where = "there are" if on_cpu else "it has" if ranks == 1 else "the fullest of them has"
    share = "a quarter of the remainder is for the KV cache" if on_cpu else f"all within {fraction:.0%} of free memory"
    parts = (
        f"weights {format_size(need.weights)}, activations {format_size(need.activations)}, "
        f"KV cache of {tokens} tokens {format_size(tokens * need.kv_per_token)}, the rest {format_size(need.overhead)}"
    )
    required = format_size(draft.requires_bytes_per_gpu or 0) + (" free" if on_cpu else " free per GPU")
    reason = f"needs {required} ({parts}; {share}), and {where} {format_size(free)}"
    fitting = need.kv_tokens(free, fraction) // _LEN_STEP * _LEN_STEP
    if fitting < _LEN_STEP or missing is not None:
        return msgspec.structs.replace(draft, reason=f"{reason}; {missing}" if missing else reason)
    return msgspec.structs.replace(
        draft,
        status="low_memory",
        reason=reason,
        suggested_max_model_len=fitting,
        suggested_bytes_per_gpu=need.required(fitting, fraction),
    )


def _with_speed(
    draft: Outcome,
    need: predict.Memory,
    stored: predict.Stored,
    place: Place,
    question: Question,
    objective: Objective,
) -> Outcome:
    if place.facts is None:
        sharing = draft.ranks // draft.nodes * draft.replicas
        device = speed.cpu_device(question.hardware.cpu_cores, sharing)
    else:
        capability = place.compute_capability or (0, 0)
        device = speed.gpu_device(place.facts, draft.precision, draft.link, draft.tp_size, capability)
    ranks = speed.Ranks(
        question.model, stored, need.kv_per_token, device, draft.tp_size, draft.pp_size, question.overrides.nodes
    )
    batch = max(1, min(draft.max_num_seqs, draft.kv_cache_tokens // speed.LOAD_CONTEXT))
    one = speed.decode_seconds(ranks, 1)
    many = speed.tokens_per_second(ranks, batch, draft.max_num_batched_tokens)
    score = 1 / one if objective == "latency" else many * draft.replicas
    return msgspec.structs.replace(
        draft,
        decode_ms=round(one * 1e3, 3),
        tokens_per_second_per_gpu=round(many / draft.ranks, 1),
        full_batch=batch,
        score=round(score, 1),
    )
