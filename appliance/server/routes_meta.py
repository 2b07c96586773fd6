"""Everything that is not generation: health, models, metadata, metrics, tokenization, and the dashboard page."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from appliance.errors import InvalidRequestError, ModelNotFoundError, UnavailableError
from appliance.server.errors import parse, plain_response
from appliance.server.metrics import CONTENT_TYPE
from appliance.server.routes_chat import render_messages
from appliance.server.state import ServerState
from appliance.server.wire.requests import DetokenizeRequest, TokenizeRequest
from appliance.server.wire.unsupported import check_extra_fields

router = APIRouter()

API_VERSION = "1"
_STATIC = Path(__file__).parent / "static"


def _state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


# ---------------------------------------------------------------- health


@router.get("/v1/health/live", tags=["health"])
async def live(request: Request) -> Response:
    """200 while the process does its work, whatever the engine is doing; 503 once it has given up."""
    life = _state(request).lifecycle
    body = {"object": "health.response", "message": "live" if life.live else "failed", **life.as_dict()}
    return JSONResponse(body, 200 if life.live else 503)


@router.get("/v1/health/ready", tags=["health"])
@router.get("/health", tags=["health"])
async def ready(request: Request) -> Response:
    """200 when requests are answered, else 503 with phase, percent, eta_seconds and reason."""
    life = _state(request).lifecycle
    body = {"object": "health.response", "message": "ready" if life.is_ready else "not ready", **life.as_dict()}
    if life.is_ready:
        return JSONResponse(body)
    return JSONResponse(body, 503, {"Retry-After": str(life.retry_after)})


@router.get("/v1/health/startup", tags=["health"])
async def startup(request: Request) -> Response:
    """200 once the server was ready for the first time; a later engine restart does not undo it."""
    life = _state(request).lifecycle
    body = {"object": "health.response", "message": "started" if life.was_ready else "starting", **life.as_dict()}
    return JSONResponse(body, 200 if life.was_ready else 503)


# ---------------------------------------------------------------- models and metadata


def _model_card(state: ServerState, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.started_at,
        "owned_by": "appliance",
        "root": state.model_names[0],
        "parent": None,
        "max_model_len": state.engine.max_model_len if state.engine else None,
    }


@router.get("/v1/models", tags=["OpenAI"])
async def models(request: Request) -> dict[str, Any]:
    """The served names. `max_model_len` is null until the engine is loaded."""
    state = _state(request)
    return {"object": "list", "data": [_model_card(state, name) for name in state.model_names]}


@router.get("/v1/models/{name:path}", tags=["OpenAI"])
async def model(request: Request, name: str) -> dict[str, Any]:
    state = _state(request)
    if name not in state.model_names:
        raise ModelNotFoundError(f"the model {name!r} does not exist", param="model")
    return _model_card(state, name)


@router.get("/v1/metadata", tags=["metadata"])
async def metadata(request: Request) -> dict[str, Any]:
    """What is served and how it was selected."""
    state = _state(request)
    selected = state.selection.get("selected") or {}
    return {
        "version": state.version,
        "modelInfo": [{"shortName": name, "modelUrl": state.model_url} for name in state.model_names],
        "licenseInfo": _license_info(state),
        "assetInfo": [state.model_url] if state.model_url else [],
        "repository_override": "",
        "selectedModelProfileId": selected.get("name", ""),
        "selection": state.selection,
        "engineKey": state.engine.engine_key if state.engine else None,
    }


def _license_info(state: ServerState) -> dict[str, Any]:
    path = state.license_path
    if path is None or not path.is_file():
        return {}
    content = path.read_bytes()
    return {"name": path.name, "size": len(content), "sha": hashlib.sha256(content).hexdigest(), "type": "file"}


@router.get("/v1/version", tags=["metadata"])
@router.get("/version", tags=["metadata"])
async def version(request: Request) -> dict[str, str]:
    state = _state(request)
    return {"release": state.version, "api": API_VERSION, "version": state.version}


@router.get("/v1/manifest", tags=["metadata"])
async def manifest(request: Request) -> dict[str, Any]:
    """The engine's manifest (engine.json); 503 until there is an engine."""
    state = _state(request)
    if not state.manifest:
        raise UnavailableError("there is no engine yet", retry_after=state.lifecycle.retry_after)
    return state.manifest


@router.get("/v1/license", tags=["metadata"])
async def license_text(request: Request) -> Response:
    path = _state(request).license_path
    if path is None or not path.is_file():
        return plain_response(404, "no license file came with this model", "not_found")
    return FileResponse(path, media_type="text/plain; charset=utf-8")


@router.get("/metrics", tags=["metrics"])
@router.get("/v1/metrics", tags=["metrics"])
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    return Response(_state(request).metrics.render(), headers={"Content-Type": CONTENT_TYPE})


# ---------------------------------------------------------------- tokenization


def _body(name: str) -> dict[str, Any]:
    return {"requestBody": {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}}


@router.post("/tokenize", tags=["tokenization"], openapi_extra=_body("TokenizeRequest"))
async def tokenize(request: Request) -> Response:
    """Token ids of a prompt, or of messages after the chat template."""
    state = _state(request)
    body = parse(TokenizeRequest, await request.body())
    headers = check_extra_fields(body)
    state.resolve_model(body.model)
    tokenizer = state.require_tokenizer()
    if body.messages is not None:
        text = render_messages(
            tokenizer,
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=bool(body.continue_final_message),
            variables=body.chat_template_kwargs,
        )
        add_special = bool(body.add_special_tokens)
    else:
        text, add_special = body.prompt or "", body.add_special_tokens is not False
    tokens = await tokenizer.encode_async(text, add_special_tokens=add_special)
    strings = [tokenizer.token_name(token_id) for token_id in tokens] if body.return_token_strs else None
    max_model_len = state.engine.max_model_len if state.engine else None
    answer = {"count": len(tokens), "max_model_len": max_model_len, "tokens": tokens, "token_strs": strings}
    return JSONResponse(answer, headers=headers)


@router.post("/detokenize", tags=["tokenization"], openapi_extra=_body("DetokenizeRequest"))
async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens included."""
    state = _state(request)
    body = parse(DetokenizeRequest, await request.body())
    headers = check_extra_fields(body)
    state.resolve_model(body.model)
    tokenizer = state.require_tokenizer()
    bad = [token_id for token_id in body.tokens if not 0 <= token_id < tokenizer.vocab_size]
    if bad:
        raise InvalidRequestError(
            f"tokens has id {bad[0]}, allowed are 0 to {tokenizer.vocab_size - 1}", param="tokens"
        )
    return JSONResponse({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}, headers=headers)


# ---------------------------------------------------------------- pages: nothing in them comes from another host


@router.get("/", include_in_schema=False)
async def dashboard() -> Response:
    return FileResponse(_STATIC / "index.html", media_type="text/html")


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    """A list of the operations; FastAPI's own pages load their scripts from a public CDN."""
    return FileResponse(_STATIC / "docs.html", media_type="text/html")
