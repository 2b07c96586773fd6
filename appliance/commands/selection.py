"""`select`, `list-model-profiles` and `serve --dry-run`: what would be served here, and why. They change nothing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from appliance import hardware, profiles
from appliance.checkpoint import names_dataset, read_model_config, resolve
from appliance.engines import EngineStore, is_local, read_manifest, redact
from appliance.engines.manifest import MANIFEST_NAME
from appliance.errors import ApplianceError, CheckpointError
from appliance.launch.plan import build_request, choose, config_only, make_plan, options_of_directory
from appliance.profiles import Selection
from appliance.settings import Settings, add_flags, cuda_visible_devices, load, specs
from appliance.settings_rules import check_place_of_node
from appliance.types import Hardware

# Settings that decide or describe a selection.
NAMES = [
    "model",
    "cache",
    "offline",
    "hf_token",
    "profile",
    "tags",
    "objective",
    "precision",
    "kv_cache_dtype",
    "tp_size",
    "pp_size",
    "replicas",
    "backend",
    "require_gpu",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "memory_fraction",
    "attention",
    "batch_invariant",
    "nnodes",
]


def add_hardware_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hardware", metavar="FILE", type=Path, help="a recorded machine (tests/hardware/*.yaml) instead of this one"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_hardware_flag(parser)
    add_flags(parser, NAMES)


def machine(settings: Settings, recorded: Path | None) -> Hardware:
    """This machine, or the recorded one. HardwareError if a GPU is required and missing."""
    found = hardware.detect(cuda_visible_devices()) if recorded is None else hardware.load(recorded)
    if settings.require_gpu:
        hardware.require_gpu(found)
    return found


def config_directory(settings: Settings) -> Path:
    """Where the model's config.json is; of a hub model only that file is downloaded."""
    return config_only(settings) or resolve(
        settings.model, settings.cache_dir, offline=settings.offline, token=settings.hf_token
    )


def selection_of(settings: Settings, recorded: Path | None) -> Selection:
    model = read_model_config(config_directory(settings))
    return choose(settings, machine(settings, recorded), model)


def run_select(args: argparse.Namespace) -> int:
    """Exit code 3 if nothing can serve, so that scripts can tell."""
    settings = load(vars(args))
    selection = selection_of(settings, args.hardware)
    if selection.selected is not None:
        make_plan(settings, selection, Path())  # kernels that were asked for and that it does not have
    if args.json:
        print(json.dumps(profiles.explain_json(selection), indent=1))
    elif args.explain:
        print(profiles.explain_text(selection))
    elif selection.selected is not None:
        print(selection.selected.name)
        for reason in profiles.reasons(selection):
            print(f"- {reason}")
    if selection.selected is None and not args.json and not args.explain:
        profiles.require(selection)
    return 0 if selection.selected is not None else 3


def run_list(args: argparse.Namespace) -> int:
    selection = selection_of(load(vars(args)), args.hardware)
    if args.json:
        print(json.dumps(profiles.explain_json(selection)["profiles"], indent=1))
    else:
        print(profiles.list_profiles_text(selection))
    return 0


def run_dry(args: argparse.Namespace) -> int:
    """`serve --dry-run`: every setting with its origin, the selection, the engine. Downloads and builds nothing."""
    settings = load(vars(args))
    facts: dict[str, Any] = {"warnings": list(settings.warnings)}
    code = 0
    try:
        if args.hardware is None:
            check_place_of_node(settings)  # as a start on this machine does
        settings, planned = _planned(settings, args.hardware)
        facts |= planned
    except ApplianceError as error:
        facts["problem"], code = str(error), error.exit_code
    shown = [(name, settings.shown(name), str(settings.origin(name))) for name in specs()]
    shown = [(n, str(settings.cache_dir) if n == "cache" else value, origin) for n, value, origin in shown]
    if args.json:
        rows = {name: {"value": value, "origin": origin} for name, value, origin in shown}
        print(json.dumps({"settings": rows, **facts}, indent=1))
        return code
    widths = [max(len(row[i]) for row in shown) for i in range(2)]
    for name, value, origin in shown:
        print(f"{name:<{widths[0]}}  {value:<{min(widths[1], 48)}}  {origin}")
    for warning in settings.warnings:
        print(f"warning: {warning}")
    print()
    for name in ("profile", "profile_id", "engine", "engine_state", "problem"):
        if name in facts:
            print(f"{name.replace('_', ' '):<12}  {facts[name] or '-'}")
    for reason in facts.get("reasons", []):
        print(f"- {reason}")
    return code


def _to_come(settings: Settings) -> str:
    """What a start would do for an engine that is not in the cache."""
    if settings.engine_source is None or (settings.offline and not is_local(settings.engine_source)):
        return "to be built"
    published = ", and published there" if settings.engine_publish else ""
    return f"to be fetched from {redact(settings.engine_source)} if it is there, else to be built{published}"


def _planned(settings: Settings, recorded: Path | None) -> tuple[Settings, dict[str, Any]]:
    """Settings with the profile's values, and what would be served. The engine's key needs the weights, so it is only
    known of a model that is here."""
    given = Path(settings.model).expanduser()
    if (given / MANIFEST_NAME).is_file():  # nothing is selected or built
        manifest = read_manifest(given)
        options_of_directory(given, manifest, settings, machine(settings, recorded))
        what = f"{manifest.precision} for the {manifest.backend} backend, built from {manifest.build.source}"
        return settings, {"profile": "-", "engine": manifest.key, "engine_state": f"given: {what}", "reasons": []}
    selection = selection_of(settings, recorded)
    checkpoint = None
    try:
        checkpoint = resolve(settings.model, settings.cache_dir, offline=True)
    except ApplianceError:
        plan = make_plan(settings, selection, Path())
        engine, state = None, "its key is not known before the checkpoint is downloaded"
    else:
        from appliance.builder import key_of
        from appliance.builder.calibration_data import tokens_for

        plan = make_plan(settings, selection, checkpoint)
        try:
            request = build_request(plan)
            tokens_for(request, selection.model)  # text that a build would refuse
        except CheckpointError as error:
            data = settings.calibration_data
            if settings.offline or data is None or not names_dataset(data):
                raise  # as a start would
            engine, state = None, f"its key is not known before its calibration data is downloaded: {error.message}"
        else:
            engine = key_of(request)
            found = EngineStore(settings.cache_dir).find(engine)
            state = f"found in {found}" if found else _to_come(settings)
    facts = {"profile": plan.outcome.name, "profile_id": plan.outcome.id, "engine": engine, "engine_state": state}
    return plan.settings, facts | {"reasons": list(profiles.reasons(selection))}
