"""Page pool, prefix cache, and what sequences get from them."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from hashlib import blake2b

import pytest
from paged_fake import make_request

from appliance.batching.kv_cache import ROOT, KvCache, PagePool, extend_digests
from appliance.batching.request import RequestLimits, Sequence, make_sequence

PAGE = 4


def make(kv: KvCache, tokens: list[int], serial: int = 0, **params: object) -> Sequence:
    limits = RequestLimits(1000, kv.pool.num_pages, PAGE)
    return make_sequence(make_request(f"s{serial}", tokens, **params), limits, serial=serial, engine_seed=0)  # type: ignore[arg-type]


def admit(kv: KvCache, seq: Sequence, spare: int = 0) -> bool:
    hits, _ = kv.match(seq)
    return kv.admit(seq, hits, spare)


def run(kv: KvCache, seq: Sequence, tokens: int | None = None) -> None:
    """As if submitted steps had computed the known tokens."""
    seq.num_computed = len(seq.token_ids) if tokens is None else tokens
    kv.register(seq)


# ---------------------------------------------------------------- digests


def test_a_digest_is_of_the_whole_beginning() -> None:
    tokens = list(range(12))
    digests: list[bytes] = []
    extend_digests(digests, tokens, 3, PAGE)
    parent = ROOT
    for page in range(3):
        parent = blake2b(parent + array("i", tokens[page * 4 : page * 4 + 4]).tobytes(), digest_size=16).digest()
        assert digests[page] == parent
    other: list[bytes] = []
    extend_digests(other, [99, *tokens[1:]], 3, PAGE)
    assert not set(digests) & set(other), "pages with equal tokens behind different ones are different pages"


def test_digests_extended_page_by_page_are_the_same() -> None:
    tokens = [5, 1, 4, 1] * 5
    at_once: list[bytes] = []
    extend_digests(at_once, tokens, 5, PAGE)
    steps: list[bytes] = []
    for pages in (1, 1, 3, 5):
        extend_digests(steps, tokens, pages, PAGE)
    assert steps == at_once
    assert len(set(at_once)) == 5


# ---------------------------------------------------------------- pool


def test_pages_go_round() -> None:
    pool = PagePool(4)
    first = pool.allocate(3)
    assert len(set(first)) == 3
    assert pool.num_available == 1
    pool.check_integrity([first])
    pool.release(first)
    assert pool.num_available == 4
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]


def test_eviction_takes_the_least_recently_used_chain_leaf_first() -> None:
    pool = PagePool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for name, pages in (("old", old), ("new", new)):
        assert pool.register(pages[0], f"{name}0".encode(), ROOT)
        assert pool.register(pages[1], f"{name}1".encode(), f"{name}0".encode())
    pool.release(old)
    pool.release(new)
    pool.check_integrity([])
    assert pool.num_available == 4
    assert pool.prefix.idle_pages == [old[1], old[0], new[1], new[0]]
    assert pool.allocate(1) == [old[1]]
    assert pool.prefix.match([b"old0", b"old1"]) == [old[0]], "the parent of an evicted leaf is still found"
    pool.acquire([old[0]])
    assert pool.allocate(1) == [new[1]], "a page that was used again is not evicted"


def test_a_shared_page_is_free_when_the_last_holder_lets_go() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.register(pages[0], b"a", ROOT)
    pool.acquire(pages)
    pool.check_integrity([pages, pages])
    pool.release(pages)
    assert pool.num_available == 1
    pool.release(pages)
    assert pool.num_available == 2
    assert pool.prefix.idle_pages == pages


def test_a_page_takes_the_place_of_an_idle_one_with_the_same_content_only() -> None:
    pool = PagePool(3)
    first, second, third = pool.allocate(3)
    assert pool.register(first, b"a", ROOT)
    assert not pool.register(second, b"a", ROOT), "the other is in use"
    pool.release([first])
    assert pool.register(third, b"a", ROOT)
    assert pool.prefix.match([b"a"]) == [third]
    pool.check_integrity([[second], [third]])
    assert pool.num_available == 1


def _leak(pool: PagePool) -> None:
    pool._free.pop()


def _free_twice(pool: PagePool) -> None:
    pool._free.append(pool._free[0])


def _free_in_use(pool: PagePool) -> None:
    pool._free.append(0)


def _count_too_many(pool: PagePool) -> None:
    pool._refs[0] += 1


def _lose_digest(pool: PagePool) -> None:
    del pool.prefix._page_of[b"a"]


def _orphan(pool: PagePool) -> None:
    pool.prefix._key_of[1] = (b"b", b"gone")


def _idle_but_used(pool: PagePool) -> None:
    pool.prefix._idle[0] = None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_leak, "leaked"),
        (_free_twice, "twice"),
        (_free_in_use, "free and in use"),
        (_count_too_many, "references"),
        (_lose_digest, "maps differ"),
        (_orphan, "its parent is not"),
        (_idle_but_used, "idle and referenced"),
    ],
)
def test_check_integrity_finds_damage(damage: Callable[[PagePool], None], message: str) -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    assert pages == [0, 1]
    pool.register(0, b"a", ROOT)
    pool.register(1, b"b", b"a")
    pool.check_integrity([pages])
    damage(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity([pages])


def test_check_integrity_finds_a_parent_that_would_be_evicted_first() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.register(0, b"a", ROOT)
    pool.register(1, b"b", b"a")
    pool.release(pages)
    pool.prefix._idle.move_to_end(1)
    with pytest.raises(AssertionError, match="before its child"):
        pool.check_integrity([])


def test_check_integrity_finds_an_unregistered_page_that_two_hold() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool._refs[0] += 1
    with pytest.raises(AssertionError, match="shared and not registered"):
        pool.check_integrity([pages, pages])


# ---------------------------------------------------------------- sequences


def test_a_prompt_hits_what_an_earlier_one_left() -> None:
    kv = KvCache(8, PAGE, prefix_caching=True)
    first = make(kv, list(range(10)))
    assert admit(kv, first)
    assert len(first.pages) == 3
    run(kv, first)
    pages = first.pages
    kv.release(first)
    assert kv.usage == 0.0
    second = make(kv, [*range(9), 77, 78], serial=1)
    assert admit(kv, second)
    assert second.pages[:2] == pages[:2]
    assert (second.num_computed, second.num_cached_tokens) == (8, 8)
    assert (kv.num_queries, kv.num_hits) == (21, 8)
    kv.check_integrity([second])


def test_of_a_prompt_that_is_cached_as_a_whole_the_last_page_is_computed_again() -> None:
    kv = KvCache(8, PAGE, prefix_caching=True)
    first = make(kv, list(range(8)))
    admit(kv, first)
    run(kv, first)
    kv.release(first)
    second = make(kv, list(range(8)), serial=1)
    admit(kv, second)
    assert second.num_computed == 4
    run(kv, second)
    kv.check_integrity([second])
    assert kv.pool.prefix.match(second.digests) == second.pages, "its page replaces the idle one"
    assert kv.pool.num_available == 6


@pytest.mark.parametrize("case", ["prompt_logprobs", "caching off"])
def test_no_reuse(case: str) -> None:
    kv = KvCache(8, PAGE, prefix_caching=case != "caching off")
    first = make(kv, list(range(9)))
    admit(kv, first)
    run(kv, first)
    kv.release(first)
    second = make(kv, list(range(9)), serial=1, **({"prompt_logprobs": 1} if case == "prompt_logprobs" else {}))
    admit(kv, second)
    assert second.num_computed == 0
    assert kv.num_hits == 0
    kv.check_integrity([second])


def test_only_known_and_computed_tokens_are_registered() -> None:
    kv = KvCache(8, PAGE, prefix_caching=True)
    seq = make(kv, list(range(7)))
    admit(kv, seq)
    run(kv, seq, 3)
    assert seq.num_registered == 0
    run(kv, seq, 8)  # position 7 has run with a token in flight
    assert seq.num_registered == 1
    seq.token_ids.append(42)
    kv.register(seq)
    assert seq.num_registered == 2
    kv.check_integrity([seq])


def test_the_chain_of_a_duplicate_ends() -> None:
    """Else a registered page of the one could outlive its parent, a page of the other."""
    kv = KvCache(12, PAGE, prefix_caching=True)
    first, second = make(kv, list(range(4))), make(kv, [*range(8), 9], serial=1, prompt_logprobs=0)
    assert admit(kv, first)
    assert admit(kv, second)
    run(kv, first)
    run(kv, second)
    assert second.num_registered == 0
    assert not second.chain_open
    waiting = make(kv, [*range(8), 9], serial=2)
    assert kv.match(waiting) == (first.pages, False), "nobody waits for what the closed chain will not register"
    kv.check_integrity([first, second])


def test_admission_is_all_or_nothing_and_leaves_spare_pages() -> None:
    kv = KvCache(4, PAGE, prefix_caching=True)
    seq = make(kv, list(range(13)))
    assert not admit(kv, seq, spare=1)
    assert kv.pool.num_available == 4
    assert seq.pages == []
    kv.check_integrity([seq])
    assert admit(kv, seq, spare=0)
    assert kv.grow(seq) is None
    kv.check_integrity([seq])


def test_an_idle_hit_is_not_counted_as_room() -> None:
    kv = KvCache(3, PAGE, prefix_caching=True)
    first = make(kv, list(range(9)))
    admit(kv, first)
    run(kv, first)
    kv.release(first)
    longer = make(kv, [*range(8), *range(50, 56)], serial=1)  # 2 hits, 2 fresh pages of 1 that is left
    assert not admit(kv, longer)
    kv.check_integrity([longer])


def test_a_request_waits_for_a_prefix_that_is_being_computed() -> None:
    kv = KvCache(12, PAGE, prefix_caching=True)
    first = make(kv, list(range(12)))
    admit(kv, first)
    twin, cousin, stranger = make(kv, list(range(12)), 1), make(kv, [*range(4), 9, 9], 2), make(kv, [9] * 9, 3)
    assert kv.match(twin) == ([], True)
    assert kv.match(cousin) == ([], True)
    assert kv.match(stranger) == ([], False)
    run(kv, first, 4)
    assert kv.match(twin) == (first.pages[:1], True)
    assert kv.match(cousin) == (first.pages[:1], False)
    kv.release(first)  # preempted, say
    assert kv.match(twin)[1] is False
    kv.check_integrity([])
