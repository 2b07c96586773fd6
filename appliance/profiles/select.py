"""The choice: which profile serves a model on a machine, and why every other does not. Pure; does no I/O.

Policy, the numbers of which are the profiles' priorities:

1. The precision with the highest priority on this GPU that GPU, model and build allow and that fits free memory.
2. Objective throughput: the smallest tensor-parallel size that has room for 32768 tokens of KV cache, or that fits at
   all. Where the build can, there is a replica of it on every other GPU with as much room; a larger size is then taken
   if its replicas together are predicted to give over 30% more, which is beyond the model's error: weights that leave
   little room for a KV cache are better shared. Objective latency: the smallest whose predicted time per token is
   within 10% of the best. Objective auto: of the sizes whose output is within 20% of the best, that for latency.
3. On a mixed machine the group of identical GPUs with the most memory; another group only if nothing runs on that one.
   The CPU only where no GPU can be used, or on request.
4. Ranks that add up through host memory, for want of peer access, only where nothing else fits in any profile; pipeline
   stages inside a node only where that does not fit either, as where no tensor-parallel size divides the model or the
   number of GPUs. On several nodes tensor parallelism stays inside, and each node has a stage.

`wanted` is the same choice made as if everything were built; `selected` only among what is. Where nothing fits,
`wanted` is the preferred precision on the fewest GPUs of the same type that would do (in several stages, if one node's
are not enough), or else with more memory, and its reason says what lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from appliance.profiles.capabilities import Capabilities
from appliance.profiles.judge import Outcome, judge
from appliance.profiles.load import GpuFacts, Profile
from appliance.profiles.names import Candidate, candidates, staged
from appliance.profiles.overrides import Overrides, normalize
from appliance.profiles.places import LINK_RANK, Place, places
from appliance.profiles.rules import Question
from appliance.types import Gpu, Hardware, ModelConfig, Objective, Struct

_STATUS_RANK = {"runnable": 0, "not_built": 1, "low_memory": 2, "incompatible": 3}
_UNLIMITED = 1 << 50  # bytes
_LATENCY_SLACK = 1.10  # a larger group of GPUs must be faster than this factor to be worth it
_OUTPUT_SLACK = 1.30  # likewise for the output of all replicas, of which fewer are larger
_AUTO_SLACK = 1.25  # and this is the most of the best output that quicker answers may cost under objective auto
_MOST_RANKS = 64  # of an engine that is proposed where nothing fits


class Selection(Struct, frozen=True):
    selected: Outcome | None  # what serves; None: nothing can, `reasons` say why
    wanted: Outcome  # what the policy wants, built or not, and fitting or not
    outcomes: tuple[Outcome, ...]  # every candidate, best first
    places: tuple[Place, ...]
    hardware: Hardware
    model: ModelConfig
    objective: Objective
    overrides: Overrides  # tags merged
    replicas: bool = False  # this build can serve several copies of an engine


def select(
    hardware: Hardware,
    model: ModelConfig,
    profiles: Sequence[Profile],
    objective: Objective = "throughput",
    overrides: Overrides = Overrides(),  # noqa: B008  (frozen)
    *,
    capabilities: Capabilities,
    gpu_facts: Sequence[GpuFacts],
    refused: Mapping[str, str] | None = None,
) -> Selection:
    """Judge every candidate and choose. The order of `profiles` does not matter. `refused`: profiles that were tried
    and failed, with the reason; another one is chosen.

    SettingsError for an override with a wrong value, ProfileError for a profile that does not exist. That nothing can
    run is no error here: `selected` is None and `explain.require` raises.
    """
    asked, named = normalize(overrides, profiles, model, tuple(capabilities.backends))
    question = Question(hardware, model, capabilities, asked, named, dict(refused or {}))
    where = places(hardware, gpu_facts)
    tp_size = named.tp_size if named is not None and named.tp_size is not None else asked.tp_size
    pp_size = named.pp_size if named is not None and named.pp_size is not None else asked.pp_size
    outcomes = _judged(candidates(profiles, tp_size, pp_size, asked.nodes), where, question, objective)
    if pp_size is None and not any(o.status in ("runnable", "not_built") for o in outcomes):
        most = max(len(place.gpus) for place in where)
        more = _judged(staged(profiles, tp_size, most, asked.nodes), where, question, objective)
        outcomes += [o for o in more if o.status in ("runnable", "not_built")]
    spread = capabilities.replicas and asked.replicas is None
    selected = _choose([o for o in outcomes if o.status == "runnable"], objective, spread)
    wanted = _choose([o for o in outcomes if o.status in ("runnable", "not_built")], objective, spread)
    if wanted is None:
        wanted = _wish(outcomes, profiles, (tp_size, pp_size), where, question, objective)
        outcomes += [] if wanted in outcomes else [wanted]
    outcomes.sort(key=lambda o: (_STATUS_RANK[o.status], o.order, -o.priority, o.profile, o.tp_size, o.pp_size))
    return Selection(
        selected=selected,
        wanted=wanted,
        outcomes=tuple(outcomes),
        places=tuple(where),
        hardware=hardware,
        model=model,
        objective=objective,
        overrides=asked,
        replicas=capabilities.replicas,
    )


def _judged(
    options: Sequence[Candidate], where: Sequence[Place], question: Question, objective: Objective
) -> list[Outcome]:
    """Each in the place where it does best."""
    return [
        min(
            (judge(candidate, place, question, objective) for place in where),
            key=lambda outcome: (_STATUS_RANK[outcome.status], _relevance(outcome, where), outcome.order),
        )
        for candidate in options
    ]


def _relevance(outcome: Outcome, where: Sequence[Place]) -> bool:
    """Among places that reject a candidate, a place of its own kind has the reason worth reading."""
    is_cpu = outcome.order == len(where) - 1
    return is_cpu != (outcome.backend == "cpu") and len(where) > 1


def _choose(able: list[Outcome], objective: Objective, spread: bool = False) -> Outcome | None:
    """`spread`: each was given as many replicas as there is room for, so that their outputs can be compared."""
    if not able:
        return None
    able = [o for o in able if not o.through_host] or able
    first = min(able, key=lambda o: (o.order, -o.priority, o.profile))
    close = [o for o in able if (o.order, o.profile) == (first.order, first.profile)]
    if objective != "latency":
        close = [o for o in close if o.roomy] or close
        slack = _AUTO_SLACK if objective == "auto" else _OUTPUT_SLACK
        most = max(o.score or 0.0 for o in close)
        compared = spread or objective == "auto"
        close = [o for o in close if (o.score or 0.0) * slack >= most] if compared else close
    if objective != "throughput":
        best = min(o.decode_ms or 0.0 for o in close)
        close = [o for o in close if (o.decode_ms or 0.0) <= best * _LATENCY_SLACK]
    return min(close, key=lambda o: (o.ranks, -(o.score or 0.0)))


def _wish(
    outcomes: list[Outcome],
    profiles: Sequence[Profile],
    sizes: tuple[int | None, int | None],
    where: Sequence[Place],
    question: Question,
    objective: Objective,
) -> Outcome:
    """The policy's profile where nothing fits, with the fewest GPUs that would do: on as many idle ones of the same
    type as each candidate takes, in several stages if need be; else with unlimited memory; else (rules of the model or
    of what was asked reject all) the deepest that the rules let go. As it was judged here, so that its reason says what
    lacks. `sizes`: tp and pp asked for."""
    nodes = question.overrides.nodes
    options = candidates(profiles, *sizes, nodes)
    more = staged(profiles, sizes[0], _MOST_RANKS // nodes, nodes) if sizes[1] is None else []
    for tried, memory in ((options, None), (more, None), (options, _UNLIMITED)):
        hardware = msgspec.structs.replace(question.hardware, free_memory=memory or question.hardware.free_memory)
        roomier = msgspec.structs.replace(question, hardware=hardware)
        able = [
            judge(candidate, _multiplied(place, _gpus_of(candidate, question), memory), roomier, objective)
            for candidate in tried
            for place in where
        ]
        able = [o for o in able if o.status in ("runnable", "not_built")]
        if able:
            choice = min(able, key=lambda o: (o.order, -o.priority, o.profile, o.pp_size, o.ranks))
            (wanted,) = (c for c in tried if c.id == choice.id)
            here = [o for o in outcomes if o.id == choice.id] or _judged([wanted], where, question, objective)
            return here[0]
    return min(
        outcomes,
        key=lambda o: (-o.rejection.depth if o.rejection is not None else 0, o.order, -o.priority, o.profile, o.ranks),
    )


def _gpus_of(candidate: Candidate, question: Question) -> int:
    return question.ranks_here(candidate) * (question.overrides.replicas or 1)


def _multiplied(place: Place, count: int, memory: int | None) -> Place:
    """The place with `count` copies of its first GPU, idle and linked as the best linked two of it are."""
    if place.is_cpu:
        return place
    like = place.gpus[0]
    links = [link for gpu in place.gpus for link in gpu.links.values()]
    link = min(links, key=LINK_RANK.__getitem__, default="pcie")
    gpus: list[Gpu] = [
        msgspec.structs.replace(
            like,
            index=index,
            uuid=f"{like.uuid}/{index}",
            free_memory=memory or like.total_memory,
            utilization=0,
            links={other: link for other in range(count) if other != index},
        )
        for index in range(count)
    ]
    return msgspec.structs.replace(place, gpus=tuple(gpus))
