"""A fake executor for tests of the batching core: a "device" whose next token depends on every byte it reads from its
own paged KV store, so that a page shared wrongly, freed too early, or not written gives wrong tokens.

The K/V of position p is a number that depends on the token at p and on the K/V of p-1 *as read through the page table*;
the next token is a function of the K/V of all positions, read likewise. `reference` computes the same without pages.
Steps execute when they are collected, in order, as on a device that lags behind; so a plan that is changed after its
submission, or a page that is handed on although the order does not protect it, shows too.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field
from zlib import crc32

from appliance.batching.step import NewSequence, ScheduledSequence, StepPlan, StepResult
from appliance.types import EngineOutput, EngineRequest, SamplingParams, TokenLogprobs

VOCAB_SIZE = 48


def key_value(token_id: int, position: int, previous: int) -> int:
    return crc32(array("q", [token_id, position]).tobytes(), previous)


def choose(states: list[int], seed: int, banned: tuple[int, ...]) -> int:
    token = crc32(array("Q", states).tobytes(), seed & 0xFFFFFFFF) % VOCAB_SIZE
    while token in banned:
        token = (token + 1) % VOCAB_SIZE
    return token


def logprobs_of(token_id: int, states: list[int]) -> TokenLogprobs:
    return TokenLogprobs(token_id, -float(crc32(array("Q", states).tobytes()) % 1000), rank=1)


def reference(request: EngineRequest, limit: int, seed: int) -> tuple[list[int], str]:
    """New tokens and finish_reason of a request, from its prompt alone. `limit`: tokens, prompt and output."""
    params = request.params
    num_prompt = len(request.prompt_token_ids) - request.num_resumed_tokens
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(request.eos_token_ids))
    end = limit if params.max_tokens is None else min(limit, num_prompt + params.max_tokens)
    tokens, states = list(request.prompt_token_ids), [0]
    for position, token in enumerate(tokens):
        states.append(key_value(token, position, states[-1]))
    while len(tokens) < end:
        banned = tuple(sorted(stops)) if len(tokens) - num_prompt < params.min_tokens else ()
        token = choose(states[1:], seed, banned)
        tokens.append(token)
        if token in stops:
            return tokens[len(request.prompt_token_ids) :], "stop"
        states.append(key_value(token, len(tokens) - 1, states[-1]))
    return tokens[len(request.prompt_token_ids) :], "length"


@dataclass
class Slot:
    tokens: list[int]
    pages: list[int]
    new: NewSequence


@dataclass
class FakeExecutor:
    num_pages: int = 64
    page_size: int = 4
    max_model_len: int = 128
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 32
    step_sizes: tuple[int, ...] = ()
    num_stages: int = 1
    plans: list[StepPlan] = field(default_factory=list)  # all submitted
    depths: list[int] = field(default_factory=list)  # steps queued at each collect, the collected one included

    def __post_init__(self) -> None:
        self._queue: deque[StepPlan] = deque()
        self._slots: dict[int, Slot] = {}
        self._cells: list[list[int]] = [[-1] * self.page_size for _ in range(self.num_pages)]

    def submit(self, plan: StepPlan) -> None:
        lengths = [row.length for row in plan.scheduled]
        assert plan.scheduled, "an empty step"
        assert min(lengths) >= 1
        assert plan.num_tokens <= self.max_num_batched_tokens, "over the token budget"
        assert [n > 1 for n in lengths] == sorted(n > 1 for n in lengths), "rows of length 1 come first"
        slots = [row.slot for row in plan.scheduled]
        assert len(set(slots)) == len(slots), "a slot twice in a step"
        assert all(0 <= slot < self.max_num_seqs for slot in slots)
        assert {new.slot for new in plan.new} <= set(slots)
        if self.num_stages > 1:
            self._check_stages(plan)
        self.plans.append(plan)
        self._queue.append(plan)

    def _check_stages(self, plan: StepPlan) -> None:
        """Steps in flight sample for different sequences, and a plan brings the tokens that it decodes."""
        assert len(self._queue) < self.num_stages
        decodes = plan.scheduled[: len(plan.token_ids)]
        for token, row in zip(plan.token_ids, decodes, strict=True):
            assert row.length == 1 and row.samples
            # What was sampled for this slot in flight was for one that has been preempted since.
            assert not any(row.slot == other.slot and other.samples for step in self._queue for other in step.scheduled)
            assert self._slots[row.slot].tokens[row.start :] == [token]

    def collect(self) -> StepResult:
        self.depths.append(len(self._queue))
        plan = self._queue.popleft()
        for new in plan.new:
            self._slots[new.slot] = Slot(list(new.token_ids), list(new.page_ids), new)
        fresh = {new.slot for new in plan.new}
        written: set[int] = set()
        for row in plan.scheduled:
            slot = self._slots[row.slot]
            assert not (row.slot in fresh and row.new_page_ids)
            slot.pages += row.new_page_ids
            pages = {slot.pages[p // self.page_size] for p in range(row.start, row.start + row.length)}
            assert not pages & written, "two sequences write into one page"
            written |= pages
        for row in plan.scheduled:
            others = {page for r in plan.scheduled if r is not row for page in self._slots[r.slot].pages}
            slot = self._slots[row.slot]
            pages = {slot.pages[p // self.page_size] for p in range(row.start, row.start + row.length)}
            assert not pages & others, "a sequence writes into a page that another one reads"
        rows = [self._run(row) for row in plan.scheduled]
        return StepResult(plan.step_id, [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])

    def _run(self, row: ScheduledSequence) -> tuple[int, TokenLogprobs | None, list[TokenLogprobs] | None]:
        slot, end = self._slots[row.slot], row.start + row.length
        for position in range(row.start, end):
            previous = self._read(slot, position - 1) if position else 0
            page, offset = divmod(position, self.page_size)
            self._cells[slot.pages[page]][offset] = key_value(slot.tokens[position], position, previous)
        states = [self._read(slot, position) & 0xFFFFFFFF for position in range(end)]
        params, num_prompt = slot.new.params, slot.new.num_prompt_tokens
        prompt_logprobs = None
        if row.prompt_logprobs:
            last = min(end + 1, num_prompt)
            prompt_logprobs = [logprobs_of(slot.tokens[p], states[:p]) for p in range(row.start + 1, last)]
        if not row.samples:
            assert end < len(slot.tokens)
            return -1, None, prompt_logprobs
        assert end == len(slot.tokens), "samples behind another token than the last"
        assert end < self.max_model_len, "samples beyond the context limit"
        banned = slot.new.suppressed_token_ids if end - num_prompt < params.min_tokens else ()
        token = choose(states, slot.new.seed, banned)
        slot.tokens.append(token)
        return token, logprobs_of(token, states) if params.logprobs is not None else None, prompt_logprobs

    def _read(self, slot: Slot, position: int) -> int:
        page, offset = divmod(position, self.page_size)
        return self._cells[slot.pages[page]][offset]


def make_request(
    request_id: str,
    prompt: list[int],
    *,
    eos: tuple[int, ...] = (),
    priority: int = 0,
    arrival: float = 0.0,
    resumed: int = 0,
    **params: object,
) -> EngineRequest:
    """A request with seed 0 unless `params` has another."""
    sampling = SamplingParams(**{"seed": 0, **params})  # type: ignore[arg-type]
    return EngineRequest(request_id, prompt, sampling, resumed, eos, arrival, priority)


class Collector:
    """Gathers outputs by request and insists that each has one terminal output, its last."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[EngineOutput]] = {}

    def add(self, outputs: list[EngineOutput]) -> None:
        ids = [output.request_id for output in outputs]
        assert len(set(ids)) == len(ids), "two outputs of one request in a step"
        for output in outputs:
            earlier = self.outputs.setdefault(output.request_id, [])
            assert not any(e.finish_reason for e in earlier), f"an output after the terminal one: {output}"
            earlier.append(output)

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs.get(request_id, []) for token in output.token_ids]

    def finish_reason(self, request_id: str) -> str | None:
        outputs = self.outputs.get(request_id)
        return outputs[-1].finish_reason if outputs else None
