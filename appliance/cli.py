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

from appliance import __version__, termination
from appliance.errors import ApplianceError
from appliance.settings import add_flags, load, termination_log, yield_idle_threads

DESCRIPTION = """\
Serves a language model behind an OpenAI-compatible API: detects the GPUs, selects an optimization profile, builds an
engine (or finds it in the cache) and serves it. Without a command it is `serve`.
"""
EPILOG = """\
Settings may also be given as APPLIANCE_<NAME> or the matching NIM_ variables, or in a YAML file (--config).
Exit codes: 0 done, 2 wrong settings, 3 hardware or no profile fits, 4 checkpoint, 5 cache not writable, 6 disk full,
7 engine build, 8 engine crashed too often.
"""

Parser = argparse.ArgumentParser
_CONTAINER_COMMANDS = ("serve", "build", "download-to-cache", "create-model-store")


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
        raise_usage("--hardware is only for --dry-run: a server needs the machine it runs on")
    # Until the server's own handlers are there; as PID 1 of a container the signal would be lost without one.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))  # nothing runs yet that could be cut off
    from appliance.launch.server import serve

    code = serve(load(vars(args)))
    logging.shutdown()
    if any(not thread.daemon and thread is not threading.main_thread() for thread in threading.enumerate()):
        sys.stderr.flush()
        os._exit(code)  # a library's download thread must not hold up a server that was told to go
    return code


def raise_usage(message: str) -> None:
    from appliance.errors import SettingsError

    raise SettingsError(message)


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
    from appliance.commands.selection import add_arguments

    parser.add_argument("--json", action="store_true", help="for scripts")
    add_arguments(parser)
    parser.add_argument("--host", default=argparse.SUPPRESS, help="address whose port is tried")
    parser.add_argument("--port", default=argparse.SUPPRESS, help="port that is tried")


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


def version(args: argparse.Namespace) -> int:
    print(__version__)
    return 0


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
    "download-to-cache": Command("download a model, with -p or --all its engines too", add_download, download),
    "create-model-store": Command("an engine as a directory that serves by itself", add_create_store, create_store),
    "engines": Command("list, verify, remove, publish and fetch engines", add_engines, engines),
    "bench": Command("measure speed and quality", add_bench, run_bench),
    "doctor": Command("check this machine before anything is downloaded, with fixes", add_doctor, run_doctor),
    "health": Command("whether the server that runs here is ready; for HEALTHCHECK", add_health, health),
    "version": Command("print the version", lambda parser: None, version),
}


def make_parser(chosen: str | None) -> Parser:
    """The parser; only the chosen command gets its arguments, since adding them imports what they belong to."""
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
    args = make_parser(words[0]).parse_args(words)
    try:
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
        raise error
    explained = full(Path(error.filename or Path.cwd()), "a file")
    _leave_reason(args, explained)
    print(f"error: {explained.message}\n  {explained.hint}", file=sys.stderr)
    return explained.exit_code


if __name__ == "__main__":
    sys.exit(main())
