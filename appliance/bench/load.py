"""What load is: flows of requests, how they are shared among client processes, and what each request gave.

Plain values that cross the border to `load_client.py`; all times are seconds of this machine's monotonic clock
(CLOCK_MONOTONIC), which processes share.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Literal

import msgspec

from appliance.errors import SettingsError

Arrivals = Literal["poisson", "constant"]


class Lengths(msgspec.Struct, frozen=True):
    """Tokens, drawn evenly from low to high, both included."""

    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return self.low if self.low == self.high else rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


class Flow(msgspec.Struct, frozen=True):
    """One client process's share of requests of one kind. Closed: `concurrency` clients, each sending its next request
    when the last one has ended. Open: requests at the times of `arrivals`, whatever has ended. Every: one each
    `interval` for as long as the process's other flows run."""

    name: str
    kind: Literal["closed", "open", "every"]
    input: Lengths
    output: Lengths
    concurrency: int = 0  # closed
    requests: int = 0  # closed; 0: until `duration`
    duration: float = 0.0  # closed: seconds in which requests are started; 0: no limit
    arrivals: tuple[float, ...] = ()  # open; seconds since the start
    interval: float = 0.0  # every; seconds


class Job(msgspec.Struct, frozen=True):
    """What one client process does."""

    host: str
    port: int
    path: str
    model: str | None  # name in the requests
    api_key: str | None
    vocab_size: int  # prompts are token ids below this
    temperature: float
    seed: str
    timeout: float  # seconds for one request
    process: int
    flows: tuple[Flow, ...]


class Record(msgspec.Struct):
    """One request."""

    flow: str
    client: int  # which of the closed flow's clients of this process; -1: none
    input_len: int
    wanted: int  # output tokens
    start: float = 0.0  # when it was due (open) or begun
    late: float = 0.0  # seconds from when it was due to when its bytes left
    end: float = 0.0
    events: list[float] = []  # when each event with tokens came
    output_tokens: int = 0  # as the server counts them
    error: str = ""  # empty: it went well

    @property
    def ttft(self) -> float:
        return self.events[0] - self.start

    @property
    def tpot(self) -> float:
        """Seconds per token behind the first."""
        return (self.events[-1] - self.events[0]) / max(self.output_tokens - 1, 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between events that follow each other."""
        return [after - before for before, after in pairwise(self.events)]


class ClientResult(msgspec.Struct):
    """What one client process saw."""

    process: int
    records: list[Record]
    cpu_seconds: float
    wall_seconds: float
    lags: list[float]  # seconds by which a timer of 10 ms was late: what this process adds to what it measures


def arrival_times(rate: float, count: int, kind: Arrivals, burstiness: float, seed: str) -> list[float]:
    """Seconds since the start of `count` requests at `rate` a second on average. Constant: evenly spaced. Poisson: gaps
    from a gamma distribution of shape `burstiness` and mean 1/rate: 1 is the Poisson process, less is burstier."""
    rng = random.Random(f"arrivals {seed}")
    times: list[float] = []
    at = 0.0
    for _ in range(count):
        times.append(at)
        at += 1 / rate if kind == "constant" else rng.gammavariate(burstiness, 1 / (rate * burstiness))
    return times


def share_closed(flow: Flow, processes: int) -> list[Flow]:
    """A closed flow as one per process, none of them without a client."""
    shares = []
    for index in range(processes):
        concurrency = flow.concurrency // processes + (index < flow.concurrency % processes)
        requests = flow.requests // processes + (index < flow.requests % processes)
        shares.append(msgspec.structs.replace(flow, concurrency=concurrency, requests=requests))
    return [share for share in shares if share.concurrency and (share.requests or share.duration)]


def share_open(flow: Flow, processes: int) -> list[Flow]:
    """An open flow as one per process, arrivals dealt out in turn."""
    shares = [msgspec.structs.replace(flow, arrivals=flow.arrivals[index::processes]) for index in range(processes)]
    return [share for share in shares if share.arrivals]


def parse_lengths(flag: str, text: str) -> Lengths:
    """ "128", or "100-200". SettingsError, naming the flag, for what is neither."""
    low, dash, high = text.strip().partition("-")
    try:
        found = Lengths(int(low), int(high) if dash else int(low))
    except ValueError:
        found = Lengths(0, 0)
    if not 1 <= found.low <= found.high:
        raise SettingsError(f"{flag} is {text!r}; it must be a number of tokens, 1 or more, or a range such as 100-200")
    return found
