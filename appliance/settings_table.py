"""What a row of the settings table is: how an annotated, described field becomes a typed value, a flag and a variable.

Knows nothing of which settings there are (settings.py) and reads nothing from anywhere.
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from appliance.errors import SettingsError


def row(
    default: Any,
    help: str,
    *,
    group: str,
    also: str = "",
    limits: tuple[float, float] | None = None,
    secret: bool = False,
) -> Any:
    """A dataclass field of the table. `also`: variables accepted beside APPLIANCE_<NAME>, separated by blanks, the
    first that is set wins; a leading "!" inverts a boolean. `limits`: smallest and largest allowed number."""
    return field(default=default, repr=not secret, metadata={"row": (help, group, tuple(also.split()), limits, secret)})


@dataclass(frozen=True)
class Spec:
    """A row, with what its annotation says."""

    name: str
    help: str
    group: str
    also: tuple[str, ...]
    limits: tuple[float, float] | None
    secret: bool
    default: Any
    kind: type  # str, int, float, bool, Path or tuple (of strings)
    choices: tuple[str, ...]  # of a Literal; empty otherwise

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "APPLIANCE_" + self.name.upper()

    @property
    def variables(self) -> tuple[str, ...]:
        """Every variable that sets it, the strongest first; "!" marks an inverted boolean."""
        return (self.variable, *self.also)

    @property
    def allowed(self) -> str:
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.limits:
            low, high = self.limits
            return f"{'a whole number' if self.kind is int else 'a number'} from {low:.10g} to {high:.10g}"
        return {bool: "true or false", tuple: "a comma-separated list", Path: "a path"}.get(self.kind, "text")

    def parse(self, raw: object, where: str) -> Any:
        """A typed value from text (flag, variable) or YAML. SettingsError names `where`, value and what is allowed."""
        try:
            value = _CONVERT[self.kind](raw)
            if self.choices and value not in self.choices:
                value = next(choice for choice in self.choices if choice.lower() == value.lower())
            if self.limits and not self.limits[0] <= value <= self.limits[1]:
                raise ValueError
        except (ValueError, TypeError, StopIteration):
            shown = "the given value" if self.secret else repr(raw)
            raise SettingsError(f"{where}: {shown} is not allowed", hint=f"allowed: {self.allowed}") from None
        return value

    def add_flag(self, group: Any) -> None:
        """Declare the flag on an argparse group. Its value stays text, absent if not given: `parse` does the rest."""
        shown = str(self.default).lower() if self.kind is bool else self.default
        default = "" if self.default in (None, (), "") else f" [{shown}]"
        options: dict[str, Any] = {"dest": self.name, "default": argparse.SUPPRESS, "help": f"{self.help}{default}"}
        if self.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = "{" + ",".join(self.choices) + "}" if self.choices else _METAVAR[self.kind]
        group.add_argument(self.flag, **options)


def specs_of(table: type) -> dict[str, Spec]:
    """The rows of a dataclass by name, in order of declaration."""
    hints = get_type_hints(table)
    found: dict[str, Spec] = {}
    for item in fields(table):
        if "row" not in item.metadata:
            continue
        hint: Any = hints[item.name]
        if get_origin(hint) in (Union, types.UnionType):
            hint = next(arg for arg in get_args(hint) if arg is not types.NoneType)
        choices: tuple[str, ...] = get_args(hint) if get_origin(hint) is Literal else ()
        kind = str if choices else get_origin(hint) or hint
        help, group, also, limits, secret = item.metadata["row"]
        found[item.name] = Spec(item.name, help, group, also, limits, secret, item.default, kind, choices)
    return found


def add_flags(parser: argparse.ArgumentParser, specs: Iterable[Spec]) -> None:
    """A flag per row, grouped as in the table."""
    groups: dict[str, Any] = {}
    for spec in specs:
        if spec.group not in groups:
            groups[spec.group] = parser.add_argument_group(spec.group)
        spec.add_flag(groups[spec.group])


def _to_bool(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    text = str(raw).strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    raise ValueError


def _to_int(raw: object) -> int:
    if isinstance(raw, bool | float):
        raise ValueError
    return int(str(raw).strip())


def _to_float(raw: object) -> float:
    if isinstance(raw, bool):
        raise ValueError
    return float(str(raw))


def _to_text(raw: object) -> str:
    if isinstance(raw, bool | Mapping | list) or raw is None or not str(raw).strip():
        raise ValueError
    return str(raw).strip()


def _to_names(raw: object) -> tuple[str, ...]:
    items = raw if isinstance(raw, list | tuple) else _to_text(raw).split(",")
    return tuple(_to_text(item) for item in items if str(item).strip())


def _to_path(raw: object) -> Path:
    return Path(_to_text(raw)).expanduser()


_CONVERT: dict[type, Callable[[object], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_text,
    tuple: _to_names,
    Path: _to_path,
}
_METAVAR: dict[type, str] = {int: "N", float: "X", str: "TEXT", tuple: "A,B", Path: "PATH"}
