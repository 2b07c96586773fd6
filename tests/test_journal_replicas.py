"""The journal over several replicas: who goes where, shares, suspects, limits and numbers; one end each at any rate."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_fakes import engine_info

from appliance.errors import OverloadedError
from appliance.server.request_group import RequestGroup
from appliance.server.state import ServerState
from appliance.types import EngineOutput, EngineRequest, EngineStats, SamplingParams


class Engine:
    """A link that runs two requests at a time, by hand: token i of a request is 100 + i. As the real one, it answers an
    abort with a terminal output, unless the request has ended."""

    max_running = 2

    def __init__(self, state: ServerState, replica: int) -> None:
        self.state, self.replica = state, replica
        self.held: dict[str, tuple[EngineRequest, int]] = {}  # with the tokens given, those of before included
        self.added: list[list[str]] = []
        self.dead = False
        self.finished: list[EngineOutput] = []

    async def add(self, requests: Sequence[EngineRequest]) -> None:
        if self.dead:
            raise ConnectionError("the engine is gone")
        msgspec.msgpack.encode(requests)
        self.added.append([request.request_id for request in requests])
        for request in requests:
            assert request.request_id not in self.held
            self.held[request.request_id] = (request, request.num_resumed_tokens)

    async def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if self.held.pop(request_id, None) is not None:
                self.finished.append(EngineOutput(request_id, finish_reason="abort"))

    def step(self) -> None:
        outputs, self.finished = self.finished, []
        for request_id, (request, count) in list(self.held.items())[: self.max_running]:
            ends = count + 1 == request.params.max_tokens
            outputs.append(EngineOutput(request_id, [100 + count], finish_reason="length" if ends else None))
            self.held[request_id] = (request, count + 1)
            if ends:
                del self.held[request_id]
        running = min(len(self.held), self.max_running)
        stats = EngineStats(running, len(self.held) - running, 0.1 * running, prefix_cache_queries=5)
        self.state.journal.on_outputs(outputs, stats, self.replica)


class Rig:
    def __init__(self, replicas: int, **options: int) -> None:
        self.state = ServerState(("m",), **options)  # type: ignore[arg-type]
        self.journal = self.state.journal
        self.journal.set_replicas(replicas)
        self.state.lifecycle.enter("ready")
        self.engines: dict[int, Engine] = {}

    async def start(self, *replicas: int, max_model_len: int = 512) -> None:
        for replica in replicas:
            self.state.metrics.engines[replica] = engine_info(max_model_len, 2)
            self.engines[replica] = Engine(self.state, replica)
            engine = self.engines[replica]
            await self.journal.on_engine_ready(engine, replica)
            probe = asyncio.create_task(self.journal.probe([1], 5.0, replica))
            await settle()
            while not probe.done():
                engine.step()
                await settle()
            engine.added.clear()

    def lose(self, replica: int) -> None:
        self.engines.pop(replica).dead = True
        self.journal.on_engine_lost(replica)

    @property
    def homes(self) -> dict[str, int]:
        """Where each request was sent last."""
        return {name: n for n, engine in self.engines.items() for batch in engine.added for name in batch}

    def held(self, replica: int) -> list[str]:
        return sorted(self.engines[replica].held)

    async def step(self, *replicas: int) -> None:
        await settle()
        for replica in replicas or tuple(self.engines):
            if replica in self.engines:
                self.engines[replica].step()
        await settle()
        self.journal.check_integrity()


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


def make(name: str, max_tokens: int = 5, prompt: list[int] | None = None) -> EngineRequest:
    return EngineRequest(name, [7, 8, 9] if prompt is None else prompt, SamplingParams(max_tokens=max_tokens))


async def collect(group: RequestGroup) -> list[EngineOutput]:
    async with asyncio.timeout(5):
        return [output async for outputs in group for output in outputs]


async def tokens_of(group: RequestGroup) -> list[int]:
    return [token for output in await collect(group) for token in output.token_ids]


async def test_choices_of_a_prompt_stay_together_and_prompts_are_spread() -> None:
    rig = Rig(2)
    await rig.start(0, 1)
    one, other = [1] * 20, [2] * 20
    rig.journal.submit([make(f"a{i}", prompt=one) for i in range(3)] + [make(f"b{i}", prompt=other) for i in range(3)])
    await settle()
    assert [rig.held(0), rig.held(1)] == [["a0", "a1", "a2"], ["b0", "b1", "b2"]]
    assert rig.engines[0].added == [["a0", "a1", "a2"]], "one message"


async def test_a_conversation_comes_back_to_its_replica() -> None:
    rig = Rig(3)
    await rig.start(0, 1, 2)
    history = {i: [i] * 3 for i in range(6)}  # not a page: only with the answer is there one to tell them apart
    homes: dict[int, list[int]] = {i: [] for i in history}
    for turn in range(3):
        for i in [1, 2, 3, 4, 5, 0] if turn % 2 else [0, 1, 2, 3, 4, 5]:
            group = rig.journal.submit([make(f"{i}-{turn}", 20, list(history[i]))])
            await settle()
            homes[i] += [n for n in rig.engines if rig.held(n)]
            for _ in range(20):
                await rig.step()
            history[i] += [*await tokens_of(group), 50 + i]
    assert all(len(set(home)) == 1 for home in homes.values()), homes
    assert {home[0] for home in homes.values()} == {0, 1, 2}


async def test_a_lost_replicas_cache_is_lost_with_it() -> None:
    rig = Rig(2)
    await rig.start(0, 1)
    prompt = [1] * 160
    group = rig.journal.submit([make("a", 1, prompt)])
    await rig.step()
    assert await tokens_of(group) == [100]
    home = rig.homes["a"]
    busy = rig.journal.submit([make("x", 50, [2] * 20)])
    await settle()
    assert rig.homes["x"] == 1 - home
    rig.lose(home)
    await rig.start(home)
    busy.cancel()
    rig.journal.submit([make("y", 50, [3] * 20)])
    await settle()
    rig.journal.submit([make("b", 1, prompt)])
    await settle()
    assert rig.homes["b"] != rig.homes["y"], "no reason to go where more is to be done"


async def test_outputs_of_a_replica_that_has_not_the_request_are_dropped() -> None:
    rig = Rig(2)
    await rig.start(0, 1)
    group = rig.journal.submit([make("a", 2)])
    await settle()
    rig.journal.on_outputs([EngineOutput("a", [5], finish_reason="stop")], EngineStats(), 1 - rig.homes["a"])
    for _ in range(2):
        await rig.step()
    assert await tokens_of(group) == [100, 101]


async def test_a_lost_replicas_requests_go_on_at_once_elsewhere_with_their_tokens() -> None:
    rig = Rig(2)
    await rig.start(0, 1)
    groups = [rig.journal.submit([make(f"r{i}", 6, [i, 8, 9])]) for i in range(4)]
    await rig.step()
    await rig.step()
    assert [len(rig.held(n)) for n in (0, 1)] == [2, 2]
    rig.lose(0)
    await settle()
    assert len(rig.held(1)) == 4 and [rig.journal.in_flight_on(n) for n in (0, 1)] == [0, 4]
    resumed, count = rig.engines[1].held["r0"]
    assert resumed.prompt_token_ids == [0, 8, 9, 100, 101] and count == 2
    for _ in range(12):
        await rig.step()
    for group in groups:
        assert await tokens_of(group) == list(range(100, 106))
    assert rig.state.metrics.resubmitted == 2


async def test_a_replica_that_comes_up_gets_a_share_of_what_waits() -> None:
    rig = Rig(2)
    await rig.start(0)
    groups = {name: rig.journal.submit([make(name, 4, [i] * 8)]) for i, name in enumerate("abcdefgh")}
    both = rig.journal.submit([make("x", 4, choices := [9] * 8), make("y", 4, choices)])
    await rig.step()
    assert rig.held(0) == sorted([*"abcdefgh", "x", "y"])
    await rig.start(1)
    rig.journal.check_integrity()
    groups["h"].cancel()  # meanwhile: it must not come back
    await rig.step(0)
    assert rig.held(1) == ["f", "g", "x", "y"], "the newest half, choices of a prompt together"
    assert rig.held(0) == ["a", "b", "c", "d", "e"]
    for _ in range(12):
        await rig.step()
    for name, group in groups.items():
        assert await tokens_of(group) == ([] if name == "h" else list(range(100, 104)))
    assert await tokens_of(both) == [100, 100, 101, 101, 102, 102, 103, 103]
    assert rig.state.metrics.resubmitted == 0


async def test_a_share_is_not_lost_with_the_replica_that_gives_or_takes_it() -> None:
    for lost in (0, 1):
        rig = Rig(2)
        await rig.start(0)
        groups = [rig.journal.submit([make(f"r{i}", 3, [i] * 8)]) for i in range(8)]
        await rig.step()
        await rig.start(1)  # its engine has not given them up yet
        rig.lose(lost)
        for _ in range(20):
            await rig.step()
        for group in groups:
            assert await tokens_of(group) == [100, 101, 102]


async def test_what_runs_or_only_might_is_left_where_it_is() -> None:
    rig = Rig(2)
    await rig.start(0)
    groups = [rig.journal.submit([make(f"r{i}", 3, [i] * 8)]) for i in range(2)]
    await rig.step()
    await rig.start(1)
    await rig.step()
    assert rig.held(0) == ["r0", "r1"] and rig.held(1) == []
    for group in groups:
        group.cancel()


async def test_suspects_go_one_by_one_and_only_where_they_endanger_nobody() -> None:
    rig = Rig(2)
    await rig.start(0, 1)
    prompt = [1] * 3  # choices of one prompt stay together
    group = rig.journal.submit([make(name, 9, prompt) for name in "abc"])
    await settle()
    first = 0 if rig.held(0) else 1
    second = 1 - first
    rig.lose(first)
    await settle()
    await rig.start(first)
    assert rig.held(second) == ["a", "b", "c"]
    innocent = rig.journal.submit([make("i", 9, [5] * 20)])
    await settle()
    rig.lose(second)
    await settle()
    assert rig.held(first) == ["i"] and all(rig.journal._entries[name].crashes == 2 for name in "abc")
    rig.journal.check_integrity()
    await rig.start(second)
    assert rig.held(second) == ["a"], "one at a time, to the replica that has nothing to lose"
    rig.lose(first)  # not the suspect's doing
    await settle()
    assert rig.held(second) == ["a", "i"] and rig.journal._entries["a"].crashes == 2
    await rig.start(first)
    rig.lose(second)
    await settle()
    assert "a" not in rig.journal._entries, "that was its third"
    assert rig.held(first) == ["i"] and rig.journal._entries["i"].crashes == 1, "blamed on the suspect alone"
    rig.journal.check_integrity()
    for _ in range(9):
        await rig.step()
    assert await tokens_of(innocent) == list(range(100, 109))
    assert "b" in rig.journal._entries and rig.held(first), "it is idle, so they need not wait for the other"
    for _ in range(40):
        await rig.step()
    ends = {output.request_id: output.finish_reason for output in await collect(group) if output.finish_reason}
    assert ends == {"a": "error", "b": "length", "c": "length"}


async def test_suspects_do_not_wait_for_a_replica_that_was_given_up() -> None:
    rig = Rig(2, max_engine_crashes=2)
    await rig.start(0, 1)
    group = rig.journal.submit([make("a")])
    await settle()
    home = 0 if rig.held(0) else 1
    rig.journal.submit([make("i", 50, [5] * 20)])
    await settle()
    rig.lose(home)
    await settle()
    assert rig.held(1 - home) == ["i"], "the next crash would be its last"
    rig.journal.on_replica_given_up(home)
    for _ in range(6):
        await rig.step()
    assert await tokens_of(group) == [100, 101, 102, 103, 104]


async def test_what_did_not_reach_a_dead_engine_has_no_part_in_its_crash() -> None:
    rig = Rig(2)
    await rig.start(0, 1)
    rig.engines[0].dead = rig.engines[1].dead = True  # nobody has noticed yet
    group = rig.journal.submit([make("a", 3)])
    await settle()
    for replica in (0, 1):
        rig.lose(replica)
        await settle()
    assert rig.journal._entries["a"].crashes == 0
    await rig.start(0)
    for _ in range(4):
        await rig.step()
    assert await tokens_of(group) == [100, 101, 102]


async def test_a_send_that_fails_after_its_requests_went_elsewhere_changes_nothing() -> None:
    rig = Rig(2)
    await rig.start(0, 1)
    stuck = asyncio.Event()

    async def add(requests: Sequence[EngineRequest]) -> None:
        await stuck.wait()
        raise ConnectionError("the engine is gone")

    rig.engines[0].add = rig.engines[1].add = add  # type: ignore[method-assign]
    group = rig.journal.submit([make("a", 3)])
    await settle()
    home = 0 if rig.journal.in_flight_on(0) else 1
    del rig.engines[1 - home].__dict__["add"]
    rig.lose(home)
    await settle()
    assert rig.held(1 - home) == ["a"]
    stuck.set()
    for _ in range(3):
        await rig.step()
    assert await tokens_of(group) == [100, 101, 102]


async def test_a_replica_that_came_up_gets_nothing_before_its_first_token() -> None:
    rig = Rig(2)
    await rig.start(0)
    engine = rig.engines[1] = Engine(rig.state, 1)
    await rig.journal.on_engine_ready(engine, 1)
    for i in range(4):
        rig.journal.submit([make(f"r{i}")])
    await settle()
    assert engine.held == {}, "it may hang"
    probe = asyncio.create_task(rig.journal.probe([1], 5.0, 1))
    await settle()
    engine.step()
    await probe
    rig.journal.submit([make("r4")])
    await settle()
    assert list(engine.held) == ["r4"]


async def test_a_request_goes_where_its_context_fits() -> None:
    rig = Rig(2)
    await rig.start(0, max_model_len=64)
    await rig.start(1, max_model_len=512)
    assert rig.state.require_engine().max_model_len == 64, "what is accepted fits everywhere"
    groups = [rig.journal.submit([make(f"r{i}", 120, [i] * 100)]) for i in range(3)]  # accepted before the first came
    await settle()
    assert rig.held(0) == [] and rig.held(1) == ["r0", "r1", "r2"]
    rig.lose(1)
    await settle()
    assert rig.held(0) == ["r0", "r1", "r2"], "its engine says what does not fit"
    for group in groups:
        group.cancel()


async def test_limits_and_numbers_are_sums() -> None:
    rig = Rig(2, max_waiting_requests=1)
    await rig.start(0)
    assert rig.journal.max_in_flight == 3
    await rig.start(1)
    assert rig.journal.max_in_flight == 5
    groups = [rig.journal.submit([make(f"r{i}", 3)]) for i in range(5)]
    with pytest.raises(OverloadedError, match="at most 5"):
        rig.journal.submit([make("no")])
    await rig.step()
    metrics = rig.state.metrics
    assert (metrics.num_running, metrics.num_waiting) == (4, 1)
    assert metrics.kv_cache_usage == pytest.approx(0.2) and metrics.prefix_cache == (10, 0)
    rig.lose(1)
    await rig.step()
    assert metrics.prefix_cache == (10, 0), "what the lost one counted stays"
    assert metrics.engine_restarts == 1 and [metrics.restarts_of(n) for n in (0, 1)] == [0, 1]
    metrics.replica_phases = lambda: ["ready", "restarting"]
    text = metrics.render().decode()
    assert 'replica_up{model_name="m",replica="1"} 0.0' in text
    assert 'replica_requests{model_name="m",replica="0"} 5.0' in text
    assert 'num_gpu_blocks="200"' in text
    for group in groups:
        group.cancel()


async def test_drain_tells_every_replica() -> None:
    rig = Rig(2)
    await rig.start(0, 1)
    for i in range(4):
        rig.journal.submit([make(f"r{i}", 50)])
    await settle()
    assert await rig.journal.drain(0.05) == 4
    assert rig.held(0) == [] and rig.held(1) == []


@given(
    st.lists(
        st.sampled_from(["submit", "pair", "step", "one", "cancel", "finish", "lose", "restart", "yield", "probe"]),
        max_size=50,
    ),
    st.integers(2, 3),
)
@settings(max_examples=150, deadline=None)
def test_every_request_ends_exactly_once(actions: list[str], replicas: int) -> None:
    async def run() -> None:
        rig = Rig(replicas)
        await rig.start(*range(replicas))
        groups: dict[str, RequestGroup] = {}
        ended_here: set[str] = set()
        probes: list[asyncio.Task[None]] = []
        for count, action in enumerate(actions):
            name, replica = f"r{count}", count % replicas
            up = replica in rig.engines
            if action == "submit":
                groups[name] = rig.journal.submit([make(name, 4, [count] * (count % 40 + 1))])
            elif action == "pair":
                prompt = [count] * 20
                groups[name] = rig.journal.submit([make(name, 4, prompt), make(f"{name}+", 4, prompt)])
            elif action == "step":
                await rig.step()
            elif action == "one" and up:
                rig.engines[replica].step()
            elif action in ("cancel", "finish") and groups:
                chosen = sorted(groups)[count % len(groups)]
                if chosen in groups[chosen].open and len(groups[chosen].open) == 1:
                    ended_here.add(chosen)
                    groups[chosen].cancel() if action == "cancel" else groups[chosen].finish(chosen, "stop")
            elif action == "lose" and up:
                rig.lose(replica)
            elif action == "restart" and not up:
                await rig.start(replica)
            elif action == "probe" and up:
                probes.append(asyncio.create_task(rig.journal.probe([1], 0.001, replica)))
            else:
                await settle()
            rig.journal.check_integrity()
        await asyncio.gather(*probes, return_exceptions=True)
        await rig.start(*({*range(replicas)} - rig.engines.keys()))
        for _ in range(150):  # two at a time, suspects one by one
            await rig.step()
        assert rig.journal.in_flight == 0
        for name, group in groups.items():
            outputs = await collect(group)
            if name in ended_here:
                continue
            for request_id in {name, f"{name}+"} & {output.request_id for output in outputs}:
                own = [output for output in outputs if output.request_id == request_id]
                assert sum(output.finish_reason is not None for output in own) == 1
                if own[-1].finish_reason != "error":
                    assert [token for output in own for token in output.token_ids] == [100, 101, 102, 103]

    asyncio.run(run())
