"""Python's cycle collector in processes that must not pause: what a start has loaded is never looked at again.

A full collection walks every object of the process: 10 ms in a small one, more than 100 ms where torch is loaded, in
the middle of a stream. Steady serving makes hardly any cycles (its objects go by reference counts), so what was there
at the end of the start is frozen, and young objects are looked at once in many thousands instead of 700.
"""

from __future__ import annotations

import gc

_THRESHOLDS = (20_000, 20, 20)  # objects; collections of the generation before


def settle() -> None:
    """Call once what stays is loaded. Does not collect: the pause would meet the first requests."""
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
