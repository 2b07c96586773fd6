"""The loop of the engine: takes requests, keeps the executor busy with steps, turns results into outputs.

Knows stop conditions on tokens and what is in flight. Knows nothing of text, of processes and messages, or of the
device. Not thread-safe: one thread calls everything.

Pipelining: `step()` plans and submits step N+1 before it waits for step N, so the device has its next step queued while
the CPU works on results. Sampled tokens stay on the device in between. Consequences:
- a sequence that ends by a stop token in step N has run one token too many in N+1; its row there is discarded;
- pages and slots given back while steps are in flight may be used by the next plan at once, since the device runs
  steps in order, and results find their sequence by object and not by slot;
- a sequence preempted with a token in flight gets it on collection, and is not admitted again before.

An executor of several stages gets as many steps, of disjoint sequences (`lanes.py`): each lane's next step is planned
when the result of its last one is there, and the stages work on the other lanes' steps meanwhile.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from appliance.batching.kv_cache import KvCache
from appliance.batching.lanes import Lanes
from appliance.batching.pacing import PrefillPacer
from appliance.batching.request import RequestLimits, Sequence, make_sequence
from appliance.batching.scheduler import ScheduledStep, Scheduler
from appliance.batching.step import Executor, ScheduledSequence, StepResult
from appliance.errors import InvalidRequestError
from appliance.types import EngineOutput, EngineRequest, EngineStats, FinishReason, TokenLogprobs

_WAITED = 0.1  # share of the time between two results that the core has to wait for, if the device sets the pace


class EngineCore:
    """Serves requests with one executor. Every request that `add_request` accepts gets outputs from `step`, of which
    exactly one, the last, has a finish_reason.

    An exception of the executor leaves `step` as it is, and then the engine is lost: nothing here can be used again.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        prefix_caching: bool = True,
        pipeline_depth: int = 2,
        seed: int = 0,
        max_step_stretch: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`pipeline_depth`: steps in flight at most; 1 waits for each step before it plans the next. An executor of
        several stages has one for each of them instead. `seed`: what
        requests without a seed of their own derive theirs from, with their request id. `max_step_stretch`: how many
        times longer prefill may make a step that decodes (`pacing.py`); 0 is no limit, and then the schedule does not
        depend on `clock`."""
        if pipeline_depth < 1:
            raise ValueError(f"pipeline_depth is {pipeline_depth}; it must be at least 1")
        self.limits = RequestLimits(executor.max_model_len, executor.num_pages, executor.page_size)
        self._executor = executor
        self._lanes = Lanes(executor.num_stages)
        self._pipeline_depth = pipeline_depth if executor.num_stages == 1 else executor.num_stages
        self._seed = seed
        self._clock = clock
        self._pacer = PrefillPacer(max_step_stretch) if max_step_stretch else None
        self._collected_at = 0.0  # when the newest result had come
        self._kv_cache = KvCache(executor.num_pages, executor.page_size, prefix_caching=prefix_caching)
        self._scheduler = Scheduler(
            self._kv_cache,
            max_num_seqs=executor.max_num_seqs,
            max_num_batched_tokens=executor.max_num_batched_tokens,
            step_sizes=executor.step_sizes,
            pacer=self._pacer,
            lanes=self._lanes,
        )
        self._sequences: dict[str, Sequence] = {}  # accepted, without terminal output
        self._in_flight: deque[ScheduledStep] = deque()
        self._ready: list[EngineOutput] = []  # terminal outputs that need no step
        self._num_accepted = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0

    def validate(self, request: EngineRequest) -> None:
        """Raises InvalidRequestError or ContextLengthError if this engine can never serve the request."""
        self.limits.validate(request)

    def add_request(self, request: EngineRequest) -> None:
        """Accepts a request, or raises InvalidRequestError or ContextLengthError and changes nothing."""
        self.limits.validate(request)
        if request.request_id in self._sequences:
            raise InvalidRequestError(
                f"a request with the id {request.request_id!r} is still running", hint="give each request its own id"
            )
        seq = make_sequence(request, self.limits, serial=self._num_accepted, engine_seed=self._seed)
        seq.accepted_at = self._clock()
        self._num_accepted += 1
        scores_prompt = seq.prompt_logprobs is not None and seq.num_prompt_tokens > 1
        if len(seq.token_ids) >= seq.max_length and not scores_prompt:
            # Nothing to run: max_tokens is 0, or a resumed request was complete but for its last message.
            self._ready.append(
                EngineOutput(seq.request_id, finish_reason="length", prompt_logprobs=seq.prompt_logprobs)
            )
            return
        self._sequences[seq.request_id] = seq
        self._scheduler.add(seq)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Ends requests with finish_reason "abort". Their pages are free for the next step. Ids that are unknown or
        have ended are ignored: their terminal output may be on its way."""
        for request_id in request_ids:
            seq = self._sequences.pop(request_id, None)
            if seq is not None:
                self._scheduler.finish(seq)
                self._ready.append(EngineOutput(request_id, finish_reason="abort"))

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do, discarding results of ended requests included."""
        return bool(self._sequences or self._in_flight or self._ready)

    def step(self) -> list[EngineOutput]:
        """Submits the next step if anything can run, then waits for the oldest in flight if `pipeline_depth` are or if
        nothing was submitted; of several stages, then submits the step that this makes possible. Returns at most one
        output per request and may return none."""
        outputs, self._ready = self._ready, []
        submitted = self._submit_next()
        if self._in_flight and (not submitted or len(self._in_flight) >= self._pipeline_depth):
            self._collect(outputs)
            if self._lanes.count > 1:
                self._submit_next()  # the first stage may be waiting for it, before outputs go to whoever wants them
        return outputs

    def _submit_next(self) -> bool:
        """False if nothing can run now."""
        step = self._next_step()
        if step is None:
            return False
        if step.plan.new:
            self._note_first_steps(step)
        begin = self._clock()
        self._executor.submit(step.plan)
        step.submitted_at = self._clock()
        step.submit_seconds = step.submitted_at - begin
        self._in_flight.append(step)
        return True

    def _next_step(self) -> ScheduledStep | None:
        """Of the lane that has waited longest among those that have something to run and no step in flight."""
        for lane in self._lanes.free:
            step = self._scheduler.schedule(lane)
            if step is not None:
                self._lanes.take(lane)
                return step
        return None

    def _note_first_steps(self, step: ScheduledStep) -> None:
        now = self._clock()
        for seq in step.sequences:
            if seq.queue_seconds < 0:  # else it runs already, or again after a preemption
                seq.queue_seconds = now - seq.accepted_at

    def _collect(self, outputs: list[EngineOutput]) -> None:
        """Takes in the oldest step's result. The hot loop: about a microsecond of Python for each decoding sequence."""
        begin = self._clock()
        result = self._executor.collect()
        step = self._in_flight.popleft()
        self._lanes.give_back(step.lane)
        self._measure(step, begin)
        if result.step_id != step.plan.step_id or len(result.token_ids) != len(step.sequences):
            raise RuntimeError(
                f"the executor returned step {result.step_id} with {len(result.token_ids)} rows for step "
                f"{step.plan.step_id} with {len(step.sequences)}"
            )
        for row, (seq, token_id) in enumerate(zip(step.sequences, result.token_ids)):
            if token_id < 0:
                self._collect_chunk(seq, step, result, row, outputs)
                continue
            seq.num_in_flight -= 1
            if seq.finished:
                continue
            seq.token_ids.append(token_id)
            self._generation_tokens += 1
            reason = seq.finish_reason(token_id)
            if seq.detailed or reason is not None:
                outputs.append(self._detailed_output(seq, token_id, reason, step, result, row))
            else:
                outputs.append(EngineOutput(seq.request_id, [token_id]))

    def _measure(self, step: ScheduledStep, begin: float) -> None:
        """Tells the pacer how long a step took whose result has just come; `begin`: when the wait for it began."""
        now = self._clock()
        seconds = now - max(self._collected_at, step.submitted_at)  # the device runs one step after the other
        if self._lanes.count > 1:  # what a stage takes of it: the others need not have had anything else to do
            seconds = min(seconds, (now - step.submitted_at + step.submit_seconds) / self._lanes.count)
        if now - begin < _WAITED * seconds:  # it was done before: it ran while it was submitted, as on the CPU
            seconds = step.submit_seconds + now - begin
        self._collected_at = now
        if self._pacer is not None:
            self._pacer.observe(step.num_decodes, step.num_prefill_tokens, seconds, step.prefill_pairs)

    def _collect_chunk(
        self, seq: Sequence, step: ScheduledStep, result: StepResult, row: int, outputs: list[EngineOutput]
    ) -> None:
        """A row without a sampled token: part of a prefill."""
        scheduled = step.plan.scheduled[row]
        if scheduled.samples:
            raise RuntimeError(f"the executor sampled no token for slot {scheduled.slot} in step {step.plan.step_id}")
        if seq.finished or not scheduled.prompt_logprobs:
            return
        if len(seq.token_ids) >= seq.max_length and scheduled.start + scheduled.length == seq.prefill_end:
            # max_tokens is 0: these log probabilities were all that was wanted.
            outputs.append(self._detailed_output(seq, None, "length", step, result, row))
        else:
            _store_prompt_logprobs(seq, scheduled, result.prompt_logprobs[row])

    def _detailed_output(
        self,
        seq: Sequence,
        token_id: int | None,
        reason: FinishReason | None,
        step: ScheduledStep,
        result: StepResult,
        row: int,
    ) -> EngineOutput:
        """A first or last output, or one with log probabilities. Ends the sequence if it is the last."""
        scheduled = step.plan.scheduled[row]
        if scheduled.prompt_logprobs:
            _store_prompt_logprobs(seq, scheduled, result.prompt_logprobs[row])
        prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs, None
        logprobs: list[TokenLogprobs] | None = None
        if token_id is not None and seq.params.logprobs is not None:
            entry = result.logprobs[row]
            if entry is None:
                raise RuntimeError(f"the executor returned no log probabilities for request {seq.request_id}")
            logprobs = [entry]
        num_cached, queue_seconds = 0, 0.0
        if not seq.started:
            num_cached, queue_seconds = seq.num_cached_tokens, max(seq.queue_seconds, 0.0)
            self._prompt_tokens += seq.num_prompt_tokens
            seq.started = True
            seq.detailed = seq.params.logprobs is not None
        if reason is not None:
            self._scheduler.finish(seq)
            del self._sequences[seq.request_id]
        return EngineOutput(
            request_id=seq.request_id,
            token_ids=[] if token_id is None else [token_id],
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_token_id=token_id if reason == "stop" else None,
            num_cached_tokens=num_cached,
            queue_seconds=queue_seconds,
        )

    def stats(self) -> EngineStats:
        """A snapshot; counters are totals. `prompt_tokens` counts a request when its first output comes."""
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            kv_cache_usage=self._kv_cache.usage,
            num_preemptions=self._scheduler.num_preemptions,
            prefix_cache_queries=self._kv_cache.num_queries,
            prefix_cache_hits=self._kv_cache.num_hits,
            num_steps=self._scheduler.num_steps,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError if requests, slots, pages or steps in flight contradict each other. Takes time in
        proportion to the number of pages: for tests, and for a server that is idle."""
        self._scheduler.check_integrity()
        in_flight: dict[int, int] = {}
        for step in self._in_flight:
            for seq, scheduled in zip(step.sequences, step.plan.scheduled):
                in_flight[id(seq)] = in_flight.get(id(seq), 0) + scheduled.samples
        sequences = self._scheduler.running + self._scheduler.waiting
        if {id(seq) for seq in sequences} != {id(seq) for seq in self._sequences.values()}:
            raise AssertionError("the scheduler's sequences are not the accepted ones")
        for seq in sequences:
            if seq.num_in_flight != in_flight.get(id(seq), 0):
                raise AssertionError(f"request {seq.request_id} counts {seq.num_in_flight} tokens in flight")


def _store_prompt_logprobs(seq: Sequence, scheduled: ScheduledSequence, entries: list[TokenLogprobs] | None) -> None:
    """Keeps a chunk's entries by position: a prefill that was preempted runs some positions again."""
    if seq.prompt_logprobs is None:
        return
    first = scheduled.start + 1
    count = min(scheduled.start + scheduled.length + 1, seq.num_prompt_tokens) - first
    if entries is None or len(entries) != count:
        got = "none" if entries is None else len(entries)
        raise RuntimeError(f"the executor returned {got} of {count} prompt log probabilities for {seq.request_id}")
    seq.prompt_logprobs[first : first + count] = entries
