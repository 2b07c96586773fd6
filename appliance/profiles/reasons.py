"""Why a Selection is as it is, in plain lines; and the error when nothing can run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from appliance.errors import ProfileError
from appliance.profiles import kernels
from appliance.profiles.judge import Outcome
from appliance.profiles.places import at_work
from appliance.profiles.select import Selection
from appliance.sizes import format_size
from appliance.types import Gpu


def require(selection: Selection) -> Outcome:
    """What serves; ProfileError with the reason when nothing can."""
    if selection.selected is not None:
        return selection.selected
    message, hint = _failure(selection)
    raise ProfileError(message, hint=hint)


def reasons(selection: Selection) -> tuple[str, ...]:
    """Why this choice, one plain line each, the most important first."""
    return tuple(_reasons(selection))


def _reasons(selection: Selection) -> Iterator[str]:
    selected, wanted = selection.selected, selection.wanted
    if selected is None:
        message, hint = _failure(selection)
        yield f"nothing can serve this model here: {message}" + (f"; {hint}" if hint else "")
    elif selected.backend == "cpu":
        usable = selection.hardware.usable_gpus
        yield "the CPU serves" + (", as asked" if usable else f": {selection.hardware.problem or 'there is no GPU'}")
    if selected is None or wanted.id != selected.id:
        serves = f"; {selected.name} serves instead" if selected is not None else ""
        reason = wanted.reason or "cannot run"
        reason = f"it {reason}" if reason.startswith(("needs ", "cannot ", "runs ")) else reason
        yield f"the policy wants {wanted.name}, but {reason}{serves}"
    if selected is not None:
        yield _why(selection, selected)
        yield from _links(selected)
        yield from _sizes(selection, selected)
        if (published := selection.model.quantization) is not None:
            yield (
                f"the checkpoint is already quantized to {published.label} and is served as it is: only "
                f"{published.precision} profiles were considered"
            )
        yield from _kernels(selection, selected)
        yield from _passed_over(selection, selected)
        yield from _quicker(selection, selected)
        yield from _about_gpus(selection, selected)
    yield from selection.hardware.notes


def _why(selection: Selection, chosen: Outcome) -> str:
    on = "the CPU" if chosen.backend == "cpu" else _gpu_list(selection, chosen)
    on += f" of each of {chosen.nodes} nodes" if chosen.nodes > 1 else ""
    per_gpu = f"{format_size(chosen.requires_bytes_per_gpu or 0)}" + ("" if chosen.backend == "cpu" else " per GPU")
    choice = chosen.backend != "cpu" and _can_be_joined(selection, chosen)
    size = f", {_why_size(selection, chosen)}" if choice else ""
    copies = f"{chosen.replicas} replicas of " if chosen.replicas > 1 else ""
    return (
        f"{copies}{chosen.name} on {on}: highest priority that can run{size}; needs {per_gpu}, predicted "
        f"{chosen.decode_ms:.2f} ms per token of one request, context up to {chosen.max_model_len} tokens"
    )


def _why_size(selection: Selection, chosen: Outcome) -> str:
    same = [o for o in selection.outcomes if o.status == "runnable" and o.profile == chosen.profile]
    smaller = [o for o in same if o.ranks < chosen.ranks]
    larger = [o for o in same if o.ranks > chosen.ranks]
    if chosen.pp_size > chosen.nodes and selection.overrides.pp_size is None and not _named(selection):
        return "in several stages, as no tensor-parallel size alone fits"
    if not smaller and not larger:
        return "smallest group of GPUs that fits"
    if selection.objective == "auto":
        return "quickest size for one request whose output is within 20% of the best"
    if selection.objective == "latency":
        if not smaller:
            return "no larger group that can run is 10% faster"
        return "smallest group of GPUs whose time per token is within 10% of the best"
    if not smaller:
        return "smallest group of GPUs that fits"
    if any(o.roomy for o in smaller):
        return "smallest group of GPUs whose predicted output is within 30% of the best"
    return "smallest group of GPUs with room for several users"


def _can_be_joined(selection: Selection, chosen: Outcome) -> bool:
    """Whether there are several GPUs, and no MIG slices."""
    gpus = selection.places[chosen.order].gpus
    return len(gpus) > 1 and gpus[0].mig_profile is None


def _named(selection: Selection) -> bool:
    return selection.overrides.profile is not None


def _asked_away(outcome: Outcome) -> bool:
    return (outcome.reason or "").startswith("not what was asked for")


def _label(outcome: Outcome) -> str:
    """ "TP2", "TP2 × PP2"."""
    return f"TP{outcome.tp_size}" + (f" × PP{outcome.pp_size}" if outcome.pp_size > 1 else "")


_PATHS = {
    "switch": ", below one PCIe switch",
    "switches": ", below PCIe switches",
    "host": ", below one host bridge",
    "numa": ", inside one NUMA node",
    "system": ", from socket to socket",
}


def _links(chosen: Outcome) -> Iterator[str]:
    """How the GPUs of an engine reach each other."""
    if chosen.backend == "cpu" or chosen.ranks == chosen.nodes:
        return
    if chosen.through_host:
        yield (
            "there is no peer access between its GPUs: NCCL adds up through host memory, which is slow; that is chosen "
            "only where nothing else fits, or where it is asked for"
        )
    elif chosen.link != "none":
        way = "NVLink" if chosen.link == "nvlink" else f"PCIe{_PATHS.get(chosen.path or '', '')}"
        yield f"its GPUs reach each other's memory over {way}"


def _sizes(selection: Selection, chosen: Outcome) -> Iterator[str]:
    """What each size of the chosen profile is predicted to do, where there is a choice."""
    same = [o for o in selection.outcomes if o.profile == chosen.profile and not _asked_away(o)]
    same.sort(key=lambda o: (o.ranks, o.pp_size))
    if chosen.backend == "cpu" or len(selection.places[chosen.order].gpus) == 1 or len(same) == 1:
        return
    larger = [o for o in same if o.status == "runnable" and o.ranks > chosen.ranks]
    if chosen.replicas > 1 and larger:
        other = larger[-1]
        yield (
            f"{chosen.replicas} replicas of {_label(chosen)}: predicted {chosen.tokens_per_second_per_gpu:,.0f} "
            f"tokens/s per GPU at full load, against {other.tokens_per_second_per_gpu:,.0f} with {_label(other)}"
        )
    for outcome in same:
        yield f"{_label(outcome)}: {_predicted(outcome)}"


def _predicted(outcome: Outcome) -> str:
    if outcome.decode_ms is None:
        return outcome.reason or "cannot run"
    words = (
        f"predicted {outcome.decode_ms:.2f} ms per token of one request, "
        f"{outcome.tokens_per_second_per_gpu:,.0f} tokens/s per GPU at full load ({outcome.full_batch} requests at "
        f"once), {format_size(outcome.bytes_per_rank or 0)} per rank with its KV cache"
    )
    return words if outcome.reason is None else f"{words}; {outcome.reason}"


def _kernels(selection: Selection, chosen: Outcome) -> Iterator[str]:
    """What would run there, and whether it ever has."""
    capability = selection.places[chosen.order].compute_capability
    if chosen.backend == "cuda" and capability is not None:
        head = chosen.head if selection.model.quantization is None else None  # of a published engine: as it came
        sums = None if chosen.tp_size == 1 else "host" if chosen.through_host else "peers"
        whole = chosen.pp_size == 1
        line = kernels.described(chosen.precision, chosen.activations, capability, head, sums=sums, whole=whole)
        yield f"kernels: {line}"
        untried = kernels.untried_ranks(chosen.tp_size, chosen.pp_size, chosen.nodes, capability)
        if untried is not None:
            yield f"ranks: {untried}"


def _gpu_list(selection: Selection, chosen: Outcome) -> str:
    """ "GPU 0 (NVIDIA H200)"; of replicas "GPUs 0+1, 2+3 (NVIDIA H200)"; of slices "2 slices of GPU 0 (…)"."""
    first = selection.places[chosen.order].gpus[0]
    if first.mig_profile is not None:
        indices = sorted({index for group in chosen.gpu_groups for index in group})
        slices = "a slice" if len(chosen.gpu_groups) == 1 else f"{len(chosen.gpu_groups)} slices"
        return f"{slices} of GPU{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))} ({first.name})"
    plural = "s" if len(chosen.gpu_groups) * len(chosen.gpu_indices) > 1 else ""
    if len(chosen.gpu_groups) > 1:
        groups = ["+".join(map(str, group)) for group in chosen.gpu_groups]
    else:
        groups = [str(index) for index in chosen.gpu_indices]
    return f"GPU{plural} {', '.join(groups)} ({first.name})"


def _passed_over(selection: Selection, chosen: Outcome) -> Iterator[str]:
    """Per profile of higher priority than the chosen one: why not, with the size that lacks least. Profiles with the
    same reason share a line."""
    published = selection.model.quantization
    of_profile: dict[str, list[Outcome]] = {}
    for outcome in selection.outcomes:
        higher = outcome.backend == chosen.backend and outcome.priority > chosen.priority
        otherwise = published is not None and outcome.precision != published.precision
        if higher and not _asked_away(outcome) and not otherwise:
            of_profile.setdefault(outcome.profile, []).append(outcome)
    lines: dict[str, list[str]] = {}
    for outcomes in of_profile.values():
        best = min(outcomes, key=lambda o: (o.status != "runnable", o.requires_bytes_per_gpu or 1 << 60))
        if best.name != selection.wanted.name:  # that one has its line already
            reason = best.reason or "runs only with sums through host memory, as there is no peer access"
            lines.setdefault(reason, []).append(best.name)
    for reason, names in lines.items():
        yield f"not {', '.join(names)}: {reason}"


def _quicker(selection: Selection, chosen: Outcome) -> Iterator[str]:
    """For one who asks for quick answers: what would be quicker, but has a lower priority."""
    if selection.objective != "latency" or chosen.backend == "cpu":
        return
    others = [
        o
        for o in selection.outcomes
        if o.status == "runnable" and (o.order, o.backend) == (chosen.order, chosen.backend) and not o.through_host
    ]
    best = min(others, key=lambda o: o.decode_ms or 0.0, default=chosen)
    if best.profile != chosen.profile and (best.decode_ms or 0.0) * 1.1 < (chosen.decode_ms or 0.0):
        yield (
            f"{best.name} is predicted to be quicker ({best.decode_ms:.2f} ms per token of one request), but the "
            f"precision comes first: its priority is {best.priority}, that of {chosen.profile} {chosen.priority}; "
            f"--profile={best.profile} takes it"
        )


def _about_gpus(selection: Selection, chosen: Outcome) -> Iterator[str]:
    if chosen.backend == "cpu":
        return
    place = selection.places[chosen.order]
    groups = [p for p in selection.places if not p.is_cpu]
    if len(groups) > 1:
        others = ", ".join(p.label for p in groups if p.order != place.order)
        yield f"the machine is mixed: {place.label} is the group in use, idle: {others} (ranks need identical GPUs)"
    if not chosen.roomy:
        yield (f"free memory leaves a small KV cache ({chosen.kv_cache_tokens} tokens): few requests run at once")
    if place.facts is not None and place.facts.generic:
        yield f"no facts are known about {place.gpus[0].name} ({place.gpus[0].pci_id}): {place.facts.name} is assumed"
    taken = {uuid for group in chosen.device_groups for uuid in group}
    for gpu in place.gpus:
        if gpu.uuid in taken:
            continue
        if gpu.free_memory < max(gpu.total_memory // 2, chosen.requires_bytes_per_gpu or 0):
            yield f"GPU {gpu.index} is busy: {format_size(gpu.free_memory)} of {format_size(gpu.total_memory)} are free"
        elif at_work(gpu):
            yield f"GPU {gpu.index} is left out: somebody computes on it (utilization {gpu.utilization}%)"
    yield from _idle(selection, chosen, [gpu for gpu in place.gpus if gpu.uuid not in taken])


def _idle(selection: Selection, chosen: Outcome, idle: Sequence[Gpu]) -> Iterator[str]:
    """What is not used of the group in use, and what would use it."""
    if not idle or (idle[0].mig_profile is not None and not selection.replicas):
        return
    ranks, asked = chosen.ranks // chosen.nodes, selection.overrides.replicas
    roomy = [gpu for gpu in idle if gpu.free_memory >= (chosen.requires_bytes_per_gpu or 0) and not at_work(gpu)]
    if chosen.nodes > 1:
        advice = f"each node has {ranks} rank" + ("s" if ranks > 1 else "")
    elif not selection.replicas:
        advice = "start a replica for each"
    elif asked is not None:
        advice = f"as asked, with --replicas={asked}"
    elif selection.objective == "latency" and len(roomy) >= ranks:
        advice = f"--replicas={1 + len(roomy) // ranks} or --objective=throughput would use them"
    elif ranks > 1:
        advice = f"a replica of {_label(chosen)} takes {ranks}, with as much free memory as the first has"
    else:
        advice = "too little is free there for another replica"
    what = "slices" if idle[0].mig_profile is not None else "GPUs"
    stay = "stays" if len(idle) == 1 else "stay"
    total = len(selection.places[chosen.order].gpus)
    yield f"{len(idle)} of {total} {what} {stay} idle ({', '.join(str(gpu.index) for gpu in idle)}): {advice}"


def _failure(selection: Selection) -> tuple[str, str | None]:
    """(what stands in the way, what to do)."""
    low = [o for o in selection.outcomes if o.status == "low_memory"]
    if low:
        best = min(low, key=lambda o: (o.order, -o.priority, o.tp_size))
        return f"{best.name} {best.reason}", f"try --max-model-len={best.suggested_max_model_len}"
    wanted = selection.wanted
    if wanted.status == "not_built":
        alone = "leave --nnodes out" if wanted.nodes > 1 else None
        hint = _hint_if_asked(selection, wanted) or alone or "choose a smaller model, or a GPU with more free memory"
        return f"{wanted.name} would fit, but {wanted.reason}", hint
    measured = [o for o in selection.outcomes if o.requires_bytes_per_gpu is not None]
    if measured:
        best = min(measured, key=lambda o: (o.order, not o.built, o.requires_bytes_per_gpu or 0))
        return f"nothing fits; the least is {best.name}, which {best.reason}", _what_would_do(selection)
    asked = [o for o in selection.outcomes if o.rejection is not None and o.rejection.depth > 0]
    if asked:
        deepest = max(o.rejection.depth for o in asked if o.rejection is not None)
        telling = [o for o in asked if o.rejection is not None and o.rejection.depth == deepest]
        best = min(telling, key=lambda o: (o.order, -o.priority, o.tp_size))
        same = len({o.reason for o in telling}) == 1  # a rule for all is no matter of one profile
        return best.reason or "" if same else f"{best.name}: {best.reason}", _hint_if_asked(selection, best)
    return "no profile agrees with everything that was asked for", "leave out some of the settings, or see their values"


def _what_would_do(selection: Selection) -> str:
    """Where nothing fits: the engine that would run on more GPUs like these, if one would."""
    wanted, advice = selection.wanted, "choose a smaller model, or free memory"
    groups = [place for place in selection.places if place.order == wanted.order and not place.is_cpu]
    if not groups or wanted.ranks // wanted.nodes <= len(groups[0].gpus):
        return advice
    name = groups[0].gpus[0].name
    stages = f", in {wanted.pp_size} stages of {wanted.tp_size}" if wanted.pp_size > 1 else ""
    return f"{advice}; on {wanted.ranks} × {name} it would run as {wanted.name}{stages}"


def _hint_if_asked(selection: Selection, outcome: Outcome) -> str | None:
    """What to do about the rule that rejected it, if somebody asked for what the rule is about."""
    rejection, asked = outcome.rejection, selection.overrides
    if rejection is None or rejection.field is None:
        return None
    of_field = getattr(asked, rejection.field) not in (None, "auto")
    if asked.profile is not None and not of_field and (rejection.hint or "").startswith("leave --"):
        _, elsewhere, where = (rejection.hint or "").partition(", or serve ")
        return f"leave --profile out, or name another one{elsewhere}{where}"
    by_device = rejection.field == "backend" and (asked.precision is not None or asked.backend is not None)
    by_checkpoint = selection.model.quantization is not None and rejection.field == "precision"
    return rejection.hint if of_field or by_device or by_checkpoint or asked.profile is not None else None
