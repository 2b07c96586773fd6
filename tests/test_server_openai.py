"""The real OpenAI client against uvicorn on a loopback port, with a scripted engine behind the server."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import openai
import pytest
from server_fakes import FakeEngine, eventually, ready_state, served, server_tokenizer

HELLO: Any = [{"role": "user", "content": "hello"}]


def connect(url: str, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


async def test_chat() -> None:
    state, _engine = await ready_state("hello world 😀", api_keys=("secret",))
    async with served(state) as url, connect(url, "secret") as api:
        answer = await api.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, top_logprobs=1)
        assert answer.choices[0].message.content == "hello world 😀" and answer.choices[0].finish_reason == "stop"
        assert answer.usage and answer.usage.prompt_tokens_details
        assert answer.usage.prompt_tokens_details.cached_tokens == 4
        assert answer.choices[0].logprobs and answer.choices[0].logprobs.content
        stream = await api.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}, extra_body={"top_k": 3}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello world 😀"
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage and chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
        assert [m.id async for m in api.models.list()] == ["tiny", "alias"]
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await api.chat.completions.create(model="other", messages=HELLO)
        with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
            await api.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5000)
        assert caught.value.code == "context_length_exceeded"
    async with served(state) as url, connect(url, "wrong") as api:
        with pytest.raises(openai.AuthenticationError):
            await api.models.list()


async def test_completions() -> None:
    state, _engine = await ready_state(" world")
    async with served(state) as url, connect(url) as api:
        answer = await api.completions.create(model="tiny", prompt=["hello", "a"], echo=True, logprobs=1, n=2)
        assert [c.text for c in answer.choices] == ["hello world"] * 2 + ["a world"] * 2
        logprobs = answer.choices[0].logprobs
        assert logprobs and logprobs.text_offset and logprobs.token_logprobs and logprobs.text_offset[0] == 0
        stream = await api.completions.create(model="tiny", prompt="hello", stream=True, max_tokens=50)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == " world"


async def test_client_errors_in_a_stream() -> None:
    state, engine = await ready_state()
    engine.auto = False
    async with served(state) as url, connect(url) as api:
        task = asyncio.create_task(api.chat.completions.create(model="tiny", messages=HELLO, stream=True))
        await eventually(lambda: bool(engine.running))
        engine.step()
        stream = await task
        engine.error = "numbers went bad"
        engine.step()
        with pytest.raises(openai.APIError, match="numbers went bad"):
            async for _ in stream:
                pass


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_aborts_its_requests(stream: bool) -> None:
    state, engine = await ready_state()
    engine.auto = False
    body = {"model": "tiny", "messages": HELLO, "stream": stream, "n": 2}
    async with served(state) as url:
        async with httpx.AsyncClient() as http:
            task = asyncio.create_task(http.post(f"{url}/v1/chat/completions", json=body))
            await eventually(lambda: len(engine.running) == 2)
            engine.step()
            await asyncio.sleep(0.02)
            task.cancel()
        await eventually(lambda: engine.aborted != [])
    assert [sorted(ids) for ids in engine.aborted] == [sorted(r.request_id for r in engine.added[0])]
    assert state.journal.in_flight == 0 and state.metrics.finished == {"abort": 2}


async def test_engine_loss_is_only_a_pause_for_the_client() -> None:
    state, engine = await ready_state("hello world, this is 😀 a small text")
    engine.auto = False
    async with served(state) as url, connect(url) as api:
        task = asyncio.create_task(
            api.chat.completions.create(
                model="tiny", messages=HELLO, stream=True, stop="mall", stream_options={"include_usage": True}
            )
        )
        await eventually(lambda: bool(engine.running))
        engine.step()
        stream = await task
        for steps in (3, 7):
            for _ in range(steps):
                engine.step()
            engine.dead = True
            state.journal.on_engine_lost()
            state.lifecycle.enter("restarting", "the engine died")
            engine = FakeEngine(state, engine.script, auto=False)
            await state.journal.on_engine_ready(engine)
            state.lifecycle.enter("ready")
        engine.auto = True
        while engine.running:
            engine.step()
            await asyncio.sleep(0)
        chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "hello world, this is 😀 a s"
    assert chunks[-1].usage
    said = len(server_tokenizer().encode("hello world, this is 😀 a small"))
    assert chunks[-1].usage.completion_tokens == said


async def test_drain_lets_a_stream_finish() -> None:
    state, engine = await ready_state("hello world")
    engine.auto = False
    async with served(state) as url, connect(url) as api:
        task = asyncio.create_task(api.chat.completions.create(model="tiny", messages=HELLO))
        await eventually(lambda: bool(engine.running))
        drain = asyncio.create_task(state.journal.drain(5))
        await asyncio.sleep(0)
        with pytest.raises(openai.InternalServerError) as caught:
            await api.chat.completions.create(model="tiny", messages=HELLO)
        assert caught.value.status_code == 503 and caught.value.response.headers["Retry-After"] == "5"
        while engine.running:
            engine.step()
        assert (await task).choices[0].message.content == "hello world"
        assert await drain == 0


async def test_streaming_costs_little_per_token() -> None:
    """Everything from engine output to socket, tokens one by one: one core must carry many streams."""
    state, engine = await ready_state("hello world, this is a small text about numbers 12 34 " * 12)
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 400, "stream": True, "ignore_eos": True}
    async with served(state) as url, httpx.AsyncClient(timeout=60) as http:

        async def one() -> int:
            count = 0
            async with http.stream("POST", f"{url}/v1/completions", json=body) as response:
                async for data in response.aiter_bytes():
                    count += data.count(b"data: ")
            return count

        engine.auto = False
        tasks = [asyncio.create_task(one()) for _ in range(16)]
        await eventually(lambda: len(engine.running) == 16)
        started = time.process_time()
        while engine.running:
            engine.step()
            await asyncio.sleep(0)
        counts = await asyncio.gather(*tasks)
        seconds = time.process_time() - started
    tokens = 16 * len(engine.script(engine.added[0][0])[:400])
    assert all(count > 2 for count in counts)
    assert seconds / tokens < 300e-6, f"{seconds / tokens * 1e6:.0f} µs per token, client included"


async def test_curl_without_content_type() -> None:
    state, _engine = await ready_state("hello world")
    body = json.dumps({"model": "tiny", "messages": HELLO})
    async with served(state) as url:
        process = await asyncio.create_subprocess_exec(
            "curl", "-sS", f"{url}/v1/chat/completions", "-d", body, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
    assert json.loads(out)["choices"][0]["message"]["content"] == "hello world"
