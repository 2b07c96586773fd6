"""Drain: readiness drops, newcomers get 503 with Retry-After, what runs finishes, the rest ends with a proper event."""

from __future__ import annotations

import asyncio
import json

import httpx
from server_fakes import CHAT, chat, eventually, ready_state, served


async def test_drain_with_open_streams() -> None:
    state, engine = await ready_state("one two three four")
    engine.auto = False
    async with served(state) as base, httpx.AsyncClient(base_url=base, timeout=30) as http:

        async def stream(**fields: object) -> list[str]:
            async with http.stream("POST", CHAT, json=chat(stream=True, **fields)) as answer:
                assert answer.status_code == 200
                return [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]

        short = asyncio.create_task(stream(max_tokens=2))
        long = asyncio.create_task(stream(ignore_eos=True))
        whole = asyncio.create_task(http.post(CHAT, json=chat()))
        await eventually(lambda: len(engine.running) == 3)
        engine.step()
        draining = asyncio.create_task(state.journal.drain(1.0))
        await eventually(lambda: state.lifecycle.draining)

        ready = await http.get("/v1/health/ready")
        assert ready.status_code == 503 and ready.json()["phase"] == "draining" and ready.headers["Retry-After"]
        assert (await http.get("/v1/health/live")).status_code == 200, "a restart would not help"
        refused = await http.post(CHAT, json=chat())
        assert refused.status_code == 503 and int(refused.headers["Retry-After"]) > 0
        assert "shutting down" in refused.json()["error"]["message"]

        engine.step()
        lines = await short
        assert json.loads(lines[-2])["choices"][0]["finish_reason"] == "length" and lines[-1] == "[DONE]"
        assert not draining.done(), "two are left"
        assert await draining == 2
        lines = await long
        error = json.loads(lines[-2])["error"]
        assert "shut down before this request was finished" in error["message"] and lines[-1] == "[DONE]"
        answer = await whole
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "unavailable"
        assert {request for group in engine.aborted for request in group} and state.journal.in_flight == 0
        state.journal.check_integrity()


async def test_an_idle_server_drains_at_once() -> None:
    state, _engine = await ready_state()
    assert await asyncio.wait_for(state.journal.drain(60.0), 1.0) == 0
