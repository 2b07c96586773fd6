"""The engine process: batching core and executor behind one ipc channel.

`python -m appliance.engine_process --ipc ADDRESS`, spawned by the server.

Imports torch and the rest at once, then waits for StartEngine, so that a server may spawn it before it knows what to
load. Owns no request: what is lost with this process is re-submitted by the server's journal.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from appliance import garbage, registry
from appliance.batching.core import EngineCore
from appliance.errors import ApplianceError, RequestError
from appliance.ipc import (
    AbortRequests,
    AddRequests,
    ChildEnd,
    Failed,
    Nodes,
    NodesWanted,
    Outputs,
    Phase,
    Progress,
    Ready,
    Shutdown,
    StartEngine,
)
from appliance.runtime.remote_nodes import NodeListener, RemoteNodes, WaitForNodes
from appliance.types import EngineInfo, EngineOptions, EngineOutput, EngineRequest

if TYPE_CHECKING:
    from appliance.runtime.ranks import Member

log = logging.getLogger("appliance.engine")

_IDLE_POLL_SECONDS = 5.0  # how often an idle engine looks whether its server is still there
_PREPARE_SECONDS = 2.0  # a busy engine does one piece of what its start put off (some 20 ms) as often as this


def import_early() -> None:
    """The slow part of every start, done while the server is still deciding what to serve: torch, and what the backend
    of this machine's kind imports."""
    import torch

    import appliance.runtime.loading  # noqa: F401

    device = "gpu" if torch.cuda.is_available() else "cpu"
    for name, plugin in registry.plugins("backends").items():
        if plugin.facts.get("device") == device:
            preload = getattr(registry.load("backends", name), "preload", None)
            if preload is not None:
                preload()


def open_engine(
    options: EngineOptions, end: ChildEnd, import_seconds: float, member: Member
) -> tuple[EngineCore, EngineInfo, Callable[[], bool]]:
    """Load what `options` says, as rank 0 of `member`'s ranks, reporting progress on `end`; also what does one piece of
    work that the start put off (`LocalExecutor.prepare_more`). Raises as the backend does."""
    from appliance.runtime.loading import PhaseTimer

    backend = registry.load("backends", options.backend)
    timer = PhaseTimer({"imports": import_seconds})

    def progress(phase: Phase, detail: str, percent: float) -> None:
        end.send(Progress(phase=phase, detail=detail, percent=percent))

    loaded = backend.load(options, progress, timer, member)
    executor, info = backend.assemble(loaded, options, progress, timer)
    core = EngineCore(
        executor,
        prefix_caching=options.prefix_caching,
        seed=options.seed,
        max_step_stretch=options.max_step_stretch,
    )
    return core, info, executor.prepare_more


def join_nodes(nodes: Nodes | None, end: ChildEnd) -> RemoteNodes | None:
    """The other nodes of the engine, if there are any, once all have joined. NodeError if one does not."""
    if nodes is None:
        return None
    parent = os.getppid()

    def say(line: str) -> None:
        end.send(Progress(phase="load", detail=line))

    listener = NodeListener(nodes.address, nodes.count)
    end.send(NodesWanted(listener.port, listener.token))
    return listener.accept_all(WaitForNodes(say, nodes.timeout, lambda: os.getppid() != parent))


class EngineLoop:
    """Messages in, steps, outputs out; until Shutdown or until the server is gone. In between, what the start put off:
    one piece whenever nothing runs, and every few seconds while something does."""

    def __init__(self, core: EngineCore, end: ChildEnd, prepare_more: Callable[[], bool] = lambda: False) -> None:
        self._core = core
        self._end = end
        self._prepare_more = prepare_more
        self._prepared_at = time.monotonic()
        self._parent = os.getppid()

    def run(self) -> None:
        while self._take_messages():
            if self._core.has_work:
                self._step()
                if time.monotonic() - self._prepared_at > _PREPARE_SECONDS:
                    self._prepare_one()

    def _step(self) -> None:
        self._send(self._core.step())

    def _take_messages(self) -> bool:
        """Handle what has arrived, waiting only when there is nothing to run. False: stop."""
        while True:
            message = self._end.receive(0.0)
            if message is None and not self._core.has_work and not self._prepare_one():
                message = self._end.receive(_IDLE_POLL_SECONDS)
            match message:
                case None:
                    if self._core.has_work:
                        return True
                    if os.getppid() != self._parent:
                        log.warning("the server process is gone: stopping")
                        return False
                case AddRequests(requests=requests):
                    rejected = [self._add(request) for request in requests]
                    self._send([output for output in rejected if output is not None])
                case AbortRequests(request_ids=request_ids):
                    self._core.abort(request_ids)
                case Shutdown():
                    return False
                case StartEngine():
                    raise AssertionError("StartEngine twice")

    def _prepare_one(self) -> bool:
        """One piece of what the start put off; False if nothing is left."""
        done = self._prepare_more()
        self._prepared_at = time.monotonic() if done else float("inf")  # nothing more to look for while busy
        return done

    def _add(self, request: EngineRequest) -> EngineOutput | None:
        try:
            self._core.add_request(request)
        except RequestError as error:
            return EngineOutput(request_id=request.request_id, finish_reason="error", error=error.message)
        return None

    def _send(self, outputs: list[EngineOutput]) -> None:
        if outputs:
            self._end.send(Outputs(outputs=outputs, stats=self._core.stats()))


class RankLoss:
    """Ends this process when another rank is lost (`runtime/ranks.py`), whatever its main thread is doing: usually that
    raises the reason and fails as for any other; if it is stuck in a library, the process ends without it."""

    _MAIN_THREAD_SECONDS = 2.0

    def __init__(self, end: ChildEnd) -> None:
        """In the main thread."""
        self._end = end
        self._reason: ApplianceError | None = None
        self._main = threading.get_ident()
        self._handled = threading.Event()
        signal.signal(signal.SIGUSR1, self._on_signal)

    def __call__(self, reason: ApplianceError) -> None:
        """From another thread, once a rank is lost."""
        self._reason = reason
        signal.pthread_kill(self._main, signal.SIGUSR1)
        if self._handled.wait(self._MAIN_THREAD_SECONDS):
            return
        # The main thread runs no Python code, so it is not at the channel either.
        log.error("the engine's main thread is stuck: ending without it")
        self._end.send(_failure(reason))
        self._end.close()
        self._end.flush()
        os._exit(reason.exit_code)

    def handled(self) -> None:
        """The main thread fails, or ends, by itself."""
        self._handled.set()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._reason is not None and not self._handled.is_set():
            raise self._reason


def _failure(error: BaseException) -> Failed:
    if isinstance(error, ApplianceError):
        return Failed(error=type(error).__name__, message=error.message, hint=error.hint)
    return Failed(error=type(error).__name__, message=f"{type(error).__name__}: {error}")


def _log_failure(error: Exception, reason: Exception) -> None:
    """One line for what was raised on purpose, none for what follows from a lost rank, which has its line already; the
    traceback of what nobody expected."""
    if reason is error and not isinstance(error, ApplianceError):
        log.error("engine failed\n%s", traceback.format_exc())
        return
    if reason is error:
        log.error("engine failed: %s", error)
    log.debug("where it failed\n%s", traceback.format_exc())


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 after Shutdown, the error's own otherwise; the reason is sent as `Failed` first."""
    parser = argparse.ArgumentParser(prog="python -m appliance.engine_process")
    parser.add_argument("--ipc", required=True, help="address of the server's end of the channel")
    args = parser.parse_args(argv)
    # A terminal's Ctrl-C goes to the whole group; the server decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end = ChildEnd(args.ipc)
    lost = RankLoss(end)
    member: Member | None = None
    try:
        begin = time.perf_counter()
        import_early()
        import_seconds = time.perf_counter() - begin
        start = end.receive()
        if isinstance(start, Shutdown):
            return 0
        assert isinstance(start, StartEngine), start
        from appliance.runtime.ranks import lead

        member = lead(start.options, lost, join_nodes(start.nodes, end))
        core, info, prepare_more = open_engine(start.options, end, import_seconds, member)
        garbage.settle()
        end.send(Ready(info=info))
        EngineLoop(core, end, prepare_more).run()
    except Exception as error:
        lost.handled()
        reason = error if member is None else member.explain(error)
        _log_failure(error, reason)
        end.send(_failure(reason))
        return reason.exit_code if isinstance(reason, ApplianceError) else 1
    finally:
        lost.handled()
        end.close()
        if member is not None:
            member.close()
    return 0


def _leave(code: int) -> NoReturn:
    """Exit; one of several ranks without what libraries do at exit, which might wait for ranks that are gone."""
    import torch.distributed

    if not torch.distributed.is_initialized():
        raise SystemExit(code)
    ChildEnd.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main())
