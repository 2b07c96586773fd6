"""Composition of the HTTP application: gate, routes, error mapping. `create_app(state)` is all that others call."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from appliance.errors import ApplianceError, RequestError
from appliance.server import routes_chat, routes_completions, routes_meta
from appliance.server.errors import on_appliance_error, on_disconnect, on_http_error, on_unexpected_error
from appliance.server.middleware import Gate
from appliance.server.sse import DIRECT_SEND
from appliance.server.state import ServerState
from appliance.server.wire.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest


class _App(FastAPI):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[DIRECT_SEND] = send
        await super().__call__(scope, receive, send)


def create_app(state: ServerState) -> FastAPI:
    """The application over this state. Cheap: it reads no file and needs neither tokenizer nor engine to be there."""
    # FastAPI's own /docs and /redoc load their scripts from a public CDN: routes_meta has a page that needs none.
    app = _App(
        title="Inference appliance", version=state.version, redirect_slashes=False, docs_url=None, redoc_url=None
    )
    app.state.server = state

    async def on_error(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestError):
            state.metrics.rejected[error.code or "none"] += 1
        return await on_appliance_error(request, error)

    app.add_exception_handler(ApplianceError, on_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_unexpected_error)
    for module in (routes_chat, routes_completions, routes_meta):
        app.include_router(module.router)
    app.add_middleware(Gate, api_keys=state.api_keys, max_body_bytes=state.max_body_bytes, tracer=state.tracer)
    _describe_bodies(app)
    return app


def _describe_bodies(app: FastAPI) -> None:
    """Put the request models into /openapi.json: routes parse bodies themselves, so FastAPI does not see them."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = original()
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            for model in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest):
                own = model.model_json_schema(ref_template="#/components/schemas/{model}")
                components.update(own.pop("$defs", {}))
                components[model.__name__] = own
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
