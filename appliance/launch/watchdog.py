"""Says that the event loop is stuck, from outside of it: a thread that answers probes in its place.

A loop that does not turn answers nothing, not even its health endpoints, and hears no SIGTERM. Then this thread takes
connections from the listening sockets and answers 503 with the reason, so that liveness fails at once and in words;
when the loop turns again, it stops. A loop that stays stuck for as long again ends the process. Load never does this: a
busy loop turns late, and only time counts in which it did not turn at all.

Knows sockets and one event loop; nothing of routes or engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import select
import socket
import ssl
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

_TICKS = 60  # looks at the loop within the limit
_SLOWEST_TICK = 1.0  # seconds
_ANSWER_SECONDS = 1.0  # for one connection's request to come in


class Watchdog:
    """`limit_seconds` without a turn of the loop is stuck; twice that calls `give_up` with the reason, which ends the
    process. `tls` gives the context of encrypted sockets once there is one.

    Time is counted in looks that found the loop still, so a process that was frozen (`docker pause`, a debugger, a
    suspended machine) is not taken for a stuck one when it goes on."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sockets: Sequence[socket.socket],
        limit_seconds: float,
        give_up: Callable[[str], None],
        tls: Callable[[], ssl.SSLContext | None] = lambda: None,
    ) -> None:
        self._loop = loop
        self._sockets = [opened.dup() for opened in sockets]
        self._limit = limit_seconds
        self._tick = min(_SLOWEST_TICK, limit_seconds / _TICKS)
        self._give_up = give_up
        self._tls = tls
        self._watched = threading.get_ident()  # the loop's thread
        self._turned = threading.Event()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """From the loop's own thread."""
        self._thread.start()

    def stop(self) -> None:
        """Idempotent."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(self._tick + _ANSWER_SECONDS + 1)
        for opened in self._sockets:
            opened.close()

    def _run(self) -> None:
        still = 0.0  # seconds for which every look found the loop still
        while not self._end.wait(self._tick):
            if self._turned.is_set() or still == 0.0:
                if still >= self._limit:
                    log.warning("the event loop turns again after %.0f s", still)
                still = 0.0
                self._turned.clear()
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    self._loop.call_soon_threadsafe(self._turned.set)
            before, still = still, still + self._tick
            if still < self._limit:
                continue
            reason = f"the event loop has not turned for {still:.0f} s"
            if before < self._limit:
                log.error("%s; it is here:\n%s", reason, self._stack())
            if still >= 2 * self._limit:
                self._give_up(reason)
                return
            still += self._answer_for(self._tick, reason)

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._watched)
        return "".join(traceback.format_stack(frame)).rstrip() if frame is not None else "no such thread"

    def _answer_for(self, seconds: float, reason: str) -> float:
        """Answer whoever connects within this time, or until the loop turns. Returns the seconds it took."""
        began = time.monotonic()
        while (left := began + seconds - time.monotonic()) > 0 and not self._turned.is_set():
            readable, _, _ = select.select(self._sockets, [], [], left)
            for listener in readable:
                with contextlib.suppress(OSError):  # gone, or the loop was quicker
                    connection, _ = listener.accept()
                    with connection:
                        self._answer(connection, reason)
        return min(time.monotonic() - began, 2 * seconds)

    def _answer(self, connection: socket.socket, reason: str) -> None:
        connection.settimeout(_ANSWER_SECONDS)
        context = self._tls()
        with context.wrap_socket(connection, server_side=True) if context else connection as stream:
            head = b""
            while b"\r\n\r\n" not in head and len(head) < 65536:
                data = stream.recv(8192)
                if not data:
                    return
                head += data
            stream.sendall(_response(head, reason))
            stream.shutdown(socket.SHUT_WR)


def _response(head: bytes, reason: str) -> bytes:
    """503, as the health endpoints or as OpenAI's errors have it."""
    path = head.split(b" ", 2)[1] if head.count(b" ") >= 2 else b""
    if b"/health" in path:
        body: dict[str, object] = {"object": "health.response", "message": "failed", "phase": "failed"}
        body |= {"percent": None, "eta_seconds": None, "reason": reason}
    else:
        body = {"error": {"message": f"the server is stuck: {reason}", "type": "service_unavailable_error"}}
        body["error"] |= {"param": None, "code": "unavailable"}  # type: ignore[operator]
    content = json.dumps(body).encode()
    lines = [
        b"HTTP/1.1 503 Service Unavailable",
        b"Content-Type: application/json",
        b"Retry-After: 5",
        b"Connection: close",
        b"Content-Length: %d" % len(content),
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + content
