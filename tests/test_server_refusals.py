"""What the server refuses, with which status, and that every error has OpenAI's shape."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from server_fakes import (
    CHAT,
    TEXT,
    chat,
    client,
    events,
    eventually,
    ready_state,
    text,
)

from appliance.server.state import ServerState
from appliance.server.tokenizer import ServerTokenizer
from appliance.types import EngineOutput, EngineStats


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (CHAT, {"model": "tiny"}, "messages", "required"),
        (CHAT, chat(messages=[]), "messages", "at least 1"),
        (CHAT, chat(messages=[{"role": "robot", "content": "x"}]), "messages.0.role", "robot"),
        (CHAT, chat(messages=[{"role": "user"}]), "messages.0", "needs content"),
        (
            CHAT,
            chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "messages.0.content",
            "image_url",
        ),
        (CHAT, chat(temperature=-1), "temperature", "greater than or equal to 0"),
        (CHAT, chat(top_logprobs=3), None, "logprobs is true"),
        (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs", "20"),
        (CHAT, chat(n=0), "n", "greater than or equal to 1"),
        (CHAT, chat(stop=["x"] * 17), "stop", "at most 16"),
        (CHAT, chat(stop=""), "stop", "1 to"),
        (CHAT, chat(logit_bias={"99999": 1}), "logit_bias", "99999"),
        (CHAT, chat(max_tokens=0), "max_tokens", "greater"),
        (CHAT, chat(min_tokens=9, max_tokens=3), "min_tokens", "more than"),
        (CHAT, chat(stream_options={"include_usage": True}), None, "stream is true"),
        (CHAT, chat(tools=[{"type": "function"}]), "tools", "not supported yet"),
        (CHAT, chat(response_format={"type": "json_object"}), "response_format", "not supported yet"),
        (CHAT, chat(modalities=["text", "audio"]), "modalities", "['text'] is allowed"),
        (TEXT, text(suffix="x"), "suffix", "not supported"),
        (TEXT, text(best_of=3), None, "value of n"),
        (TEXT, text(max_tokens=0), None, "echo"),
        (TEXT, text(prompt=[]), "prompt", "list of token ids"),
        (TEXT, text(prompt=[1, "a"]), "prompt", "list of token ids"),
        (TEXT, text(prompt=[1, 99999]), "prompt", "99999"),
        (TEXT, text(prompt=""), "prompt", "no tokens"),
        (TEXT, text(priority=2**64), "priority", "less than"),
        ("/tokenize", {}, None, "either prompt or messages"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "-1"),
    ],
)
async def test_bad_requests_name_the_field(path: str, body: Any, param: str | None, message: str) -> None:
    state, engine = await ready_state()
    async with client(state) as http:
        response = await http.post(path, json=body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param and message in error["message"]
    assert engine.added == [] and sum(state.metrics.rejected.values()) == 1


async def test_context_length_is_refused_at_once() -> None:
    state, engine = await ready_state(max_model_len=32)
    cases = [
        (CHAT, chat(messages=[{"role": "user", "content": "12 " * 100}]), "messages"),
        (CHAT, chat(max_tokens=31), "messages"),
        (TEXT, text(prompt=[5] * 32), "prompt"),
    ]
    async with client(state) as http:
        for path, body, param in cases:
            response = await http.post(path, json=body)
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
            assert "maximum context length is 32 tokens" in error["message"]
        assert (await http.post(TEXT, json=text(prompt=[5] * 30, max_tokens=2))).status_code == 200
        whole = text(prompt=[5] * 32, max_tokens=0, echo=True, logprobs=0)  # only scored: no position need be free
        assert (await http.post(TEXT, json=whole)).status_code == 200
        longer = (await http.post(TEXT, json=text(prompt=[5] * 33, max_tokens=0, echo=True))).json()["error"]
        assert longer["code"] == "context_length_exceeded" and "left to generate" not in longer["message"]
        assert [each.params.max_tokens for (each,) in engine.added] == [2, 0]


async def test_a_text_that_is_far_too_long_is_refused_after_a_look_at_its_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokenizing it whole would take seconds."""
    looked_at: list[int] = []
    encode = ServerTokenizer.encode_async

    async def counting(self: ServerTokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
        looked_at.append(len(text))
        return await encode(self, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(ServerTokenizer, "encode_async", counting)
    state, engine = await ready_state(max_model_len=32)
    async with client(state) as http:
        response = await http.post(TEXT, json=text(prompt="hello 12 34 " * 500_000))
        error = response.json()["error"]
        assert error["code"] == "context_length_exceeded" and "of 6000000 characters" in error["message"]
        assert len(looked_at) == 1 and looked_at[0] < 1000
        whole = (await http.post(TEXT, json=text(prompt="hello world" * 40))).json()["error"]
        assert "the prompt has" in whole["message"]
    assert engine.added == []


async def test_cached_tokens_are_those_of_the_first_output() -> None:
    state, engine = await ready_state()
    engine.auto = False
    async with client(state) as http:
        task = asyncio.create_task(http.post(TEXT, json=text(prompt=[5, 6, 7], max_tokens=2)))
        await eventually(lambda: bool(engine.running))
        (request_id,) = engine.running
        state.journal.on_outputs([EngineOutput(request_id, [8], num_cached_tokens=2)], EngineStats())
        last = EngineOutput(request_id, [9], finish_reason="length", num_cached_tokens=4)  # after a preemption
        state.journal.on_outputs([last], EngineStats())
        usage = (await task).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_http_errors_have_the_same_shape() -> None:
    state, _engine = await ready_state(max_body_bytes=2000)

    async def chunks() -> Any:
        for _ in range(5):
            yield b" " * 1000

    async with client(state) as http:
        responses = {
            "not_found": await http.get("/v1/nothing"),
            "method_not_allowed": await http.get(CHAT),
            "invalid_json": await http.post(CHAT, content=b"{"),
            "model_not_found": await http.post(CHAT, json=chat(model="other")),
            "request_too_large": await http.post(CHAT, json=chat(user="x" * 3000)),
        }
        unannounced = await http.post(CHAT, content=chunks())
    statuses = {code: r.status_code for code, r in responses.items()}
    assert list(statuses.values()) == [404, 405, 400, 404, 413]
    for code, response in responses.items():
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["code"] == code and error["message"]
        assert response.headers["X-Request-Id"]
    assert "POST" in responses["method_not_allowed"].json()["error"]["message"]
    assert "tiny, alias" in responses["model_not_found"].json()["error"]["message"]
    assert unannounced.status_code == 413 and "2000 bytes" in unannounced.json()["error"]["message"]


async def test_unknown_fields_are_named_and_harmless_ones_are_not() -> None:
    state, _engine = await ready_state()
    async with client(state) as http:
        odd = await http.post(
            CHAT, json=chat(max_token=3, **{"we\nird": 1}, tools=[], response_format={"type": "text"})
        )
        fine = await http.post(CHAT, json=chat(store=True, tool_choice="none", tools=[{"type": "function"}]))
    assert odd.status_code == fine.status_code == 200
    assert odd.headers["X-Appliance-Ignored-Fields"] == "max_token (did you mean max_tokens?), we?ird"
    assert "X-Appliance-Ignored-Fields" not in fine.headers


async def test_api_keys() -> None:
    state, _engine = await ready_state(api_keys=("one", "two"))
    async with client(state) as http:
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer no"}, 401),
            ({"Authorization": "Bearer two"}, 200),
        ):
            response = await http.post(CHAT, json=chat(), headers=headers)
            assert response.status_code == status
        refused = await http.get("/v1/models")
        assert refused.json()["error"]["code"] == "invalid_api_key" and refused.status_code == 401
        for path in ("/health", "/v1/health/live", "/metrics", "/"):
            assert (await http.get(path)).status_code == 200


async def test_not_ready_draining_and_overloaded() -> None:
    cold = ServerState(("tiny",))
    cold.lifecycle.enter("building")
    cold.lifecycle.progress(percent=50, eta_seconds=12)
    async with client(cold) as http:
        response = await http.post(CHAT, json=chat())
    assert response.status_code == 503 and response.headers["Retry-After"] == "12"
    assert response.json()["error"]["code"] == "unavailable"

    state, engine = await ready_state(max_waiting_requests=0, max_num_seqs=1)
    engine.auto = False
    async with client(state) as http:
        first = asyncio.create_task(http.post(TEXT, json=text(max_tokens=1)))
        await eventually(lambda: bool(engine.running))
        full = await http.post(CHAT, json=chat())
        assert full.status_code == 429 and full.json()["error"]["type"] == "rate_limit_error"
        assert (await http.post(CHAT, json=chat(n=2))).status_code == 400  # never fits
        engine.step()
        assert (await first).status_code == 200
        await state.journal.drain(0)
        gone = await http.post(CHAT, json=chat())
    assert gone.status_code == 503 and "shutting down" in gone.json()["error"]["message"]
    assert state.metrics.rejected == {"overloaded": 1, "invalid_request": 1, "unavailable": 1}


async def test_engine_errors_before_and_within_a_stream() -> None:
    state, engine = await ready_state()
    engine.error = "numbers went bad"
    async with client(state) as http:
        for stream in (False, True):
            response = await http.post(CHAT, json=chat(stream=stream))
            assert response.status_code == 500 and response.json()["error"]["message"] == "numbers went bad"
        engine.error, engine.auto = None, False
        task = asyncio.create_task(http.post(CHAT, json=chat(stream=True)))
        await eventually(lambda: bool(engine.running))
        engine.step()
        await asyncio.sleep(0.02)
        engine.error = "numbers went bad"
        engine.step()
        response = await task
    assert response.status_code == 200
    assert events(response.text)[-1]["error"]["type"] == "server_error"


async def test_unexpected_exceptions_are_json_too() -> None:
    state, _engine = await ready_state()
    state.tokenizer = object()  # type: ignore[assignment]
    async with client(state) as http:
        response = await http.post(CHAT, json=chat())
    assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
