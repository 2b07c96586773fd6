"""Strict YAML files: what is unreadable or unknown is a SettingsError naming the file, the key and what is known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from appliance.errors import SettingsError


class _Loader(yaml.SafeLoader):
    """YAML lets the last of two equal keys win, which hides mistakes: here the second is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key != "<<" and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Plain values only. Raises yaml.YAMLError, also for a key that a mapping repeats."""
    return yaml.load(text, _Loader)


def read_yaml(path: Path, what: str) -> Any:
    """The parsed content of a file; `what` names its kind in messages, e.g. "profile"."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the {what} file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"the {what} file {path} is not valid YAML: {error}") from error


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like a mistyped one, None when nothing comes close."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), list(by_lower), n=1)
    return by_lower[found[0]] if found else None


def check_keys(entry: Any, known: Iterable[str], where: str) -> None:
    """ValueError unless `entry` is a mapping with only known keys."""
    names = list(known)
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a mapping, with keys among {', '.join(names)}")
    for key in entry:
        if key not in names:
            near = nearest(str(key), names)
            guess = f", did you mean {near!r}?" if near else f", known are {', '.join(names)}"
            raise ValueError(f"unknown key {key!r} in {where}{guess}")
