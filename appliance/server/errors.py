"""From exceptions to HTTP: every error leaves in OpenAI's shape, whatever raised it.

Knows statuses and headers; which error means which status is the table in `appliance.errors`.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from appliance.errors import ApplianceError, InvalidRequestError, RequestError, UnavailableError, http_status
from appliance.server.wire.responses import ErrorBody, ErrorResponse, encode

Model = TypeVar("Model", bound=BaseModel)


def error_body(error: ApplianceError) -> bytes:
    """`{"error": {...}}` as JSON."""
    _, kind = http_status(error)
    param = error.param if isinstance(error, RequestError) else None
    code = error.code if isinstance(error, RequestError) else None
    return encode(ErrorResponse(ErrorBody(str(error), kind, param, code)))


def error_response(error: ApplianceError) -> Response:
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, UnavailableError) else {}
    status, _ = http_status(error)
    if status == 429:
        headers["Retry-After"] = "1"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(error_body(error), status, headers, media_type="application/json")


def plain_response(status: int, message: str, code: str | None, headers: dict[str, str] | None = None) -> Response:
    """For errors of the HTTP layer itself, which the exception tree does not have (404 route, 405, 413)."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = encode(ErrorResponse(ErrorBody(message, kind, None, code)))
    return Response(body, status, headers, media_type="application/json")


async def on_appliance_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApplianceError)
    return error_response(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, headers = request.url.path, dict(error.headers or {})
    if error.status_code == 404:
        return plain_response(404, f"there is no route {path}; GET /openapi.json lists them", "not_found", headers)
    if error.status_code == 405:
        allowed = headers.get("Allow") or headers.get("allow")
        hint = f", allowed: {allowed}" if allowed else ""
        return plain_response(405, f"{path} does not take {request.method}{hint}", "method_not_allowed", headers)
    return plain_response(error.status_code, str(error.detail), None, headers)


async def on_disconnect(request: Request, error: Exception) -> Response:
    """The client left before its request was whole: nobody reads this, and it is no failure of the server."""
    return plain_response(400, "the request ended before its body was complete", "incomplete_request")


async def on_unexpected_error(request: Request, error: Exception) -> Response:
    # Starlette raises it again after this response, so that the server logs the traceback.
    message = f"internal error: {type(error).__name__}; the server's log has more"
    request_id = request.scope.get("state", {}).get("request_id", "")  # the gate, which sends it, is inside of this
    return plain_response(500, message, "internal_error", {"X-Request-Id": request_id} if request_id else None)


def parse(model: type[Model], body: bytes) -> Model:
    """Validate a request body. Raises InvalidRequestError that names the field and what is allowed."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error) from None


def _invalid(error: ValidationError) -> InvalidRequestError:
    # For a union each branch reports; the deepest location is the branch that fitted best.
    details = error.errors(include_url=False, include_context=False)
    detail = max(details, key=lambda item: len(item["loc"]))
    if detail["type"] == "json_invalid":
        return InvalidRequestError(f"the body is not valid JSON: {detail['msg']}", code="invalid_json")
    names = [str(part) for part in detail["loc"] if isinstance(part, int) or str(part).isidentifier()]
    param = ".".join(names) or None
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "missing":
        return InvalidRequestError(f"{param} is required", param=param, code="missing_required_parameter")
    if isinstance(detail["input"], str | int | float) and detail["type"] != "value_error":
        message = f"{message}, got {str(detail['input'])[:80]!r}"
    return InvalidRequestError(f"{param}: {message}" if param else message, param=param)
