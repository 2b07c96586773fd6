"""The HTTP surface against a scripted engine: shapes, statuses, limits, metrics, health."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_fakes import client, eventually, ready_state, saying, server_tokenizer

from appliance.server.app import create_app
from appliance.server.lifecycle import PHASES
from appliance.server.state import ServerState

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO, **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hello", **fields}


def events(body: str) -> list[dict[str, Any]]:
    """The JSON of each event; checks the framing."""
    assert body.endswith("data: [DONE]\n\n")
    lines = body.split("\n\n")[:-2]
    assert all(line.startswith("data: {") for line in lines)
    return [json.loads(line[6:]) for line in lines]


# ---------------------------------------------------------------- answers


async def test_chat_answer() -> None:
    state, engine = await ready_state("hello world")
    async with client(state) as http:
        response = await http.post(CHAT, json=chat(max_tokens=50), headers={"X-Request-Id": "mine-1"})
    assert response.status_code == 200 and response.headers["X-Request-Id"] == "mine-1"
    answer = response.json()
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "tiny" and answer["system_fingerprint"] == "fp_0123456789ab"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello world", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = server_tokenizer().encode("<s><|user|>hello<|end|>\n<|assistant|>", add_special_tokens=False)
    (request,) = engine.added[0]
    assert request.prompt_token_ids == prompt
    said = len(server_tokenizer().encode("hello world")) + 1
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": said,
        "total_tokens": len(prompt) + said,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


async def test_chat_stream_chunks() -> None:
    state, _engine = await ready_state("hello 😀")
    async with client(state) as http:
        body = chat(stream=True, stream_options={"include_usage": True})
        response = await http.post(CHAT, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
    first, last = chunks[0]["choices"][0], chunks[-2]["choices"][0]
    assert first["delta"] == {"role": "assistant", "content": ""} and first["finish_reason"] is None
    assert last["finish_reason"] == "stop"
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "hello 😀"
    assert all(c["usage"] is None for c in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 2
    async with client(state) as http:
        plain = events((await http.post(CHAT, json=chat(stream=True))).text)
        each = events(
            (await http.post(CHAT, json=chat(stream=True, stream_options={"continuous_usage_stats": True}))).text
        )
    assert all("usage" not in c for c in plain)
    counts = [c["usage"]["completion_tokens"] for c in each]
    assert counts == sorted(counts) and counts[0] == 1


async def test_tokens_that_are_ready_together_share_a_chunk() -> None:
    state, engine = await ready_state("hello world 12 34")
    engine.per_step = 100
    async with client(state) as http:
        chunks = events((await http.post(CHAT, json=chat(stream=True))).text)
    assert [c["choices"][0]["delta"].get("content") for c in chunks] == ["", "hello world 12 34"]


async def test_chat_logprobs_join_to_the_text() -> None:
    state, _engine = await ready_state("hé 😀 lo")
    for stream in (False, True):
        async with client(state) as http:
            response = await http.post(CHAT, json=chat(stream=stream, logprobs=True, top_logprobs=2))
        if stream:
            choices = [c["choices"][0] for c in events(response.text)]
            content = [e for c in choices if c["logprobs"] for e in c["logprobs"]["content"]]
        else:
            content = response.json()["choices"][0]["logprobs"]["content"]
        assert bytes(b for entry in content for b in entry["bytes"]).decode() == "hé 😀 lo"
        assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] < 0 for entry in content)
        assert set(content[0]) == {"token", "logprob", "bytes", "top_logprobs"}


async def test_sampling_parameters_reach_the_engine() -> None:
    state, engine = await ready_state()
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2,
        "frequency_penalty": 0.3, "seed": 11, "logit_bias": {"5": -3}, "min_tokens": 2, "ignore_eos": True,
        "stop_token_ids": [9], "skip_special_tokens": False, "include_stop_str_in_output": True,
    }  # fmt: skip
    async with client(state) as http:
        response = await http.post(CHAT, json=chat(**fields, n=2, max_tokens=3, stop=["x"], priority=4))
    assert response.status_code == 200 and "X-Appliance-Ignored-Fields" not in response.headers
    first, second = engine.added[0]
    for name, value in fields.items():
        want = {5: -3.0} if name == "logit_bias" else (9,) if name == "stop_token_ids" else value
        assert getattr(first.params, name) == want, name
    assert (first.params.max_tokens, first.params.stop, first.priority) == (3, ("x",), 4)
    assert second.params.seed == 12  # each choice has its own random stream
    async with client(state) as http:
        await http.post(CHAT, json=chat(temperature=None, top_p=0))
    params = engine.added[1][0].params
    assert (params.temperature, params.top_k, params.top_p) == (1.0, 1, 1.0) and params.seed is not None
    assert params.max_tokens == 512 - len(engine.added[1][0].prompt_token_ids)


async def test_completions_with_many_prompts_and_choices() -> None:
    state, engine = await ready_state()
    tokenizer = server_tokenizer()
    engine.script = lambda request: request.prompt_token_ids  # says the prompt again
    async with client(state) as http:
        for prompt in (["hello", "world"], [tokenizer.encode("hello"), tokenizer.encode("world")]):
            answer = (await http.post(TEXT, json=text(prompt=prompt, n=2, max_tokens=50, return_token_ids=True))).json()
            assert [c["text"] for c in answer["choices"]] == ["hello", "hello", "world", "world"]
            assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
            assert answer["choices"][2]["prompt_token_ids"] == answer["choices"][2]["token_ids"]
            both = len(tokenizer.encode("hello")) + len(tokenizer.encode("world"))
            assert answer["usage"]["prompt_tokens"] == both and answer["usage"]["completion_tokens"] == 2 * both
        answer = (await http.post(TEXT, json=text(prompt=tokenizer.encode("hello")))).json()
        assert answer["choices"][0]["text"] == "hello" and answer["object"] == "text_completion"
        stream = events((await http.post(TEXT, json=text(prompt=["hello", "world"], stream=True))).text)
    for index, want in enumerate(["hello", "world"]):
        own = [c["choices"][0] for c in stream if c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in own) == want and own[-1]["finish_reason"] == "length"


async def test_echo_with_prompt_logprobs() -> None:
    state, engine = await ready_state(" world")
    tokenizer = server_tokenizer()
    ids = tokenizer.encode("hello 😀")
    for stream in (False, True):
        body = text(prompt=ids, echo=True, logprobs=2, max_tokens=50, stream=stream)
        async with client(state) as http:
            response = await http.post(TEXT, json=body)
        choices = [c["choices"][0] for c in events(response.text)] if stream else response.json()["choices"]
        whole = "".join(c["text"] for c in choices)
        assert whole == "hello 😀 world"
        joined = {k: [x for c in choices for x in c["logprobs"][k]] for k in choices[0]["logprobs"]}
        count = len(ids) + len(tokenizer.encode(" world"))
        assert {k: len(v) for k, v in joined.items()} == dict.fromkeys(joined, count)
        assert joined["token_logprobs"][0] is None and joined["top_logprobs"][0] is None
        assert joined["token_logprobs"][1] == -ids[1] / 1000
        for token, offset in zip(joined["tokens"], joined["text_offset"]):
            assert "\ufffd" in token or whole[offset:].startswith(token)
    async with client(state) as http:
        scored = (await http.post(TEXT, json=text(prompt=ids, echo=True, logprobs=0, max_tokens=0))).json()
        plain = (await http.post(TEXT, json=text(prompt="hello", echo=True))).json()
    assert scored["choices"][0]["text"] == "hello 😀" and scored["usage"]["completion_tokens"] == 0
    assert len(scored["choices"][0]["logprobs"]["tokens"]) == len(ids)
    assert engine.added[2][0].params.max_tokens == 1
    assert plain["choices"][0]["text"] == "hello world" and plain["choices"][0]["logprobs"] is None


async def test_stop_strings_end_the_engine_request() -> None:
    state, engine = await ready_state("hello world, this is")
    for stream in (False, True):
        async with client(state) as http:
            response = await http.post(TEXT, json=text(stop=["ld, t", "never"], max_tokens=50, stream=stream))
        choices = [c["choices"][0] for c in events(response.text)] if stream else response.json()["choices"]
        assert "".join(c["text"] for c in choices) == "hello wor"
        assert choices[-1]["finish_reason"] == "stop"
    await eventually(lambda: len(engine.aborted) == 2)
    assert engine.running == {} and state.journal.in_flight == 0


async def test_messages_with_parts_and_continuation() -> None:
    state, engine = await ready_state()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
    async with client(state) as http:
        await http.post(CHAT, json=chat(messages=messages))
        continued = [*HELLO, {"role": "assistant", "content": "he"}]
        await http.post(CHAT, json=chat(messages=continued, continue_final_message=True))
    prompts = [server_tokenizer().decode(b[0].prompt_token_ids, skip_special_tokens=False) for b in engine.added]
    assert prompts[0] == "<s><|system|>be<|end|>\n<|user|>a\nb<|end|>\n<|assistant|>"
    assert prompts[1].endswith("<|assistant|>he")


# ---------------------------------------------------------------- refusals


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
    assert len(engine.added) == 1


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


# ---------------------------------------------------------------- everything else


async def test_health_through_the_phases() -> None:
    state = ServerState(("tiny",))
    async with client(state) as http:
        for phase in PHASES:
            if phase in ("ready", "restarting", "draining", "failed"):
                continue
            state.lifecycle.enter(phase, "layers.3")  # type: ignore[arg-type]
            state.lifecycle.progress(percent=12.34, eta_seconds=7)
            assert (await http.get("/v1/health/live")).status_code == 200
            for path in ("/v1/health/ready", "/health", "/v1/health/startup"):
                response = await http.get(path)
                body = response.json()
                assert response.status_code == 503
                assert [body[k] for k in ("phase", "percent", "eta_seconds", "reason")] == [phase, 12.3, 7, "layers.3"]
        want = {"ready": (200, 200, 200), "restarting": (200, 503, 200), "failed": (503, 503, 200)}
        for phase, statuses in want.items():
            state.lifecycle.enter(phase)  # type: ignore[arg-type]
            got = [(await http.get(f"/v1/health/{x}")).status_code for x in ("live", "ready", "startup")]
            assert tuple(got) == statuses


async def test_models_metadata_and_the_rest(tmp_path: Path) -> None:
    license_path = tmp_path / "LICENSE"
    license_path.write_text("free")
    state, _engine = await ready_state(model_url="hf://org/tiny", license_path=license_path)
    state.selection = {"selected": {"name": "fp8-tp1"}}
    async with client(state) as http:
        models = (await http.get("/v1/models")).json()
        assert [m["id"] for m in models["data"]] == ["tiny", "alias"] and models["data"][0]["max_model_len"] == 512
        assert (await http.get("/v1/models/alias")).json()["id"] == "alias"
        assert (await http.get("/v1/models/x/y")).status_code == 404
        assert (await http.post(CHAT, json=chat(model="alias"))).json()["model"] == "alias"
        metadata = (await http.get("/v1/metadata")).json()
        assert metadata["selectedModelProfileId"] == "fp8-tp1" and metadata["version"] == "1.2.3"
        assert metadata["modelInfo"][0] == {"shortName": "tiny", "modelUrl": "hf://org/tiny"}
        assert metadata["licenseInfo"]["size"] == 4
        assert {"licenseInfo", "assetInfo", "repository_override"} <= set(metadata)
        assert (await http.get("/v1/version")).json()["release"] == "1.2.3"
        assert (await http.get("/v1/license")).text == "free"
        assert (await http.get("/v1/manifest")).status_code == 503
        state.manifest = {"schema": 1}
        assert (await http.get("/v1/manifest")).json() == {"schema": 1}
        schema = (await http.get("/openapi.json")).json()
        page = await http.get("/")
    assert "text/html" in page.headers["content-type"] and "v1/health/startup" in page.text
    reference = schema["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert "top_k" in schema["components"]["schemas"][reference.rsplit("/", 1)[1]]["properties"]
    assert schema["components"]["schemas"]["Message"]


async def test_tokenize_and_detokenize() -> None:
    state, _engine = await ready_state()
    tokenizer = server_tokenizer()
    long = "hello world " * 1000  # long enough for the thread
    async with client(state) as http:
        answer = (await http.post("/tokenize", json={"prompt": long, "return_token_strs": True})).json()
        assert answer["tokens"] == tokenizer.encode(long) and answer["count"] == len(answer["tokens"])
        assert answer["token_strs"][0] == tokenizer.token_name(answer["tokens"][0]) and answer["max_model_len"] == 512
        chatted = (await http.post("/tokenize", json={"messages": HELLO})).json()
        back = (await http.post("/detokenize", json={"tokens": chatted["tokens"]})).json()
    assert back == {"prompt": "<s><|user|>hello<|end|>\n<|assistant|>"}


def samples(text: str) -> dict[tuple[str, str], float]:
    """Metric values by name and the values of its other labels, by label name."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            extra = [v for k, v in sorted(sample.labels.items()) if k not in ("model_name", "le")]
            if "le" not in sample.labels:
                found[sample.name, ",".join(extra)] = sample.value
    return found


async def test_metrics_are_true() -> None:
    state, engine = await ready_state("hello world")
    said = len(server_tokenizer().encode("hello world")) + 1
    async with client(state) as http:
        for _ in range(2):
            await http.post(CHAT, json=chat(stream=True))
        await http.post(TEXT, json=text(max_tokens=2))
        engine.auto = False
        waiting = asyncio.create_task(http.post(TEXT, json=text(n=3, max_tokens=1)))
        await eventually(lambda: len(engine.running) == 3)
        before = samples((await http.get("/metrics")).text)
        engine.step()
        await waiting
        after = samples((await http.get("/v1/metrics")).text)
    prompt = len(engine.added[0][0].prompt_token_ids)
    short = len(engine.added[2][0].prompt_token_ids)
    generated, prompts = 2 * said + 2 + 3, 2 * prompt + short + 3 * short
    for prefix in ("vllm:", ""):
        assert before[f"{prefix}num_requests_waiting", ""] == 3 and before[f"{prefix}num_requests_running", ""] == 0
        assert after[f"{prefix}num_requests_waiting", ""] == after[f"{prefix}num_requests_running", ""] == 0
        assert after[f"{prefix}generation_tokens_total", ""] == generated
        assert after[f"{prefix}prompt_tokens_total", ""] == prompts
        assert after[f"{prefix}time_to_first_token_seconds_count", ""] == 6
        assert after[f"{prefix}e2e_request_latency_seconds_count", ""] == 6
        assert after[f"{prefix}time_per_output_token_seconds_count", ""] == generated - 6
        assert after[f"{prefix}request_generation_tokens_sum", ""] == generated
        assert after[f"{prefix}request_prompt_tokens_sum", ""] == prompts
    assert after["vllm:inter_token_latency_seconds_count", ""] == generated - 6
    assert after["vllm:request_success_total", "stop"] == 2 and after["vllm:request_success_total", "length"] == 4
    assert after["request_finish_total", "length"] == 4 and after["num_request_max", ""] == 8 + 4096
    assert after["vllm:kv_cache_usage_perc", ""] == after["gpu_cache_usage_perc", ""] == 0


async def test_metrics_of_start_and_engine() -> None:
    state, engine = await ready_state()
    state.metrics.profile = {"profile": "fp8-tp1", "precision": "fp8"}
    state.metrics.engine_cache_hit = True
    engine.auto = False
    async with client(state) as http:
        task = asyncio.create_task(http.post(TEXT, json=text(max_tokens=2)))
        await eventually(lambda: bool(engine.running))
        engine.step()
        found = samples((await http.get("/metrics")).text)
        assert found["vllm:num_requests_running", ""] == 1 and found["vllm:num_requests_waiting", ""] == 0
        assert found["gpu_cache_usage_perc", ""] == found["vllm:kv_cache_usage_perc", ""] == 0.01
        task.cancel()
    assert found["startup_phase_seconds", "starting"] >= 0 and found["engine_cache_hit", ""] == 1
    assert found["profile_info", "fp8,fp8-tp1"] == 1
    assert found["vllm:cache_config_info", "16,bf16,100"] == 1


def test_counters_survive_an_engine() -> None:
    from appliance.types import EngineStats

    metrics = ServerState(("tiny",)).metrics
    metrics.engine_stats(EngineStats(num_preemptions=2, prefix_cache_queries=10, prefix_cache_hits=4))
    metrics.engine_lost()
    metrics.engine_stats(EngineStats(num_preemptions=1, prefix_cache_queries=5, prefix_cache_hits=5))
    assert metrics.num_preemptions == 3 and metrics.prefix_cache == (15, 9)


def test_histogram_buckets() -> None:
    from appliance.server.metrics import Distribution

    distribution = Distribution((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        distribution.observe(value)
    distribution.observe(2.0, count=3)
    assert distribution.buckets() == [("1.0", 2.0), ("2.0", 6.0), ("+Inf", 7.0)] and distribution.total == 18.0


def test_importing_the_server_stays_light() -> None:
    """No torch, and with all modules loaded well under the two seconds in which /v1/health/live must answer."""
    code = (
        "import sys, time; t = time.perf_counter()\n"
        "from appliance.server.app import create_app\nfrom appliance.server.state import ServerState\n"
        "import appliance.server.tokenizer\ncreate_app(ServerState(('m',)))\n"
        "print(sorted({'torch', 'triton', 'transformers'} & set(sys.modules)), time.perf_counter() - t)"
    )
    best = 9.0
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        heavy, seconds = done.stdout.rsplit(" ", 1)
        assert heavy == "[]"
        best = min(best, float(seconds))
    assert best < 1.7, best


def test_create_app_needs_nothing() -> None:
    assert create_app(ServerState(("m",))).state.server.model_names == ("m",)


def test_scripts_end_with_the_end_token() -> None:
    assert saying(server_tokenizer(), "a")(None)[-1] == 1  # type: ignore[arg-type]
