"""What a start says of itself: a line per phase and every ten seconds in a long one, the breakdown when it is
ready. Knows the lifecycle only."""

from __future__ import annotations

import asyncio
import logging
import time

from appliance.server.lifecycle import Lifecycle

log = logging.getLogger(__name__)

SILENCE_SECONDS = 10.0  # longest time without a line while not ready
_QUIET_PHASES = ("starting", "ready", "restarting", "draining", "failed")  # these have their own lines


def progress_line(lifecycle: Lifecycle) -> str:
    """`building: layers.3.mlp (43%, 1.2 of 3.0 GiB, 20 s left)`."""
    facts = []
    if lifecycle.percent is not None:
        facts.append(f"{lifecycle.percent:.0f}%")
    if lifecycle.bytes_total:
        facts.append(f"{lifecycle.bytes_done / 2**30:.2f} of {lifecycle.bytes_total / 2**30:.2f} GiB")
    if lifecycle.eta_seconds is not None:
        facts.append(f"{lifecycle.eta_seconds:.0f} s left")
    line = f"{lifecycle.phase}: {lifecycle.detail}" if lifecycle.detail else lifecycle.phase
    return f"{line} ({', '.join(facts)})" if facts else line


async def report_progress(
    lifecycle: Lifecycle, *, silence_seconds: float = SILENCE_SECONDS, poll_seconds: float = 0.2
) -> None:
    """Log for ever. A phase shorter than a poll may go unmentioned; the breakdown has it."""
    last_phase, last_line, told = "", "", time.monotonic()
    while True:
        now = time.monotonic()
        line = progress_line(lifecycle)
        due = now - told >= silence_seconds and not lifecycle.is_ready
        if (lifecycle.phase != last_phase and line != last_line and lifecycle.phase not in _QUIET_PHASES) or due:
            log.info("%s", line)
            told = now
        last_phase, last_line = lifecycle.phase, line
        await asyncio.sleep(poll_seconds)


def breakdown(lifecycle: Lifecycle, before_seconds: float, engine_seconds: dict[str, float]) -> str:
    """`4.2 s: python 0.5, detecting 0.1, loading 0.9 (weights 0.4); beside it, imports took 2.0 s`.

    `before_seconds`: from the start of the process to the lifecycle's. `engine_seconds`: of the engine's own phases;
    its imports go on from the first moment."""
    parts = {"python": before_seconds}
    parts |= {name: seconds for name, seconds in lifecycle.phase_seconds.items() if name != "ready"}
    shown = []
    inside = {key: value for key, value in engine_seconds.items() if key != "imports" and value >= 0.05}
    beside = f"; beside it, imports took {imports:.1f} s" if (imports := engine_seconds.get("imports")) else ""
    for name, seconds in parts.items():
        inner = ", ".join(f"{key} {value:.1f}" for key, value in inside.items())
        shown.append(f"{name} {seconds:.1f}" + (f" ({inner})" if name == "loading" and inner else ""))
    return f"{(lifecycle.time_to_ready or 0.0) + before_seconds:.1f} s: {', '.join(shown)}{beside}"
