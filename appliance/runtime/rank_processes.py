"""Starts the process of a rank: `python -m appliance.worker_process`, with the file descriptors that it inherits.

For rank 0's process and for the process that holds the ranks of another node. Imports no torch, so that ranks can begin
to import theirs at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from appliance import logs
from appliance.runtime.rank_watch import RankProcess
from appliance.runtime.step_ring import SharedSteps


def start_rank(
    rank: int,
    shared: SharedSteps,
    master_addr: str,
    master_port: int,
    inherited: Mapping[str, int] | None = None,
    further: Mapping[str, str] | None = None,
) -> tuple[RankProcess, int]:
    """The process, which dies with the calling thread, and the writing end of the pipe that ends its sleep. The ranks
    meet at the address. `inherited`: arguments that are file descriptors, by name; `further`: other arguments."""
    sleeps, wakes = os.pipe()
    hears, reports = os.pipe()
    os.set_blocking(wakes, False)
    fds = {"memory": shared.fd, "wake": sleeps, "report": reports, **(inherited or {})}
    arguments = {"rank": rank, "world-size": shared.ranks, "master-addr": master_addr, "master-port": master_port}
    replica = own if (own := logs.process_name()).startswith("engine-") else ""  # there are several of each rank
    name = f"{replica}-rank-{rank}" if replica else f"rank-{rank}"
    bootstrap = [sys.executable, "-m", "appliance.launch.bootstrap", str(os.getpid()), name]
    command = [
        *bootstrap,
        "appliance.worker_process",
        *(f"--{k}={v}" for k, v in {**arguments, **fds, **(further or {})}.items()),
    ]
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=list(fds.values()))
    except BaseException:
        os.close(wakes)
        os.close(hears)
        raise
    finally:
        os.close(sleeps)
        os.close(reports)
    return RankProcess(rank, process, hears), wakes
