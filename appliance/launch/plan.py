"""From settings, hardware and checkpoint to what is served: selection, build request, engine options. Runs nothing.

Shared by the start of a server and by the commands that only look (`serve --dry-run`, `select`, `build`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from appliance import builder, profiles
from appliance.profiles import Outcome, Overrides, Selection
from appliance.settings import Settings
from appliance.types import EngineOptions, Hardware, KvCacheDtype, ModelConfig, Precision


@dataclass(frozen=True)
class Plan:
    """What a start will do. `settings` has the profile's values where nobody chose others."""

    settings: Settings
    selection: Selection
    outcome: Outcome  # the one that serves
    checkpoint: Path


def overrides_of(settings: Settings) -> Overrides:
    return Overrides(
        precision=settings.precision,
        tp_size=settings.tp_size,
        pp_size=settings.pp_size,
        profile=settings.profile,
        tags=settings.tags,
        backend=settings.backend,
        kv_cache_dtype=settings.kv_cache_dtype,
        max_model_len=settings.max_model_len,
        memory_fraction=settings.memory_fraction,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
    )


def choose(settings: Settings, hardware: Hardware, model: ModelConfig) -> Selection:
    """SettingsError and ProfileError as `profiles.select`; that nothing can run is no error yet."""
    return profiles.select_here(hardware, model, settings.objective, overrides_of(settings))


def make_plan(settings: Settings, selection: Selection, checkpoint: Path) -> Plan:
    """Raises ProfileError, with every reason, if no profile can serve."""
    outcome = profiles.require(selection)
    values: dict[str, object] = {
        "precision": outcome.precision,
        "kv_cache_dtype": outcome.kv_cache,
        "tp_size": outcome.tp_size,
        "pp_size": outcome.pp_size,
        "backend": outcome.backend,
        "max_num_seqs": outcome.max_num_seqs,
        "max_num_batched_tokens": outcome.max_num_batched_tokens,
    }
    return Plan(settings.with_profile(outcome.name, values), selection, outcome, checkpoint)


def build_request(plan: Plan, checkpoint_digest: str = "") -> builder.BuildRequest:
    outcome = plan.outcome
    place = next(place for place in plan.selection.places if place.order == outcome.order)
    return builder.BuildRequest(
        checkpoint=str(plan.checkpoint),
        cache=str(plan.settings.cache_dir),
        precision=cast(Precision, outcome.precision),
        backend=outcome.backend,
        tp_size=outcome.tp_size,
        pp_size=outcome.pp_size,
        compute_capability=place.compute_capability,
        checkpoint_digest=checkpoint_digest,
    )


def engine_options(plan: Plan, engine_dir: Path) -> EngineOptions:
    """How to load the engine. The context limit is left to the engine, which knows the memory that is really free,
    unless somebody chose one."""
    settings, outcome = plan.settings, plan.outcome
    return EngineOptions(
        engine_dir=str(engine_dir),
        backend=outcome.backend,
        devices=outcome.devices,
        max_model_len=settings.max_model_len or 0,
        max_num_seqs=outcome.max_num_seqs,
        max_num_batched_tokens=outcome.max_num_batched_tokens,
        memory_fraction=settings.memory_fraction,
        kv_cache_dtype=cast(KvCacheDtype, outcome.kv_cache),
        prefix_caching=settings.prefix_caching,
        cuda_graphs=settings.cuda_graphs,
        attention=settings.attention,
        seed=settings.seed,
        verify_digests=False,  # the start has checked every file, with stamps, so that only the first load reads all
    )
