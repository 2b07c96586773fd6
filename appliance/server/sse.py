"""Server-sent events, and noticing that a client went away. Knows bytes and connections, not what is in the events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from appliance.errors import ApplianceError
from appliance.server.errors import error_body, error_response

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"


def event(payload: bytes) -> bytes:
    """One event. The payload is JSON, so it has no line break."""
    return b"data: %b\n\n" % payload


class EventStream(Response):
    """Sends what `events` yields, then [DONE].

    The response begins with the first item, so that an error before it has its own HTTP status; an ApplianceError after
    it becomes an error event. `cancel` is called once the client is gone or the stream has ended, however it ended.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], cancel: Callable[[], None], headers: Mapping[str, str] | None = None
    ) -> None:
        # Proxies must not buffer or transform what a person is watching.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._events = events
        self._cancel = cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        started = False
        try:
            try:
                async for data in self._events:
                    if not started:
                        await self._start(send)
                        started = True
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except ApplianceError as error:
                if not started:
                    await error_response(error)(scope, receive, send)
                    return
                await send({"type": "http.response.body", "body": event(error_body(error)), "more_body": True})
            if not started:
                await self._start(send)
            await send({"type": "http.response.body", "body": DONE})
        finally:
            watcher.cancel()
            self._cancel()

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

    async def _watch(self, receive: Receive) -> None:
        await wait_disconnect(receive)
        self._cancel()


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
