"""Which of several ways computes a product quickest on this GPU: the table filled from timings, and its lookup.

A *tactic* is a named way to compute one product: a kernel and how it is cut up. A scheme lists those it has for a shape
and a number of rows (`PrecisionScheme.tactics`); the builder times them (`builder/tactics.py`) and writes the winners
into the engine; loading an engine fills `TABLE`; the scheme's `apply` asks it. Knows names and shapes; knows nothing of
how a tactic computes or is timed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# (prepared tensors, input as the scheme's products take it, bias, the model's dtype) -> what the scheme's `apply` gives
Tactic = Callable[[dict[str, Tensor], Any, Tensor | None, torch.dtype], Any]
Tactics = Mapping[str, Tactic]  # by name; the first is what serves where nothing was timed
# (scheme, out_features, in_features, rows, all tactics for up to so many rows) -> the one to use
Probe = Callable[[str, int, int, int, Callable[[int], Tactics]], Tactic | None]

Timer = Callable[[Sequence[Callable[[], object]], int], float]  # (calls in turn, launches) -> µs of a call, in a graph

# Row counts that are timed; a product of another number of rows uses the next larger one.
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def row_bucket(rows: int) -> int | None:
    """The smallest of ROW_BUCKETS that holds `rows`; None above the largest."""
    at = bisect_left(ROW_BUCKETS, rows)
    return ROW_BUCKETS[at] if at < len(ROW_BUCKETS) else None


@dataclass(frozen=True)
class TimedChoice:
    """One row count's winner among ways that are no products'. Fields as of a manifest's tactic."""

    product: str  # for people
    scheme: str
    out_features: int
    in_features: int
    rows: int
    tactic: str
    microseconds: float
    runner_up: str
    runner_up_microseconds: float


class TacticTable:
    """Choices by (scheme, out_features, in_features) and row bucket. Not thread-safe: filled once, while loading."""

    def __init__(self) -> None:
        self._chosen: dict[tuple[str, int, int], dict[int, str]] = {}
        self._buckets: dict[tuple[str, int, int], list[int]] = {}
        self._resolved: dict[tuple[str, int, int, int | None], Tactic | None] = {}
        self.unknown: set[str] = set()  # names in use that no scheme has: of an engine built by other code
        self.batch_invariant = False  # schemes ask neither choices nor defaults, but multiply by `invariant_linear`
        self.probe: Probe | None = None  # decides instead of the choices, while tactics are being timed

    def clear(self) -> None:
        """Forget all choices: every product is computed the way it is without timings."""
        self._chosen.clear()
        self._buckets.clear()
        self._resolved.clear()
        self.unknown.clear()

    def choose(self, scheme: str, out_features: int, in_features: int, rows: int, name: str) -> None:
        """Products of up to `rows` rows (and more than the next smaller choice) are computed by tactic `name`."""
        shape = (scheme, out_features, in_features)
        new = rows not in self._chosen.setdefault(shape, {})
        self._chosen[shape][rows] = name
        if new:  # after it can be found: a build computes while it chooses
            insort(self._buckets.setdefault(shape, []), rows)
        self._resolved.clear()

    def chosen(self, scheme: str, out_features: int, in_features: int, rows: int) -> str | None:
        """The name of the tactic for a product; None: nothing was timed, or only for fewer rows."""
        buckets = self._buckets.get((scheme, out_features, in_features))
        if not buckets:
            return None
        at = bisect_left(buckets, rows)
        return self._chosen[scheme, out_features, in_features][buckets[at]] if at < len(buckets) else None

    def find(
        self, scheme: str, out_features: int, in_features: int, rows: int, tactics: Callable[[int], Tactics]
    ) -> Tactic | None:
        """The tactic to compute a product with, None: the scheme's own choice. One dict lookup after the first call of
        a row bucket. `tactics(bucket)`: all that the scheme has for up to that many rows."""
        if self.probe is not None:
            return self.probe(scheme, out_features, in_features, rows, tactics)
        bucket = row_bucket(rows)
        key = (scheme, out_features, in_features, bucket)
        try:
            return self._resolved[key]
        except KeyError:
            found = self._resolved[key] = self._resolve(scheme, out_features, in_features, bucket, tactics)
            return found

    def _resolve(
        self,
        scheme: str,
        out_features: int,
        in_features: int,
        bucket: int | None,
        tactics: Callable[[int], Tactics],
    ) -> Tactic | None:
        name = None if bucket is None else self.chosen(scheme, out_features, in_features, bucket)
        if name is None or bucket is None:
            return None
        found = tactics(bucket).get(name)
        if found is None:
            self.unknown.add(name)
        return found


TABLE = TacticTable()  # of this process; what `apply` of every scheme consults
