"""What the commands that do work have in common: settings with logging set up, a checkpoint, an engine, a result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from appliance import checkpoint, logs
from appliance.commands import progress
from appliance.launch.prepare import prepare
from appliance.settings import Settings, export_hub_environment, load, secrets_of


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of a command that logs, as `serve` logs."""
    settings = load(vars(args))
    logs.configure(settings.log_level, settings.json_logging, process="appliance", secrets=secrets_of(settings))
    for warning in settings.warnings:
        logs.say(warning)
    return settings


def obtain(settings: Settings) -> Path:
    """The verified engine of these settings: found, fetched or built."""
    return Path(prepare(settings, progress.watch).engine_dir)


def resolved(settings: Settings) -> Path:
    """The checkpoint's directory, downloaded if need be."""
    export_hub_environment(settings)
    with progress.shown(f"downloading {settings.model}") as show:
        return checkpoint.resolve(
            settings.model, settings.cache_dir, offline=settings.offline, token=settings.hf_token, progress=show
        )


def print_paths(args: argparse.Namespace, **paths: object) -> None:
    """A command's result: one path or name a line, or one JSON object with `--json`."""
    if args.json:
        print(json.dumps(paths, default=str))
        return
    for value in paths.values():
        for item in value if isinstance(value, list | tuple) else [value]:
            if item is not None:
                print(item)


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the result as one JSON object, for scripts")


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table for people, each column as wide as its widest cell; a row may end early."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows), default=0))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
