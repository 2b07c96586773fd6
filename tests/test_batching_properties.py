"""Whatever arrives, is cancelled, or is short: right tokens, one end each, and a whole page pool after every step."""

from __future__ import annotations

import random
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paged_fake import VOCAB_SIZE, Collector, FakeExecutor, make_request, reference

from appliance.batching.core import EngineCore
from appliance.batching.request import derive_seed
from appliance.types import EngineRequest

EOS = 3


def drive(
    core: EngineCore, arrivals: dict[int, list[EngineRequest]], aborts: dict[int, list[str]], max_steps: int = 5000
) -> Collector:
    """Runs everything to its end; arrivals and aborts by step number. Checks integrity after each step."""
    collector = Collector()
    last = max([*arrivals, *aborts, 0])
    step = 0
    while step <= last or core.has_work:
        assert step < max_steps, "the core does not come to an end"
        for request in arrivals.get(step, ()):
            core.add_request(request)
        core.abort(aborts.get(step, ()))
        collector.add(core.step())
        core.check_integrity()
        step += 1
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    return collector


def check(core: EngineCore, collector: Collector, requests: list[EngineRequest], aborted: set[str]) -> None:
    for request in requests:
        name = request.request_id
        seed = request.params.seed
        tokens, reason = reference(request, core.limits.max_length, derive_seed(0, name) if seed is None else seed)
        got = collector.tokens(name)
        if collector.finish_reason(name) == "abort":
            assert name in aborted
            assert got == tokens[: len(got)]
        else:
            assert (got, collector.finish_reason(name)) == (tokens, reason)
            first = collector.outputs[name][0]
            assert first.num_cached_tokens <= len(request.prompt_token_ids) - 1
            wants = request.params.prompt_logprobs is not None and request.num_resumed_tokens == 0
            num_prompt = len(request.prompt_token_ids)
            assert (first.prompt_logprobs is not None) == wants
            if first.prompt_logprobs is not None:
                assert [e and e.token_id for e in first.prompt_logprobs] == [None, *request.prompt_token_ids[1:]]
                assert len(first.prompt_logprobs) == num_prompt


@st.composite
def scenarios(
    draw: st.DrawFn,
) -> tuple[FakeExecutor, dict[str, object], dict[int, list[EngineRequest]], dict[int, list[str]]]:
    page_size = draw(st.sampled_from([1, 2, 4]))
    executor = FakeExecutor(
        page_size=page_size,
        num_pages=draw(st.integers(6, 40)),
        max_model_len=draw(st.integers(12, 60)),
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 24)),
        num_stages=draw(st.sampled_from([1, 1, 2, 3])),
    )
    options = {
        "prefix_caching": draw(st.booleans()),
        "pipeline_depth": draw(st.sampled_from([1, 2, 2, 3])),
        "max_step_stretch": draw(st.sampled_from([0.0, 0.0, 1.1, 3.0])),
        "clock": count(step=draw(st.sampled_from([0.0, 0.01]))).__next__,
    }
    limit = min(executor.max_model_len, executor.num_pages * page_size)
    # Shared beginnings come from two token streams; few distinct tokens make equal continuations likely, too.
    streams = [[(i * 7 + s) % 5 for i in range(limit)] for s in range(2)]
    arrivals: dict[int, list[EngineRequest]] = {}
    aborts: dict[int, list[str]] = {}
    for number in range(draw(st.integers(1, 9))):
        shared = draw(st.integers(0, limit - 2))
        own = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=0 if shared else 1, max_size=3))
        prompt = (streams[draw(st.integers(0, 1))][:shared] + own)[: limit - 1]
        max_tokens = draw(st.none() | st.integers(0, 30))
        request = make_request(
            f"r{number}",
            prompt,
            eos=(EOS,),
            priority=draw(st.integers(0, 1)),
            arrival=float(draw(st.integers(0, 2))),
            resumed=draw(st.integers(0, min(2, len(prompt) - 1))),
            max_tokens=max_tokens,
            min_tokens=draw(st.integers(0, max_tokens if max_tokens is not None else 4)),
            ignore_eos=draw(st.booleans()),
            seed=draw(st.sampled_from([0, 0, 0, None])),
            logprobs=draw(st.sampled_from([None, None, 1])),
            prompt_logprobs=draw(st.sampled_from([None, None, None, 1])),
        )
        at = draw(st.integers(0, 20))
        arrivals.setdefault(at, []).append(request)
        if draw(st.integers(0, 3)) == 0:
            aborts.setdefault(at + draw(st.integers(0, 12)), []).append(request.request_id)
    return executor, options, arrivals, aborts


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(scenarios())
def test_random_traffic(
    scenario: tuple[FakeExecutor, dict[str, object], dict[int, list[EngineRequest]], dict[int, list[str]]],
) -> None:
    executor, options, arrivals, aborts = scenario
    core = EngineCore(executor, **options)  # type: ignore[arg-type]
    requests = [request for batch in arrivals.values() for request in batch]
    collector = drive(core, arrivals, aborts)
    check(core, collector, requests, {name for names in aborts.values() for name in names})


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize(("pipeline_depth", "stages"), [(1, 1), (2, 1), (3, 1), (2, 2), (2, 4)])
def test_a_prompt_gives_the_same_tokens_alone_and_among_64(
    pipeline_depth: int, stages: int, prefix_caching: bool
) -> None:
    """Chunked prefill, prefix hits, preemptions and cancellations all happen around it."""
    rng = random.Random(7)
    executor = FakeExecutor(
        num_pages=60, page_size=4, max_model_len=100, max_num_seqs=16, max_num_batched_tokens=40, num_stages=stages
    )
    core = EngineCore(executor, pipeline_depth=pipeline_depth, prefix_caching=prefix_caching)
    heads = [[rng.randrange(VOCAB_SIZE) for _ in range(40)] for _ in range(3)]
    arrivals: dict[int, list[EngineRequest]] = {}
    aborts: dict[int, list[str]] = {}
    for i in range(64):
        prompt = rng.choice(heads)[: rng.randrange(1, 40)] + [
            rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(4))
        ]
        request = make_request(f"r{i}", prompt, eos=(EOS,), arrival=float(i), max_tokens=rng.randrange(5, 50))
        at = rng.randrange(40)
        arrivals.setdefault(at, []).append(request)
        if i % 5 == 0:
            aborts.setdefault(at + rng.randrange(1, 15), []).append(request.request_id)
    collector = drive(core, arrivals, aborts)
    requests = [request for batch in arrivals.values() for request in batch]
    check(core, collector, requests, {name for names in aborts.values() for name in names})
    stats = core.stats()
    assert stats.num_preemptions > 0
    assert (stats.prefix_cache_hits > 0) == prefix_caching
    assert any(collector.finish_reason(name) == "abort" for names in aborts.values() for name in names)
    assert any(not row.samples for plan in executor.plans for row in plan.scheduled), "no prefill was chunked"
