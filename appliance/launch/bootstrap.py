"""`python -m appliance.launch.bootstrap PARENT_PID MODULE ARGS...`: runs a module in a child that dies with its parent.

Asks the kernel to kill this process when the thread that started it ends (prctl, Linux), so that a server killed with
SIGKILL leaves no engine behind on the GPU. Done here and not between fork and exec, where Python code is unsafe.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Exit 1 at once if the parent is gone already. Without effect where there is no prctl."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        sys.exit(1)


def main() -> None:
    parent_pid, module = int(sys.argv[1]), sys.argv[2]
    die_with_parent(parent_pid)
    faulthandler.enable()  # a crash in native code leaves a stack in the log
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
