"""One HTTP/1.1 connection that streams completions: as little work per token as Python allows.

Parses what it needs of RFC 9112 (section 7.1, chunked bodies) and of server-sent events and no more: it measures
servers and is no general client. Knows which events carry tokens; decodes JSON only where usage or an error is in it.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, cast


class Response:
    """What came so far; complete when the connection's future is done."""

    __slots__ = ("body", "error", "events", "saw_done", "status", "usage")

    def __init__(self) -> None:
        self.status = 0
        self.events: list[float] = []  # monotonic seconds, one for each event that carries tokens
        self.usage: dict[str, Any] = {}
        self.error = ""
        self.saw_done = False
        self.body = b""  # of a response that is no event stream


class SseConnection(asyncio.Protocol):
    """Requests one after another. `post` gives the response; its `error` says what went wrong, nothing is raised."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._tail = b""  # of an event that is not complete
        self._response = Response()
        self._done: asyncio.Future[None] | None = None
        self._in_body = False
        self._remaining: int | None = None  # bytes of a body with a length; None: chunked
        self._close_after = False

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def post(self, request: bytes, timeout: float) -> Response:
        """Send a whole request and wait for the end of its response."""
        response = self._response = Response()
        if not self.usable or self._transport is None:
            response.error = "the server closed the connection"
            return response
        self._done = asyncio.get_running_loop().create_future()
        self._in_body = False
        self._transport.write(request)
        try:
            await asyncio.wait_for(self._done, timeout)
        except TimeoutError:
            response.error = f"no end within {timeout:.0f} s"
            self.close()
        return response

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # ------------------------------------------------------------ asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(f"the connection was lost{f': {exc}' if exc else ''}")

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        buffer = self._buffer + data if self._buffer else data
        at = 0
        try:
            if not self._in_body:
                end = buffer.find(b"\r\n\r\n")
                if end < 0:
                    self._buffer = buffer
                    return
                self._read_head(buffer[:end])
                at = end + 4
            at = self._read_chunks(buffer, at, now) if self._remaining is None else self._read_length(buffer, at, now)
        except ValueError as error:
            self._finish(f"not HTTP as this client reads it: {error}")
            self.close()
            return
        self._buffer = buffer[at:] if at < len(buffer) else b""

    # ------------------------------------------------------------ reading

    def _read_head(self, head: bytes) -> None:
        """Status and how the body is delimited. ValueError for what is neither chunked nor of a given length."""
        lines = head.split(b"\r\n")
        self._response.status = int(lines[0].split(b" ", 2)[1])
        headers = dict(line.lower().split(b":", 1) for line in lines[1:])
        self._close_after = headers.get(b"connection", b"").strip() == b"close"
        if b"chunked" in headers.get(b"transfer-encoding", b""):
            self._remaining = None
        elif b"content-length" in headers:
            self._remaining = int(headers[b"content-length"])
        else:
            raise ValueError("a response has neither a length nor chunks")
        self._in_body, self._tail = True, b""

    def _read_chunks(self, buffer: bytes, at: int, now: float) -> int:
        """Take whole chunks from `at` on; where the rest begins."""
        while True:
            line = buffer.find(b"\r\n", at)
            if line < 0:
                return at
            size = int(buffer[at:line], 16)
            end = line + 2 + size
            if len(buffer) < end + 2:
                return at
            if size == 0:
                self._finish("")
                return end + 2
            self._take(buffer[line + 2 : end], now)
            at = end + 2

    def _read_length(self, buffer: bytes, at: int, now: float) -> int:
        part = buffer[at : at + (self._remaining or 0)]
        self._remaining = (self._remaining or 0) - len(part)
        self._take(part, now)
        if self._remaining == 0:
            self._finish("")
        return at + len(part)

    def _take(self, data: bytes, now: float) -> None:
        """Part of a body."""
        response = self._response
        if response.status != 200:
            response.body += data
            return
        text = self._tail + data if self._tail else data
        *events, self._tail = text.split(b"\n\n")
        for event in events:
            if not event.startswith(b"data:"):
                continue
            if b'"usage":{' in event or b'"usage": {' in event or b'"error"' in event or event == b"data: [DONE]":
                self._take_rare(event[5:].strip(), now)
            else:
                response.events.append(now)

    def _take_rare(self, payload: bytes, now: float) -> None:
        """An event that is, or may be, about something else than tokens. ValueError if it is no JSON."""
        response = self._response
        if payload == b"[DONE]":
            response.saw_done = True
            return
        value = json.loads(payload)
        if value.get("error"):
            response.error = str(value["error"].get("message", value["error"]))[:200]
        response.usage = value.get("usage") or response.usage
        if value.get("choices"):
            response.events.append(now)

    def _finish(self, problem: str) -> None:
        """The response has ended, or will never."""
        if self._done is None or self._done.done():
            return
        response = self._response
        if response.status not in (0, 200) and not problem:
            response.error = f"HTTP {response.status}: {response.body.decode(errors='replace')[:200]}"
        elif problem and not response.error:
            response.error = problem
        elif not response.error and not response.saw_done:
            response.error = "the stream ended without [DONE]"
        self._done.set_result(None)
        if self._close_after:
            self.close()
