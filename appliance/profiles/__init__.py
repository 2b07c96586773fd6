"""Optimization profiles: load them, predict memory and speed, select one for a model on a machine, and explain.

`select` is a pure function of values; `select_here` fills in the project's profiles, GPU facts and what this build
contains. Never imports torch; knows nothing of how hardware is detected or engines are built.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from appliance.profiles.capabilities import BackendFacts, Capabilities, SchemeFacts, capabilities
from appliance.profiles.explain import engine_values, explain_json, explain_text, list_profiles_text
from appliance.profiles.gpus import facts_of
from appliance.profiles.judge import Outcome
from appliance.profiles.load import GpuFacts, Profile, default_directory, load_gpu_facts, load_profiles
from appliance.profiles.overrides import Overrides
from appliance.profiles.reasons import reasons, require
from appliance.profiles.select import Selection, select
from appliance.types import Hardware, ModelConfig, Objective

__all__ = [
    "BackendFacts",
    "Capabilities",
    "GpuFacts",
    "Outcome",
    "Overrides",
    "Profile",
    "SchemeFacts",
    "Selection",
    "capabilities",
    "default_directory",
    "engine_values",
    "explain_json",
    "explain_text",
    "facts_of",
    "list_profiles_text",
    "load_gpu_facts",
    "load_profiles",
    "reasons",
    "require",
    "select",
    "select_here",
]


def select_here(
    hardware: Hardware,
    model: ModelConfig,
    objective: Objective = "throughput",
    overrides: Overrides = Overrides(),  # noqa: B008  (frozen)
    *,
    directory: Path | None = None,
    refused: Mapping[str, str] | None = None,
) -> Selection:
    """`select` with the profiles of `directory` (default: the project's) and what this build contains."""
    return select(
        hardware,
        model,
        load_profiles(directory),
        objective,
        overrides,
        capabilities=capabilities(),
        gpu_facts=load_gpu_facts(directory),
        refused=refused,
    )
