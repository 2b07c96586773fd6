"""A Selection in words and as JSON, what it means for the engine, and the error when nothing can run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

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


def engine_values(selection: Selection) -> dict[str, Any]:
    """Fields of `types.EngineOptions` that the choice decides: backend, devices (UUIDs, of all replicas one after the
    other), replicas, kv_cache_dtype, max_model_len (0, as much as really fits, unless somebody asked for a limit),
    max_num_seqs, max_num_batched_tokens and memory_fraction. ProfileError when nothing can run."""
    chosen = require(selection)
    return {
        "backend": chosen.backend,
        "devices": tuple(uuid for group in chosen.device_groups for uuid in group),
        "replicas": chosen.replicas,
        "kv_cache_dtype": chosen.kv_cache,
        "max_model_len": selection.overrides.max_model_len or 0,
        "max_num_seqs": chosen.max_num_seqs,
        "max_num_batched_tokens": chosen.max_num_batched_tokens,
        "memory_fraction": selection.overrides.memory_fraction,
    }


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
        yield from _sizes(selection, selected)
        if (published := selection.model.quantization) is not None:
            yield (
                f"the checkpoint is already quantized to {published.label} and is served as it is: only "
                f"{published.precision} profiles were considered"
            )
        yield from _kernels(selection, selected)
        yield from _passed_over(selection, selected)
        yield from _about_gpus(selection, selected)
    yield from selection.hardware.notes


def _why(selection: Selection, chosen: Outcome) -> str:
    on = "the CPU" if chosen.backend == "cpu" else _gpu_list(selection, chosen)
    per_gpu = f"{format_size(chosen.requires_bytes_per_gpu or 0)}" + ("" if chosen.backend == "cpu" else " per GPU")
    size = f", {_why_size(selection, chosen)}" if chosen.backend != "cpu" else ""
    copies = f"{chosen.replicas} replicas of " if chosen.replicas > 1 else ""
    return (
        f"{copies}{chosen.name} on {on}: highest priority that can run{size}; needs {per_gpu}, predicted "
        f"{chosen.decode_ms:.2f} ms per token of one request, context up to {chosen.max_model_len} tokens"
    )


def _why_size(selection: Selection, chosen: Outcome) -> str:
    if selection.objective == "latency":
        return "no larger group that can run is 10% faster"
    ranks = chosen.tp_size * chosen.pp_size
    same = [o for o in selection.outcomes if o.status == "runnable" and o.profile == chosen.profile]
    smaller = [o for o in same if o.tp_size * o.pp_size < ranks]
    if not smaller:
        return "smallest group of GPUs that fits"
    if any(o.roomy for o in smaller):
        return "smallest group of GPUs whose predicted output is within 30% of the best"
    return "smallest group of GPUs with room for several users"


def _asked_away(outcome: Outcome) -> bool:
    return (outcome.reason or "").startswith("not what was asked for")


def _label(outcome: Outcome) -> str:
    """ "TP2", "TP2 × PP2"."""
    return f"TP{outcome.tp_size}" + (f" × PP{outcome.pp_size}" if outcome.pp_size > 1 else "")


def _sizes(selection: Selection, chosen: Outcome) -> Iterator[str]:
    """What each size of the chosen profile is predicted to do, where there is a choice."""
    same = [o for o in selection.outcomes if o.profile == chosen.profile and not _asked_away(o)]
    same.sort(key=lambda o: (o.tp_size * o.pp_size, o.pp_size))
    if chosen.backend == "cpu" or len(selection.places[chosen.order].gpus) == 1 or len(same) == 1:
        return
    larger = [o for o in same if o.status == "runnable" and o.tp_size * o.pp_size > chosen.tp_size * chosen.pp_size]
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
        yield f"kernels: {kernels.described(chosen.precision, chosen.activations, capability, head)}"


def _gpu_list(selection: Selection, chosen: Outcome) -> str:
    """ "GPU 0 (NVIDIA H200)"; of replicas "GPUs 0+1, 2+3 (NVIDIA H200)"."""
    place = selection.places[chosen.order]
    plural = "s" if len(chosen.gpu_groups) * len(chosen.gpu_indices) > 1 else ""
    if len(chosen.gpu_groups) > 1:
        groups = ["+".join(map(str, group)) for group in chosen.gpu_groups]
    else:
        groups = [str(index) for index in chosen.gpu_indices]
    return f"GPU{plural} {', '.join(groups)} ({place.gpus[0].name})"


def _passed_over(selection: Selection, chosen: Outcome) -> Iterator[str]:
    """Per profile of higher priority than the chosen one: why not."""
    published = selection.model.quantization
    best_of: dict[str, Outcome] = {}
    for outcome in selection.outcomes:
        higher = outcome.backend == chosen.backend and outcome.priority > chosen.priority
        otherwise = published is not None and outcome.precision != published.precision
        if higher and outcome.status != "runnable" and not _asked_away(outcome) and not otherwise:
            best_of.setdefault(outcome.profile, outcome)
    for outcome in best_of.values():
        if outcome.name != selection.wanted.name:  # that one has its line already
            yield f"not {outcome.name}: {outcome.reason}"


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
    ranks, asked = chosen.tp_size * chosen.pp_size, selection.overrides.replicas
    roomy = [gpu for gpu in idle if gpu.free_memory >= (chosen.requires_bytes_per_gpu or 0) and not at_work(gpu)]
    if not selection.replicas:
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
        hint = _hint_if_asked(selection, wanted) or "choose a smaller model, or a GPU with more free memory"
        return f"{wanted.name} would fit, but {wanted.reason}", hint
    measured = [o for o in selection.outcomes if o.requires_bytes_per_gpu is not None]
    if measured:
        best = min(measured, key=lambda o: (o.order, not o.built, o.requires_bytes_per_gpu or 0))
        return f"nothing fits; the least is {best.name}, which {best.reason}", "choose a smaller model, or free memory"
    asked = [o for o in selection.outcomes if o.rejection is not None and o.rejection.depth > 0]
    if asked:
        deepest = max(o.rejection.depth for o in asked if o.rejection is not None)
        telling = [o for o in asked if o.rejection is not None and o.rejection.depth == deepest]
        best = min(telling, key=lambda o: (o.order, -o.priority, o.tp_size))
        same = len({o.reason for o in telling}) == 1  # a rule for all is no matter of one profile
        return best.reason or "" if same else f"{best.name}: {best.reason}", _hint_if_asked(selection, best)
    return "no profile agrees with everything that was asked for", "leave out some of the settings, or see their values"


def _hint_if_asked(selection: Selection, outcome: Outcome) -> str | None:
    """What to do about the rule that rejected it, if somebody asked for what the rule is about."""
    rejection, asked = outcome.rejection, selection.overrides
    if rejection is None or rejection.field is None:
        return None
    of_field = getattr(asked, rejection.field) not in (None, "auto")
    by_device = rejection.field == "backend" and (asked.precision is not None or asked.backend is not None)
    by_checkpoint = selection.model.quantization is not None and rejection.field == "precision"
    return rejection.hint if of_field or by_device or by_checkpoint or asked.profile is not None else None


# ---------------------------------------------------------------- JSON


def _choice(outcome: Outcome) -> dict[str, Any]:
    keys = ("name", "id", "precision", "kv_cache", "tp_size", "pp_size", "backend")
    return {key: getattr(outcome, key) for key in keys}


def _profile_json(outcome: Outcome) -> dict[str, Any]:
    keys = (
        "status",
        "score",
        "reason",
        "decode_ms",
        "requires_bytes_per_gpu",
        "max_model_len",
        "max_num_seqs",
        "replicas",
    )
    values: dict[str, Any] = {**_choice(outcome), **{key: getattr(outcome, key) for key in keys}}
    values["max_num_batched_tokens"] = outcome.max_num_batched_tokens
    values["scheme"] = outcome.scheme  # None: the first that serves the precision
    values["gpus"] = list(outcome.gpu_indices)
    values["predicted"] = _predicted_json(outcome)
    values["memory"] = None if outcome.memory is None else msgspec.to_builtins(outcome.memory)
    if outcome.suggested_max_model_len:
        values["suggested_max_model_len"] = outcome.suggested_max_model_len
    return values


def _predicted_json(outcome: Outcome) -> dict[str, Any] | None:
    """None where it does not fit. `bytes_per_rank`: with the KV cache that fits; `memory` says what else there is."""
    if outcome.decode_ms is None:
        return None
    return {
        "ms_per_token": outcome.decode_ms,
        "tokens_per_second_per_gpu": outcome.tokens_per_second_per_gpu,
        "full_batch": outcome.full_batch,
        "bytes_per_rank": outcome.bytes_per_rank,
        "kv_cache_tokens": outcome.kv_cache_tokens,
    }


def explain_json(selection: Selection) -> dict[str, Any]:
    """Keys: selected, wanted (each {name, id, precision, kv_cache, tp_size, pp_size, backend}; selected is null where
    nothing can serve, and the first of the reasons says why), profiles (every candidate with its score or reason, and
    what is predicted of it), objective, devices (of the first replica), replicas, device_groups (of each replica),
    predicted (of the selected), reasons, hardware, model. Plain values, ready for JSON."""
    selected = selection.selected
    return {
        "selected": None if selected is None else _choice(selected),
        "wanted": _choice(selection.wanted),
        "objective": selection.objective,
        "devices": [] if selected is None else list(selected.devices),
        "replicas": 0 if selected is None else selected.replicas,
        "device_groups": [] if selected is None else [list(group) for group in selected.device_groups],
        "predicted": None if selected is None else _predicted_json(selected),
        "max_model_len": None if selected is None else selected.max_model_len,
        "reasons": list(reasons(selection)),
        "profiles": [_profile_json(outcome) for outcome in selection.outcomes],
        "hardware": msgspec.to_builtins(selection.hardware, str_keys=True),
        "model": {**msgspec.to_builtins(selection.model), "num_parameters": selection.model.num_parameters},
    }


# ---------------------------------------------------------------- text


def explain_text(selection: Selection) -> str:
    """For people: what serves, why, and every profile with its score or the rule that rejected it."""
    selected, wanted = selection.selected, selection.wanted
    lines = [
        f"selected  {_one_line(selected)}",
        f"wanted    {_one_line(wanted)}",
        f"objective {selection.objective}",
        "",
        "Why",
        *(f"- {line}" for line in reasons(selection)),
        "",
        "Profiles (score: predicted output tokens/s; the policy's priority comes first)",
    ]
    width = max(len(outcome.name) for outcome in selection.outcomes)
    for outcome in selection.outcomes:
        if outcome.status == "runnable":
            verdict = f"runs: score {outcome.score:.1f}, needs {format_size(outcome.requires_bytes_per_gpu or 0)}"
        elif outcome.status == "low_memory":
            verdict = f"low memory: {outcome.reason}; try --max-model-len={outcome.suggested_max_model_len}"
        else:
            verdict = f"no: {outcome.reason}"
        lines.append(f"- {outcome.name:<{width}}  {verdict}")
    return "\n".join(lines)


def _one_line(outcome: Outcome | None) -> str:
    if outcome is None:
        return "nothing"
    return (
        f"{outcome.name} (precision {outcome.precision}, KV cache {outcome.kv_cache}, tp_size {outcome.tp_size}, "
        f"pp_size {outcome.pp_size}, backend {outcome.backend})"
    )


def list_profiles_text(selection: Selection) -> str:
    """`list-model-profiles`, in the shape that users of other appliances know. Its ids and names name profiles."""
    hardware = selection.hardware
    lines = ["SYSTEM INFO", "- Free GPUs:" if hardware.usable_gpus else "- Free GPUs: <None>"]
    lines += [f"  -  {_gpu_line(gpu)}" for gpu in hardware.usable_gpus]
    unusable = [gpu for gpu in hardware.gpus if not gpu.usable]
    if unusable:
        lines += ["- GPUs that cannot be used:", *(f"  -  {_gpu_line(gpu)}: {gpu.problem}" for gpu in unusable)]
    if hardware.problem:
        lines.append(f"- {hardware.problem}")
    lines.append(
        f"- CPU: {hardware.cpu_cores} cores, {format_size(hardware.free_memory)} of {format_size(hardware.memory)} free"
    )
    lines.append("MODEL PROFILES")
    by_status: dict[str, list[str]] = {"runnable": [], "low_memory": [], "not_built": [], "incompatible": []}
    for outcome in selection.outcomes:
        by_status[outcome.status].append(_listed(outcome))
    titles = {
        "runnable": "Compatible with system and runnable",
        "low_memory": "Compatible with system but low memory",
        "not_built": "Compatible with system but not built yet in this version",
        "incompatible": "Incompatible with system",
    }
    for status, title in titles.items():
        listed = by_status[status]
        lines += [f"- {title}:", *(f"  - {line}" for line in listed)] if listed else [f"- {title}: <None>"]
    return "\n".join(lines)


def _gpu_line(gpu: Gpu) -> str:
    vendor, _, device = gpu.pci_id.partition(":")
    return f"[{device}:{vendor}] ({gpu.index}) {gpu.name} [current utilization: {gpu.utilization}%]"


def _listed(outcome: Outcome) -> str:
    gib = -(-(outcome.requires_bytes_per_gpu or 0) // 10**9)
    unit = "RAM" if outcome.backend == "cpu" else "gpu"
    head = f"{outcome.id} ({outcome.name})"
    if outcome.status == "runnable":
        return f"{head} [requires >={gib} GB/{unit}]"
    if outcome.status == "low_memory":
        fitting = -(-outcome.suggested_bytes_per_gpu // 10**9)
        return (
            f"{head} [requires >={gib} GB/{unit}] try --max-model-len={outcome.suggested_max_model_len} "
            f"to reduce to >={fitting} GB/{unit}"
        )
    return f"{head}: {outcome.reason}"
