"""Lifecycle and request journal: one terminal event each, across engine loss, cancellation, overload and drain."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_fakes import FakeEngine, engine_info, eventually, ready_state

from appliance.errors import InvalidRequestError, OverloadedError, RequestFailedError, UnavailableError
from appliance.server.lifecycle import Lifecycle
from appliance.server.request_group import RequestGroup
from appliance.server.state import ServerState
from appliance.types import EngineOutput, EngineRequest, EngineStats, SamplingParams


def make(request_id: str, max_tokens: int = 5, **params: object) -> EngineRequest:
    return EngineRequest(request_id, [7, 8, 9], SamplingParams(max_tokens=max_tokens, **params))  # type: ignore[arg-type]


async def collect(group: RequestGroup) -> list[EngineOutput]:
    return [output async for outputs in group for output in outputs]


async def manual() -> tuple[ServerState, FakeEngine]:
    """A ready server whose engine steps by hand and says 100, 101, …"""
    state, engine = await ready_state(max_waiting_requests=3, max_num_seqs=2)
    engine.auto = False
    engine.script = lambda request: range(100, 200)
    return state, engine


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


# ---------------------------------------------------------------- lifecycle


def test_lifecycle_phases_and_times() -> None:
    now = [0.0]
    life = Lifecycle(lambda: now[0])
    assert (life.phase, life.live, life.is_ready, life.accepts_requests) == ("starting", True, False, False)
    now[0] = 1.0
    life.enter("building", "layers")
    life.progress(percent=140, bytes_done=3, bytes_total=4, eta_seconds=90.2)
    assert (life.percent, life.retry_after, life.reason) == (100.0, 60, "layers")
    now[0] = 4.0
    life.enter("ready")
    assert (life.percent, life.eta_seconds, life.time_to_ready) == (None, None, 4.0)
    assert life.accepts_requests
    now[0] = 5.0
    life.enter("restarting")
    assert life.accepts_requests and not life.is_ready and life.was_ready
    assert life.phase_seconds == {"starting": 1.0, "building": 3.0, "ready": 1.0, "restarting": 0.0}
    life.enter("draining")
    life.enter("ready")
    assert life.phase == "draining" and not life.accepts_requests
    life.enter("failed", "no more")
    assert not life.live and life.as_dict()["reason"] == "no more"
    with pytest.raises(ValueError, match="unknown phase"):
        life.enter("sleeping")  # type: ignore[arg-type]


# ---------------------------------------------------------------- the usual path


async def test_outputs_in_order_and_one_terminal_event() -> None:
    state, engine = await manual()
    group = state.journal.submit([make("a", 3), make("b", 2)])
    await settle()
    assert [[r.request_id for r in batch] for batch in engine.added] == [["a", "b"]]  # one message
    while engine.running:
        engine.step()
        state.journal.check_integrity()
    outputs = await collect(group)
    for request_id, count in (("a", 3), ("b", 2)):
        own = [o for o in outputs if o.request_id == request_id]
        assert [t for o in own for t in o.token_ids] == list(range(100, 100 + count))
        assert [o.finish_reason for o in own] == [None] * (count - 1) + ["length"]
    assert state.journal.in_flight == 0
    assert engine.aborted == []


async def test_finish_early_aborts_once_and_drops_the_rest() -> None:
    state, engine = await manual()
    group = state.journal.submit([make("a"), make("b")])
    await settle()
    engine.step()
    group.finish("a", "stop")
    await settle()
    assert engine.aborted == [["a"]]
    # What the engine had already sent for "a" is not given.
    state.journal.on_outputs([EngineOutput("a", [1], finish_reason="abort")], EngineStats())
    while engine.running:
        engine.step()
    assert {o.request_id for o in await collect(group)} == {"b"}
    assert state.metrics.finished == {"stop": 1, "length": 1}


async def test_cancel_sends_one_abort_for_the_group_and_is_idempotent() -> None:
    state, engine = await manual()
    group = state.journal.submit([make("a"), make("b")])
    await settle()
    group.cancel()
    group.cancel()
    await settle()
    assert engine.aborted == [["a", "b"]]
    assert await collect(group) == [] and state.journal.in_flight == 0
    unsent = state.journal.submit([make("c")])
    unsent.cancel()  # before it reached the engine: nothing to send, nothing to abort
    await settle()
    assert len(engine.added) == 1 and len(engine.aborted) == 1


async def test_admission() -> None:
    state = ServerState(("m",), max_waiting_requests=3)
    with pytest.raises(UnavailableError, match="not ready"):
        state.journal.submit([make("a")])
    state, _engine = await manual()
    assert state.journal.max_in_flight == 5
    with pytest.raises(InvalidRequestError, match="at most 5"):
        state.journal.submit([make(str(i)) for i in range(6)])
    state.journal.submit([make(str(i)) for i in range(4)])
    with pytest.raises(OverloadedError):
        state.journal.submit([make("x"), make("y")])  # all or none
    assert state.journal.in_flight == 4
    state.journal.submit([make("x")])
    state.journal.check_integrity()


async def test_probe() -> None:
    state = ServerState(("m",))
    state.engine = engine_info()
    engine = FakeEngine(state, lambda request: [5])
    await state.journal.on_engine_ready(engine)
    await state.journal.probe([1])  # before the server accepts anything
    assert state.metrics.generation_tokens == 0 and not state.metrics.finished
    engine.error = "broken"
    with pytest.raises(RequestFailedError, match="broken"):
        await state.journal.probe([1])
    engine.error, engine.auto = None, False
    with pytest.raises(RequestFailedError, match="within"):
        await state.journal.probe([1], timeout_seconds=0.01)
    await eventually(lambda: engine.aborted != [])
    assert state.journal.in_flight == 0


# ---------------------------------------------------------------- engine loss


async def lose_and_restart(state: ServerState, engine: FakeEngine) -> FakeEngine:
    engine.dead = True
    state.journal.on_engine_lost()
    state.lifecycle.enter("restarting")
    fresh = FakeEngine(state, engine.script, auto=False)
    await state.journal.on_engine_ready(fresh)
    state.lifecycle.enter("ready")
    return fresh


async def test_resubmission_goes_on_where_it_was() -> None:
    state, engine = await manual()
    group = state.journal.submit([make("a", 6, prompt_logprobs=1)])
    await settle()
    engine.step()
    engine.step()
    fresh = await lose_and_restart(state, engine)
    (request,) = fresh.added[0]
    assert request.prompt_token_ids == [7, 8, 9, 100, 101] and request.num_resumed_tokens == 2
    assert request.params.prompt_logprobs is None and request.params.max_tokens == 6
    fresh.step()
    again = await lose_and_restart(state, fresh)
    assert again.added[0][0].prompt_token_ids == [7, 8, 9, 100, 101, 102]
    while again.running:
        again.step()
    outputs = await collect(group)
    assert [t for o in outputs for t in o.token_ids] == list(range(100, 106))
    assert sum(o.finish_reason is not None for o in outputs) == 1
    assert sum(o.prompt_logprobs is not None for o in outputs) == 1
    assert state.metrics.resubmitted == 2 and state.metrics.engine_restarts == 2
    state.journal.check_integrity()


async def test_requests_wait_while_the_engine_restarts() -> None:
    state, engine = await manual()
    state.journal.on_engine_lost()
    state.lifecycle.enter("restarting")
    group = state.journal.submit([make("a", 1)])
    gone = state.journal.submit([make("b", 1)])
    gone.cancel()
    await settle()
    assert engine.added == []
    fresh = FakeEngine(state, engine.script)
    await state.journal.on_engine_ready(fresh)
    assert [o.token_ids for o in await collect(group)] == [[100]]
    assert [[r.request_id for r in batch] for batch in fresh.added] == [["a"]]


async def test_an_engine_that_dies_while_sending_loses_nothing() -> None:
    state, engine = await manual()
    engine.dead = True  # the supervisor has not noticed yet
    group = state.journal.submit([make("a", 2)])
    await settle()
    assert engine.added == [] and state.journal.in_flight == 1
    fresh = await lose_and_restart(state, engine)
    while fresh.running:
        fresh.step()
    assert [t for o in await collect(group) for t in o.token_ids] == [100, 101]


async def test_a_request_that_cannot_be_sent_ends_alone() -> None:
    state, engine = await manual()
    groups = [state.journal.submit([make(name, 1, top_k=top_k)]) for name, top_k in (("a", 0), ("b", 2**70), ("c", 0))]
    await settle()
    assert [request.request_id for batch in engine.added for request in batch] == ["a", "c"]
    async with asyncio.timeout(5):
        refused = await collect(groups[1])
    assert [output.finish_reason for output in refused] == ["error"] and "cannot be sent" in (refused[0].error or "")
    engine.step()
    for group in (groups[0], groups[2]):
        assert [output.finish_reason for output in await collect(group)] == ["length"]
    state.journal.check_integrity()


async def test_poison_request_is_given_up_and_a_later_one_is_not() -> None:
    state, engine = await manual()
    poison = state.journal.submit([make("p", 50)])
    await settle()
    for _ in range(2):
        engine = await lose_and_restart(state, engine)
    innocent = state.journal.submit([make("i", 1)])
    await settle()
    engine = await lose_and_restart(state, engine)
    outputs = await collect(poison)
    assert outputs[-1].finish_reason == "error" and "crashed 3 times" in (outputs[-1].error or "")
    engine.step()
    assert [o.finish_reason for o in await collect(innocent)] == ["length"]
    state.journal.check_integrity()


async def test_a_poison_request_does_not_take_its_neighbours_along() -> None:
    state, engine = await ready_state(max_num_seqs=8)
    engine.auto = False
    engine.script = lambda request: range(100, 200)
    names = [f"r{i}" for i in range(5)]
    groups = {name: state.journal.submit([make(name, 6)]) for name in names}
    crashes = 0
    for _ in range(100):
        await settle()
        state.journal.check_integrity()
        if not engine.running:
            break
        poison = engine.running.get("r2")
        if poison is not None and poison.done >= 3:  # the fourth token of r2 kills the engine
            crashes += 1
            engine = await lose_and_restart(state, engine)
        else:
            engine.step()
    assert crashes == 3
    for name, group in groups.items():
        outputs = await collect(group)
        assert outputs[-1].finish_reason == ("error" if name == "r2" else "length"), name
        assert [t for o in outputs for t in o.token_ids] == list(range(100, 103 if name == "r2" else 106))


async def test_suspects_go_one_by_one() -> None:
    state, engine = await manual()
    groups = [state.journal.submit([make(name)]) for name in ("a", "b", "c")]
    await settle()
    for _ in range(2):
        engine = await lose_and_restart(state, engine)
    fresh = state.journal.submit([make("d")])
    await settle()
    assert sorted(engine.running) == ["a", "d"]  # "d" was in no crash
    engine.step()
    await settle()
    assert sorted(engine.running) == ["a", "b", "d"]
    groups[1].cancel()  # on probation: the next one's turn
    await settle()
    assert sorted(engine.running) == ["a", "c", "d"]
    engine = await lose_and_restart(state, engine)  # blamed on "c" alone
    while engine.running:
        engine.step()
        await settle()
    ends = [(await collect(group))[-1].finish_reason for group in (groups[0], groups[2], fresh)]
    assert ends == ["length", "error", "length"]


async def test_fail_all() -> None:
    state, _engine = await manual()
    group = state.journal.submit([make("a"), make("b")])
    state.journal.fail_all("gone for good")
    assert [(o.finish_reason, o.error) for o in await collect(group)] == [("error", "gone for good")] * 2


# ---------------------------------------------------------------- drain


async def test_drain_waits_then_ends_the_rest() -> None:
    state, engine = await manual()
    short, long = state.journal.submit([make("s", 1)]), state.journal.submit([make("l", 50)])
    await settle()
    drain = asyncio.create_task(state.journal.drain(0.1))
    await settle()
    with pytest.raises(UnavailableError, match="shutting down"):
        state.journal.submit([make("x")])
    engine.step()
    assert (await collect(short))[-1].finish_reason == "length"
    assert await drain == 1
    last = (await collect(long))[-1]
    assert last.finish_reason == "abort" and "shut down" in (last.error or "")
    assert engine.aborted == [["l"]]
    assert await state.journal.drain(0.1) == 0


async def test_drain_is_over_when_all_is_done() -> None:
    state, engine = await manual()
    state.journal.submit([make("s", 1)])
    await settle()
    drain = asyncio.create_task(state.journal.drain(60))
    await settle()
    engine.step()
    assert await asyncio.wait_for(drain, 1) == 0


# ---------------------------------------------------------------- whatever happens


@given(st.lists(st.sampled_from(["submit", "step", "cancel", "finish", "lose", "restart", "yield"]), max_size=40))
@settings(max_examples=120, deadline=None)
def test_every_request_ends_exactly_once(actions: list[str]) -> None:
    async def run() -> None:
        state, engine = await manual()
        groups: dict[str, RequestGroup] = {}
        ended_here: set[str] = set()
        for count, action in enumerate(actions):
            name = f"r{count}"
            if action == "submit" and state.journal.in_flight < 5:
                groups[name] = state.journal.submit([make(name, 4)])
            elif action == "step" and not engine.dead:
                engine.step()
            elif action in ("cancel", "finish") and groups:
                chosen = sorted(groups)[count % len(groups)]
                if chosen in groups[chosen].open:
                    ended_here.add(chosen)
                    groups[chosen].cancel() if action == "cancel" else groups[chosen].finish(chosen, "stop")
            elif action == "lose" and not engine.dead:
                engine.dead = True
                state.journal.on_engine_lost()
            elif action == "restart" and engine.dead:
                engine = FakeEngine(state, engine.script, auto=False)
                await state.journal.on_engine_ready(engine)
            else:
                await settle()
            state.journal.check_integrity()
        if engine.dead:
            engine = FakeEngine(state, engine.script, auto=False)
            await state.journal.on_engine_ready(engine)
        for _ in range(100):  # suspects come one by one
            await settle()
            state.journal.check_integrity()
            engine.step()
        assert state.journal.in_flight == 0
        assert sum(state.metrics.finished.values()) == len(groups)
        for name, group in groups.items():
            outputs = await asyncio.wait_for(collect(group), 1)
            assert sum(o.finish_reason is not None for o in outputs) == (name not in ended_here)
            if name not in ended_here and outputs[-1].finish_reason != "error":
                assert [t for o in outputs for t in o.token_ids] == [100, 101, 102, 103]

    asyncio.run(run())
