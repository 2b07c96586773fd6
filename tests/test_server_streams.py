"""How events leave: the quick way writes what the slow way writes, nothing is lost or held up by a client that reads
slowly, and streams do not wait for one another."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_fakes import CHAT, TEXT, byte_level_tokenizer, chat, client, events, eventually, ready_state, served, text
from starlette.types import Message

from appliance.errors import RequestFailedError
from appliance.server.app import create_app
from appliance.server.detokenizer import json_text
from appliance.server.sse import DONE, EventStream, begin
from appliance.server.tokenizer import ServerTokenizer
from appliance.types import EngineOutput, EngineStats

TOKENIZER = ServerTokenizer(byte_level_tokenizer())


class Source:
    """An event source by hand."""

    def __init__(self) -> None:
        self.waiting: list[bytes | Exception] = []
        self.ended = False
        self.cancelled = 0
        self.taken = 0  # calls of `events` that gave something
        self._on_ready: Callable[[], None] = lambda: None

    def listen(self, on_ready: Callable[[], None]) -> None:
        self._on_ready = on_ready

    def events(self) -> bytes:
        waiting, self.waiting = self.waiting, []
        for item in waiting:
            if isinstance(item, Exception):
                raise item
        self.taken += bool(waiting)
        return b"".join(item for item in waiting if isinstance(item, bytes))

    def cancel(self) -> None:
        self.cancelled += 1
        self.ended = True
        self._on_ready()

    def give(self, *items: bytes | Exception, end: bool = False) -> None:
        self.waiting += items
        self.ended = self.ended or end
        self._on_ready()


class Connection:
    """An ASGI server's side. While `gate` is cleared, `send` waits as for a client that reads slowly."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.gone = asyncio.Event()

    async def send(self, message: Message) -> None:
        await self.gate.wait()
        self.messages.append(message)

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    @property
    def bodies(self) -> list[bytes]:
        return [m["body"] for m in self.messages if m["type"] == "http.response.body"]


def start(source: Source) -> tuple[Connection, asyncio.Task[None]]:
    connection = Connection()
    return connection, asyncio.create_task(EventStream(source)({"type": "http"}, connection.receive, connection.send))


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# ---------------------------------------------------------------- EventStream


async def test_events_are_sent_before_any_task_runs() -> None:
    source = Source()
    connection, task = start(source)
    await turns()
    source.give(b"first")
    await turns()
    assert connection.bodies == [b"first"]
    for item in (b"a", b"b", b"c"):
        source.give(item)
        assert connection.bodies[-1] == item
    source.give(b"last", end=True)
    assert connection.bodies[-1] == b"last"
    await task
    assert connection.bodies == [b"first", b"a", b"b", b"c", b"last", DONE]
    assert connection.messages[-1].get("more_body", False) is False
    assert source.cancelled == 1


async def test_a_slow_client_gets_all_in_order_and_in_one_piece() -> None:
    source = Source()
    connection, task = start(source)
    await turns()
    source.give(b"first")
    await turns()
    connection.gate.clear()
    source.give(b"0")
    for i in range(1, 6):
        source.give(b"%d" % i)
        await turns()
    assert connection.bodies == [b"first"]
    taken = source.taken
    connection.gate.set()
    await turns()
    assert connection.bodies == [b"first", b"0", b"12345"], "what came meanwhile goes out together"
    assert source.taken == taken + 1
    source.give(b"6")
    assert connection.bodies[-1] == b"6", "and then at once again"
    connection.gate.clear()
    source.give(b"7", end=True)
    await turns()
    connection.gate.set()
    await task
    assert connection.bodies[3:] == [b"6", b"7", DONE]


@pytest.mark.parametrize("blocked", [False, True])
async def test_a_client_that_leaves(blocked: bool) -> None:
    source = Source()
    connection, task = start(source)
    await turns()
    source.give(b"first")
    await turns()
    if blocked:
        connection.gate.clear()
        source.give(b"a")
        await turns()
        task.cancel()  # as uvicorn does when it shuts down
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        connection.gone.set()
        await task
    assert source.cancelled >= 1


@pytest.mark.parametrize("begun", [False, True])
async def test_errors(begun: bool) -> None:
    source = Source()
    connection, task = start(source)
    await turns()
    if begun:
        source.give(b"first")
        await turns()
    source.give(RequestFailedError("no luck"))
    await task
    head, body = connection.messages[0], b"".join(connection.bodies)
    assert head["status"] == (200 if begun else 500)
    if begun:
        assert body.startswith(b'firstdata: {"error":') and b"no luck" in body and body.endswith(DONE)
    else:
        assert "no luck" in json.loads(body)["error"]["message"]
    assert source.cancelled == 1


async def test_a_bug_in_a_source_ends_its_stream_only() -> None:
    source = Source()
    _, task = start(source)
    await turns()
    source.give(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        await task
    assert source.cancelled == 1


async def test_a_stream_without_events() -> None:
    source = Source()
    connection, task = start(source)
    await turns()
    source.give(end=True)
    await task
    assert b"".join(connection.bodies) == DONE


async def test_begin() -> None:
    gate = asyncio.Event()
    log: list[str] = []

    async def work(wait: bool) -> None:
        log.append("begun")
        if wait:
            await gate.wait()
            await asyncio.sleep(0.001)
        log.append("done")

    assert begin(work(False)) is None and log == ["begun", "done"]
    rest = begin(work(True))
    assert rest is not None and log[2:] == ["begun"]
    gate.set()
    await rest
    assert log[2:] == ["begun", "done"]

    async def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        begin(fail())


async def test_a_cancelled_rest_cleans_up() -> None:
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)

    rest = begin(work())
    assert rest is not None
    task = asyncio.ensure_future(_run(rest))
    await turns(2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned == [True]


async def _run(awaitable: Any) -> None:
    await awaitable


async def test_a_client_that_does_not_read_under_uvicorn() -> None:
    """Real sockets and their buffers: what a client does not read waits in the group as tokens, not as a growing pile
    of events, and all of it arrives once it reads."""
    name = "m" * 600  # for large events: the system's buffers hold several MB
    state, engine = await ready_state("x" * 15_000, max_model_len=16_384, model_names=(name,))
    engine.auto = False
    body = json.dumps(text(model=name, stream=True, max_tokens=15_000)).encode()
    loop = asyncio.get_running_loop()
    async with served(state) as url:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            connection.setblocking(False)
            await loop.sock_connect(connection, ("127.0.0.1", int(url.rsplit(":", 1)[1])))
            head = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (TEXT.encode(), len(body))
            await loop.sock_sendall(connection, head + body)
            await eventually(lambda: bool(engine.running))
            group = next(iter(state.journal._entries.values())).group
            while engine.running:
                engine.step()
                await asyncio.sleep(0)
            assert len(group.pending) > 1000, "the stream is held up"
            received = bytearray()
            while b"data: [DONE]" not in received[-100:]:
                received += await asyncio.wait_for(loop.sock_recv(connection, 1 << 20), 10)
    chunks = [json.loads(line[6:]) for line in received.splitlines() if line.startswith(b"data: {")]
    assert "".join(map(_text, chunks)) == TOKENIZER.decode(engine.script(engine.added[0][0])[:15_000])
    assert 1000 < len(chunks) < 14_000, "what had waited came in larger pieces"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


# ---------------------------------------------------------------- the quick way and the slow way


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 399), min_size=1, max_size=3), max_size=30), st.booleans())
def test_push_json_is_push(pieces: list[list[int]], skip: bool) -> None:
    for exact in (True, False):
        quick = TOKENIZER.text_stream((), skip_special_tokens=skip, exact=exact)
        slow = TOKENIZER.text_stream((), skip_special_tokens=skip, exact=exact)
        for ids in pieces:
            assert quick.push_json(ids) == json_text(slow.push(ids))
        assert quick.flush() == slow.flush()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 399), st.booleans()), max_size=30))
def test_push_and_push_json_may_be_mixed(pieces: list[tuple[int, bool]]) -> None:
    mixed, slow = TOKENIZER.text_stream(()), TOKENIZER.text_stream(())
    for token, as_json in pieces:
        expected = slow.push((token,))
        assert (mixed.push_json((token,)) == json_text(expected)) if as_json else (mixed.push((token,)) == expected)


@pytest.mark.parametrize(("path", "make"), [(CHAT, chat), (TEXT, text)])
async def test_quick_chunks_are_the_slow_ones(path: str, make: Callable[..., dict[str, Any]]) -> None:
    """`return_token_ids` takes the slow way for each token; without it, all but the first and the last are quick."""
    said = 'hello "world"\n\\ 12 😀 naïve <b>'
    state, _ = await ready_state(said)
    async with client(state) as http:
        for options in ({}, {"stream_options": {"include_usage": True}}):
            quick = events((await http.post(path, json=make(stream=True, max_tokens=200, **options))).text)
            body = make(stream=True, max_tokens=200, return_token_ids=True, **options)
            slow = events((await http.post(path, json=body)).text)
            for chunk in slow:
                chunk.pop("prompt_token_ids", None)
                for choice in chunk["choices"]:
                    choice.pop("token_ids", None)
                    choice.pop("prompt_token_ids", None)
            # The slow way tells tokens that complete no character, too.
            slow = [c for c in slow if not c["choices"] or c["choices"][0]["finish_reason"] or _text(c) or _role(c)]
            for chunk in (*quick, *slow):
                chunk.update(id="x", created=0)
            assert [list(chunk) for chunk in quick] == [list(chunk) for chunk in slow], "the order of fields, too"
            assert quick == slow
            assert "".join(map(_text, quick)) == said


def _text(chunk: dict[str, Any]) -> str:
    if not chunk["choices"]:
        return ""
    choice = chunk["choices"][0]
    return str(choice["text"] if "text" in choice else choice["delta"].get("content", ""))


def _role(chunk: dict[str, Any]) -> bool:
    return "role" in chunk["choices"][0].get("delta", {})


async def test_streams_of_one_step_go_out_together_and_messages_are_taken_in_first() -> None:
    state, engine = await ready_state()
    engine.auto = False
    sent: list[tuple[str, bytes]] = []
    app = create_app(state)
    ids: dict[str, str] = {}

    async def one(name: str) -> None:
        messages = [{"type": "http.request", "body": json.dumps(text(stream=True)).encode(), "more_body": False}]

        async def receive() -> Message:
            return messages.pop() if messages else await asyncio.get_running_loop().create_future()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                sent.append((name, message["body"]))

        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": TEXT, "raw_path": TEXT.encode()}
        rest = {"query_string": b"", "headers": [], "client": None, "server": None, "scheme": "http", "root_path": ""}
        await app({**scope, **rest}, receive, send)

    tasks = []
    for name in ("a", "b"):
        tasks.append(asyncio.create_task(one(name)))
        await eventually(lambda: len(engine.running) == len(tasks))
        ids[name] = list(engine.running)[-1]
    journal, token = state.journal, TOKENIZER.encode("h", add_special_tokens=False)[0]

    def step() -> None:
        journal.on_outputs([EngineOutput(ids[name], [token]) for name in ("a", "b")], EngineStats())

    step()
    await eventually(lambda: len(sent) == 2)
    sent.clear()
    step()
    assert not sent, "taken in first"
    await asyncio.sleep(0)
    assert [name for name, _ in sent] == ["a", "b"], "in the next turn, with no task between"
    sent.clear()
    step()
    step()
    step()
    await asyncio.sleep(0)
    assert [name for name, _ in sent] == ["a", "b"]
    assert [json.loads(body[6:])["choices"][0]["text"] for _, body in sent] == ["hhh", "hhh"]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await eventually(lambda: journal.in_flight == 0)
    journal.check_integrity()


# ---------------------------------------------------------------- answers that are given as a whole


@pytest.mark.parametrize("stop", [None, "never"])
async def test_whole_answers_do_not_wake_anybody_for_each_token(stop: str | None) -> None:
    """Unless a stop string has to be looked for, which ends the request early."""
    state, engine = await ready_state("a" * 200)
    engine.auto = False
    async with client(state) as http:
        task = asyncio.create_task(http.post(TEXT, json=text(max_tokens=100, stop=stop)))
        await eventually(lambda: bool(engine.running))
        entry = next(iter(state.journal._entries.values()))
        most = 0
        while engine.running:
            engine.step()
            await turns()
            most = max(most, len(entry.group.pending))
        answer = (await task).json()
    assert answer["usage"]["completion_tokens"] == 100
    assert answer["choices"][0]["text"] == TOKENIZER.decode(engine.script(engine.added[0][0])[:100])
    assert most == (31 if stop is None else 0)
