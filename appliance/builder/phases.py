"""Seconds that the parts of a build took, for the log and the manifest. Knows no part.

A name with a dot is a part of the phase before the dot: "convert.read". Parts of one phase may run side by side, in
several threads, so their sum may be more than the phase. "beside" is no phase: its parts ran beside the conversion.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Phases:
    """Seconds by name, in the order in which they were first counted; counted from any thread."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the block takes is added to `name`, also if it raises."""
        begin = time.monotonic()
        self.add(name, 0.0)  # before its parts
        try:
            yield
        finally:
            self.add(name, time.monotonic() - begin)

    def add(self, name: str, seconds: float) -> None:
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def add_parts(self, name: str, seconds: Mapping[str, float]) -> None:
        """Parts of the phase `name`."""
        for part, value in seconds.items():
            self.add(f"{name}.{part}", value)

    @property
    def seconds(self) -> dict[str, float]:
        with self._lock:
            return {name: round(value, 3) for name, value in self._seconds.items()}


def describe(seconds: Mapping[str, float]) -> str:
    """For people: "convert 9.1 (read 4.2, write 7.9), self-check 0.3"; parts below a twentieth of a second left out."""
    groups: dict[str, list[str]] = {}
    for name, value in seconds.items():
        whole, _, part = name.partition(".")
        parts = groups.setdefault(whole, [])
        if part and value >= 0.05:
            parts.append(f"{part} {value:.1f}")
    shown = []
    for whole, parts in groups.items():
        text = f"{whole} {seconds[whole]:.1f}" if whole in seconds else whole
        shown.append(f"{text} ({', '.join(parts)})" if parts else text)
    return ", ".join(shown)
