"""How one step's tokens are shared among prefills, so that neither long nor short prompts wait for the other for ever.

Knows numbers of tokens only. Decodes are not its business: the scheduler gives each running decode its one token first,
so the longest prefill delays a decode by no more than one step of at most `max_num_batched_tokens`.

Policy: a quarter of what the decodes leave is reserved for short prefills (at most a quarter of a whole step left to
run). Long prefills share the rest in order of rank, the first takes what it can, and get whatever of the reserve no
short prefill wanted. So all tokens of a step are used as long as anything wants them, a short prompt starts within a
few steps behind any number of huge ones, and the first huge one always gets at least three quarters.
"""

from __future__ import annotations

RESERVED_SHARE = 4  # one in so many tokens of a step is for short prefills


class PrefillBudget:
    """Tokens of one step that prefills can take. Grants in the order of the calls."""

    def __init__(self, num_tokens: int, max_num_batched_tokens: int) -> None:
        """`num_tokens`: what the decodes of this step leave of `max_num_batched_tokens`."""
        self.left = num_tokens
        self._left_for_long = num_tokens - num_tokens // RESERVED_SHARE
        self._long = max(1, max_num_batched_tokens // RESERVED_SHARE)

    def offer(self, wanted: int) -> int:
        """How many of `wanted` tokens (all that the prefill has left to run) this step can run; may be 0."""
        return min(wanted, self.left if wanted <= self._long else min(self.left, self._left_for_long))

    def take(self, wanted: int, granted: int) -> None:
        """Uses an offer."""
        self.left -= granted
        if wanted > self._long:
            self._left_for_long -= granted

    def take_leftover(self, wanted: int) -> int:
        """When every prefill has had its offer: tokens that a granted one gets on top."""
        extra = min(wanted, self.left)
        self.left -= extra
        return extra
