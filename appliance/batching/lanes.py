"""Which running sequences share their steps, where a step runs through several pipeline stages.

A stage would idle while another one works on the only step. So there are as many *lanes* as stages: every running
sequence belongs to one, a step decodes sequences of one lane, and each lane has at most one step in flight; while the
last stage works on one lane's step, the first works on another's. One lane more would keep the first stage busy between
a result and the next plan, too, but with fewer sequences in each step, which costs more, since a step mostly reads
weights: 64 requests to a 70B model on two stages, simulated, take 7.9 s with two lanes and 11.0 s with three. With one
stage there is one lane, which takes part in every step.

Tokens of prompts are known beforehand, so any lane's step may run the next part of a prompt, and a prompt that a step
could run is run in parts where there is nothing else: one alone keeps all stages busy. The sequence decodes in the lane
that ran its last part.

Knows lanes and how many sequences they have; not what runs in a step. Lanes are kept level: new sequences go where
there are fewest, and a lane that has two more than another gives some up when its next step is planned, as none that it
decodes is in flight then.
"""

from __future__ import annotations

from collections.abc import Iterable

from appliance.batching.request import Sequence

_PARTS = 2  # of the prompts that wait, for each lane: the pipeline fills and drains with one of them
_SMALLEST_PART = 1024  # tokens that keep a GPU as busy as more would


class Lanes:
    """Writes `Sequence.lane` and counts. A lane is *free* while it has no step in flight."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))  # the one that has waited longest first
        self._sizes = [0] * count  # running sequences

    @property
    def free(self) -> tuple[int, ...]:
        """Lanes that may be planned now, in the order in which they should be; of one lane always that one."""
        return (0,) if self.count == 1 else tuple(self._free)

    def take(self, lane: int) -> None:
        """A step of it is in flight now."""
        if self.count > 1:
            self._free.remove(lane)

    def give_back(self, lane: int) -> None:
        """The result of its step is there."""
        if self.count > 1:
            self._free.append(lane)

    def add(self, seq: Sequence, lane: int) -> None:
        """A sequence begins to run."""
        seq.lane = lane
        self._sizes[lane] += 1

    def remove(self, seq: Sequence) -> None:
        """A sequence runs no more."""
        self._sizes[seq.lane] -= 1

    def move(self, seq: Sequence, lane: int) -> None:
        """A running sequence belongs to another lane from now on."""
        self.remove(seq)
        self.add(seq, lane)

    def room(self, lane: int, running: int, waiting: int) -> int:
        """How many of `waiting` sequences, beside `running` ones, the lane should take so that all lanes get about as
        many. Some lane always has room for one that waits."""
        if self.count == 1:
            return waiting
        return max(0, -(-(running + waiting) // self.count) - self._sizes[lane])

    def share(self, tokens: int) -> int:
        """How many of so many tokens of prompts a step should run, so that other lanes' steps have some to run."""
        return max(_SMALLEST_PART, -(-tokens // (_PARTS * self.count)))

    def level(self, running: Iterable[Sequence], lane: int) -> None:
        """Move sequences of a free lane that has too many to those that have fewest; the last of `running` first."""
        if self.count == 1 or self._sizes[lane] - min(self._sizes) < 2:
            return
        for seq in [seq for seq in running if seq.lane == lane][::-1]:
            fewest = min(range(self.count), key=self._sizes.__getitem__)
            if self._sizes[lane] - self._sizes[fewest] < 2:
                return
            self.move(seq, fewest)

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Raises AssertionError if the counts are not those of the running sequences."""
        sizes = [0] * self.count
        for seq in running:
            sizes[seq.lane] += 1
        if sizes != self._sizes:
            raise AssertionError(f"lanes have {sizes} sequences and count {self._sizes}")
