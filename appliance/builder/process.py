"""The builder as a child process: one request in, Progress messages and then Built or Failed out."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import msgspec

from appliance import errors
from appliance.builder.request import BuildRequest
from appliance.ipc import Built, ChildEnd, Failed, Progress, Shutdown, ToServer

RunFn = Callable[[BuildRequest, Callable[[Progress], None]], Path]

_SIGTERM_EXIT = 128 + signal.SIGTERM
# Seconds that a thread in Python keeps the others waiting. Those that read and write need the interpreter for moments
# only, but often, and others compile kernels meanwhile; at Python's 5 ms they would mostly wait.
_SWITCH_SECONDS = 1e-4


class _Channel:
    """To the server, or without one as lines to stderr. Messages may come from several threads; a ZeroMQ socket may be
    used by one at a time."""

    def __init__(self, address: str | None) -> None:
        self._end = ChildEnd(address) if address else None
        self._lock = threading.Lock()

    def send(self, message: ToServer) -> None:
        if self._end is None:
            print(_line(message), file=sys.stderr, flush=True)
            return
        with self._lock:
            self._end.send(message)
            if isinstance(self._end.receive(0), Shutdown):
                os.kill(os.getpid(), signal.SIGTERM)

    def close(self) -> None:
        if self._end is not None:
            with self._lock:
                self._end.close()


def _line(message: ToServer) -> str:
    if isinstance(message, Progress):
        eta = "" if message.eta_seconds is None else f", {message.eta_seconds:.0f} s left"
        return f"{message.phase} {message.percent:5.1f}% {message.detail}{eta}"
    if isinstance(message, Built):
        return f"built {message.engine_dir} in {message.seconds:.1f} s"
    return f"{message.error}: {message.message}" if isinstance(message, Failed) else repr(message)


def _failed(error: Exception) -> tuple[Failed, int]:
    """The message and exit code of an error, named by its nearest class in errors.py. One that was not raised on
    purpose is a failed build."""
    if not isinstance(error, errors.ApplianceError):
        return Failed("EngineBuildError", f"{type(error).__name__}: {error}"), errors.EngineBuildError.exit_code
    named = next(cls for cls in type(error).__mro__ if cls.__module__ == errors.__name__)
    return Failed(named.__name__, error.message, error.hint), error.exit_code


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(_SIGTERM_EXIT)  # unwinds, so that staging directories go


def _read_request(text: str) -> BuildRequest:
    data = text.encode() if text.lstrip().startswith("{") else Path(text).read_bytes()
    return msgspec.json.decode(data, type=BuildRequest)


def _build(request: BuildRequest, send: Callable[[Progress], None]) -> Path:
    from appliance.builder.build import build  # imports torch: after the first sign of life
    from appliance.builder.phases import Phases
    from appliance.clock import process_age_seconds

    phases = Phases()
    phases.add("imports", process_age_seconds())
    return build(request, send, phases=phases)


def main(argv: list[str] | None = None, run: RunFn | None = None) -> int:
    """Exit code: 0, or that of the error (errors.py). `run` is a seam for tests."""
    parser = argparse.ArgumentParser(prog="appliance.builder", description="Build one engine.")
    parser.add_argument("--ipc", metavar="ADDRESS", help="where to send messages; without it they go to stderr")
    parser.add_argument("--request", metavar="FILE|JSON", required=True, help="a BuildRequest as JSON, or its file")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    sys.setswitchinterval(_SWITCH_SECONDS)
    started = time.monotonic()
    channel = _Channel(args.ipc)
    try:
        request = _read_request(args.request)
        channel.send(Progress(phase="build", detail="starting the builder"))
        engine_dir = (run or _build)(request, channel.send)
        channel.send(Built(str(engine_dir), engine_dir.name, round(time.monotonic() - started, 3)))
        return 0
    except Exception as error:
        if not isinstance(error, errors.ApplianceError):
            traceback.print_exc()
        message, code = _failed(error)
        channel.send(message)
        return code
    finally:
        channel.close()
