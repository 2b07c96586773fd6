"""`completion`: shell code that completes commands, flags and their values; and what it asks back of this program.

The shell runs the program with the line typed so far (argcomplete's protocol), so values that only a machine knows are
completed too: profiles, engines of the cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from appliance.settings import load, specs

SHELLS = ("bash", "zsh", "fish")
PROGRAMS = ("appliance", "entrypoint.py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="whose completion to print")


def run(args: argparse.Namespace) -> int:
    """Prints code to evaluate: `eval "$(appliance completion bash)"`."""
    from argcomplete.shell_integration import shellcode

    if args.shell == "fish":
        print("\n".join(shellcode([program], shell="fish") for program in PROGRAMS))
    else:
        print(shellcode(list(PROGRAMS), shell=args.shell))
    return 0


def answer(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and exit."""
    from argcomplete.finders import CompletionFinder

    for action in _actions(parser):
        completer = _COMPLETERS.get(action.dest) or _of_setting(action.dest)
        if completer is not None:
            action.completer = completer  # type: ignore[attr-defined]
    CompletionFinder()(parser)


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Of a parser and all below it."""
    found = []
    for action in parser._actions:
        found.append(action)
        if isinstance(action, argparse._SubParsersAction):
            for child in {id(child): child for child in action.choices.values()}.values():
                found += _actions(child)
    return found


def _of_setting(name: str) -> Callable[..., list[str]] | None:
    """The values that a setting allows; files for a path (None: the shell's own way), nothing for numbers and text."""
    spec = specs().get(name)
    if spec is None or spec.kind is Path:
        return None
    choices = list(spec.choices)
    return lambda **_: choices


def _profiles(**_: Any) -> list[str]:
    from appliance.profiles import load_profiles
    from appliance.profiles.names import candidates

    return [candidate.name for candidate in candidates(load_profiles(), None, None)]


def _engines(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    from appliance.engines import EngineStore

    return [engine.key for engine in EngineStore(load(vars(parsed_args)).cache_dir).list_engines()]


def _directories_or_builtin(prefix: str, **_: Any) -> list[str]:
    from argcomplete.completers import DirectoriesCompleter

    found: list[str] = list(DirectoriesCompleter()(prefix))
    return [*found, "builtin"]


_COMPLETERS: dict[str, Callable[..., list[str]]] = {
    "profile": _profiles,
    "key": _engines,
    "model": _directories_or_builtin,
}
