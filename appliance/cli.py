"""The command line: every command, its arguments, and how errors become exit codes. The composition root.

Heavy modules are imported by the command that needs them, so `--help` is quick and `serve` opens its port at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from appliance import __version__, termination
from appliance.errors import ApplianceError, SettingsError
from appliance.settings import add_flags, load, termination_log, words_to_complete, yield_idle_threads

DESCRIPTION = """\
Serves a language model behind an OpenAI-compatible API: detects the GPUs, selects an optimization profile, builds an
engine (or finds it in the cache) and serves it. Without a command it is `serve`.
"""
EPILOG = """\
Settings may also be given as APPLIANCE_<NAME> or the matching NIM_ variables, or in a YAML file (--config).
Exit codes: 0 done, 2 wrong settings, 3 hardware or no profile fits, 4 checkpoint, 5 cache not writable, 6 disk full,
7 engine build, 8 engine crashed too often, 9 another node is missing.
"""

_CONTAINER_COMMANDS = ("serve", "build", "download-to-cache", "create-model-store", "bundle")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error is said, and not with the list of all flags."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message, hint=f"`{self.prog} --help` lists what there is")

    def refuse(self, words: Sequence[str], unknown: Sequence[str]) -> NoReturn:
        """For words that no argument of the command in `words` took. SettingsError with its nearest flag."""
        from appliance.strict import nearest

        chosen = self._chosen(words)
        flags = [flag for parser in chosen for flag in parser._option_string_actions]
        near = nearest(unknown[0].partition("=")[0], flags) if unknown[0].startswith("-") else None
        raise SettingsError(
            f"unknown argument {unknown[0]!r}" + (f", did you mean {near}?" if near else ""),
            hint=f"`{chosen[-1].prog} --help` lists what there is",
        )

    def _chosen(self, words: Sequence[str]) -> list[Parser]:
        """This parser and those of the commands that `words` name, the innermost last."""
        for at, word in enumerate(words):
            for action in self._actions:
                if isinstance(action, argparse._SubParsersAction) and word in action.choices:
                    return [self, *action.choices[word]._chosen(words[at + 1 :])]
        return [self]


@dataclass(frozen=True)
class Command:
    help: str
    add_arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]


# ---------------------------------------------------------------- serve


def add_serve(parser: Parser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print each setting, its origin and the choice; stop")
    parser.add_argument("--json", action="store_true", help="the dry run as JSON")
    parser.add_argument("--hardware", metavar="FILE", type=Path, help="a recorded machine, for the dry run")
    add_flags(parser)


def serve(args: argparse.Namespace) -> int:
    if args.dry_run:
        from appliance.commands.selection import run_dry

        return run_dry(args)
    if args.hardware is not None:
        raise SettingsError("--hardware is only for --dry-run: a server needs the machine it runs on")
    if args.json:
        raise SettingsError("--json is only for --dry-run", hint="--log-json makes log lines JSON")
    # Until the server's own handlers are there; as PID 1 of a container the signal would be lost without one.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))  # nothing runs yet that could be cut off
    from appliance.launch.server import serve

    code = serve(load(vars(args)))
    logging.shutdown()
    if any(not thread.daemon and thread is not threading.main_thread() for thread in threading.enumerate()):
        sys.stderr.flush()
        os._exit(code)  # a library's download thread must not hold up a server that was told to go
    return code


# ---------------------------------------------------------------- looking


def add_select(parser: Parser) -> None:
    from appliance.commands.selection import add_arguments

    parser.add_argument("--explain", action="store_true", help="every profile with its score or what rules it out")
    parser.add_argument("--json", action="store_true", help="the same as JSON: selected, wanted, profiles")
    add_arguments(parser)


def select(args: argparse.Namespace) -> int:
    from appliance.commands.selection import run_select

    return run_select(args)


def add_list(parser: Parser) -> None:
    from appliance.commands.selection import add_arguments

    parser.add_argument("--json", action="store_true", help="for scripts")
    add_arguments(parser)


def list_profiles(args: argparse.Namespace) -> int:
    from appliance.commands.selection import run_list

    return run_list(args)


def add_doctor(parser: Parser) -> None:
    from appliance.commands.selection import NAMES, add_hardware_flag

    parser.add_argument("--json", action="store_true", help="for scripts")
    add_hardware_flag(parser)
    place = ["node_rank", "master_addr", "master_port", "host", "port", "health_port"]
    add_flags(parser, [*NAMES, "engine_source", "engine_source_timeout", "engine_publish", *place])


def run_doctor(args: argparse.Namespace) -> int:
    """Exit code 1 if anything failed that would stop a start."""
    from appliance import doctor, hardware
    from appliance.settings import cuda_visible_devices

    settings = load(vars(args))
    found = hardware.detect(cuda_visible_devices()) if args.hardware is None else hardware.load(args.hardware)
    checks = doctor.examine(settings, found)
    print(doctor.as_json(checks) if args.json else doctor.as_text(checks))
    return 0 if doctor.passed(checks) else 1


def add_health(parser: Parser) -> None:
    from appliance.commands.health import add_arguments

    add_arguments(parser)


def health(args: argparse.Namespace) -> int:
    from appliance.commands.health import run_health

    return run_health(args)


def add_version(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="for scripts, with the versions of what decides results")


def version(args: argparse.Namespace) -> int:
    from appliance.commands.version import run_version

    return run_version(args)


def add_completion(parser: Parser) -> None:
    from appliance.commands.completion import add_arguments

    add_arguments(parser)


def completion(args: argparse.Namespace) -> int:
    from appliance.commands.completion import run

    return run(args)


# ---------------------------------------------------------------- engines


def add_build(parser: Parser) -> None:
    from appliance.commands.engine import add_build_arguments

    add_build_arguments(parser)


def build(args: argparse.Namespace) -> int:
    from appliance.commands.engine import run_build

    return run_build(args)


def add_download(parser: Parser) -> None:
    from appliance.commands.engine import add_download_arguments

    add_download_arguments(parser)


def download(args: argparse.Namespace) -> int:
    from appliance.commands.engine import run_download

    return run_download(args)


def add_create_store(parser: Parser) -> None:
    from appliance.commands.engine import add_store_arguments

    add_store_arguments(parser)


def create_store(args: argparse.Namespace) -> int:
    from appliance.commands.engine import run_create_store

    return run_create_store(args)


def add_engines(parser: Parser) -> None:
    from appliance.commands.engine import add_engines_arguments

    add_engines_arguments(parser)


def engines(args: argparse.Namespace) -> int:
    from appliance.commands.engine import run_engines

    return run_engines(args)


def add_bundle(parser: Parser) -> None:
    from appliance.commands.bundle import add_arguments

    add_arguments(parser)


def bundle(args: argparse.Namespace) -> int:
    from appliance.commands.bundle import run

    return run(args)


def add_bench(parser: Parser) -> None:
    from appliance import bench

    bench.add_parsers(parser)


def run_bench(args: argparse.Namespace) -> int:
    from appliance import bench

    return bench.run(args)


COMMANDS: dict[str, Command] = {
    "serve": Command("serve a model (the default)", add_serve, serve),
    "select": Command("which profile would serve a model here, or on a recorded machine, and why", add_select, select),
    "list-model-profiles": Command("all profiles: runnable, too large, incompatible", add_list, list_profiles),
    "build": Command("build the engine of a model, and publish it if asked", add_build, build),
    "download-to-cache": Command("download a model, and build engines of it", add_download, download),
    "create-model-store": Command("an engine as a directory that serves by itself", add_create_store, create_store),
    "bundle": Command("a model and its engines as one file, for machines without a network", add_bundle, bundle),
    "engines": Command("list, verify, remove, publish and fetch engines", add_engines, engines),
    "bench": Command("measure speed and quality", add_bench, run_bench),
    "doctor": Command("check this machine before anything is downloaded, with fixes", add_doctor, run_doctor),
    "health": Command("whether the server that runs here is ready; for HEALTHCHECK", add_health, health),
    "completion": Command("print shell code that completes commands, flags and values", add_completion, completion),
    "version": Command("print the version", add_version, version),
}


def make_parser(chosen: str | None) -> Parser:
    """The parser; only the chosen command gets its arguments, since adding them imports what they belong to. What it
    does not understand is a SettingsError."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="appliance", description=DESCRIPTION, epilog=EPILOG, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        child = subparsers.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        if name == chosen:
            command.add_arguments(child)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Errors raised on purpose become one line on stderr, with what to do."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
        words = ["serve", *words]
    yield_idle_threads()
    if os.getpid() == 1:  # see entrypoint.py; from here on with what `finally` has to say
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    args = argparse.Namespace(command=words[0])  # what is known of it while it is parsed
    try:
        typed = words_to_complete()
        if typed is not None:
            return _complete(typed)
        args = _parse(words)
        return COMMANDS[args.command].run(args)
    except ApplianceError as error:
        _leave_reason(args, error)
        print(f"error: {error.message}" + (f"\n  {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return _ended_by(args, error)
    except Exception as error:
        _leave_reason(args, error)
        raise


def _parse(words: Sequence[str]) -> argparse.Namespace:
    if words[0] not in COMMANDS and not words[0].startswith("-"):
        from appliance.strict import nearest

        near = nearest(words[0], COMMANDS)
        raise SettingsError(
            f"there is no command {words[0]!r}" + (f", did you mean {near!r}?" if near else ""),
            hint="`appliance --help` lists the commands",
        )
    parser = make_parser(words[0])
    args, unknown = parser.parse_known_args(words)
    if unknown:
        parser.refuse(words, unknown)
    return args


def _complete(typed: Sequence[str]) -> int:
    """Answer a shell that asks how its line could go on."""
    from appliance.commands.completion import answer

    command = next((word for word in typed if word in COMMANDS), None)
    parser = make_parser(command)
    if command is None:
        add_serve(parser)  # flags without a command are its
    answer(parser)
    return 0


def _leave_reason(args: argparse.Namespace, error: BaseException) -> None:
    """For Kubernetes, from the commands that containers are started with; not from one that looks into a container."""
    if args.command in _CONTAINER_COMMANDS:
        termination.write(error, termination_log(vars(args)))


def _ended_by(args: argparse.Namespace, error: OSError) -> int:
    from appliance.engines.disk import full, is_full

    if isinstance(error, BrokenPipeError):  # `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if not is_full(error):
        _leave_reason(args, error)
        if error.filename is None or error.strerror is None:
            raise error
        print(f"error: {error.filename}: {error.strerror}\n  check the path and its permissions", file=sys.stderr)
        return 1
    explained = full(Path(error.filename or Path.cwd()), "a file")
    _leave_reason(args, explained)
    print(f"error: {explained.message}\n  {explained.hint}", file=sys.stderr)
    return explained.exit_code


if __name__ == "__main__":
    sys.exit(main())
