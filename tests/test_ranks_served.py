"""A server of two ranks as users start it: a rank is killed under a streaming client, who sees a pause."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest
from test_end_to_end import MODEL, Server, greedy

PROMPT = "one two three"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("ranks") / "cache", "--backend", "cpu", "--tp-size", "2")
    try:
        running.until("/v1/health/ready", 200)
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def ranks_of(server: Server) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(server.engine_pid()).children()
        if "appliance.worker_process" in " ".join(child.cmdline())
    ]


def stream_with(server: Server, number: signal.Signals, tokens: int = 200, rank: int = 1) -> tuple[str, float]:
    """What a client gets that streams while a rank gets a signal, and its longest pause in seconds."""
    chunks = server.client().completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text, at, pause = "", time.monotonic(), 0.0
    for i, chunk in enumerate(chunks):
        now = time.monotonic()
        at, pause = now, max(pause, now - at)
        text += chunk.choices[0].text if chunk.choices else ""
        if i == 20:
            os.kill(ranks_of(server)[rank - 1].pid, number)
    return text, pause


def test_a_rank_killed_under_a_streaming_client_is_a_pause(server: Server) -> None:
    expected = greedy(server.client(), PROMPT, 200)
    engine = server.engine_pid()
    text, _ = stream_with(server, signal.SIGKILL)
    assert text == expected
    assert server.engine_pid() != engine
    server.until_logged("rank 1 was killed by SIGKILL")
    server.until_logged("the engine is ready again")
    assert "Traceback" not in server.log, "the reason is a line, not what followed from it"


def until_replaced(server: Server, engine: int) -> None:
    """Until another engine is ready; for a moment the server may not know that the old one is gone."""
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(IndexError):  # there is none
            if server.engine_pid() != engine and server.status("/v1/health/ready") == 200 and ranks_of(server):
                return
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_rank_that_is_lost_while_nothing_runs_is_replaced(server: Server) -> None:
    engine, (rank,) = server.engine_pid(), ranks_of(server)
    rank.kill()
    until_replaced(server, engine)


def test_ranks_die_with_their_engine_and_end_with_the_server(server: Server) -> None:
    (rank,) = ranks_of(server)
    engine = server.engine_pid()
    os.kill(engine, signal.SIGKILL)
    rank.wait(10)
    until_replaced(server, engine)
    (rank,) = ranks_of(server)
    assert server.stop() == 0
    rank.wait(10)
    assert "Traceback" not in server.log.partition("SIGTERM")[2]
