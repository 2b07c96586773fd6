"""From settings, hardware and checkpoint to what is served: selection, build request, engine options. Runs nothing.

Shared by the start of a server and by the commands that only look (`serve --dry-run`, `select`, `build`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec

from appliance import builder, profiles, registry
from appliance.checkpoint import read_model_config, resolve_text
from appliance.engines import EngineManifest, scheme_of
from appliance.errors import HardwareError, SettingsError
from appliance.launch.node_devices import own_devices, ranks_of_a_node, with_those_elsewhere
from appliance.profiles import Outcome, Overrides, Selection
from appliance.profiles.places import Place, places
from appliance.settings import Settings, export_hub_environment
from appliance.sizes import counted
from appliance.types import EngineOptions, Hardware, KvCacheDtype, ModelConfig, Precision


@dataclass(frozen=True)
class Plan:
    """What a start will do. `settings` has the profile's values where nobody chose others."""

    settings: Settings
    selection: Selection
    outcome: Outcome  # the one that serves
    checkpoint: Path


def config_only(settings: Settings) -> Path | None:
    """A directory with config.json of a hub model, without its weights: enough to select by, before a download of many
    gigabytes. None for a model that is here already, offline, or when it cannot be had so: then `resolve` explains."""
    name, _, revision = settings.model.removeprefix("hf://").partition("@")
    if settings.offline or settings.model == "builtin" or Path(settings.model).expanduser().exists():
        return None
    export_hub_environment(settings)
    try:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(
            name,
            "config.json",
            revision=revision or "main",
            cache_dir=settings.cache_dir / "hub",
            token=settings.hf_token,
        )
    except Exception:  # no such model, no access, no network: `resolve` has the words for each
        return None
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    return Path(path).parent if isinstance(config, dict) and {"dtype", "torch_dtype"} & config.keys() else None


def overrides_of(settings: Settings) -> Overrides:
    return Overrides(
        precision=settings.precision,
        tp_size=settings.tp_size,
        pp_size=settings.pp_size,
        replicas=settings.replicas,
        nodes=settings.nnodes,
        profile=settings.profile,
        tags=settings.tags,
        backend=settings.backend,
        kv_cache_dtype=settings.kv_cache_dtype,
        max_model_len=settings.max_model_len,
        memory_fraction=settings.memory_fraction,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
    )


def choose(
    settings: Settings, hardware: Hardware, model: ModelConfig, refused: Mapping[str, str] | None = None
) -> Selection:
    """SettingsError and ProfileError as `profiles.select`; that nothing can run is no error yet."""
    return profiles.select_here(hardware, model, settings.objective, overrides_of(settings), refused=refused)


def max_kl(plan: Plan) -> float | None:
    """What the engine must keep of its checkpoint's predictions (engines/quality.py); None: no limit."""
    return None if plan.settings.on_quality_failure == "ignore" else plan.outcome.max_kl


def make_plan(settings: Settings, selection: Selection, checkpoint: Path) -> Plan:
    """Raises ProfileError, with every reason, if no profile can serve; SettingsError for kernels that its backend does
    not have."""
    outcome = profiles.require(selection)
    _check_attention(settings, outcome.backend)
    scheme = scheme_of(cast(Precision, outcome.precision), outcome.scheme)
    _check_batch_invariant(settings, outcome.backend, scheme.name)
    values: dict[str, object] = {
        "precision": outcome.precision,
        "kv_cache_dtype": outcome.kv_cache,
        "tp_size": outcome.tp_size,
        "pp_size": outcome.pp_size,
        "replicas": outcome.replicas,
        "backend": outcome.backend,
        "max_num_seqs": outcome.max_num_seqs,
        "max_num_batched_tokens": outcome.max_num_batched_tokens,
    }
    return Plan(settings.with_profile(outcome.name, values), selection, outcome, checkpoint)


def _check_attention(settings: Settings, backend: str) -> None:
    """The backend itself would say so only after the engine is built and loaded."""
    plugin = registry.plugins("backends").get(backend)
    allowed = plugin.facts.get("attention", []) if plugin is not None else []
    if allowed and settings.attention not in allowed:
        raise SettingsError(
            f"attention {settings.attention!r} is not supported by the {backend} backend, which would serve here; "
            f"allowed: {', '.join(allowed)}",
            hint="leave --attention out, or choose another profile",
        )


def _check_batch_invariant(settings: Settings, backend: str, scheme: str) -> None:
    """Only some products and attentions have kernels whose rows do not depend on the batch."""
    if not settings.batch_invariant:
        return
    hint = "leave --batch-invariant out, or choose another profile"
    if not registry.plugins("backends")[backend].facts.get("batch_invariant"):
        raise SettingsError(f"--batch-invariant is not supported by the {backend} backend", hint=hint)
    schemes = registry.plugins("quantization")
    allowed = [name for name, plugin in schemes.items() if plugin.facts.get("batch_invariant")]
    if scheme not in allowed:
        raise SettingsError(
            f"--batch-invariant is not supported by weights of scheme {scheme}; allowed: {', '.join(allowed)}",
            hint=hint,
        )
    if settings.attention not in ("auto", "triton"):
        raise SettingsError(
            f"--batch-invariant is not supported by attention {settings.attention!r}; allowed: auto, triton", hint=hint
        )


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
        max_num_seqs=outcome.max_num_seqs,
        max_num_batched_tokens=outcome.max_num_batched_tokens,
        kv_cache_dtype=cast(KvCacheDtype, outcome.kv_cache),
        attention=plan.settings.attention,
        tactics=plan.settings.tactics,
        calibration_data=_calibration_data(plan),
        calibration_samples=plan.settings.calibration_samples,
        calibration_length=plan.settings.calibration_length,
        max_kl=max_kl(plan),
        scheme=outcome.scheme,
    )


def needs_text(plan: Plan) -> bool:
    """Whether an engine of this plan is calibrated with text that the user named."""
    if plan.settings.calibration_data in (None, "none"):
        return False
    calibrated = scheme_of(cast(Precision, plan.outcome.precision), plan.outcome.scheme).facts.get("calibrated", False)
    return bool(calibrated) and read_model_config(plan.checkpoint).quantization is None


def _calibration_data(plan: Plan) -> str:
    """As `BuildRequest` has it. CheckpointError for a data set of the hub that is not downloaded."""
    settings = plan.settings
    if settings.calibration_data is None or not needs_text(plan):
        return settings.calibration_data or ""
    return str(resolve_text(settings.calibration_data, settings.cache_dir, offline=True))


def engine_options(plan: Plan, engine_dir: Path) -> EngineOptions:
    """How to load the engine. The context limit is left to the engine, which knows the memory that is really free,
    unless somebody chose one."""
    settings, outcome = plan.settings, plan.outcome
    return EngineOptions(
        engine_dir=str(engine_dir),
        backend=outcome.backend,
        devices=with_those_elsewhere([uuid for group in outcome.device_groups for uuid in group], settings.nnodes),
        replicas=outcome.replicas,
        max_model_len=settings.max_model_len or 0,
        max_num_seqs=outcome.max_num_seqs,
        max_num_batched_tokens=outcome.max_num_batched_tokens,
        memory_fraction=settings.memory_fraction,
        kv_cache_dtype=cast(KvCacheDtype, outcome.kv_cache),
        max_step_stretch=settings.max_step_stretch,
        prefix_caching=settings.prefix_caching,
        cuda_graphs=settings.cuda_graphs,
        persistent_decode=settings.persistent_decode,
        batch_invariant=settings.batch_invariant,
        attention=settings.attention,
        seed=settings.seed,
        verify_digests=False,  # the start has checked every file, with stamps, so that only the first load reads all
    )


def options_of_directory(
    engine_dir: Path, manifest: EngineManifest, settings: Settings, machine: Hardware
) -> EngineOptions:
    """For an engine directory that the user names: no selection, since its manifest says what it was built for. Raises
    HardwareError if this machine cannot run it, SettingsError for kernels that its backend does not have and for
    settings that ask for another engine."""
    for name in ("precision", "tp_size", "pp_size", "backend"):
        asked, built = getattr(settings, name), getattr(manifest, name)
        if asked not in (None, built):
            raise SettingsError(
                f"{name} {asked} was asked for, and the engine in {engine_dir} was built for {name} {built}",
                hint=f"leave --{name.replace('_', '-')} out, or serve the checkpoint that it was built from",
            )
    _check_attention(settings, manifest.backend)
    _check_batch_invariant(settings, manifest.backend, manifest.scheme)
    options = EngineOptions(
        engine_dir=str(engine_dir),
        backend=manifest.backend,
        devices=with_those_elsewhere(devices_of_directory(manifest, settings, machine), settings.nnodes),
        replicas=settings.replicas or 1,
        max_model_len=settings.max_model_len or 0,
        memory_fraction=settings.memory_fraction,
        kv_cache_dtype=settings.kv_cache_dtype,
        max_step_stretch=settings.max_step_stretch,
        prefix_caching=settings.prefix_caching,
        cuda_graphs=settings.cuda_graphs,
        persistent_decode=settings.persistent_decode,
        batch_invariant=settings.batch_invariant,
        attention=settings.attention,
        seed=settings.seed,
        verify_digests=False,
    )
    chosen = {
        name: value
        for name in ("max_num_seqs", "max_num_batched_tokens")
        if (value := getattr(settings, name)) is not None
    }
    return msgspec.structs.replace(options, **chosen)


def devices_of_build(plan: Plan) -> tuple[str, ...]:
    """UUIDs of the GPUs that will serve the engine, which is also built and tried there: others may be busy. None for
    whatever there is: on the CPU, and on several nodes, each of which builds all ranks."""
    return () if plan.settings.nnodes > 1 else tuple(uuid for group in plan.outcome.device_groups for uuid in group)


def devices_of_node(plan: Plan, machine: Hardware) -> tuple[str, ...]:
    """GPUs of this machine, one of several nodes, for its ranks of what node 0 has selected. HardwareError."""
    outcome = plan.outcome
    place = next(place for place in plan.selection.places if place.order == outcome.order)
    count = ranks_of_a_node(outcome.tp_size, outcome.pp_size, plan.settings.nnodes)
    return own_devices(machine, count, place.compute_capability, outcome.requires_bytes_per_gpu or 0)


def devices_of_directory(manifest: EngineManifest, settings: Settings, machine: Hardware) -> tuple[str, ...]:
    """GPUs of the engine's compute capability, one per rank of each replica that this machine has: identical and well
    linked ones. HardwareError; SettingsError if several nodes cannot share the ranks."""
    on_node = ranks_of_a_node(manifest.tp_size, manifest.pp_size, settings.nnodes)
    if manifest.compute_capability is None:
        return ()
    fitting = [gpu for gpu in machine.usable_gpus if gpu.compute_capability == manifest.compute_capability]
    replicas = settings.replicas or 1
    needed = on_node * replicas
    if len(fitting) < needed:
        capability = ".".join(map(str, manifest.compute_capability))
        each = f" for {replicas} replicas" if replicas > 1 else ""
        raise HardwareError(
            f"the engine needs {counted(needed, 'GPU')} of compute capability {capability}{each}; here are "
            f"{len(fitting)}",
            hint=machine.problem or "build it here, from its checkpoint",
        )
    alike = [place for place in places(machine, profiles.load_gpu_facts()) if any(gpu in fitting for gpu in place.gpus)]
    chosen = next((place for place in alike if len(place.gpus) >= needed), Place(0, tuple(fitting)))
    return tuple(gpu.uuid for team in chosen.teams(on_node, 0, replicas) for gpu in team)
