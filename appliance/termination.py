"""Why a process ended, where Kubernetes looks for it: the termination log, a file that it makes in every container.

`kubectl describe pod` shows its text beside the exit code. Knows a file and errors, nothing of who failed.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from appliance.errors import ApplianceError

_LIMIT_BYTES = 4096  # what Kubernetes reads of it


def write(error: BaseException | str, path: Path) -> None:
    """The reason on one line, the hint on the next. Without such a file, or without the right to write it, nothing."""
    reason = error.message if isinstance(error, ApplianceError) else str(error)
    if not isinstance(error, ApplianceError | str):
        reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    hint = error.hint if isinstance(error, ApplianceError) else None
    lines = [" ".join(text.split()) for text in (reason, hint) if text]
    with contextlib.suppress(OSError):
        if path.is_file():
            text = "\n".join(lines) + "\n"
            path.write_bytes(text.encode()[:_LIMIT_BYTES])
