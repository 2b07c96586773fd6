"""A server of two stages of two ranks as users start it: a rank of the last stage is killed under a streaming client,
who sees a pause."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from test_end_to_end import MODEL, Server, greedy
from test_ranks_served import PROMPT, ranks_of, stream_with


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    sizes = ("--tp-size", "2", "--pp-size", "2")
    running = Server(tmp_path_factory.mktemp("stages") / "cache", "--backend", "cpu", *sizes)
    try:
        running.until("/v1/health/ready", 200)
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def test_a_rank_of_the_last_stage_killed_under_a_streaming_client_is_a_pause(server: Server) -> None:
    assert "-tp2-pp2" in server.log
    assert len(ranks_of(server)) == 3
    expected = greedy(server.client(), PROMPT, 200)
    engine = server.engine_pid()
    text, _ = stream_with(server, signal.SIGKILL, rank=3)
    assert text == expected
    assert server.engine_pid() != engine
    server.until_logged("rank 3 was killed by SIGKILL")
    server.until_logged("the engine is ready again")


def test_several_clients_and_log_probabilities_come_from_the_last_stage(server: Server) -> None:
    client = server.client()
    prompts = [f"{PROMPT} {i}" for i in range(4)]
    alone = [greedy(client, prompt, 12) for prompt in prompts]
    together = client.completions.create(
        model=MODEL,
        prompt=prompts,
        max_tokens=12,
        temperature=0,
        logprobs=3,
        echo=True,
        extra_body={"ignore_eos": True},
    )
    for prompt, text, choice in zip(prompts, alone, together.choices, strict=True):
        assert choice.text == prompt + text
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        assert all(value is not None and value <= 0 for value in choice.logprobs.token_logprobs[1:])


def test_ranks_end_with_the_server(server: Server) -> None:
    ranks = ranks_of(server)
    assert server.stop() == 0
    for rank in ranks:
        rank.wait(10)
    assert "Traceback" not in server.log.partition("SIGTERM")[2]
