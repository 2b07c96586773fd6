"""An executor that computes nothing and takes as long as a formula says, on a clock of its own: what scheduling
policies are judged with.

Seconds = base + per_decode * decodes + per_prefill_token * tokens + per_pair * pairs, and an overhead where both meet.

The default is one H200 with an 8B model in FP8 and short contexts, as measured: 2 ms alone, 7 ms with 256 decodes,
80,000 prompt tokens a second.

Of several pipeline stages each takes its part of these seconds, one step at a time, and a result is on its way for
`hand_over` seconds after each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

from appliance.batching.core import EngineCore
from appliance.batching.step import StepPlan, StepResult
from appliance.types import EngineRequest, SamplingParams


@dataclass
class SimulatedExecutor:
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    step_sizes: tuple[int, ...] = ()  # as the executor of the same name pads
    num_stages: int = 1
    num_pages: int = 200_000
    page_size: int = 16
    max_model_len: int = 131_072
    base: float = 2e-3
    per_decode: float = 2e-5
    per_prefill_token: float = 1.25e-5
    per_pair: float = 0.0  # of a prefill token and one before it
    overhead: float = 0.0
    hand_over: float = 0.0  # seconds from stage to stage, and from the last one back
    synchronous: bool = False  # runs a step while it is submitted, as the CPU backend does
    now: float = 0.0
    # (decodes, prefill tokens, seconds) of each step
    steps: list[tuple[int, int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._queue: deque[tuple[StepPlan, float]] = deque()
        self._free_at = [0.0] * self.num_stages
        self.busy = [0.0] * self.num_stages  # seconds of each stage
        self._prefilling: set[int] = set()  # slots

    def clock(self) -> float:
        return self.now

    def submit(self, plan: StepPlan) -> None:
        self._prefilling |= {new.slot for new in plan.new}
        chunks = [row for row in plan.scheduled if row.slot in self._prefilling]
        self._prefilling -= {row.slot for row in chunks if row.samples}
        decodes, tokens = len(plan.scheduled) - len(chunks), sum(row.length for row in chunks)
        seconds = (
            self.base + self.per_decode * decodes + self.per_prefill_token * (tokens + self._padding(decodes, tokens))
        )
        seconds += self.per_pair * sum(row.length * (row.start + row.length / 2) for row in chunks)
        if decodes and tokens:
            seconds += self.overhead
        self.steps.append((decodes, tokens, seconds))
        if self.synchronous:
            self.now += seconds
            self._queue.append((plan, self.now))
        else:
            self.now += 2e-4  # the host's part
            at, each = self.now, seconds / self.num_stages
            for stage in range(self.num_stages):
                at = self._free_at[stage] = max(self._free_at[stage], at) + each
                self.busy[stage] += each
                at += self.hand_over
            self._queue.append((plan, at))

    def _padding(self, decodes: int, tokens: int) -> int:
        total = decodes + tokens
        at = bisect_left(self.step_sizes, total)
        return self.step_sizes[at] - total if tokens and at < len(self.step_sizes) else 0

    def collect(self) -> StepResult:
        plan, done_at = self._queue.popleft()
        self.now = max(self.now, done_at)
        rows = len(plan.scheduled)
        return StepResult(plan.step_id, [7 if r.samples else -1 for r in plan.scheduled], [None] * rows, [None] * rows)


@dataclass(frozen=True)
class Arrival:
    at: float  # seconds
    prompt: int  # tokens
    output: int  # tokens


@dataclass
class Outcome:
    seconds: float  # until everything was answered
    gaps: list[float]  # seconds between two tokens of a request, sorted
    first_token: dict[int, float]  # by arrival: seconds until its first token

    def gap(self, share: float) -> float:
        return self.gaps[min(len(self.gaps) - 1, int(len(self.gaps) * share))]


def simulate(executor: SimulatedExecutor, arrivals: list[Arrival], max_step_stretch: float) -> Outcome:
    """`arrivals` in order of time."""
    core = EngineCore(executor, prefix_caching=False, max_step_stretch=max_step_stretch, clock=executor.clock)
    waiting = deque(enumerate(arrivals))
    last: dict[str, float] = {}
    outcome = Outcome(0.0, [], {})
    while waiting or core.has_work:
        if not core.has_work:
            executor.now = max(executor.now, waiting[0][1].at)
        while waiting and waiting[0][1].at <= executor.now:
            number, arrival = waiting.popleft()
            params = SamplingParams(max_tokens=arrival.output, ignore_eos=True, seed=0)
            core.add_request(EngineRequest(str(number), [1] * arrival.prompt, params, arrival_time=arrival.at))
        for output in core.step():
            name = output.request_id
            if name in last:
                outcome.gaps.append(executor.now - last[name])
            else:
                outcome.first_token[int(name)] = executor.now - arrivals[int(name)].at
            last[name] = executor.now
    outcome.seconds = executor.now
    outcome.gaps.sort()
    return outcome
