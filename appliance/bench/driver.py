"""Drives a batching core in process with synthetic requests and takes the times. Knows no model and no HTTP."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass, field

from appliance.batching.core import EngineCore
from appliance.errors import RequestFailedError
from appliance.types import EngineRequest, SamplingParams


@dataclass
class Timing:
    """One run to completion; times in seconds."""

    seconds: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token_seconds: dict[str, float] = field(default_factory=dict)  # request id -> since the start of the run
    # Seconds in which every running request got exactly one token: of a step, or, where stages have parts of the
    # requests in hand, of as many steps as there are parts.
    decode_steps: list[float] = field(default_factory=list)
    token_ids: dict[str, list[int]] = field(default_factory=dict)  # request id -> its output, if it was to be kept

    @property
    def median_step(self) -> float:
        return statistics.median(self.decode_steps) if self.decode_steps else float("nan")


def make_requests(count: int, input_len: int, output_len: int, vocab_size: int, *, seed: str) -> list[EngineRequest]:
    """Requests of random token ids, fixed by `seed`, greedy, that run to exactly `output_len` tokens."""
    rng = random.Random(seed)
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    return [
        EngineRequest(
            request_id=f"bench {seed} {i}",
            prompt_token_ids=[rng.randrange(vocab_size) for _ in range(input_len)],
            params=params,
        )
        for i in range(count)
    ]


def run(core: EngineCore, requests: list[EngineRequest], *, keep_tokens: bool = False) -> Timing:
    """Run requests to completion on an idle core. RequestFailedError if one ends in any way but by length."""
    timing = Timing(prompt_tokens=sum(len(r.prompt_token_ids) for r in requests))
    begin = last = begin_round = time.perf_counter()
    for request in requests:
        core.add_request(request)
    remaining = len(requests)
    seen: set[str] = set()  # who got a token since `begin_round`
    while core.has_work:
        outputs = core.step()
        now = time.perf_counter()
        for output in outputs:
            timing.output_tokens += len(output.token_ids)
            timing.first_token_seconds.setdefault(output.request_id, now - begin)
            if output.finish_reason not in (None, "length"):
                raise RequestFailedError(f"{output.request_id} ended with {output.finish_reason}: {output.error}")
            remaining -= output.finish_reason is not None
            if keep_tokens:
                timing.token_ids.setdefault(output.request_id, []).extend(output.token_ids)
        ids = {output.request_id for output in outputs}
        if seen & ids:  # somebody gets a second token before others had one: prompts are still being computed
            seen, begin_round = set(), last
        seen |= ids
        if len(seen) == len(requests):
            timing.decode_steps.append(now - begin_round)
            seen, begin_round = set(), now
        if outputs:
            last = now
    timing.seconds = time.perf_counter() - begin
    if remaining:
        raise RequestFailedError(f"{remaining} of {len(requests)} requests never ended")
    # The first full step's interval holds prefill, the second may hold the tail of it.
    timing.decode_steps = timing.decode_steps[2:]
    return timing
