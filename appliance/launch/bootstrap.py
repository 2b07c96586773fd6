"""`python -m appliance.launch.bootstrap PARENT_PID NAME MODULE ARGS...`: a module as a child that dies with its parent.

Asks the kernel to kill this process when the thread that started it ends (prctl, Linux), so that a server killed with
SIGKILL leaves no engine behind on the GPU. Done here and not between fork and exec, where Python code is unsafe.
Log lines of the child have the parent's format and level, and NAME.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import runpy
import signal
import sys

from appliance import logs
from appliance.settings import child_logging, inherited_secrets

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Exit 1 at once if the parent is gone already. Without effect where there is no prctl."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        sys.exit(1)


def main() -> None:
    parent_pid, name, module = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    die_with_parent(parent_pid)
    faulthandler.enable()  # a crash in native code leaves a stack in the log
    level, as_json = child_logging()
    logs.configure(level, as_json, process=name, secrets=inherited_secrets())
    sys.argv = sys.argv[3:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
