"""Pages of the KV cache: who holds which, and which can be reused by another sequence with the same beginning.

Three parts: `PagePool` counts references and hands out pages, `PrefixCache` finds a page by its content, `KvCache`
applies both to sequences. Knows page ids and token ids; never sees K/V, and does not decide who runs.

Content addressing: a full page's digest is blake2b-128 of its parent page's digest and its own token ids, so it stands
for all tokens from the start of the sequence to the end of the page, and equal digests mean equal K/V. A page that is
full and whose tokens are all known is registered once a *submitted* step computes its last K/V; the device runs steps
in order, so any later step may read it. Registered pages are never written again.

Every page is exactly one of: free (in the free list), idle (registered, no references; evicted when the free list is
empty, least recently used first), or referenced (by one sequence, or by several if registered). Allocation is O(1).

Invariant behind "leaf first": the parent of a registered page is registered, and referenced if the page is. Releasing a
sequence's pages last page first then keeps each idle page behind its children in the eviction order, so an evicted
page never has registered children, which nobody could find any more.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from appliance.batching.request import Sequence

ROOT = b""  # the parent of a sequence's first page
DIGEST_SIZE = 16  # bytes
PAGES_HASHED_AT_ONCE = 64


def extend_digests(digests: list[bytes], token_ids: list[int], num_pages: int, page_size: int) -> None:
    """Appends to `digests` until it covers the first `num_pages` pages of `token_ids`, which must all be full."""
    begin = len(digests)
    if begin >= num_pages:
        return
    data = array("i", token_ids[begin * page_size : num_pages * page_size]).tobytes()
    width = len(data) // (num_pages - begin)
    parent = digests[-1] if digests else ROOT
    for offset in range(0, len(data), width):
        parent = blake2b(parent + data[offset : offset + width], digest_size=DIGEST_SIZE).digest()
        digests.append(parent)


class PrefixCache:
    """digest -> page, and the eviction order of pages that nobody references. Counts no references itself."""

    def __init__(self) -> None:
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, tuple[bytes, bytes]] = {}  # page -> (digest, parent's digest)
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    def __contains__(self, page: int) -> bool:
        return page in self._key_of

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def find(self, digest: bytes) -> int | None:
        return self._page_of.get(digest)

    def match(self, digests: list[bytes]) -> list[int]:
        """The pages of the longest registered beginning of a chain. Changes nothing."""
        pages: list[int] = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def insert(self, page: int, digest: bytes, parent: bytes) -> None:
        """Registers a referenced page under a digest that is not taken."""
        self._page_of[digest] = page
        self._key_of[page] = (digest, parent)

    def remove(self, page: int) -> None:
        """Forgets an idle page."""
        del self._idle[page]
        del self._page_of[self._key_of.pop(page)[0]]

    def set_idle(self, page: int) -> None:
        """The last reference is gone: evict it after all that are idle now."""
        self._idle[page] = None

    def set_used(self, page: int) -> None:
        """The page was idle and has a reference now."""
        del self._idle[page]

    def evict(self) -> int:
        """Forgets the least recently used idle page and returns it. There must be one."""
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)[0]]
        return page

    def check_integrity(self, refs: list[int]) -> None:
        """`refs`: references of each page. Raises AssertionError if maps, order and references disagree."""
        _check(len(self._page_of) == len(self._key_of), "digest and page maps differ in size")
        order = {page: i for i, page in enumerate(self._idle)}
        for page, (digest, parent) in self._key_of.items():
            _check(self._page_of.get(digest) == page, f"page {page} is not found under its digest")
            _check((page in order) == (refs[page] == 0), f"page {page}: idle and referenced, or neither")
            if parent != ROOT:
                above = self._page_of.get(parent)
                _check(above is not None, f"page {page} is registered, its parent is not")
                assert above is not None
                _check(refs[page] == 0 or refs[above] > 0, f"page {page} is referenced, its parent {above} is not")
                _check(above not in order or order[above] > order[page], f"{above} goes before its child {page}")
        _check(order.keys() <= self._key_of.keys(), "an idle page is not registered")

    @property
    def idle_pages(self) -> list[int]:
        """In eviction order; for tests and integrity checks."""
        return list(self._idle)


class PagePool:
    """Reference counts and the free list. Every method is O(1) a page."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.prefix = PrefixCache()
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: low ids first, then the latest freed
        self._refs = [0] * num_pages

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give: free and idle ones."""
        return len(self._free) + self.prefix.num_idle

    def references(self, page: int) -> int:
        return self._refs[page]

    def allocate(self, count: int) -> list[int]:
        """Pages with undefined content and one reference each; idle ones are evicted as needed. The caller has checked
        `num_available`."""
        free, refs = self._free, self._refs
        pages = [free.pop() if free else self.prefix.evict() for _ in range(count)]
        for page in pages:
            refs[page] = 1
        return pages

    def acquire(self, pages: list[int]) -> None:
        """One more reference to each of these registered pages."""
        for page in pages:
            if self._refs[page] == 0:
                self.prefix.set_used(page)
            self._refs[page] += 1

    def release(self, pages: list[int]) -> None:
        """One reference less to each page of a sequence, given in sequence order; the last page goes first."""
        refs, prefix = self._refs, self.prefix
        for page in reversed(pages):
            refs[page] -= 1
            if refs[page] == 0:
                if page in prefix:
                    prefix.set_idle(page)
                else:
                    self._free.append(page)

    def register(self, page: int, digest: bytes, parent: bytes) -> bool:
        """Registers a referenced, full page. If an idle page has the same content, this one takes its place. False if
        a referenced one has: then nothing changes."""
        old = self.prefix.find(digest)
        if old is not None:
            if self._refs[old] > 0:
                return False
            self.prefix.remove(old)
            self._free.append(old)
        self.prefix.insert(page, digest, parent)
        return True

    def check_integrity(self, holders: Iterable[list[int]]) -> None:
        """`holders`: the pages of each sequence. Raises AssertionError naming the first page that is wrong."""
        expected = [0] * self.num_pages
        for pages in holders:
            _check(len(set(pages)) == len(pages), "a sequence holds a page twice")
            for page in pages:
                expected[page] += 1
        free = set(self._free)
        _check(len(free) == len(self._free), "a page is in the free list twice")
        for page in range(self.num_pages):
            refs = self._refs[page]
            _check(refs == expected[page], f"page {page} counts {refs} references, sequences hold {expected[page]}")
            _check(refs <= 1 or page in self.prefix, f"page {page} is shared and not registered")
            wanted = refs == 0 and page not in self.prefix
            _check((page in free) == wanted, f"page {page} is {'leaked' if wanted else 'free and in use'}")
        self.prefix.check_integrity(self._refs)


class KvCache:
    """The pages of sequences. The only writer of a Sequence's page fields."""

    def __init__(self, num_pages: int, page_size: int, *, prefix_caching: bool) -> None:
        self.pool = PagePool(num_pages)
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self.num_queries = 0  # prompt tokens looked up, at a request's first admission
        self.num_hits = 0  # of those, found
        # Digests that a running prefill is going to register -> that sequence.
        self._pending: dict[bytes, Sequence] = {}

    @property
    def usage(self) -> float:
        """Share of pages that sequences hold, 0..1."""
        return 1.0 - self.pool.num_available / self.pool.num_pages

    def match(self, seq: Sequence) -> tuple[list[int], bool]:
        """Registered pages that `seq` could start with, and whether it had better wait: a running prefill is just
        computing the next page it needs, so that in a few steps the same K/V need not be computed again (several
        choices of one request, a burst of requests with one system prompt).

        Leaves the last token out: its logits are needed, so it runs in any case. Changes nothing but `seq.digests`.
        """
        if not self.prefix_caching or seq.prompt_logprobs is not None:
            return [], False
        usable = (len(seq.token_ids) - 1) // self.page_size
        hits: list[int] = []
        while len(hits) < usable:
            if len(hits) == len(seq.digests):  # as far as it is found, so that looking at a long new prompt is cheap
                extend_digests(
                    seq.digests, seq.token_ids, min(usable, len(hits) + PAGES_HASHED_AT_ONCE), self.page_size
                )
            digest = seq.digests[len(hits)]
            page = self.pool.prefix.find(digest)
            if page is None:
                return hits, digest in self._pending
            hits.append(page)
        return hits, False

    def admit(self, seq: Sequence, hits: list[int], spare: int) -> bool:
        """Gives `seq` the pages of `match` and fresh ones for the rest of its known tokens, if `spare` pages are still
        available afterwards; else changes nothing and returns False. All of them now and not chunk by chunk: a prefill
        that has begun never waits for a page. Sets `num_computed` to the tokens hit."""
        pool = self.pool
        fresh = -(-len(seq.token_ids) // self.page_size) - len(hits)
        idle_hits = sum(pool.references(page) == 0 for page in hits)
        if pool.num_available - idle_hits < fresh + spare:
            return False
        pool.acquire(hits)
        if self.prefix_caching:
            extend_digests(seq.digests, seq.token_ids, len(seq.token_ids) // self.page_size, self.page_size)
        seq.pages = hits + pool.allocate(fresh)
        seq.capacity = len(seq.pages) * self.page_size
        seq.num_registered = len(hits)
        seq.chain_open = self.prefix_caching
        seq.num_computed = len(hits) * self.page_size
        for digest in seq.digests[len(hits) :]:
            self._pending.setdefault(digest, seq)
        if not seq.admitted:
            seq.admitted = True
            seq.num_cached_tokens = min(seq.num_computed, seq.num_prompt_tokens)
            if self.prefix_caching and seq.prompt_logprobs is None:
                self.num_queries += seq.num_prompt_tokens
                self.num_hits += seq.num_cached_tokens
        return True

    def grow(self, seq: Sequence) -> int | None:
        """One more page for a sequence whose pages are full; None if there is none."""
        self.register(seq)
        if self.pool.num_available == 0:
            return None
        (page,) = self.pool.allocate(1)
        seq.pages.append(page)
        seq.capacity += self.page_size
        return page

    def register(self, seq: Sequence) -> None:
        """Registers the full pages of `seq` whose tokens are known and run by submitted steps. Called when one fills,
        not for each token.

        Tokens beyond the known ones have been run too when steps are pipelined; they may turn out to be discarded, so
        known tokens are the limit. When another sequence holds a page with the same content (both computed it at the
        same time), the chain of this one ends: registering later pages would break the invariant above.
        """
        full = min(seq.num_computed, len(seq.token_ids)) // self.page_size
        if full <= seq.num_registered or not seq.chain_open:
            return
        extend_digests(seq.digests, seq.token_ids, full, self.page_size)
        for i in range(seq.num_registered, full):
            digest = seq.digests[i]
            if not self.pool.register(seq.pages[i], digest, seq.digests[i - 1] if i else ROOT):
                seq.chain_open = False
                self._forget_pending(seq)
                return
            seq.num_registered = i + 1
            if self._pending.get(digest) is seq:
                del self._pending[digest]

    def release(self, seq: Sequence) -> None:
        """Takes all pages from `seq`; what is registered stays to be found until it is evicted. Steps in flight may
        still write into its unregistered pages: whoever gets them writes later."""
        self.register(seq)
        self._forget_pending(seq)
        self.pool.release(seq.pages)
        seq.pages = []
        seq.capacity = seq.num_registered = seq.num_computed = 0

    def _forget_pending(self, seq: Sequence) -> None:
        if self._pending:
            for digest in seq.digests[seq.num_registered :]:
                if self._pending.get(digest) is seq:
                    del self._pending[digest]

    def check_integrity(self, sequences: list[Sequence]) -> None:
        """`sequences`: all that may hold pages. Raises AssertionError where something is wrong."""
        self.pool.check_integrity(seq.pages for seq in sequences)
        holders = {id(seq) for seq in sequences if seq.pages}
        for seq in self._pending.values():
            _check(id(seq) in holders, f"request {seq.request_id} has promised pages but holds none")
        for seq in sequences:
            _check(seq.capacity == len(seq.pages) * self.page_size, f"request {seq.request_id}: wrong capacity")
            _check(seq.num_computed <= seq.capacity, f"request {seq.request_id}: tokens without a page")
            found = self.pool.prefix.match(seq.digests[: seq.num_registered])
            _check(found == seq.pages[: seq.num_registered], f"request {seq.request_id}: registered pages not its own")


def _check(condition: bool, message: str) -> None:
    """An assert that survives `python -O`: integrity checks are called by the running server too."""
    if not condition:
        raise AssertionError(message)
