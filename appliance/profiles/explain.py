"""A Selection as JSON and as text, and what it means for the engine. The words of why are in reasons.py."""

from __future__ import annotations

from typing import Any

import msgspec

from appliance.profiles.judge import Outcome
from appliance.profiles.reasons import reasons, require
from appliance.profiles.select import Selection
from appliance.sizes import counted, format_size
from appliance.types import Gpu


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
    values["link"] = outcome.link if len(outcome.gpu_indices) > 1 else None  # the slowest between them
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
    what is predicted of it), objective, devices (of the first replica), replicas, nodes, device_groups (of each
    replica), predicted (of the selected), reasons, hardware, model. Plain values, ready for JSON."""
    selected = selection.selected
    return {
        "selected": None if selected is None else _choice(selected),
        "wanted": _choice(selection.wanted),
        "objective": selection.objective,
        "devices": [] if selected is None else list(selected.devices),
        "replicas": 0 if selected is None else selected.replicas,
        "nodes": selection.overrides.nodes,
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
    free = f"{format_size(hardware.free_memory)} of {format_size(hardware.memory)} free"
    lines.append(f"- CPU: {counted(hardware.cpu_cores, 'core')}, {free}")
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
