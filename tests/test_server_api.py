"""Generation over HTTP against a scripted engine: shapes, parameters, streaming, echo, stop strings."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest
from server_fakes import (
    CHAT,
    HELLO,
    TEXT,
    chat,
    client,
    events,
    eventually,
    ready_state,
    served,
    server_tokenizer,
    text,
)

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


async def test_a_top_k_beyond_the_vocabulary_is_off_whatever_its_size() -> None:
    state, engine = await ready_state("hello")
    assert state.tokenizer is not None
    async with asyncio.timeout(5), client(state) as http:
        response = await http.post(TEXT, json=text(top_k=10**20, temperature=1))
    assert response.status_code == 200, response.text
    assert engine.added[0][0].params.top_k == state.tokenizer.vocab_size


async def test_a_client_that_leaves_in_mid_request_is_no_error_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    state, _ = await ready_state("hello")
    async with served(state) as url:
        logging.getLogger("uvicorn.error").addHandler(caplog.handler)  # its records do not reach the root logger
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
        await writer.drain()
        await asyncio.sleep(0.1)  # the route waits for the rest
        writer.close()
        await asyncio.sleep(0.2)
    logging.getLogger("uvicorn.error").removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelname == "ERROR"], caplog.text


async def test_head_is_answered_as_get_without_a_body() -> None:
    state, _ = await ready_state("hello")
    async with served(state) as url, httpx.AsyncClient(base_url=url) as http:
        for path in ("/v1/health/live", "/v1/health/ready", "/v1/models", "/metrics", "/"):
            response = await http.head(path)
            assert response.status_code == 200 and response.content == b"", path
        assert (await http.get("/v1/health/ready")).json()["phase"] == "ready"  # the connection is still in step
        refused = await http.head(TEXT)
        assert refused.status_code == 405 and refused.headers["allow"] == "POST"


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
    assert engine.added[2][0].params.max_tokens == 0
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
