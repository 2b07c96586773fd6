"""Decides which sequences run which tokens in a step, and gives them slots and pages.

Knows the order of requests, the token budget, slots, and page shortage. Does not know the executor, results, or stop
conditions (`core.py`).

A step is made in this order:
1. every decoding sequence gets its one token; where a page is missing, the running sequence of the worst rank is
   preempted, itself at last;
2. running prefills go on, in chunks (`fairness.py`), all together with no more tokens than `pacing.py` allows;
3. waiting requests are admitted by (priority, arrival) while there are slots, tokens and pages, unless this step
   preempted. A request that lacks pages stops those behind it, so that it is not overtaken for ever; one that lacks
   only the budget for long prompts, or waits for K/V that a running prefill is just computing, lets others pass.

Rank is (priority, arrival). The best-ranked running sequence is never preempted while another one holds pages, and one
sequence alone always fits (`RequestLimits`), so every accepted request ends.

Steps are planned ahead: a decoding sequence is scheduled although its newest token is still in flight. Its length is
known nevertheless, so none runs past its limit; that it ended with a stop token shows later, and the token run in
excess is discarded. An executor of several stages wants the tokens themselves: a step then runs the sequences of one
lane (`lanes.py`), which have no other in flight, and parts of any prompts.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass
from operator import attrgetter

from appliance.batching.fairness import PrefillBudget
from appliance.batching.kv_cache import KvCache
from appliance.batching.lanes import Lanes
from appliance.batching.pacing import PrefillPacer
from appliance.batching.request import Sequence
from appliance.batching.step import NewSequence, ScheduledSequence, StepPlan

MAX_PASSED_OVER = 64  # waiting requests that may be overtaken in one step; bounds the time a step's planning takes
WATERMARK = 100  # one page in so many stays available at admission, so that running sequences can grow for a while

_rank = attrgetter("rank")
_queue_rank = attrgetter("queue_rank")


@dataclass(slots=True)
class ScheduledStep:
    """A plan and the sequences of `plan.scheduled`, row by row."""

    plan: StepPlan
    sequences: list[Sequence]
    lane: int = 0
    num_decodes: int = 0  # of its rows; the others are chunks of prefills
    num_prefill_tokens: int = 0
    prefill_pairs: float = 0.0  # of each of them and each token that it attends to
    submitted_at: float = 0.0  # when `submit` had returned; seconds of the core's clock
    submit_seconds: float = 0.0  # that `submit` took


@dataclass(slots=True)
class _Chunk:
    """A prefill's share of a step."""

    sequence: Sequence
    length: int


class Scheduler:
    """Owns all sequences that have not finished: each is in `running` (has a slot and pages) or in `waiting`."""

    def __init__(
        self,
        kv_cache: KvCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        step_sizes: tuple[int, ...] = (),
        pacer: PrefillPacer | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        """Without a `pacer` prefills take all tokens that decodes leave. `step_sizes`: see `step.Executor`."""
        self.kv_cache = kv_cache
        self._lanes = lanes or Lanes(1)
        self._pacer = pacer
        self.running: list[Sequence] = []  # by rank
        self.waiting: list[Sequence] = []  # by queue rank
        self.num_preemptions = 0
        self.num_steps = 0
        self._max_num_batched_tokens = max_num_batched_tokens
        self._step_sizes = step_sizes
        # No more sequences than tokens in a step, or the last ones would never run.
        self._num_slots = min(max_num_seqs, max_num_batched_tokens)
        self._free_slots = list(range(self._num_slots - 1, -1, -1))  # a stack: low slots first
        self._watermark = max(1, kv_cache.pool.num_pages // WATERMARK)

    def add(self, seq: Sequence) -> None:
        """Accepts a new sequence."""
        insort(self.waiting, seq, key=_queue_rank)

    def finish(self, seq: Sequence) -> None:
        """Ends a sequence of this scheduler, whatever it is doing; its slot and pages are free for the next step."""
        seq.finished = True
        if seq.slot >= 0:
            del self.running[bisect_left(self.running, seq.rank, key=_rank)]
            self._vacate(seq)
        else:
            del self.waiting[bisect_left(self.waiting, seq.queue_rank, key=_queue_rank)]

    def schedule(self, lane: int = 0) -> ScheduledStep | None:
        """The next step of a lane that has none in flight, which the caller must submit before it calls anything else
        here; None if nothing can run now.

        Sequences are moved on as if the step had run: `num_computed`, and `num_in_flight` where a token is sampled.
        """
        plan = StepPlan(self.num_steps)
        step = ScheduledStep(plan, [], lane)
        self._lanes.level(self.running, lane)
        prefills, preempted = self._schedule_decodes(step)
        step.num_decodes = len(plan.scheduled)
        budget = PrefillBudget(self._prefill_tokens(step.num_decodes, prefills), self._max_num_batched_tokens)
        chunks = self._continue_prefills(prefills, budget)
        if self.waiting and not preempted:
            self._admit(chunks, budget, step)
        if chunks:
            self._schedule_chunks(step, chunks, budget)
        if not plan.scheduled:
            return None
        self.num_steps += 1
        return step

    def _prefill_tokens(self, num_decodes: int, prefills: list[Sequence]) -> int:
        """How many the next step may run; `prefills` are running."""
        left = self._max_num_batched_tokens - num_decodes
        if not (prefills or self.waiting):
            return left
        limit = None
        if self._pacer is not None:
            context = prefills[0].num_computed if prefills else 0
            limit = self._pacer.limit(num_decodes, len(prefills) + self._num_admissible(), context)
        if self._lanes.count > 1:
            limit = min(left if limit is None else limit, self._lanes.share(self._waiting_tokens(prefills)))
        return left if limit is None else min(left, self._without_padding(num_decodes, limit))

    def _waiting_tokens(self, prefills: list[Sequence]) -> int:
        """About how many tokens of prompts could be run, as far as they matter."""
        running = sum(seq.prefill_end - seq.num_computed for seq in prefills)
        return running + sum(len(seq.token_ids) for seq in self.waiting[:MAX_PASSED_OVER])

    def _without_padding(self, num_decodes: int, limit: int) -> int:
        """The most prefill tokens up to `limit` that fill a step's size: padding takes as long as tokens. `limit`
        itself if that leaves less than half."""
        total = num_decodes + limit
        at = bisect_right(self._step_sizes, total)
        if at == len(self._step_sizes):  # beyond the largest nothing is padded
            return limit
        fitting = self._step_sizes[at - 1] - num_decodes if at else 0
        return fitting if 2 * fitting >= limit else limit

    def _num_admissible(self) -> int:
        """About how many waiting requests there is a slot and room in the KV cache for, if all are like the first."""
        if not self.waiting or not self._free_slots:
            return 0
        pages = -(-len(self.waiting[0].token_ids) // self.kv_cache.page_size)
        room = max(0, self.kv_cache.pool.num_available - self._watermark) // pages
        return min(len(self.waiting), len(self._free_slots), room)

    def _schedule_decodes(self, step: ScheduledStep) -> tuple[list[Sequence], bool]:
        """Adds a row for each decoding sequence; returns the running prefills, and whether any was preempted.

        The hot loop: at most a few hundred nanoseconds of Python for each sequence.
        """
        rows, sequences = step.plan.scheduled, step.sequences
        prefills: list[Sequence] = []
        preemptions = self.num_preemptions
        lane, bring_tokens = step.lane, self._lanes.count > 1
        for seq in self.running:  # `_page_for` may shorten the list at its end
            if not seq.decoding:
                prefills.append(seq)
                continue
            if seq.lane != lane:
                continue
            start = seq.num_computed
            if start + 1 >= seq.max_length:
                continue  # its last token is in flight
            new_pages: list[int] = []
            if start == seq.capacity:
                page = self._page_for(seq)
                if page is None:
                    break  # it was the last of the list, and is preempted
                new_pages.append(page)
            seq.num_computed = start + 1
            seq.num_in_flight += 1
            rows.append(ScheduledSequence(seq.slot, start, 1, new_pages, True))
            sequences.append(seq)
            if bring_tokens:
                step.plan.token_ids.append(seq.token_ids[start])
        return prefills, self.num_preemptions > preemptions

    def _page_for(self, seq: Sequence) -> int | None:
        """A page for a running sequence, preempting others of worse rank as needed; None if `seq` itself had to be.

        Sequences are visited by rank, so those of worse rank have no row in the plan yet.
        """
        while (page := self.kv_cache.grow(seq)) is None:
            victim = self.running.pop()
            self._preempt(victim)
            if victim is seq:
                return None
        return page

    def _preempt(self, seq: Sequence) -> None:
        """Back to the waiting queue, before others of its priority. It keeps its tokens, and gets those still in flight
        on collection; it recomputes its K/V unless the pages are still in the prefix cache when it comes back."""
        self.num_preemptions += 1
        self._vacate(seq)
        seq.decoding = False
        priority, arrival, serial = seq.rank
        seq.queue_rank = (priority, 0, arrival, serial)
        insort(self.waiting, seq, key=_queue_rank)

    def _vacate(self, seq: Sequence) -> None:
        self._lanes.remove(seq)
        self.kv_cache.release(seq)
        self._free_slots.append(seq.slot)
        seq.slot = -1

    def _continue_prefills(self, prefills: list[Sequence], budget: PrefillBudget) -> list[_Chunk]:
        chunks: list[_Chunk] = []
        for seq in prefills:
            wanted = seq.prefill_end - seq.num_computed
            granted = budget.offer(wanted)
            if granted > 0:
                budget.take(wanted, granted)
                chunks.append(_Chunk(seq, granted))
        return chunks

    def _admit(self, chunks: list[_Chunk], budget: PrefillBudget, step: ScheduledStep) -> None:
        """Moves requests from `waiting` to `running`, into the step's lane, and appends their first chunks."""
        index = 0
        room = self._lanes.room(step.lane, len(self.running), min(len(self.waiting), len(self._free_slots)))
        while self._free_slots and budget.left and room and index < min(len(self.waiting), MAX_PASSED_OVER):
            seq = self.waiting[index]
            if seq.num_in_flight:
                return  # preempted a moment ago: its newest token, which it has to run, is not known yet
            hits, better_wait = self.kv_cache.match(seq)
            # With max_tokens 0 only prompt log probabilities are wanted, and the last token's logits are none of them.
            end = min(len(seq.token_ids), seq.max_length - 1) if seq.params.max_tokens == 0 else len(seq.token_ids)
            wanted = end - len(hits) * self.kv_cache.page_size
            granted = budget.offer(wanted)
            if better_wait or granted == 0:
                index += 1
                continue
            if not self.kv_cache.admit(seq, hits, self._watermark if self.running else 0):
                return
            del self.waiting[index]
            budget.take(wanted, granted)
            seq.prefill_end = end
            seq.slot = self._free_slots.pop()
            self._lanes.add(seq, step.lane)
            room -= 1
            insort(self.running, seq, key=_rank)
            chunks.append(_Chunk(seq, granted))
            step.plan.new.append(_new_sequence(seq))

    def _schedule_chunks(self, step: ScheduledStep, chunks: list[_Chunk], budget: PrefillBudget) -> None:
        """Adds a row for each chunk, those of one token first, and registers the pages that they fill."""
        for chunk in chunks:
            seq = chunk.sequence
            chunk.length += budget.take_leftover(seq.prefill_end - seq.num_computed - chunk.length)
            step.num_prefill_tokens += chunk.length
            step.prefill_pairs += chunk.length * (chunk.sequence.num_computed + chunk.length / 2)
        for single in (True, False):
            for chunk in chunks:
                if (chunk.length == 1) is single:
                    step.plan.scheduled.append(_run_chunk(chunk))
                    if chunk.sequence.decoding:
                        self._lanes.move(chunk.sequence, step.lane)
                    step.sequences.append(chunk.sequence)
        # The plan is submitted before anybody can look pages up again.
        for chunk in chunks:
            self.kv_cache.register(chunk.sequence)

    def check_integrity(self) -> None:
        """Raises AssertionError if slots, queues or pages are not what they should be."""
        slots = sorted([seq.slot for seq in self.running] + self._free_slots)
        _check(slots == list(range(self._num_slots)), "slots are not exactly the running sequences' and the free ones")
        _check(all(seq.slot == -1 and not seq.pages for seq in self.waiting), "a waiting request has a slot or pages")
        _check(not any(seq.finished for seq in self.running + self.waiting), "a finished request is still here")
        _check(sorted(self.running, key=_rank) == self.running, "running requests are not in order")
        _check(sorted(self.waiting, key=_queue_rank) == self.waiting, "waiting requests are not in order")
        for seq in self.running:
            known = len(seq.token_ids) + seq.num_in_flight
            expected = known - 1 if seq.decoding else seq.num_computed
            _check(seq.num_computed == expected, f"request {seq.request_id}: {seq.num_computed} of {known} tokens run")
            _check(known <= seq.max_length, f"request {seq.request_id} runs past its limit")
        self._lanes.check_integrity(self.running)
        self.kv_cache.check_integrity(self.running)


def _run_chunk(chunk: _Chunk) -> ScheduledSequence:
    """The row of a chunk; moves the sequence on."""
    seq, start = chunk.sequence, chunk.sequence.num_computed
    end = start + chunk.length
    samples = end == len(seq.token_ids)
    seq.num_computed = end
    if samples:
        seq.num_in_flight += 1
        seq.decoding = True
    logprobs = seq.prompt_logprobs is not None and start + 1 < seq.num_prompt_tokens
    return ScheduledSequence(seq.slot, start, chunk.length, [], samples, prompt_logprobs=logprobs)


def _new_sequence(seq: Sequence) -> NewSequence:
    return NewSequence(
        slot=seq.slot,
        token_ids=list(seq.token_ids),
        num_prompt_tokens=seq.num_prompt_tokens,
        params=seq.params,
        seed=seq.seed,
        suppressed_token_ids=seq.suppressed_token_ids,
        page_ids=list(seq.pages),
    )


def _check(condition: bool, message: str) -> None:
    """An assert that survives `python -O`: integrity checks are called by the running server too."""
    if not condition:
        raise AssertionError(message)
