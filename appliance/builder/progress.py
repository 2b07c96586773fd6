"""From byte counts to the Progress messages of ipc."""

from __future__ import annotations

from collections.abc import Callable

from appliance.engines.meter import ProgressFn, Snapshot
from appliance.ipc import Phase, Progress

SendFn = Callable[[Progress], None]


def to_message(phase: Phase, snapshot: Snapshot) -> Progress:
    return Progress(
        phase=phase,
        detail=snapshot.detail,
        percent=round(min(snapshot.percent, 100.0), 1),
        bytes_done=snapshot.bytes_done,
        bytes_total=snapshot.bytes_total,
        eta_seconds=None if snapshot.eta_seconds is None else round(snapshot.eta_seconds, 1),
    )


def sender(phase: Phase, send: SendFn) -> ProgressFn:
    """A byte-counting callback that sends messages of `phase`."""
    return lambda snapshot: send(to_message(phase, snapshot))
