"""How long this process has been running, from before Python's own start-up. Knows Linux's /proc, and psutil where that
says nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

_START_FIELD = 22  # of /proc/<pid>/stat, counted from 1: ticks from the machine's start (proc_pid_stat(5))


def process_age_seconds(stat: Path = Path("/proc/self/stat")) -> float:
    """Seconds since this process was started, to a hundredth: both ends are counted from the machine's start, whereas
    the wall-clock time of that start is known to whole seconds only."""
    try:
        after_name = stat.read_text().rpartition(")")[2].split()  # the name may hold spaces and brackets
        started = int(after_name[_START_FIELD - 3]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError):
        import psutil

        return max(0.0, time.time() - psutil.Process().create_time())
