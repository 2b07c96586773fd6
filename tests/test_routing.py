"""Routing between replicas: where prompts go, what that does to prefix hits, and that nobody starves."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.batching.kv_cache import extend_digests
from appliance.server.routing import LOAD_PER_HIT, MAX_PAGES, PrefixRouter


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(1000), k=length)


def send(router: PrefixRouter, tokens: list[int], loads: dict[int, int]) -> int:
    digests = router.digests(tokens)
    replica = router.choose(digests, loads)
    router.record(replica, digests)
    return replica


def test_the_longest_prefix_wins_then_the_least_load_then_turns() -> None:
    router = PrefixRouter(3)
    system, first = prompt(0, 64), prompt(1, 160)
    assert send(router, system + first, {0: 5, 1: 5, 2: 4}) == 2
    assert send(router, system + prompt(2, 80), {0: 0, 1: 0, 2: 9}) == 2, "the system prompt is there"
    router.record(1, router.digests(system))
    assert send(router, system + prompt(3, 80), {0: 0, 1: 7, 2: 9}) == 1, "as much is here, with less to do"
    assert send(router, system + first + prompt(4, 40), {0: 0, 1: 7, 2: 9}) == 2
    turns = [send(router, prompt(10 + i, 40), {0: 5, 1: 5, 2: 5}) for i in range(6)]
    assert sorted(turns[:3]) == sorted(turns[3:]) == [0, 1, 2]


def test_pages_are_matched_as_the_engine_matches_them() -> None:
    router = PrefixRouter(2)
    tokens = prompt(0, 50)
    digests = router.digests(tokens)
    assert len(digests) == 3 and router.digests(tokens, digests[:2]) == digests
    of_engine: list[bytes] = []
    extend_digests(of_engine, tokens, 3, 16)
    assert digests == of_engine
    router.record(0, digests)
    assert router.matched_tokens(0, router.digests(tokens[:40] + [1] * 20)) == 32
    assert router.matched_tokens(0, router.digests([1, *tokens])) == 0, "the same pages elsewhere are others"
    assert router.matched_tokens(1, digests) == 0


def test_affinity_ends_where_the_load_is_too_high() -> None:
    router = PrefixRouter(2, slack_tokens=100)
    tokens = prompt(0, 160)
    router.record(0, router.digests(tokens))
    allowed = LOAD_PER_HIT * 160
    assert router.choose(router.digests(tokens), {0: 7 + allowed, 1: 7}) == 0
    assert router.choose(router.digests(tokens), {0: 8 + allowed, 1: 7}) == 1
    short = tokens[:16] + prompt(1, 10)
    assert router.choose(router.digests(short), {0: 128, 1: 0}) == 0
    assert router.choose(router.digests(short), {0: 129, 1: 0}) == 1
    assert router.choose(router.digests(prompt(2, 64)), {0: 1, 1: 0}) == 1, "no match: no slack"
    assert router.choose(router.digests(tokens), {1: 10**9}) == 1, "the only one that is up"


def test_a_second_best_match_is_taken_where_the_best_has_too_much_to_do() -> None:
    router = PrefixRouter(3, slack_tokens=0)
    tokens = prompt(0, 320)
    router.record(0, router.digests(tokens))
    router.record(1, router.digests(tokens[:160]))
    assert router.choose(router.digests(tokens), {0: 10_000, 1: 500, 2: 0}) == 1


def test_memory_is_bounded_and_forgets_the_oldest_ends_first() -> None:
    router = PrefixRouter(2)
    router.set_capacity(0, 6)
    old, new = router.digests(prompt(0, 64)), router.digests(prompt(1, 64))
    router.record(0, old)
    router.record(0, new)
    assert router.remembered(0) == 6
    assert router.matched_tokens(0, new) == 64 and router.matched_tokens(0, old) == 32
    router.set_capacity(0, MAX_PAGES * 10)
    for seed in range(3):
        router.record(1, router.digests(prompt(seed, 160)))
    router.forget(1)
    assert router.remembered(1) == 0
    assert router.matched_tokens(1, new) == 0


def test_nothing_is_hashed_where_it_would_decide_nothing() -> None:
    assert PrefixRouter(1).digests(prompt(0, 64)) == []
    without = PrefixRouter(2, prefix_caching=False)
    assert without.digests(prompt(0, 64)) == []
    assert send(without, prompt(0, 64), {0: 3, 1: 2}) == 1


# ---------------------------------------------------------------- a workload of conversations


Choose = Callable[[PrefixRouter, list[bytes], dict[int, int]], int]


def simulate(choose: Choose, replicas: int = 4) -> tuple[float, int]:
    """40 conversations of 6 turns behind one system prompt, 10 at a time, in an order that mixes them. Returns the
    share of prompt tokens found in a cache, and the largest difference of loads. Answers take 8 arrivals."""
    rng = random.Random(7)
    router, caches = PrefixRouter(replicas), PrefixRouter(replicas)
    system = prompt(0, 96)
    history = {c: list(system) for c in range(40)}
    turns = dict.fromkeys(history, 0)
    open_now, waiting = list(range(10)), list(range(10, 40))
    running: list[tuple[int, int, int]] = []  # (arrival at which it ends, replica, tokens)
    loads = dict.fromkeys(range(replicas), 0)
    hits = total = spread = 0
    for arrival in count():
        while running and running[0][0] <= arrival:
            _, replica, tokens = running.pop(0)
            loads[replica] -= tokens
        if not open_now:
            return hits / total, spread
        conversation = rng.choice(open_now)
        history[conversation] += [rng.randrange(1000) for _ in range(rng.randrange(5, 120))]
        tokens = history[conversation]
        digests = router.digests(tokens)
        replica = choose(router, digests, loads)
        router.record(replica, digests)
        hits += caches.matched_tokens(replica, digests)
        total += len(tokens)
        tokens += [rng.randrange(1000) for _ in range(rng.randrange(20, 200))]  # the answer
        for memory in (router, caches):
            memory.record(replica, memory.digests(tokens))
        loads[replica] += len(tokens)
        spread = max(spread, max(loads.values()) - min(loads.values()))
        running.append((arrival + 8, replica, len(tokens)))
        turns[conversation] += 1
        if turns[conversation] == 6:
            open_now.remove(conversation)
            open_now += [waiting.pop()] if waiting else []
    raise AssertionError


def test_share_of_hits_on_conversations() -> None:
    """Against the policies that look at no prefixes, on the same arrivals. All of a prompt but its newest message could
    be found: about 0.9 of the tokens."""
    turn = count()
    aware, aware_spread = simulate(lambda router, digests, loads: router.choose(digests, loads))
    round_robin, _ = simulate(lambda router, digests, loads: next(turn) % len(loads))
    least_loaded, least_spread = simulate(lambda router, digests, loads: min(loads, key=lambda n: (loads[n], n)))
    print(f"hits: prefix-aware {aware:.2f}, round-robin {round_robin:.2f}, least-loaded {least_loaded:.2f}")
    print(f"largest difference of loads: prefix-aware {aware_spread}, least-loaded {least_spread}")
    assert aware > 0.8
    assert aware > 1.5 * round_robin and aware > 1.5 * least_loaded


def test_a_prefix_that_all_share_does_not_pile_up_on_one_replica() -> None:
    router = PrefixRouter(4)
    system = prompt(0, 2000)
    loads = dict.fromkeys(range(4), 0)
    for i in range(400):
        tokens = system + prompt(i + 1, 50)
        loads[send(router, tokens, loads)] += len(tokens)
    assert max(loads.values()) - min(loads.values()) <= LOAD_PER_HIT * 2000 + 2050
    assert min(loads.values()) > 0.8 * max(loads.values())


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40), st.integers(0, 30)), max_size=120), st.integers(2, 5))
@settings(max_examples=60, deadline=None)
def test_loads_stay_within_the_margin(arrivals: list[tuple[int, int, int]], replicas: int) -> None:
    """Whatever comes: a replica never gets a request while it has more than the margin above the least loaded one."""
    router = PrefixRouter(replicas, slack_tokens=300)
    loads = dict.fromkeys(range(replicas), 0)
    for topic, pages, own in arrivals:
        tokens = prompt(topic, pages * 16) + prompt(100 + own, own)
        replica = send(router, tokens, loads)
        assert loads[replica] <= min(loads.values()) + max(300, LOAD_PER_HIT * len(tokens))
        loads[replica] += len(tokens)


@pytest.mark.parametrize("replicas", [2, 3])
def test_equal_prompts_without_pages_are_spread_evenly(replicas: int) -> None:
    router = PrefixRouter(replicas)
    loads = dict.fromkeys(range(replicas), 0)
    for i in range(30 * replicas):
        loads[send(router, prompt(i, 10), loads)] += 10
    assert set(loads.values()) == {300}
