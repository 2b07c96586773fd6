"""The outputs of requests that were submitted together, on their way from the journal to whoever made them.

Knows engine outputs and one consumer; neither text nor HTTP. A consumer either iterates, or is called (`listen`) and
takes what is there: streams do the latter, since waking a task for each token costs more than the token's event.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from appliance.types import EngineOutput, FinishReason


class RequestGroup(AsyncIterator[list[EngineOutput]]):
    """The requests of one HTTP request (its choices).

    Iterating gives all outputs that are ready, at least one, in order; it ends after each request's terminal event was
    given, or after `cancel`. One consumer only. `push` and `wake` are the journal's.
    """

    def __init__(self, request_ids: Sequence[str], end_early: Callable[[str, FinishReason], None]) -> None:
        """`end_early` ends a request in the journal and in the engine, without an event for this group."""
        self.open = set(request_ids)  # without a terminal event
        self.pending: list[EngineOutput] = []
        self.batch = 1  # outputs that are worth waking the consumer for; an end always is
        self._end_early = end_early
        self._waiter: asyncio.Future[None] | None = None
        self._on_ready: Callable[[], None] | None = None

    # ------------------------------------------------------------ the consumer's side

    async def __anext__(self) -> list[EngineOutput]:
        while not self.pending:
            if not self.open:
                raise StopAsyncIteration
            assert self._waiter is None, "a request group has one consumer"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.take()

    def listen(self, on_ready: Callable[[], None]) -> None:
        """Call `on_ready`, which must not raise, whenever there may be something to `take` or the end has come. What is
        not taken is not told again."""
        self._on_ready = on_ready

    def take(self) -> list[EngineOutput]:
        """All outputs that are ready, in order; may be empty."""
        outputs, self.pending = self.pending, []
        return outputs

    @property
    def ended(self) -> bool:
        """Nothing is ready and nothing more will come."""
        return not self.open and not self.pending

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """End one request from this side (a stop string was found): no further output of it is given. What is already
        waiting to be read is dropped. The consumer does this while it runs, so it is not woken."""
        self.open.discard(request_id)
        self.pending = [output for output in self.pending if output.request_id != request_id]
        self._end_early(request_id, reason)

    def cancel(self) -> None:
        """The client is gone: end all that is open, with one abort message to the engine. Idempotent."""
        self.pending.clear()
        for request_id in sorted(self.open):
            self._end_early(request_id, "abort")
        self.open.clear()
        self.wake()

    # ------------------------------------------------------------ the journal's side

    def push(self, output: EngineOutput) -> bool:
        """Add an output; whether the consumer has to be told, with `wake`. It has been, if something is waiting."""
        self.pending.append(output)
        if output.finish_reason is not None:
            self.open.discard(output.request_id)
            return True
        return len(self.pending) == self.batch

    def wake(self) -> None:
        if self._on_ready is not None:
            self._on_ready()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
