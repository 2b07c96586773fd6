#!/usr/bin/env python3
"""The appliance's command; `./entrypoint.py --help` lists what it can do. All of it is in `appliance.cli`.

Started with a Python that lacks the dependencies, it goes on with the one that `make install` made beside it.
"""

# Any old Python must be able to run this file as far as its advice.
# ruff: noqa: PTH118, PTH120

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    if os.getpid() == 1:  # of a container: a signal that nobody handles does not reach process 1
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
    environment = os.path.join(os.path.dirname(os.path.realpath(__file__)), ".venv")
    python = os.path.join(environment, "bin", "python")
    can_switch = os.access(python, os.X_OK) and os.path.realpath(sys.prefix) != os.path.realpath(environment)
    if sys.version_info < (3, 11):  # noqa: UP036 — likewise
        if can_switch:
            os.execv(python, [python, *sys.argv])
        print("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0], file=sys.stderr)
        return 2
    try:
        from appliance.cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "appliance":
            raise
        if can_switch:
            os.execv(python, [python, *sys.argv])
        print(f"error: {sys.executable} has no module {error.name}; run `make install` first", file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
