"""Another rank of an engine than 0: loads its share and runs the plans that rank 0 sends. It gives nothing back, save
one of the last pipeline stage, which sends what was sampled.

`python -m appliance.worker_process --rank R --world-size N --master-port P --memory FD --wake FD --report FD`, started
by rank 0 (`runtime/ranks.py`) through `launch/bootstrap.py`: it dies with rank 0 and logs like it, as "rank-R". Why it
fails goes to rank 0 through the report pipe, whose closing tells that it has ended.
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

import msgspec
from torch.distributed import DistError

from appliance import garbage, registry
from appliance.errors import ApplianceError
from appliance.ipc import Failed
from appliance.meeting import Rendezvous
from appliance.runtime.executor import LocalExecutor
from appliance.runtime.loading import PhaseTimer
from appliance.runtime.rank_watch import PEER_LOST
from appliance.runtime.ranks import Follower, LoadEngine, PrepareMore, RunStep, Stop, decode
from appliance.runtime.step_results import ResultWriter
from appliance.runtime.step_ring import LeaderGoneError, RingReader, SharedSteps, Word
from appliance.types import EngineOptions

log = logging.getLogger("appliance.engine")

_BEAT_SECONDS = 0.2
_IN_FLIGHT = 12  # steps: more than rank 0 submits before it waits for the first
_BUSY_POLL = 0.05  # seconds between looks whether the device has done a step
_IDLE_POLL = 5.0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m appliance.worker_process")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True, help="number of ranks")
    parser.add_argument("--master-addr", default="127.0.0.1", help="where rank 0 listens")
    parser.add_argument("--local-addr", default="127.0.0.1", help="of this machine, as other machines reach it")
    parser.add_argument("--master-port", type=int, required=True)
    parser.add_argument("--memory", type=int, required=True, help="file descriptor of the shared memory")
    parser.add_argument("--wake", type=int, required=True, help="file descriptor of the pipe that ends a sleep")
    parser.add_argument("--report", type=int, required=True, help="file descriptor of the pipe for a failure")
    parser.add_argument("--results", type=int, help="file descriptor of the pipe for results of steps")
    parser.add_argument("--engine-dir", help="where the engine lies, if not where rank 0 has it")
    parser.add_argument("--device", help="what this rank runs on, if rank 0 does not know")
    return parser.parse_args(argv)


def _here(options: EngineOptions, args: argparse.Namespace) -> EngineOptions:
    """The options on this rank's node, which may be another than rank 0's."""
    if args.device is not None:
        devices = (*options.devices[: args.rank], args.device, *options.devices[args.rank + 1 :])
        options = msgspec.structs.replace(options, devices=devices)
    return options if args.engine_dir is None else msgspec.structs.replace(options, engine_dir=args.engine_dir)


def _run(args: argparse.Namespace) -> None:
    """Until Stop. Raises whatever goes wrong."""
    shared = SharedSteps(args.memory, args.world_size)
    threading.Thread(target=_beat, args=(shared, args.rank), name="beat", daemon=True).start()
    reader = RingReader(shared, args.rank, args.wake, spin_seconds=0.0)
    results = None if args.results is None else ResultWriter(args.results)
    member = Follower(
        Rendezvous(args.rank, args.world_size, args.master_addr, args.master_port, args.local_addr), shared, results
    )
    executor: LocalExecutor | None = None
    while True:
        try:
            data = reader.receive(_BUSY_POLL if executor is not None and executor.in_flight else _IDLE_POLL)
        except LeaderGoneError:
            return
        while executor is not None and executor.in_flight and executor.drop(wait=executor.in_flight > _IN_FLIGHT):
            shared.count(args.rank, Word.FINISHED)
        if data is None:
            continue
        match decode(data):
            case RunStep(plan=plan):
                assert executor is not None
                executor.submit(plan)
            case PrepareMore():
                assert executor is not None
                executor.prepare_more()
                shared.count(args.rank, Word.FINISHED)
            case LoadEngine(options=options):
                begin, options = time.perf_counter(), _here(options, args)
                backend = registry.load("backends", options.backend)
                if hasattr(backend, "preload"):
                    backend.preload()
                loaded = backend.load(options, lambda *_: None, PhaseTimer(), member)
                executor, info = backend.assemble(loaded, options, lambda *_: None, PhaseTimer())
                garbage.settle()
                shared.count(args.rank, Word.FINISHED)
                seconds = time.perf_counter() - begin
                log.info("rank %d of %d is loaded: %.1f s (%s)", args.rank, args.world_size, seconds, info.device_name)
            case Stop():
                return


def _beat(shared: SharedSteps, rank: int) -> None:
    """Shows rank 0 that this process gets to run."""
    while True:
        shared.count(rank, Word.BEAT)
        time.sleep(_BEAT_SECONDS)


def _failure(error: BaseException) -> Failed:
    if isinstance(error, ApplianceError):
        return Failed(error=type(error).__name__, message=error.message, hint=error.hint)
    return Failed(error=_kind(error), message=f"{type(error).__name__}: {error}")


def _kind(error: BaseException) -> str:
    """Operations that the ranks do together fail where one of them is gone, with torch's own errors or plain ones."""
    text = str(error)
    together = isinstance(error, DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))
    return PEER_LOST if together else type(error).__name__


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 after Stop, the error's own otherwise; the reason is reported first."""
    args = _arguments(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the engine process
    for fd in (args.memory, args.wake, args.report, args.results):
        if fd is not None:
            os.set_inheritable(fd, False)  # what this process starts must not keep its pipes open
    try:
        _run(args)
    except Exception as error:
        expected = isinstance(error, ApplianceError) or _kind(error) == PEER_LOST
        if expected:
            reason = str(error).partition("\n")[0].partition(". This is typically")[0]  # of gloo
            log.error("rank %d failed: %s", args.rank, reason)
        log.log(logging.DEBUG if expected else logging.ERROR, "rank %d failed\n%s", args.rank, traceback.format_exc())
        os.write(args.report, msgspec.msgpack.encode(_failure(error)))
        return error.exit_code if isinstance(error, ApplianceError) else 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what libraries do at exit may wait for ranks that are gone
