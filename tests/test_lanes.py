"""Lanes: sequences spread over the steps that an executor of several stages has in flight. All stages are busy, each
sequence is decoded by one step at a time, and lanes stay level."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from paged_fake import Collector, FakeExecutor, make_request, reference
from simulated_executor import Arrival, SimulatedExecutor, simulate

from appliance.batching.core import EngineCore
from appliance.batching.lanes import Lanes
from appliance.batching.request import RequestLimits, Sequence, make_sequence

# Steps that are nearly all work that sequences do not share: half the sequences take half as long.
WORK: dict[str, Any] = {"base": 1e-3, "per_decode": 1e-3, "hand_over": 5e-5}


def seconds(stages: int, arrivals: list[Arrival], stretch: float = 0.0, **model: float) -> tuple[float, float]:
    """Until all is answered, and the share of that for which the idlest stage is busy."""
    executor = SimulatedExecutor(num_stages=stages, **{**WORK, **model})  # type: ignore[arg-type]
    taken = simulate(executor, arrivals, stretch).seconds
    return taken, min(executor.busy) / taken


@pytest.mark.parametrize("stages", [2, 4])
def test_all_stages_are_busy(stages: int) -> None:
    """A stage at a time would take as long as one device does, and longer by what hand-overs take."""
    arrivals = [Arrival(0.0, 16, 300)] * 64
    alone, _ = seconds(1, arrivals)
    together, busy = seconds(stages, arrivals)
    assert alone / together > 0.9 * stages and busy > 0.9


@pytest.mark.parametrize("stages", [2, 4])
def test_requests_that_come_and_go_keep_all_stages_busy(stages: int) -> None:
    arrivals = [Arrival(0.02 * i, 100 + 37 * i % 500, 50 + 61 * i % 400) for i in range(120)]
    alone, _ = seconds(1, arrivals, stretch=2.0)
    together, _ = seconds(stages, arrivals, stretch=2.0)
    assert alone / together > 0.8 * stages


def test_the_parts_of_one_long_prompt_keep_all_stages_busy() -> None:
    arrivals = [Arrival(0.0, 100_000, 1)]
    alone, _ = seconds(1, arrivals)
    together, busy = seconds(2, arrivals)
    assert alone / together > 1.7 and busy > 0.85


def test_a_prompt_that_a_step_could_run_is_run_in_parts() -> None:
    arrivals = [Arrival(0.0, 8192, 1)]
    alone, _ = seconds(1, arrivals)
    together, _ = seconds(2, arrivals)
    assert alone / together > 1.5
    short = [Arrival(0.0, 700, 1)]
    executor = SimulatedExecutor(num_stages=2, **WORK)
    simulate(executor, short, 0.0)
    assert len(executor.steps) == 1, "parts that are too small cost more than they bring"


def test_one_request_takes_as_long_as_on_one_device_and_the_hand_overs() -> None:
    arrivals = [Arrival(0.0, 16, 200)]
    alone, _ = seconds(1, arrivals, base=4e-3)
    together, _ = seconds(2, arrivals, base=4e-3)
    assert together < 1.1 * alone


def test_answers_do_not_stutter_while_prompts_arrive() -> None:
    """The pacer measures a stage's part of a step, so it allows what it would allow one device."""
    arrivals = [Arrival(0.0, 16, 2000)] * 16 + [Arrival(1.0 + 0.4 * i, 20_000, 16) for i in range(10)]
    model = {"base": 2e-3, "per_decode": 2e-5, "hand_over": 5e-5}
    paced = simulate(SimulatedExecutor(num_stages=2, **model), arrivals, 2.0)  # type: ignore[arg-type]
    free = simulate(SimulatedExecutor(num_stages=2, **model), arrivals, 0.0)  # type: ignore[arg-type]
    assert paced.gap(0.999) < 3.5 * paced.gap(0.5)
    assert free.gap(0.999) > 10 * free.gap(0.5)


# ---------------------------------------------------------------- what is in flight


def test_steps_in_flight_decode_different_sequences_and_bring_their_tokens() -> None:
    executor = FakeExecutor(num_stages=2, max_num_seqs=8)
    core, collector = EngineCore(executor), Collector()
    requests = [make_request(f"r{i}", [i + 1] * (3 + i), max_tokens=20 + i) for i in range(6)]
    for request in requests:
        core.add_request(request)
    while core.has_work:
        collector.add(core.step())
        core.check_integrity()
    for request in requests:
        assert (collector.tokens(request.request_id), "length") == reference(request, 128, 0)
    assert executor.depths.count(2) > len(executor.depths) - 10, "two steps are in flight"
    decodes = [{row.slot for row in plan.scheduled} for plan in executor.plans if plan.token_ids]
    pairs = list(pairwise(decodes))
    assert sum(first.isdisjoint(second) for first, second in pairs) > len(pairs) - 5
    assert {len(slots) for slots in decodes[4:-12]} == {3}, "six sequences in two lanes"


def test_a_lane_whose_sequences_ended_gets_some_of_the_others() -> None:
    executor = FakeExecutor(num_stages=2, max_num_seqs=8)
    core = EngineCore(executor)
    for i in range(8):  # in turns: those of one lane end soon
        core.add_request(make_request(f"r{i}", [i + 1] * 3, max_tokens=60 if i < 4 else 4))
    plans = 0
    while core.has_work:
        core.step()
        core.check_integrity()
        plans += 1
        if plans == 30:
            sizes = [len(plan.token_ids) for plan in executor.plans[-4:]]
            assert sizes == [2, 2, 2, 2]


def sequences(count: int) -> list[Sequence]:
    limits = RequestLimits(100, 100, 4)
    return [make_sequence(make_request(f"s{i}", [1]), limits, serial=i, engine_seed=0) for i in range(count)]


def test_lanes_are_kept_level() -> None:
    lanes, running = Lanes(3), sequences(7)
    for seq in running[:5]:
        lanes.add(seq, 0)
    lanes.add(running[5], 1)
    lanes.add(running[6], 1)
    assert lanes.room(2, 7, 4) == 4, "four that wait and seven that run are four for each lane"
    assert lanes.room(0, 7, 4) == 0
    lanes.level(running, 1)
    assert [seq.lane for seq in running] == [0, 0, 0, 0, 0, 1, 2], "to where there are fewest, the worst first"
    lanes.level(running, 0)
    lanes.check_integrity(running)
    assert sorted(seq.lane for seq in running) == [0, 0, 0, 1, 1, 2, 2]
    lanes.remove(running[0])
    with pytest.raises(AssertionError, match="lanes have"):
        lanes.check_integrity(running)


def test_lanes_take_turns() -> None:
    lanes = Lanes(3)
    assert lanes.free == (0, 1, 2)
    lanes.take(1)
    lanes.take(0)
    assert lanes.free == (2,)
    lanes.give_back(1)
    assert lanes.free == (2, 1)
    one = Lanes(1)
    one.take(0)
    assert one.free == (0,), "one stage has steps of the same sequences in flight"
