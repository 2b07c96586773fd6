"""Holds the ranks of one node that is not node 0: starts them, passes on what rank 0 says, tells it how they are.

`python -m appliance.node_process --ipc ADDRESS --leader HOST:PORT --token T --node N --engine-dir DIR [--devices A,B]`,
started by the node's agent (`launch/node_agent.py`) for one engine, and at an end with it: when rank 0's connection
closes, the ranks are killed. Imports no torch: it has to be quick, and the ranks import their own.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence

from appliance.errors import ApplianceError, NodeError
from appliance.ipc import ChildEnd, Failed, Progress
from appliance.runtime.node_channel import (
    BEAT_SECONDS,
    Begin,
    Channel,
    Counters,
    Ended,
    Join,
    Kind,
)
from appliance.runtime.rank_processes import start_rank
from appliance.runtime.rank_watch import RankProcess
from appliance.runtime.remote_nodes import MIRRORED
from appliance.runtime.step_ring import RingWriter, SharedSteps
from appliance.sizes import counted

log = logging.getLogger("appliance.node")

_CONNECT_SECONDS = 20.0
_BEGIN_SECONDS = 3600.0  # until all other nodes have joined; rank 0 gives up earlier
_EXIT_SECONDS = 5.0  # of a rank, after it has closed its report


class LeaderLostError(ApplianceError):
    """Rank 0's process is gone; what it was part of is at an end."""


class NodeRanks:
    """The ranks of this node in one engine."""

    def __init__(self, channel: Channel, begin: Begin, engine_dir: str, devices: Sequence[str]) -> None:
        """Starts them; they die with the thread that this is called in. `devices`: one for each; none on the CPU."""
        self._channel = channel
        self._shared = SharedSteps.create(begin.world_size)
        self._gone = threading.Event()
        self._ranks: list[RankProcess] = []
        self._results: int | None = None
        wake: dict[int, int] = {}
        for number in range(begin.num_ranks):
            rank = begin.first_rank + number
            further = {"local-addr": channel.here, "engine-dir": engine_dir} | (
                {"device": devices[number]} if devices else {}
            )
            inherited = {}
            if rank == begin.results:
                self._results, inherited["results"] = os.pipe()
            process, wake[rank] = start_rank(rank, self._shared, channel.there, begin.port, inherited, further)
            for fd in inherited.values():
                os.close(fd)
            self._ranks.append(process)
        self._ring = RingWriter(self._shared, wake)

    def run(self) -> None:
        """Until rank 0 is gone: LeaderLostError. Then nothing is left of the ranks."""
        threading.Thread(target=self._pass_on, name="pass-on", daemon=True).start()
        try:
            while True:
                self._check()
                self._tell()
                self._listen()
        finally:
            for rank in self._ranks:
                rank.process.kill()
            for rank in self._ranks:  # until their devices are free
                with contextlib.suppress(subprocess.TimeoutExpired):
                    rank.process.wait(_EXIT_SECONDS)

    # ------------------------------------------------------------ from rank 0

    def _pass_on(self) -> None:
        """Rank 0's messages into this node's ring."""
        poll = select.poll()
        poll.register(self._channel.socket, select.POLLIN)
        try:
            while not self._gone.is_set():
                for kind, data in self._channel.receive():  # some may have come with the note before
                    if kind == Kind.STEP:
                        self._ring.send(data, self._check)
                poll.poll(1000 * BEAT_SECONDS)
        except (OSError, LeaderLostError):
            pass
        finally:
            self._gone.set()

    def _check(self) -> None:
        if self._gone.is_set():
            raise LeaderLostError("rank 0 has ended")

    # ------------------------------------------------------------ to rank 0

    def _tell(self) -> None:
        words = [[self._shared.get(rank.rank, word) for word in MIRRORED] for rank in self._ranks]
        self._send(lambda: self._channel.note(Counters(words), self._check))

    def _listen(self) -> None:
        """Pass on what ranks say, for as long as no counters are due."""
        until = time.monotonic() + BEAT_SECONDS
        while (left := until - time.monotonic()) > 0:
            reports = {rank.report: rank for rank in self._ranks if not rank.ended}
            poll = select.poll()
            for fd in (*reports, *([] if self._results is None else [self._results])):
                poll.register(fd, select.POLLIN)
            for fd, _ in poll.poll(1000 * left):
                if fd == self._results:
                    self._pass_back(fd)
                else:
                    self._hear(reports[fd])
            self._check()

    def _pass_back(self, fd: int) -> None:
        data = os.read(fd, 1 << 20)
        if data:
            self._send(lambda: self._channel.send(Kind.RESULT, data, self._check))
        else:
            self._results = None  # the rank has ended, which its report tells

    def _hear(self, rank: RankProcess) -> None:
        data = os.read(rank.report, 65536)
        rank.said += data
        if data:
            return
        rank.ended = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.process.wait(_EXIT_SECONDS)
        code = rank.process.returncode
        ended = Ended(rank.rank, -signal.SIGKILL if code is None else code, bytes(rank.said))
        self._send(lambda: self._channel.note(ended, self._check))

    def _send(self, sending: Callable[[], None]) -> None:
        try:
            sending()
        except OSError as error:
            raise LeaderLostError(f"rank 0 has ended: {error}") from None


def connect(leader: str, node: int, token: str) -> Channel:
    """Join the engine at an address HOST:PORT. NodeError if nobody is there."""
    host, _, port = leader.rpartition(":")
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS)
        channel = Channel(connection)
        channel.note(Join(node, token))
    except OSError as error:
        raise NodeError(
            f"node {node} cannot reach the engine at {leader}: {error}",
            hint="nodes need to reach each other at every port",
        ) from error
    return channel


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m appliance.node_process")
    parser.add_argument("--ipc", required=True, help="address of the agent's end of the channel")
    parser.add_argument("--leader", required=True, help="where rank 0 listens")
    parser.add_argument("--node", type=int, required=True)
    parser.add_argument("--token", required=True, help="of the engine")
    parser.add_argument("--engine-dir", required=True, help="where the engine lies on this node")
    parser.add_argument("--devices", default="", help="those of this node's ranks, comma-separated")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when the engine has ended; else the error's own, and it is sent as `Failed` first."""
    args = _arguments(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent decides
    end = ChildEnd(args.ipc)
    try:
        channel = connect(args.leader, args.node, args.token)
        begin = channel.wait_for_note(_BEGIN_SECONDS)
        assert isinstance(begin, Begin), begin
        first, last = begin.first_rank, begin.first_rank + begin.num_ranks - 1
        log.info("this node has %s", f"ranks {first} to {last}" if last > first else f"rank {first}")
        end.send(Progress(phase="load", detail=counted(begin.num_ranks, "rank")))
        NodeRanks(channel, begin, args.engine_dir, [name for name in args.devices.split(",") if name]).run()
    except (LeaderLostError, ConnectionError) as error:
        log.info("the engine has ended: %s", error)
    except ApplianceError as error:
        end.send(Failed(error=type(error).__name__, message=error.message, hint=error.hint))
        return error.exit_code
    except Exception as error:
        log.error("unexpected failure\n%s", traceback.format_exc())
        end.send(Failed(error=type(error).__name__, message=f"{type(error).__name__}: {error}"))
        return 1
    finally:
        end.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
