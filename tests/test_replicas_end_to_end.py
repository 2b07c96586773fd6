"""Two real engines behind one endpoint, as users start them: `serve --replicas 2` with the built-in model, on two GPUs
where there are so many, else on the CPU."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from conftest import GPU_COUNT
from test_end_to_end import MODEL, Server

ON_GPUS = GPU_COUNT >= 2
TOKENS = 400 if ON_GPUS else 160  # of a stream that something happens to meanwhile


def engine_pids(server: Server) -> dict[str, int]:
    """By the name of the process."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in children}
    return {words[4]: pid for pid, words in commands.items() if "appliance.engine_process" in words}


def replica_phases(server: Server) -> list[str]:
    replicas = server.json("/v1/health/live")["replicas"]
    assert isinstance(replicas, list)
    return [replica["phase"] for replica in replicas]


def until_all_serve(server: Server, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while replica_phases(server) != ["ready", "ready"]:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.05)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--profile", "bf16-cpu-tp1"] if GPU_COUNT == 1 else []
    running = Server(tmp_path_factory.mktemp("replicas") / "cache", "--replicas", "2", "--max-num-seqs", "8", *flags)
    try:
        running.until("/v1/health/ready", 200)
        until_all_serve(running)
        yield running
    finally:
        running.process.kill()
        running.process.wait()


class Stream(threading.Thread):
    """One greedy completion, read in a thread of its own."""

    def __init__(self, client: openai.OpenAI, prompt: str, tokens: int) -> None:
        super().__init__(daemon=True)
        self.times: list[float] = []
        self.text = ""
        self.failure: Exception | None = None
        self.num_tokens = 0
        self._client, self._prompt, self._tokens = client, prompt, tokens
        self.start()

    def run(self) -> None:
        try:
            for event in self._client.completions.create(
                model=MODEL,
                prompt=self._prompt,
                max_tokens=self._tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            ):
                self.num_tokens = event.usage.completion_tokens if event.usage else 0
                self.times.append(time.monotonic())
                self.text += event.choices[0].text if event.choices else ""
        except Exception as error:
            self.failure = error

    def after(self, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.times) < count and self.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def result(self) -> str:
        self.join(120)
        assert self.failure is None and not self.is_alive(), self.failure
        assert self.num_tokens == self._tokens
        # On GPUs tokens that are computed again, in a prompt, are rounded otherwise: near-ties fall otherwise.
        return self.text[:40] if ON_GPUS else self.text


def test_the_second_turn_of_every_conversation_finds_its_first(server: Server) -> None:
    """Eight conversations at once: each comes back to the replica that has its pages, and both have some."""
    client = server.client()
    history = {
        i: [{"role": "user", "content": f"Conversation {i}: " + "count the words of this text. " * 6}] for i in range(8)
    }
    cached: dict[int, list[int]] = {i: [] for i in history}

    def turn(i: int) -> None:
        answer = client.chat.completions.create(
            model=MODEL, messages=history[i], max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        cached[i].append(answer.usage.prompt_tokens_details.cached_tokens or 0)
        history[i] += [
            {"role": "assistant", "content": answer.choices[0].message.content or ""},
            {"role": "user", "content": "And once more, please."},
        ]

    for _ in range(3):
        threads = [threading.Thread(target=turn, args=(i,)) for i in history]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert all(len(counts) == 3 for counts in cached.values())
    first = max(counts[0] for counts in cached.values())
    assert all(counts[1] > first and counts[2] > counts[1] for counts in cached.values()), cached
    text = server.client()._client.get(f"{server.base}/metrics").text
    served = [line for line in text.splitlines() if line.startswith("replica_up{")]
    assert len(served) == 2 and all(line.endswith(" 1.0") for line in served)


def test_one_killed_in_mid_stream_all_streams_complete(server: Server) -> None:
    prompts = [f"{i}: the numbers are" for i in range(4)]
    alone = [Stream(server.client(), prompt, TOKENS).result() for prompt in prompts]
    before = engine_pids(server)
    assert before.keys() == {"engine-0", "engine-1"}
    streams = [Stream(server.client(), prompt, TOKENS) for prompt in prompts]
    streams[3].after(20)
    os.kill(before["engine-1"], signal.SIGKILL)
    assert [stream.result() for stream in streams] == alone
    assert server.status("/v1/health/ready") == 200
    until_all_serve(server)
    after = engine_pids(server)
    assert after["engine-0"] == before["engine-0"] and after["engine-1"] != before["engine-1"]
    assert "replica 1 is not ready (restarting): 1 of 2 serve" in server.log


def test_both_killed_streams_complete_and_a_drain_ends_it(server: Server) -> None:
    alone = Stream(server.client(), "again", TOKENS).result()
    streams = [Stream(server.client(), "again", TOKENS) for _ in range(3)]
    streams[2].after(10)
    for pid in engine_pids(server).values():
        os.kill(pid, signal.SIGKILL)
    assert [stream.result() for stream in streams] == [alone] * 3
    until_all_serve(server)
    last = Stream(server.client(), "again", TOKENS)
    last.after(5)
    assert server.stop() == 0
    assert last.result() == alone
    lines = [json.loads(line)["message"] for line in server.log.splitlines() if line.startswith("{")]
    assert not any("Traceback" in line for line in lines)
