"""Server-sent events, and noticing that a client went away. Knows bytes and connections, not what is in the events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from appliance.errors import ApplianceError
from appliance.server.errors import error_body, error_response

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"
# In the scope: the `send` of the ASGI server itself. What wraps it on the way to a route (middleware, exception
# handlers) looks only at the start of a response, and would cost a third of the time of each event.
DIRECT_SEND = "appliance.direct_send"


def event(payload: bytes) -> bytes:
    """One event. The payload is JSON, so it has no line break."""
    return b"data: %b\n\n" % payload


class EventSource(Protocol):
    """What a stream sends (`server.answer.Answer`)."""

    def listen(self, on_ready: Callable[[], None]) -> None:
        """Call `on_ready` whenever `events` may have something new, or the end has come."""

    def events(self) -> bytes:
        """All events that are ready, possibly none. Raises ApplianceError if the answer failed."""

    @property
    def ended(self) -> bool:
        """Nothing comes after what `events` gave."""

    def cancel(self) -> None:
        """Nobody reads it any more. Idempotent."""


class EventStream(Response):
    """Sends what a source gives, then [DONE].

    The response begins with the first events, so that an error before them has its own HTTP status; an ApplianceError
    after them becomes an error event. The source is cancelled once the client is gone or the stream has ended, however
    it ended.

    Events are sent from where the source says that they are ready, without a task being woken for each. The task of the
    request does the rest: the beginning, the end, and waiting for a client that reads too slowly; meanwhile the source
    gathers what comes, and that goes out in one piece.
    """

    media_type = "text/event-stream"

    def __init__(self, source: EventSource, headers: Mapping[str, str] | None = None) -> None:
        # Proxies must not buffer or transform what a person is watching.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._source = source
        self._send: Send
        self._direct_send: Send
        self._started = False
        self._first = b""  # the first events, until the response has started
        self._turn: asyncio.Future[Awaitable[None] | None] | None = None  # while the task waits for its turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        self._direct_send = scope.get(DIRECT_SEND, send)
        watcher = asyncio.create_task(self._watch(receive))
        try:
            try:
                await self._start(await self._first_events())
                await self._go_on()
            except ApplianceError as error:
                if not self._started:
                    await error_response(error)(scope, receive, send)
                    return
                await send(_body(event(error_body(error))))
            await send({"type": "http.response.body", "body": DONE})
        finally:
            watcher.cancel()
            self._source.cancel()

    async def _first_events(self) -> bytes:
        """Waits for them; none if the source ends without any."""
        self._source.listen(self._on_ready)
        self._first = self._source.events()
        if not self._first and not self._source.ended:
            await self._wait_for_turn()
        return self._first

    async def _start(self, data: bytes) -> None:
        await self._send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._started = True
        self._send = self._direct_send
        await self._send(_body(data))

    async def _go_on(self) -> None:
        """Until the source has ended."""
        while True:
            while data := self._source.events():
                await self._send(_body(data))
            if self._source.ended:
                return
            rest = await self._wait_for_turn()
            if rest is not None:
                await rest

    async def _wait_for_turn(self) -> Awaitable[None] | None:
        """Until `_on_ready` needs the task. Returns the rest of a send that has to wait; raises what `events` did."""
        self._turn = asyncio.get_running_loop().create_future()
        try:
            return await self._turn
        finally:
            self._turn = None

    def _on_ready(self) -> None:
        """Sends what is ready, or gives the task its turn. When it has that already it does not need to be told: it
        looks for new events before it waits again."""
        turn = self._turn
        if turn is None or turn.done():
            return
        rest: Awaitable[None] | None = None
        try:
            data = self._source.events()
            if not self._started:
                self._first, needed = data, bool(data)
            else:
                rest = begin(self._send(_body(data))) if data else None
                needed = rest is not None
            if needed or self._source.ended:
                turn.set_result(rest)
        except Exception as error:
            turn.set_exception(error)

    async def _watch(self, receive: Receive) -> None:
        await wait_disconnect(receive)
        self._source.cancel()


def _body(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


def begin(awaitable: Awaitable[None]) -> Awaitable[None] | None:
    """Runs an awaitable up to where it has to wait, outside of any task. None if it came to its end without, which is
    the rule for an ASGI `send`; else what is left, to be awaited by a task."""
    steps = awaitable.__await__()
    try:
        return _Rest(next(steps), steps)
    except StopIteration:
        return None


class _Rest(Awaitable[None]):
    """An awaitable that was begun and waits for `first`, which it gave to whoever runs it."""

    def __init__(self, first: Any, steps: Generator[Any, None, None]) -> None:
        self._first = first
        self._steps = steps

    def __await__(self) -> Generator[Any, None, None]:
        try:
            yield self._first
        except BaseException as error:  # the task was cancelled
            self._steps.throw(error)
            raise
        yield from self._steps


async def wait_disconnect(receive: Receive) -> None:
    """Return when the client closed the connection. The request body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_disconnect(
    request: Request, work: Coroutine[Any, Any, Result], cancel: Callable[[], None]
) -> Result | None:
    """Run `work`; None if the client went away first. `cancel` is called in the end, however it ends."""
    working = asyncio.create_task(work)
    watcher = asyncio.create_task(wait_disconnect(request.receive))
    try:
        await asyncio.wait([working, watcher], return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        watcher.cancel()
        working.cancel()
        cancel()
