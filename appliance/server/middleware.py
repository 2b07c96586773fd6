"""The gate before all routes: request ids, API keys, and a limit on body size. Plain ASGI, so that streaming and
disconnects pass through untouched.
"""

from __future__ import annotations

import hmac
import re
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance import logs
from appliance.errors import AuthenticationError
from appliance.server.errors import error_response, plain_response
from appliance.server.tracing import RequestTracer

# Answered without a key: probes, scrapers and the dashboard have none, and these tell nothing of any request.
OPEN_PATHS = frozenset(
    [
        "/",
        "/docs",
        "/openapi.json",
        "/health",
        "/v1/health/live",
        "/v1/health/ready",
        "/v1/health/startup",
        "/metrics",
        "/v1/metrics",
    ]
)
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class Gate:
    """`api_keys` empty means open to all. The request id is the client's X-Request-Id if it is a plain one, else new;
    it is in `scope["state"]["request_id"]`, in the response, and in every log line of the request's task."""

    def __init__(
        self, app: ASGIApp, *, api_keys: Collection[str], max_body_bytes: int, tracer: RequestTracer | None = None
    ) -> None:
        self._app = app
        self._api_keys = [key.encode() for key in api_keys]
        self._max_body_bytes = max_body_bytes
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        logs.request_id.set(request_id)  # of this request's own task; uvicorn logs in it even after this returns
        if self._tracer is None or scope["path"] in OPEN_PATHS:
            await self._handle(scope, receive, send, headers, request_id)
        else:
            await self._traced(self._tracer, scope, receive, send, headers, request_id)

    async def _traced(
        self, tracer: RequestTracer, scope: Scope, receive: Receive, send: Send, headers: Headers, request_id: str
    ) -> None:
        with tracer.http(scope, request_id) as span:

            async def send_noting_status(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.status(message["status"])
                await send(message)

            await self._handle(scope, receive, send_noting_status, headers, request_id)

    async def _handle(self, scope: Scope, receive: Receive, send: Send, headers: Headers, request_id: str) -> None:
        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        if self._api_keys and scope["path"] not in OPEN_PATHS and not self._has_key(headers):
            error = AuthenticationError("this server needs an API key", hint="send Authorization: Bearer KEY")
            await error_response(error)(scope, receive, send_with_id)
            return
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            response = plain_response(413, self._too_large(), "request_too_large", {"Connection": "close"})
            await response(scope, receive, send_with_id)
            return
        if scope["method"] == "HEAD":
            # Probes and proxies send it. Answered as GET; uvicorn, which has the original scope, drops the body.
            scope = {**scope, "method": "GET"}
        await self._app(scope, self._limited(receive), send_with_id)

    def _has_key(self, headers: Headers) -> bool:
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode()
        return kind.lower() == "bearer" and any(hmac.compare_digest(given, known) for known in self._api_keys)

    def _limited(self, receive: Receive) -> Receive:
        """For bodies that do not announce their length."""
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_body_bytes:
                    raise HTTPException(413, self._too_large(), {"Connection": "close"})
            return message

        return limited

    def _too_large(self) -> str:
        return f"the request body is larger than {self._max_body_bytes} bytes, the most this server takes"
