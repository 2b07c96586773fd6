"""What runs in a step, in which order, and who gives way. The replay test at the end compares whole schedules.

A change of policy changes the recorded digests on purpose: look at the difference first, then write them anew with
`python tests/test_scheduler.py`, and say in the commit why the schedule changed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from paged_fake import FakeExecutor, make_request

from appliance.batching.core import EngineCore
from appliance.batching.fairness import PrefillBudget
from appliance.batching.kv_cache import KvCache
from appliance.batching.request import RequestLimits, Sequence, make_sequence
from appliance.batching.scheduler import ScheduledStep, Scheduler
from appliance.batching.step import StepPlan

RECORDING = Path(__file__).parent / "data" / "recorded_arrivals.json"


class Bench:
    """A scheduler without executor: results are made up by `deliver`."""

    def __init__(
        self, *, num_pages: int = 100, page_size: int = 4, slots: int = 8, tokens: int = 64, caching: bool = False
    ) -> None:
        self.kv = KvCache(num_pages, page_size, prefix_caching=caching)
        self.scheduler = Scheduler(self.kv, max_num_seqs=slots, max_num_batched_tokens=tokens)
        self.limits = RequestLimits(1000, num_pages, page_size)
        self.count = 0

    def add(self, prompt: int | list[int], *, priority: int = 0, arrival: float = 0.0, **params: object) -> Sequence:
        tokens = [self.count] * prompt if isinstance(prompt, int) else prompt
        request = make_request(f"r{self.count}", tokens, priority=priority, arrival=arrival, **params)
        seq = make_sequence(request, self.limits, serial=self.count, engine_seed=0)
        self.count += 1
        self.scheduler.add(seq)
        return seq

    def schedule(self) -> ScheduledStep:
        step = self.scheduler.schedule()
        assert step is not None
        self.scheduler.check_integrity()
        return step

    def deliver(self, step: ScheduledStep, token: int = 7) -> None:
        for seq, row in zip(step.sequences, step.plan.scheduled):
            if row.samples:
                seq.num_in_flight -= 1
                if not seq.finished:
                    seq.token_ids.append(token)
                    if len(seq.token_ids) >= seq.max_length:
                        self.scheduler.finish(seq)
        self.scheduler.check_integrity()

    def turn(self) -> ScheduledStep:
        step = self.schedule()
        self.deliver(step)
        return step


def lengths(step: ScheduledStep) -> dict[str, int]:
    return {seq.request_id: row.length for seq, row in zip(step.sequences, step.plan.scheduled)}


def test_a_long_prompt_is_prefilled_in_chunks_beside_decodes() -> None:
    bench = Bench(tokens=16)
    bench.add(3)
    bench.turn()
    bench.add(40)
    steps = [bench.turn() for _ in range(4)]
    assert [lengths(step) for step in steps] == [
        {"r0": 1, "r1": 15},
        {"r0": 1, "r1": 15},
        {"r0": 1, "r1": 10},
        {"r0": 1, "r1": 1},
    ]
    rows = [next(r for s, r in zip(x.sequences, x.plan.scheduled) if s.request_id == "r1") for x in steps]
    assert [(row.start, row.samples) for row in rows] == [(0, False), (15, False), (30, True), (40, True)]
    assert steps[0].plan.new[0].token_ids == [1] * 40
    assert len(steps[0].plan.new[0].page_ids) == 10
    assert all(not step.plan.new for step in steps[1:])


def test_rows_of_one_token_come_first() -> None:
    bench = Bench()
    bench.add(5)
    bench.add(1)
    bench.add(6)
    bench.add(1)
    assert [row.length for row in bench.turn().plan.scheduled] == [1, 1, 5, 6]


def test_the_next_token_is_scheduled_while_one_is_in_flight_and_none_beyond_the_limit() -> None:
    bench = Bench()
    bench.add(3, max_tokens=2)
    first = bench.schedule()
    second = bench.schedule()
    assert [(row.start, row.length, row.samples) for row in second.plan.scheduled] == [(3, 1, True)]
    assert bench.scheduler.schedule() is None, "both tokens are in flight"
    bench.deliver(first)
    bench.deliver(second)
    assert not bench.scheduler.running


def test_a_page_is_added_when_the_last_one_is_full() -> None:
    bench = Bench()
    seq = bench.add(3)
    steps = [bench.turn() for _ in range(7)]
    assert [len(step.plan.scheduled[0].new_page_ids) for step in steps] == [0, 0, 1, 0, 0, 0, 1]
    assert seq.pages == steps[0].plan.new[0].page_ids + [p for s in steps for p in s.plan.scheduled[0].new_page_ids]


def test_admission_is_by_priority_then_arrival() -> None:
    bench = Bench(slots=3)
    bench.add(2, arrival=3.0)
    bench.add(2, arrival=1.0)
    bench.add(2, arrival=9.0, priority=-1)
    bench.add(2, arrival=1.0)
    assert [seq.request_id for seq in bench.turn().sequences] == ["r2", "r1", "r3"]
    assert [seq.request_id for seq in bench.scheduler.waiting] == ["r0"]


def test_a_request_that_lacks_pages_is_not_overtaken() -> None:
    bench = Bench(num_pages=10, slots=4)
    bench.add(16)
    bench.turn()
    bench.add(24, arrival=1.0)  # 6 pages; 5 are left beside the one that admission leaves alone
    bench.add(1, arrival=2.0)
    assert lengths(bench.turn()) == {"r0": 1}
    bench.scheduler.finish(bench.scheduler.running[0])
    assert lengths(bench.turn()) == {"r1": 24, "r2": 1}


def test_the_watermark_is_waived_when_nothing_runs() -> None:
    bench = Bench(num_pages=4)
    bench.add(15)
    assert lengths(bench.turn()) == {"r0": 15}


def test_the_worst_rank_is_preempted_and_comes_back_first() -> None:
    bench = Bench(num_pages=6, slots=4)
    best = bench.add(8, arrival=0.0)
    worst = bench.add(8, arrival=1.0)
    bench.turn()
    bench.turn()  # both have 3 pages now
    bench.add(1, arrival=0.5)
    for _ in range(3):
        bench.turn()
    before = list(worst.token_ids)
    step = bench.turn()
    assert lengths(step) == {"r0": 1}
    assert bench.scheduler.num_preemptions == 1
    assert [seq.request_id for seq in bench.scheduler.waiting] == ["r1", "r2"], "although r2 arrived earlier"
    assert worst.token_ids == before
    bench.scheduler.finish(best)
    step = bench.turn()
    assert lengths(step) == {"r2": 1, "r1": len(before)}
    new = next(new for new in step.plan.new if new.slot == worst.slot)
    assert (new.token_ids, new.num_prompt_tokens) == (before, 8)


def test_a_lower_priority_is_preempted_although_it_arrived_first() -> None:
    bench = Bench(num_pages=6)
    low = bench.add(8, priority=1, arrival=0.0)
    bench.add(8, priority=0, arrival=1.0)
    while not bench.scheduler.num_preemptions:
        bench.turn()
    assert bench.scheduler.waiting == [low]


def test_the_worst_gives_way_itself_when_it_is_the_one_that_lacks_a_page() -> None:
    bench = Bench(num_pages=5)
    bench.add(5)
    last = bench.add(8)
    bench.turn()
    assert lengths(bench.turn()) == {"r0": 1, "r1": 1}
    for _ in range(3):
        bench.turn()
    assert bench.scheduler.num_preemptions == 1
    assert bench.scheduler.waiting == [last]


def test_nothing_is_admitted_in_a_step_that_preempts() -> None:
    bench = Bench(num_pages=6)
    bench.add(8, arrival=0.0)
    bench.add(8, arrival=1.0)
    for _ in range(5):
        bench.turn()
    bench.add(1, priority=-1)
    step = bench.turn()
    assert bench.scheduler.num_preemptions == 1
    assert not step.plan.new
    assert lengths(bench.turn()) == {"r2": 1, "r0": 1}


def test_a_sequence_preempted_with_a_token_in_flight_comes_back_with_it() -> None:
    bench = Bench(num_pages=6, tokens=32)
    best = bench.add(8, arrival=0.0)
    worst = bench.add(8, arrival=1.0)
    flying = bench.schedule()
    while True:
        upcoming = bench.schedule()
        if bench.scheduler.num_preemptions:
            break
        bench.deliver(flying)
        flying = upcoming
    assert bench.scheduler.waiting == [worst]
    assert worst.num_in_flight == 1
    known = len(worst.token_ids)
    bench.scheduler.finish(best)
    assert bench.scheduler.schedule() is None, "there is room, but its newest token is not known yet"
    bench.deliver(flying)
    assert len(worst.token_ids) == known + 1
    step = bench.schedule()
    assert step.plan.new[0].token_ids == worst.token_ids
    assert lengths(step) == {"r1": known + 1}


def test_a_budget_smaller_than_the_slots_starves_nobody() -> None:
    bench = Bench(slots=8, tokens=3)
    sequences = [bench.add(4, max_tokens=5) for _ in range(6)]
    for _ in range(60):
        if not (bench.scheduler.running or bench.scheduler.waiting):
            break
        step = bench.turn()
        assert step.plan.num_tokens <= 3
        decoding = [seq for seq in bench.scheduler.running if seq.decoding]
        assert all(seq.request_id in lengths(step) for seq in decoding), "a decode missed a step"
    assert all(seq.finished for seq in sequences)


# ---------------------------------------------------------------- long and short prompts


def test_short_prompts_start_beside_any_number_of_huge_ones() -> None:
    bench = Bench(num_pages=1000, tokens=32)
    for i in range(4):
        bench.add(400, arrival=float(i))
    bench.turn()
    bench.add(6, arrival=9.0)
    step = bench.turn()
    assert lengths(step) == {"r0": 26, "r4": 6}, "in the reserve of 8; the rest of it goes to the first huge one"
    assert lengths(bench.turn()) == {"r4": 1, "r0": 31}, "nobody wants the reserve"


def test_the_first_huge_prompt_is_not_held_up_by_many_short_ones() -> None:
    bench = Bench(num_pages=1000, tokens=32, slots=64)
    huge = bench.add(300)
    bench.turn()
    while not huge.decoding:
        for _ in range(8):
            bench.add(8, arrival=1.0, max_tokens=1)
        before = huge.num_computed
        bench.turn()
        assert huge.num_computed - before >= min(24, 300 - before)


def test_prefill_budget_arithmetic() -> None:
    budget = PrefillBudget(40, 64)  # 24 decodes; 10 reserved; long is over 16
    assert budget.offer(17) == 17
    assert budget.offer(100) == 30
    budget.take(100, 30)
    assert budget.offer(17) == 0
    assert budget.offer(16) == 10
    budget.take(16, 4)
    assert budget.left == 6
    assert budget.take_leftover(2) == 2
    assert budget.take_leftover(9) == 4
    assert budget.left == 0
    assert PrefillBudget(1, 64).offer(100) == 1, "the first long prefill always gets something"


def test_choices_of_one_prompt_compute_it_once() -> None:
    bench = Bench(caching=True, tokens=16)
    prompt = list(range(30))
    for _ in range(4):
        bench.add(prompt)
    bench.add(4)
    assert lengths(bench.turn()) == {"r4": 4, "r0": 12}, "the twins wait, an unrelated request does not"
    assert lengths(bench.turn()) == {"r4": 1, "r0": 15}
    assert lengths(bench.turn()) == {"r4": 1, "r0": 3}
    step = bench.turn()
    assert lengths(step) == {"r4": 1, "r0": 1, "r1": 2, "r2": 2, "r3": 2}
    assert all(new.page_ids[:7] == bench.scheduler.running[0].pages[:7] for new in step.plan.new)


# ---------------------------------------------------------------- recorded replay


def _plan_digest(plan: StepPlan) -> str:
    new = [[n.slot, n.token_ids, n.num_prompt_tokens, n.seed, n.suppressed_token_ids, n.page_ids] for n in plan.new]
    rows = [[r.slot, r.start, r.length, r.new_page_ids, r.samples, r.prompt_logprobs] for r in plan.scheduled]
    return hashlib.sha256(json.dumps([plan.step_id, new, rows]).encode()).hexdigest()[:12]


def _replay(recording: dict[str, Any]) -> list[str]:
    executor = FakeExecutor(**recording["executor"])
    core = EngineCore(executor, **recording["core"])
    events = list(recording["events"])
    step = 0
    while events or core.has_work:
        while events and events[0]["step"] <= step:
            event = events.pop(0)
            if "abort" in event:
                core.abort(event["abort"])
                continue
            begin, length, own = event["prompt"]  # tokens begin, begin + 1 .. of a shared stream, then its own
            prompt = [(begin + i) * 31 % 47 for i in range(length)] + own
            params = event.get("params", {})
            core.add_request(
                make_request(
                    event["id"], prompt, eos=(3,), priority=event.get("priority", 0), arrival=float(step), **params
                )
            )
        core.step()
        core.check_integrity()
        step += 1
    return [_plan_digest(plan) for plan in executor.plans]


@pytest.mark.parametrize("name", ["steady", "short of pages", "depth 1"])
def test_recorded_arrivals_give_the_recorded_schedule(name: str) -> None:
    recording = json.loads(RECORDING.read_text())[name]
    got, expected = _replay(recording), recording["plans"]
    for step, (a, b) in enumerate(zip(got, expected)):
        assert a == b, f"the schedule differs from the recorded one from step {step} on"
    assert len(got) == len(expected)


def _record() -> None:
    recordings = json.loads(RECORDING.read_text())
    for recording in recordings.values():
        recording["plans"] = _replay(recording)
    RECORDING.write_text(_dump(recordings))


def _dump(recordings: dict[str, Any]) -> str:
    """JSON with one event a line and the digests ten a line, so that a difference can be read."""
    parts = []
    for name, recording in recordings.items():
        events = ",\n   ".join(json.dumps(event) for event in recording["events"])
        plans = recording["plans"]
        digests = ",\n   ".join(json.dumps(plans[i : i + 8])[1:-1] for i in range(0, len(plans), 8))
        parts.append(
            f' {json.dumps(name)}: {{\n  "executor": {json.dumps(recording["executor"])},\n'
            f'  "core": {json.dumps(recording["core"])},\n'
            f'  "events": [\n   {events}\n  ],\n  "plans": [\n   {digests}\n  ]\n }}'
        )
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    _record()
