"""The loop: stop conditions, cancellation, pipelining, and what outputs carry."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from paged_fake import VOCAB_SIZE, Collector, FakeExecutor, logprobs_of, make_request, reference

from appliance.batching.core import EngineCore
from appliance.batching.request import derive_seed
from appliance.batching.step import StepResult
from appliance.errors import InvalidRequestError
from appliance.types import EngineRequest

PROMPT = [5, 9, 2, 30, 7, 7, 1]


def finish(core: EngineCore, collector: Collector | None = None) -> Collector:
    collector = collector or Collector()
    for _ in range(2000):
        if not core.has_work:
            return collector
        collector.add(core.step())
        core.check_integrity()
    raise AssertionError("the core does not come to an end")


def serve(core: EngineCore, *requests: EngineRequest) -> Collector:
    for request in requests:
        core.add_request(request)
    return finish(core)


def greedy(count: int, **params: object) -> list[int]:
    """The first tokens behind PROMPT."""
    return reference(make_request("x", PROMPT, max_tokens=count, **params), 1000, 0)[0]


@pytest.fixture(params=[1, 2, 3])
def core(request: pytest.FixtureRequest) -> EngineCore:
    return EngineCore(FakeExecutor(), pipeline_depth=request.param)


# ---------------------------------------------------------------- how requests end


def test_max_tokens(core: EngineCore) -> None:
    got = serve(core, make_request("a", PROMPT, max_tokens=6))
    assert got.tokens("a") == greedy(6)
    assert got.finish_reason("a") == "length"
    assert core.stats().generation_tokens == 6


def test_an_eos_ends_and_is_the_last_token(core: EngineCore) -> None:
    eos = greedy(5)[4]
    assert eos not in greedy(4)
    got = serve(core, make_request("a", PROMPT, eos=(eos,)))
    assert got.tokens("a") == greedy(5)
    last = got.outputs["a"][-1]
    assert (last.finish_reason, last.stop_token_id) == ("stop", eos)


def test_a_stop_token_id_ends_even_when_eos_is_ignored(core: EngineCore) -> None:
    tokens = greedy(8)
    eos, stop = tokens[2], tokens[6]
    assert eos not in tokens[:2]
    assert stop not in tokens[:6]
    got = serve(core, make_request("a", PROMPT, eos=(eos,), ignore_eos=True, stop_token_ids=(stop,), max_tokens=20))
    assert got.tokens("a") == tokens[:7]
    assert got.outputs["a"][-1].stop_token_id == stop


def test_a_stop_token_that_is_also_the_last_allowed_is_a_stop(core: EngineCore) -> None:
    eos = greedy(5)[4]
    got = serve(core, make_request("a", PROMPT, eos=(eos,), max_tokens=5))
    assert got.finish_reason("a") == "stop"


def test_the_context_limit_ends(core: EngineCore) -> None:
    got = serve(core, make_request("a", PROMPT), make_request("b", PROMPT, max_tokens=10_000))
    assert len(got.tokens("a")) == len(got.tokens("b")) == 128 - len(PROMPT)
    assert got.finish_reason("a") == got.finish_reason("b") == "length"


def test_min_tokens_suppresses_stop_ids_just_so_long() -> None:
    eos, stop = greedy(1)[0], (greedy(1)[0] + 1) % VOCAB_SIZE
    executor = FakeExecutor()
    request = make_request("a", PROMPT, eos=(eos,), stop_token_ids=(stop,), min_tokens=4, max_tokens=30)
    got = serve(EngineCore(executor), request)
    assert executor.plans[0].new[0].suppressed_token_ids == tuple(sorted((eos, stop)))
    assert not {eos, stop} & set(got.tokens("a")[:4])
    assert (got.tokens("a"), got.finish_reason("a")) == reference(request, 1000, 0)


def test_a_stop_id_that_comes_in_spite_of_min_tokens_does_not_end() -> None:
    """The token behind exactly min_tokens may end; one before may not, whatever the executor does."""
    tokens = greedy(3)
    eos = tokens[2]

    class Careless(FakeExecutor):
        def collect(self) -> StepResult:
            for slot in self._slots.values():
                slot.new.suppressed_token_ids = ()
            return super().collect()

    for min_tokens, length in ((2, 3), (3, 6)):
        params = {"eos": (eos,), "min_tokens": min_tokens, "max_tokens": 6}
        got = serve(EngineCore(Careless(), pipeline_depth=1), make_request("a", PROMPT, **params))  # type: ignore[arg-type]
        assert len(got.tokens("a")) == length


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"min_tokens": 2}, (4, 8)),
        ({"min_tokens": 2, "ignore_eos": True}, (8,)),
        ({"min_tokens": 2, "ignore_eos": True, "stop_token_ids": (4,)}, (4,)),
        ({}, ()),
    ],
)
def test_what_is_suppressed(params: dict[str, object], expected: tuple[int, ...]) -> None:
    executor = FakeExecutor()
    serve(
        EngineCore(executor), make_request("a", PROMPT, eos=(4,), **{"stop_token_ids": (8,), "max_tokens": 3, **params})
    )  # type: ignore[arg-type]
    assert executor.plans[0].new[0].suppressed_token_ids == expected


def test_no_tokens_wanted(core: EngineCore) -> None:
    got = serve(
        core,
        make_request("a", PROMPT, max_tokens=0),
        make_request("b", PROMPT, max_tokens=0, prompt_logprobs=0),
        make_request("c", [4], max_tokens=0, prompt_logprobs=0),
    )
    for name in "abc":
        assert (got.tokens(name), got.finish_reason(name), len(got.outputs[name])) == ([], "length", 1)
    assert got.outputs["a"][0].prompt_logprobs is None
    assert [e and e.token_id for e in got.outputs["b"][0].prompt_logprobs or []] == [None, *PROMPT[1:]]
    assert got.outputs["c"][0].prompt_logprobs == [None]


# ---------------------------------------------------------------- abort


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_abort_frees_at_once_and_ends_once(core: EngineCore, steps: int) -> None:
    collector = Collector()
    core.add_request(make_request("a", PROMPT))
    core.add_request(make_request("b", PROMPT[:3], max_tokens=12))
    for _ in range(steps):
        collector.add(core.step())
    core.abort(["a", "unknown"])
    core.abort(["a"])
    core.check_integrity()
    assert core.stats().num_running + core.stats().num_waiting == 1
    collector.add(core.step())
    assert collector.finish_reason("a") == "abort"
    core.add_request(make_request("a", PROMPT, max_tokens=4))  # the id is free again, its old rows may be in flight
    again = Collector()
    again.outputs["b"] = collector.outputs.get("b", [])
    finish(core, again)
    assert again.tokens("a") == greedy(4)
    assert again.tokens("b") == reference(make_request("b", PROMPT[:3], max_tokens=12), 1000, 0)[0]
    assert core.stats().kv_cache_usage == 0.0


def test_pages_of_an_aborted_request_serve_the_next_step() -> None:
    executor = FakeExecutor(num_pages=8, max_model_len=32)
    core = EngineCore(executor)
    core.add_request(make_request("a", list(range(28))))
    core.step()
    core.add_request(make_request("b", list(range(20, 48)), max_tokens=3))
    core.step()
    assert core.stats().num_waiting == 1
    core.abort(["a"])
    core.step()
    assert executor.plans[-1].new[0].token_ids == list(range(20, 48))
    assert finish(core).finish_reason("b") == "length"


def test_abort_of_a_scoring_request_with_its_last_chunk_in_flight() -> None:
    core = EngineCore(FakeExecutor())
    core.add_request(make_request("a", PROMPT, max_tokens=0, prompt_logprobs=0))
    core.step()
    core.abort(["a"])
    assert finish(core).finish_reason("a") == "abort"


# ---------------------------------------------------------------- pipelining


def test_the_device_always_has_its_next_step_queued() -> None:
    executor = FakeExecutor()
    serve(EngineCore(executor), make_request("a", PROMPT, max_tokens=20), make_request("b", [3], max_tokens=20))
    assert set(executor.depths[:-1]) == {2}
    assert executor.depths[-1] == 1, "the last step has no successor: both lengths are known ahead"
    assert len(executor.depths) == 20


def test_step_does_not_wait_before_the_pipeline_is_full() -> None:
    executor = FakeExecutor()
    core = EngineCore(executor, pipeline_depth=3)
    core.add_request(make_request("a", PROMPT, max_tokens=20))
    assert core.step() == core.step() == []
    assert executor.depths == []
    assert len(core.step()) == 1
    assert executor.depths == [3]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_stop_token_costs_at_most_the_steps_in_flight(depth: int) -> None:
    executor = FakeExecutor()
    eos = greedy(5)[4]
    serve(EngineCore(executor, pipeline_depth=depth), make_request("a", PROMPT, eos=(eos,)))
    assert len(executor.plans) == 5 + depth - 1


@pytest.mark.parametrize("length", range(1, 10))
def test_a_follow_up_on_an_answer_that_ended_anywhere_in_a_page(core: EngineCore, length: int) -> None:
    """What ran in excess behind the stop token must not be taken for the conversation's K/V."""
    eos = greedy(length)[-1]
    answer = serve(core, make_request("a", PROMPT, eos=(eos,))).tokens("a")
    prompt = [*PROMPT, *answer, 40, 41, 42, 43, 44]
    follow_up = make_request("b", prompt, max_tokens=9)
    got = serve(core, follow_up)
    assert got.tokens("b") == reference(follow_up, 1000, 0)[0]
    assert got.outputs["b"][0].num_cached_tokens >= 4


# ---------------------------------------------------------------- what outputs carry


def test_cached_tokens_are_told_once() -> None:
    core = EngineCore(FakeExecutor())
    serve(core, make_request("a", list(range(10)), max_tokens=2))
    got = serve(core, make_request("b", list(range(10)), max_tokens=3))
    assert [output.num_cached_tokens for output in got.outputs["b"]] == [8, 0, 0]
    assert (core.stats().prefix_cache_queries, core.stats().prefix_cache_hits) == (20, 8)
    assert core.stats().prompt_tokens == 20


def test_logprobs_come_with_each_token(core: EngineCore) -> None:
    got = serve(core, make_request("a", PROMPT, max_tokens=4, logprobs=2), make_request("b", PROMPT, max_tokens=4))
    entries = [entry for output in got.outputs["a"] for entry in output.logprobs or []]
    assert [entry.token_id for entry in entries] == got.tokens("a")
    assert all(output.logprobs is None for output in got.outputs["b"])


def test_prompt_logprobs_of_a_chunked_prompt(core: EngineCore) -> None:
    prompt = [(i * 13) % VOCAB_SIZE for i in range(75)]  # 3 chunks
    first = serve(core, make_request("warm", prompt, max_tokens=1))
    got = serve(core, make_request("a", prompt, max_tokens=3, prompt_logprobs=1, logprobs=0))
    entries = got.outputs["a"][0].prompt_logprobs
    assert entries is not None
    assert len(entries) == 75
    assert entries[0] is None
    assert [entry.token_id for entry in entries[1:] if entry] == prompt[1:]
    assert len({entry.logprob for entry in entries[1:] if entry}) > 50
    assert [output.prompt_logprobs for output in got.outputs["a"][1:]] == [None, None]
    assert got.outputs["a"][0].num_cached_tokens == 0, "what is cached has no logits"
    assert got.tokens("a")[:1] == first.tokens("warm")


def test_prompt_logprobs_survive_preemption() -> None:
    executor = FakeExecutor(num_pages=8, max_model_len=32, max_num_batched_tokens=3)
    core = EngineCore(executor)
    scored = make_request("a", list(range(20)), arrival=1.0, max_tokens=4, prompt_logprobs=0)
    got = serve(core, make_request("b", PROMPT, max_tokens=20), scored)
    runs = [row.start for plan in executor.plans for row in plan.scheduled if row.prompt_logprobs]
    assert runs.count(0) == 2, "it was preempted in the middle of its prompt"
    entries = got.outputs["a"][0].prompt_logprobs
    assert [entry and entry.token_id for entry in entries or []] == [None, *range(1, 20)]


def test_a_resumed_request_goes_on_as_if_nothing_had_happened(core: EngineCore) -> None:
    whole = make_request("a", PROMPT, max_tokens=12, seed=None, min_tokens=9, eos=tuple(range(0, VOCAB_SIZE, 3)))
    expected, reason = reference(whole, 1000, derive_seed(0, "a"))
    resumed = make_request(
        "a",
        PROMPT + expected[:5],
        resumed=5,
        max_tokens=12,
        seed=None,
        min_tokens=9,
        eos=whole.eos_token_ids,
        prompt_logprobs=1,
    )
    got = serve(core, resumed)
    assert (got.tokens("a"), got.finish_reason("a")) == (expected[5:], reason)
    assert got.outputs["a"][0].prompt_logprobs is None, "they went out before the restart"
    assert core.stats().prompt_tokens == len(PROMPT)


def test_a_resumed_request_that_was_complete_ends_at_once() -> None:
    executor = FakeExecutor()
    got = serve(EngineCore(executor), make_request("a", [*PROMPT, 1, 2], resumed=2, max_tokens=2))
    assert (got.tokens("a"), got.finish_reason("a")) == ([], "length")
    assert executor.plans == []


def test_new_sequence_of_a_resumed_request_counts_output_apart() -> None:
    executor = FakeExecutor()
    serve(EngineCore(executor), make_request("a", [*PROMPT, 1, 2], resumed=2, max_tokens=4))
    new = executor.plans[0].new[0]
    assert (new.num_prompt_tokens, len(new.token_ids)) == (len(PROMPT), len(PROMPT) + 2)


def test_seeds() -> None:
    executor = FakeExecutor()
    serve(
        EngineCore(executor, seed=1),
        *(make_request(name, PROMPT, max_tokens=1, seed=None) for name in ("a", "b")),
        make_request("c", PROMPT, max_tokens=1, seed=77),
    )
    seeds = [new.seed for plan in executor.plans for new in plan.new]
    assert seeds == [derive_seed(1, "a"), derive_seed(1, "b"), 77]
    assert len({*seeds, derive_seed(0, "a")}) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


# ---------------------------------------------------------------- failures


def test_a_request_id_that_is_running_is_refused() -> None:
    core = EngineCore(FakeExecutor())
    core.add_request(make_request("a", PROMPT, max_tokens=3))
    with pytest.raises(InvalidRequestError, match="'a' is still running"):
        core.add_request(make_request("a", PROMPT))
    assert finish(core).tokens("a") == greedy(3)


def test_pipeline_depth_is_checked() -> None:
    with pytest.raises(ValueError, match="pipeline_depth is 0"):
        EngineCore(FakeExecutor(), pipeline_depth=0)


def _wrong_step(result: StepResult) -> None:
    result.step_id += 1


def _row_missing(result: StepResult) -> None:
    result.token_ids.pop()


def _no_token(result: StepResult) -> None:
    result.token_ids[0] = -1


def _no_logprobs(result: StepResult) -> None:
    result.logprobs[0] = None


def _no_prompt_logprobs(result: StepResult) -> None:
    result.prompt_logprobs[0] = [logprobs_of(1, [])]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_wrong_step, "returned step 1"),
        (_row_missing, "with 0 rows"),
        (_no_token, "sampled no token"),
        (_no_logprobs, "no log probabilities"),
        (_no_prompt_logprobs, "1 of 6 prompt log probabilities"),
    ],
)
def test_an_executor_that_breaks_the_contract_is_found_out(damage: Callable[[StepResult], None], message: str) -> None:
    class Broken(FakeExecutor):
        def collect(self) -> StepResult:
            result = super().collect()
            damage(result)
            return result

    core = EngineCore(Broken(), pipeline_depth=1)
    core.add_request(make_request("a", PROMPT, logprobs=0, prompt_logprobs=0))
    with pytest.raises(RuntimeError, match=message):
        core.step()


def test_an_exception_of_the_executor_is_not_hidden() -> None:
    class Lost(FakeExecutor):
        def collect(self) -> StepResult:
            raise OSError("device lost")

    core = EngineCore(Lost(), pipeline_depth=1)
    core.add_request(make_request("a", PROMPT))
    with pytest.raises(OSError, match="device lost"):
        core.step()
