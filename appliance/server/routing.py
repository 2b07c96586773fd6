"""Which replica a prompt goes to: the one whose prefix cache most likely holds most of it, unless it has too much work.

Knows token ids, numbers of replicas and their loads in tokens. Does not know requests, engines or time; changes nothing
but its own memory of what was sent where.

What a replica's cache holds is guessed from what was sent to it (SGLang's router, `cache_aware`: "SGLang v0.4", LMSYS
blog, December 2024, keeps an approximate radix tree per worker; the production stack of vLLM keeps hashes of chunks of
the prompt in a trie). Here it is a map of the digests of full pages, chained as the engine's own prefix cache chains
them, evicted as that evicts: least recently used first, children before parents, no more pages than the cache has. So
the guess is wrong only for pages that were computed and evicted meanwhile, or not computed yet.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from appliance.batching.kv_cache import extend_digests

PAGE_SIZE = 16  # tokens; the engine's, but a match needs no agreement on it
SLACK_TOKENS = 8192  # more load that a replica with a match may always have: about one step of prompts
# More load it may have for each token that it need not compute. A waiting prompt costs as much a token as the hit
# saves, a running request far less, and most load is that of running ones.
LOAD_PER_HIT = 8
MAX_PAGES = 1 << 18  # remembered per replica: some 30 MB


class PrefixRouter:
    """`num_replicas` replicas, numbered from 0. `prefix_caching` False: only loads decide.

    A replica that holds m > 0 tokens of the prompt is *eligible* while its load is at most that of the least loaded one
    plus max(`slack_tokens`, LOAD_PER_HIT * m); the least loaded always is. Of the eligible ones the longest match wins,
    then the least load, then who was chosen longest ago. Hence nobody starves: a replica with less than the others by
    the margin gets whatever comes."""

    def __init__(
        self,
        num_replicas: int,
        *,
        prefix_caching: bool = True,
        page_size: int = PAGE_SIZE,
        slack_tokens: int = SLACK_TOKENS,
    ) -> None:
        self._prefix_caching = prefix_caching
        self._page_size = page_size
        self._slack = slack_tokens
        self._pages: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(num_replicas)]  # next victim first
        self._capacity = [MAX_PAGES] * num_replicas
        self._chosen_at = [0] * num_replicas  # counts of choices
        self._choices = 0

    def digests(self, token_ids: list[int], known: Sequence[bytes] = ()) -> list[bytes]:
        """Of the full pages of a prompt, 16 bytes each, some 1 µs a page; `known` are those of its beginning. Empty
        where nothing would be done with them."""
        if not self._prefix_caching or len(self._pages) == 1:
            return []
        digests = list(known)
        extend_digests(digests, token_ids, len(token_ids) // self._page_size, self._page_size)
        return digests

    def matched_tokens(self, replica: int, digests: Sequence[bytes]) -> int:
        """How much of the prompt the replica was sent before."""
        pages, count = self._pages[replica], 0
        for digest in digests:
            if digest not in pages:
                break
            count += 1
        return count * self._page_size

    def choose(self, digests: Sequence[bytes], loads: Mapping[int, int]) -> int:
        """`loads`: tokens of running and waiting requests of each replica that can take one; not empty."""
        least = min(loads.values())
        best, best_rank = -1, (0, 0, 0)
        for replica, load in loads.items():
            matched = self.matched_tokens(replica, digests) if digests else 0
            if load > least and (not matched or load > least + max(self._slack, LOAD_PER_HIT * matched)):
                continue
            rank = (-matched, load, self._chosen_at[replica])
            if best < 0 or rank < best_rank:
                best, best_rank = replica, rank
        self._choices += 1
        self._chosen_at[best] = self._choices
        return best

    def record(self, replica: int, digests: Sequence[bytes]) -> None:
        """These pages are, or will be, in the replica's cache, used just now."""
        pages = self._pages[replica]
        for digest in reversed(digests):  # parents last: they leave after their children
            pages[digest] = None
            pages.move_to_end(digest)
        self._shrink(replica)

    def forget(self, replica: int) -> None:
        """Its engine is gone, and with it the cache."""
        self._pages[replica].clear()

    def set_capacity(self, replica: int, num_pages: int) -> None:
        """Pages of its KV cache, of `page_size` tokens."""
        self._capacity[replica] = max(1, min(num_pages, MAX_PAGES))
        self._shrink(replica)

    def remembered(self, replica: int) -> int:
        """Pages."""
        return len(self._pages[replica])

    def _shrink(self, replica: int) -> None:
        pages, capacity = self._pages[replica], self._capacity[replica]
        while len(pages) > capacity:
            pages.popitem(last=False)
