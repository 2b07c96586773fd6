"""Finds plug-ins by scanning their folder, without importing them.

A plug-in is one file in `appliance/<kind>/` whose top level holds a literal `PLUGIN = {...}` with at least "name". The
literal is read from the source with `ast`, so the torch-free control plane can list what exists (architectures,
precisions, backends) while the module itself, which may import torch, is imported only by `load`.
"""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

KINDS = ("models", "quantization", "backends")


@dataclass(frozen=True)
class Plugin:
    kind: str  # "models", "quantization" or "backends"
    name: str  # PLUGIN["name"]
    module: str  # dotted module name, importable by `load`
    facts: dict[str, Any]  # the PLUGIN literal

    def parameters_on(self, compute_capability: tuple[int, int] | None) -> dict[str, Any]:
        """The parameters of a quantization scheme, as it has them by itself: "parameters", replaced by those of
        "parameters_from" for GPUs from a compute capability on. None: the CPU."""
        parameters: dict[str, Any] = dict(self.facts.get("parameters", {}))
        starts: dict[str, dict[str, Any]] = self.facts.get("parameters_from", {})
        for start in sorted(starts, key=_capability):
            if compute_capability is not None and tuple(compute_capability) >= _capability(start):
                parameters |= starts[start]
        return parameters


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def _read_literal(path: Path) -> dict[str, Any] | None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "PLUGIN" for t in node.targets):
            value = ast.literal_eval(node.value)
            assert isinstance(value, dict) and "name" in value, f"{path}: PLUGIN must be a literal dict with a name"
            return value
    return None


@cache
def plugins(kind: str) -> dict[str, Plugin]:
    """All plug-ins of a kind by name, in file-name order. Imports none of them."""
    assert kind in KINDS, kind
    found: dict[str, Plugin] = {}
    for path in sorted((Path(__file__).parent / kind).glob("*.py")):
        facts = _read_literal(path) if path.stem != "__init__" else None
        if facts is not None:
            name = str(facts["name"])
            found[name] = Plugin(kind, name, f"appliance.{kind}.{path.stem}", facts)
    return found


def load(kind: str, name: str) -> ModuleType:
    """Import a plug-in's module. KeyError if there is none of that name."""
    return importlib.import_module(plugins(kind)[name].module)


def architectures() -> dict[str, Plugin]:
    """Model plug-ins by each Hugging Face architecture name (`config.json: architectures`) they serve."""
    return {arch: plugin for plugin in plugins("models").values() for arch in plugin.facts["architectures"]}
