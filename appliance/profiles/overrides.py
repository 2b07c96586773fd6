"""What a user asks for on top of the policy, checked and brought into one value. Tags are one way to say the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import msgspec

from appliance.errors import SettingsError
from appliance.profiles.load import Profile
from appliance.profiles.names import Named, resolve
from appliance.strict import nearest
from appliance.types import KvCacheDtype, ModelConfig, Precision, Struct


class Overrides(Struct, frozen=True):
    """None (or "auto") leaves the choice to the profile and the policy."""

    precision: Precision | None = None
    tp_size: int | None = None
    pp_size: int | None = None
    replicas: int | None = None  # copies of the engine, each on GPUs of its own
    nodes: int = 1  # machines like this one, each with stages of the model
    profile: str | None = None  # name, id or the start of an id
    tags: str | None = None  # "precision=fp8,tp=1"
    backend: str | None = None
    kv_cache_dtype: KvCacheDtype = "auto"
    max_model_len: int | None = None  # tokens
    memory_fraction: float = 0.9  # of free memory, for weights and KV cache
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None


_PRECISIONS, _KV_CACHES = get_args(Precision), get_args(KvCacheDtype)
# Tag -> field and how its value is read.
_TAGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "precision": ("precision", str),
    "tp": ("tp_size", int),
    "tp_size": ("tp_size", int),
    "pp": ("pp_size", int),
    "pp_size": ("pp_size", int),
    "backend": ("backend", str),
    "kv_cache": ("kv_cache_dtype", str),
    "profile": ("profile", str),
}


def normalize(
    overrides: Overrides, profiles: Sequence[Profile], model: ModelConfig, backends: Sequence[str]
) -> tuple[Overrides, Named | None]:
    """Overrides with the tags merged in, all values checked, and what `profile` names.

    SettingsError for a value that is not allowed or contradicts another, ProfileError for an unknown profile.
    """
    merged = _merge_tags(overrides)
    _one_of("precision", merged.precision, _PRECISIONS)
    _one_of("kv_cache_dtype", merged.kv_cache_dtype, _KV_CACHES)
    _one_of("backend", merged.backend, sorted({*backends, *(p.backend for p in profiles)}))
    for name in ("tp_size", "pp_size", "replicas", "nodes", "max_model_len", "max_num_seqs", "max_num_batched_tokens"):
        value = getattr(merged, name)
        if value is not None and value < 1:
            raise SettingsError(f"{name} is {value}, and must be 1 or more")
    if not 0 < merged.memory_fraction <= 1:
        raise SettingsError(f"memory_fraction is {merged.memory_fraction}, and must be above 0 and at most 1")
    if merged.max_model_len is not None and merged.max_model_len > model.max_position_embeddings:
        raise SettingsError(
            f"max_model_len {merged.max_model_len} is more than the model's limit of {model.max_position_embeddings}",
            hint="leave it out to use as much as fits",
        )
    named = None if merged.profile is None else resolve(merged.profile, profiles)
    _check_nodes(merged, named)
    return merged, named


def _check_nodes(merged: Overrides, named: Named | None) -> None:
    stages = named.pp_size if named is not None and named.pp_size is not None else merged.pp_size
    if stages is not None and stages % merged.nodes:
        raise SettingsError(
            f"{stages} pipeline stages cannot be spread over {merged.nodes} nodes: a node has whole stages",
            hint=f"leave --pp-size (or its profile) out, or choose {merged.nodes} or a multiple of it",
        )
    if merged.nodes > 1 and (merged.replicas or 1) > 1:
        raise SettingsError(
            f"{merged.replicas} replicas on {merged.nodes} nodes are not supported",
            hint="leave --replicas out; start several groups of nodes instead",
        )


def _one_of(name: str, value: str | None, allowed: Sequence[str]) -> None:
    if value is not None and value not in allowed:
        near = nearest(value, allowed)
        guess = f"; did you mean {near!r}?" if near else ""
        raise SettingsError(f"{name} is {value!r}, and may be {', '.join(allowed)}{guess}")


def _merge_tags(overrides: Overrides) -> Overrides:
    if overrides.tags is None:
        return overrides
    values: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in overrides.tags.split(","))):
        tag, equals, text = (piece.strip() for piece in part.partition("="))
        if tag.lower() not in _TAGS or not equals:
            near = nearest(tag, _TAGS)
            guess = f"; did you mean {near!r}?" if near else ""
            raise SettingsError(f"unknown tag {part!r}: write {', '.join(f'{t}=…' for t in _TAGS)}{guess}")
        field, read = _TAGS[tag.lower()]
        try:
            value = read(text.lower() if field != "profile" else text)
        except ValueError as error:
            raise SettingsError(f"the tag {part!r} needs a whole number") from error
        given = values.get(field, getattr(overrides, field))
        if given not in (None, "auto", value):
            raise SettingsError(f"the tag {part!r} contradicts {field} {given!r}", hint="say it once")
        values[field] = value
    return msgspec.structs.replace(overrides, tags=None, **values)
