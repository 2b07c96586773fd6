"""The HTTP application of a node that is not node 0: health and metrics of its own, and for everything else where the
API is.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from appliance.server import routes_meta
from appliance.server.errors import plain_response
from appliance.server.state import ServerState

_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def create_node_app(state: ServerState, node: int, leader: str) -> FastAPI:
    """Over this state, of which only the lifecycle and the metrics are used. `leader`: node 0's name or address."""
    app = FastAPI(title="Inference appliance", version=state.version, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = state

    async def elsewhere(request: Request) -> Response:
        # 421: this server is not able to produce a response for this target, RFC 9110, section 15.5.20.
        message = f"this is node {node}, which holds part of the model; the API is on node 0, {leader}"
        return plain_response(421, message, "misdirected_request")

    for path, endpoint in (
        ("/v1/health/live", routes_meta.live),
        ("/v1/health/ready", routes_meta.ready),
        ("/health", routes_meta.ready),
        ("/v1/health/startup", routes_meta.startup),
        ("/metrics", routes_meta.metrics),
        ("/v1/metrics", routes_meta.metrics),
    ):
        app.router.routes.append(Route(path, endpoint, methods=["GET"]))
    app.router.routes.append(Route("/{path:path}", elsewhere, methods=_METHODS))
    return app
