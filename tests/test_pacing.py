"""Prefill beside decodes: gaps between tokens stay short when long prompts arrive, and neither prompts nor throughput
pay much for it. Time is simulated."""

from __future__ import annotations

import pytest
from simulated_executor import Arrival, SimulatedExecutor, simulate

from appliance.batching.core import EngineCore
from appliance.batching.pacing import PrefillPacer

STREAMS = [Arrival(0.0, 64, 500)] * 200  # 3 s of steady decoding


def long_prompts(count: int, tokens: int, every: float = 0.4, at: float = 1.0) -> list[Arrival]:
    return [Arrival(at + i * every, tokens, 8) for i in range(count)]


def both(arrivals: list[Arrival], **model: object) -> tuple[object, ...]:
    """Without a limit and with the default one."""
    return tuple(simulate(SimulatedExecutor(**model), arrivals, stretch) for stretch in (0.0, 2.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(("overhead", "longer", "later"), [(0.0, 1.01, 2.0), (0.003, 1.2, 4.0)])
def test_streams_do_not_stutter_when_long_prompts_arrive(overhead: float, longer: float, later: float) -> None:
    """An overhead of mixed steps is paid more often; without one, prefill gets half of the time and nothing is lost."""
    free, paced = both(STREAMS + long_prompts(6, 8192), overhead=overhead)
    assert free.gap(0.99) > 10 * free.gap(0.5), "what it is all about"
    assert paced.gap(0.99) <= 2.5 * paced.gap(0.5)
    assert paced.seconds < longer * free.seconds
    longest = max(paced.first_token[i] for i in range(200, 206))
    assert longest < later * max(free.first_token[i] for i in range(200, 206))


def test_a_prompts_last_tokens_take_longer_than_its_first() -> None:
    """Attention over what was there before: behind 9200 tokens, a token takes twice as long. Steps are padded."""
    sizes = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1280, 1536, 2048)
    model = {"per_pair": 1.25e-5 / 9200, "overhead": 0.001, "step_sizes": sizes}
    executor = SimulatedExecutor(**model)  # type: ignore[arg-type]
    paced = simulate(executor, STREAMS + long_prompts(6, 16_384, every=0.6), 2.0)
    assert paced.gap(0.99) <= 2.3 * paced.gap(0.5)
    full = [decodes + tokens in sizes for decodes, tokens, _ in executor.steps[40:] if decodes and tokens > 100]
    assert len(full) > 100 and sum(full) > 0.6 * len(full), "chunks fill the sizes"


def test_a_single_stream_beside_huge_prompts() -> None:
    free, paced = both([Arrival(0.0, 64, 900), *long_prompts(3, 16_384, every=0.5, at=0.5)])
    assert max(free.gaps) > 0.1
    assert max(paced.gaps) <= 2.5 * 2.02e-3, "the first one, too"


def test_a_cpu_that_runs_steps_while_they_are_submitted() -> None:
    """Durations are then not the times between results."""
    model = {"base": 0.02, "per_decode": 2e-3, "per_prefill_token": 2e-3, "synchronous": True}
    arrivals = [Arrival(0.0, 16, 200)] * 8 + long_prompts(4, 512, every=1.0, at=2.0)
    free, paced = both(arrivals, **model)
    assert free.gap(0.99) > 0.5
    assert paced.gap(0.99) < 2.5 * 0.036
    assert max(paced.gaps) < 0.2, "the first chunk is a guess"


@pytest.mark.parametrize("warm", [False, True])
def test_a_burst_costs_little_throughput(warm: bool) -> None:
    """256 requests at once; with `warm` a single one has been served before, so that there is something to go by."""
    start = [Arrival(0.0, 64, 50)] if warm else []
    arrivals = start + [Arrival(1.0, 1024, 512)] * 256
    free, paced = both(arrivals, base=4e-3, per_decode=4e-5)
    assert paced.seconds - 1.0 < 1.04 * (free.seconds - 1.0)
    assert sum(paced.first_token.values()) < 1.2 * sum(free.first_token.values())


def test_nothing_is_limited_without_decodes_or_without_the_setting() -> None:
    executor = SimulatedExecutor()
    simulate(executor, [Arrival(0.0, 30_000, 1)] * 2, 2.0)
    assert [tokens for _, tokens, _ in executor.steps[:3]] == [8192] * 3
    executor = SimulatedExecutor()
    simulate(executor, STREAMS + long_prompts(1, 30_000), 0.0)
    assert max(tokens for decodes, tokens, _ in executor.steps if decodes) > 7000


def test_a_queue_that_waits_for_pages_is_no_burst() -> None:
    """Requests that cannot be admitted do not stretch the steps of those that run."""
    executor = SimulatedExecutor(num_pages=64 * 40, max_num_seqs=1024)  # some 40 requests of 1000 tokens
    outcome = simulate(executor, [Arrival(0.0, 900, 100)] * 40 + [Arrival(0.05, 900, 100)] * 200, 2.0)
    warm = [step for step in executor.steps[200:] if step[0] >= 16 and step[1]]
    assert len(outcome.first_token) == 240 and warm
    assert all(seconds < 2.6 * (executor.base + executor.per_decode * decodes) for decodes, _, seconds in warm)


# ---------------------------------------------------------------- the pacer by itself


def steady(pacer: PrefillPacer, decodes: int, seconds: float) -> None:
    for _ in range(5):
        pacer.observe(decodes, 0, seconds)


def test_it_learns_overhead_and_time_per_token() -> None:
    pacer = PrefillPacer(3.0)
    assert pacer.limit(10, 1) is None, "nothing is known"
    steady(pacer, 10, 0.010)
    assert pacer.limit(0, 1) is None and pacer.limit(10, 1) == 512, "a guess"
    for tokens in (100, 400, 1000) * 5:
        pacer.observe(10, tokens, 0.010 + 0.004 + tokens * 1e-5)
    limit = pacer.limit(10, 1)
    assert limit is not None and limit == pytest.approx((0.020 - 0.004) / 1e-5, rel=0.02)


@pytest.mark.parametrize("lengths", [(100, 400, 1000), (300, 310, 290)])
def test_it_learns_what_tokens_before_a_chunk_cost(lengths: tuple[int, ...]) -> None:
    pacer = PrefillPacer(2.0)
    steady(pacer, 100, 0.010)
    for i, tokens in enumerate(lengths * 12):
        context = i * 1000 % 9000
        pairs = tokens * (context + tokens / 2)
        pacer.observe(100, tokens, 0.010 + tokens * 1e-5 + pairs * 1e-9, pairs)
    for context in (0, 8000):
        tokens = pacer.limit(100, 1, context)
        assert tokens is not None
        assert tokens * 1e-5 + tokens * (context + tokens / 2) * 1e-9 == pytest.approx(0.010, rel=0.1)


def test_chunks_are_worth_their_overhead() -> None:
    """An overhead that no chunk can hide: smaller chunks would only mean more of it."""
    pacer = PrefillPacer(2.0)
    steady(pacer, 10, 0.002)
    for tokens in (100, 400, 1000) * 5:
        pacer.observe(10, tokens, 0.002 + 0.006 + tokens * 1e-5)
    limit = pacer.limit(10, 1)
    assert limit is not None and limit == pytest.approx(600, rel=0.05)


def test_one_long_step_is_no_new_rule() -> None:
    pacer = PrefillPacer(2.0)
    steady(pacer, 10, 0.010)
    for tokens in (100, 500) * 10:
        pacer.observe(10, tokens, 0.010 + tokens * 1e-5)
    before = pacer.limit(10, 1)
    pacer.observe(10, 0, 3.0)
    after = pacer.limit(10, 1)
    assert before is not None and after is not None and before <= after <= 1.25 * before


def test_decode_steps_of_new_sizes_are_inferred_from_mixed_ones() -> None:
    pacer = PrefillPacer(2.0)
    steady(pacer, 4, 0.002)
    for tokens in (100, 300) * 10:
        pacer.observe(4, tokens, 0.002 + tokens * 1e-5)
    small = pacer.limit(200, 1)
    for _ in range(20):
        pacer.observe(200, 300, 0.006 + 300 * 1e-5)
    assert small == pytest.approx(200, rel=0.05)
    assert pacer.limit(200, 1) == pytest.approx(600, rel=0.05)
    steady(pacer, 200, 0.008)
    assert pacer.limit(200, 1) == pytest.approx(800, rel=0.05), "a measured one counts more"


def test_a_burst_has_more_of_the_time() -> None:
    pacer = PrefillPacer(2.0)
    steady(pacer, 32, 0.004)
    for tokens in (100, 500) * 10:
        pacer.observe(32, tokens, 0.004 + tokens * 1e-5)
    limits = [pacer.limit(32, waiting) for waiting in (1, 16, 22, 64, 200)]
    assert limits[0] == limits[1] == limits[2] == pytest.approx(400, rel=0.02)
    assert limits[3] == pytest.approx(400 * 2 * 4, rel=0.02)
    assert limits[4] == pytest.approx(400 * 6.25 * 8, rel=0.02)


@pytest.mark.parametrize("stretch", [1.0, 0.5, -1.0])
def test_a_stretch_that_stops_prefill_is_refused(stretch: float) -> None:
    with pytest.raises(ValueError, match="more than 1"):
        EngineCore(SimulatedExecutor(), max_step_stretch=stretch)
