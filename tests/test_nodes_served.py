"""Several nodes as users start them, all on this machine's loopback: one process a node, a stage of the model on each.
Nodes are lost under a streaming client, who sees a pause."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from test_end_to_end import MODEL, ROOT, Server, greedy

PROMPT = "one two three"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def node(cache: Path, rank: int, port: int, *flags: str, backend: str = "cpu") -> Server:
    where = ("--nnodes", "2", "--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", str(port))
    return Server(cache, "--backend", backend, *where, *flags)


def ranks_below(pid: int) -> list[psutil.Process]:
    """The processes of a node's ranks, but for rank 0."""
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if "appliance.worker_process" in " ".join(child.cmdline())]


class Group:
    """Node 0 and node 1."""

    def __init__(self, directory: Path, *flags: str) -> None:
        self.port = free_port()
        self.flags = flags
        self.cache = directory / "cache"
        self.nodes = [self.start(rank) for rank in range(2)]

    def start(self, rank: int) -> Server:
        return node(self.cache, rank, self.port, *self.flags)

    @property
    def leader(self) -> Server:
        return self.nodes[0]

    def until_ready(self) -> None:
        for each in self.nodes:
            each.until("/v1/health/ready", 200)

    def replace(self, rank: int) -> None:
        """A node that was lost comes again, as Kubernetes brings it."""
        self.nodes[rank] = self.start(rank)

    def ranks_of(self, rank: int) -> list[psutil.Process]:
        return ranks_below(self.nodes[rank].process.pid)

    def kill(self) -> None:
        for each in self.nodes:
            each.process.kill()
            each.process.wait()


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    running = Group(tmp_path_factory.mktemp("nodes"), "--drain-seconds", "2")
    try:
        running.until_ready()
        yield running
    finally:
        running.kill()


def stream(group: Group, at_token: int = 20, tokens: int = 160, *, lose: list[psutil.Process]) -> str:
    """What a client gets from node 0 that streams while processes are killed."""
    chunks = group.leader.client().completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text = ""
    for i, chunk in enumerate(chunks):
        text += chunk.choices[0].text if chunk.choices else ""
        if i == at_token:
            for process in lose:
                process.kill()
            if any(process.pid == group.nodes[1].process.pid for process in lose):
                group.nodes[1].process.wait()
                group.replace(1)
    return text


def test_two_nodes_share_the_model_and_node_0_has_the_api(group: Group) -> None:
    assert group.leader.log.count("profile bf16-cpu-tp1-pp2") == 1
    group.nodes[1].until_logged("ready: node 0 serves, with the ranks of this node")
    with urllib.request.urlopen(f"{group.leader.base}/metrics") as answer:
        (profile,) = (line for line in answer.read().decode().splitlines() if line.startswith("profile_info{"))
    assert 'pp_size="2"' in profile and 'tp_size="1"' in profile
    assert len(group.ranks_of(1)) == 1 and not group.ranks_of(0)[1:]
    assert greedy(group.leader.client(), PROMPT) == greedy(group.leader.client(), PROMPT) != ""
    request = urllib.request.Request(f"{group.nodes[1].base}/v1/chat/completions", data=b"{}")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 421
    message = json.loads(refused.value.read())["error"]["message"]
    assert message == "this is node 1, which holds part of the model; the API is on node 0, 127.0.0.1"


def test_a_rank_lost_on_the_other_node_is_a_pause(group: Group) -> None:
    expected = greedy(group.leader.client(), PROMPT, 160)
    assert stream(group, lose=group.ranks_of(1)) == expected
    group.leader.until_logged("rank 1 on node 1 (127.0.0.1) was killed by SIGKILL")
    group.until_ready()


def test_a_node_lost_and_restarted_is_a_pause(group: Group) -> None:
    expected = greedy(group.leader.client(), PROMPT, 160)
    ranks = group.ranks_of(1)
    began = time.monotonic()
    assert stream(group, lose=[psutil.Process(group.nodes[1].process.pid)]) == expected
    assert time.monotonic() - began < 60
    psutil.wait_procs(ranks, 10)
    assert not any(rank.is_running() for rank in ranks)
    group.leader.until_logged("rank 1 on node 1 (127.0.0.1): node 1 is lost: its connection was closed")
    group.leader.until_logged("node 1 (127.0.0.1) is gone")
    group.until_ready()


def test_a_node_that_is_told_to_end_and_comes_again_is_a_pause_and_no_failure(group: Group) -> None:
    restarts = group.leader.log.count(" in 10 minutes")
    group.nodes[1].process.terminate()
    assert group.nodes[1].process.wait(30) == 0
    group.leader.until_logged("is gone: it was told to end")
    group.leader.until_logged("the engine is started anew: node 1 has left: it was told to end")
    group.replace(1)
    deadline = time.monotonic() + 60
    while group.leader.log.count("the engine is ready again") < 3:
        assert time.monotonic() < deadline, group.leader.log
        time.sleep(0.1)
    assert greedy(group.leader.client(), PROMPT) != ""
    assert group.leader.log.count(" in 10 minutes") == restarts


def test_an_agent_outlives_the_engine_and_the_server(group: Group) -> None:
    agent = group.nodes[1].process.pid
    os.kill(group.leader.engine_pid(), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while group.leader.log.count("the engine is ready again") < 4:
        assert time.monotonic() < deadline, group.leader.log
        time.sleep(0.1)
    assert group.leader.stop() == 0
    group.nodes[1].until_logged("node 0 is gone: the server was told to end")
    group.nodes[1].until_logged("waiting for node 0 at 127.0.0.1")
    assert group.nodes[1].status("/v1/health/live") == 200 and group.nodes[1].status("/v1/health/ready") == 503
    group.replace(0)
    group.until_ready()
    assert greedy(group.leader.client(), PROMPT) != ""
    assert group.nodes[1].process.pid == agent


def test_a_group_ends_together(group: Group) -> None:
    for each in group.nodes:
        each.process.send_signal(signal.SIGTERM)
    assert [each.process.wait(60) for each in group.nodes] == [0, 0]
    for each in group.nodes:
        assert "Traceback" not in each.log.rpartition("SIGTERM")[2]


# ---------------------------------------------------------------- torchrun, four ranks, a cache of its own each


class UnderTorchrun(Server):
    """A node that torchrun starts; it says which node it is."""

    def __init__(self, cache: Path, rendezvous: int, *flags: str) -> None:
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self.began = time.monotonic()
        cache.parent.mkdir(parents=True, exist_ok=True)
        self._log = cache.parent / f"log-{self.port}"
        agent = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{rendezvous}"]
        serve = [ROOT / "entrypoint.py", "serve", "--host=127.0.0.1", f"--port={self.port}", f"--cache={cache}", *flags]
        command = [sys.executable, "-m", "torch.distributed.run", *agent, *serve]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen([str(word) for word in command], cwd=cache.parent, stderr=log)

    @property
    def is_leader(self) -> bool:
        return self.json("/v1/health/ready").get("phase") == "ready" and self.status("/v1/models") == 200


def until_repaired(leader: Server, other: Server, directory: Path) -> None:
    """What was damaged on one node only is made anew there."""
    cache = directory / ("cache-0" if "cache-0" in " ".join(psutil.Process(other.process.pid).cmdline()) else "cache-1")
    (file,) = cache.glob("engines/*/rank-3.safetensors")
    os.truncate(file, 5000)
    (engine,) = [
        child
        for child in psutil.Process(leader.process.pid).children(recursive=True)
        if "appliance.engine_process" in " ".join(child.cmdline())
    ]
    built = leader.log.count(" built in ")
    engine.kill()
    leader.until_logged("rank 3 on node 1 (127.0.0.1): ")
    deadline = time.monotonic() + 90
    while leader.log.count("the engine is ready again") < 2:
        assert time.monotonic() < deadline, leader.log + other.log
        time.sleep(0.1)
    assert file.stat().st_size > 5000 and "is damaged: 5000 bytes" in other.log
    assert leader.log.count(" built in ") == built


def test_torchrun_starts_two_stages_of_two_ranks(tmp_path: Path) -> None:
    """Each node builds the engine for itself. A rank of the second stage is lost under a stream."""
    rendezvous = free_port()
    flags = ("--backend", "cpu", "--tp-size", "2")
    nodes = [UnderTorchrun(tmp_path / f"cache-{i}", rendezvous, *flags) for i in range(2)]
    try:
        for each in nodes:
            each.until("/v1/health/ready", 200)
        nodes.sort(key=lambda each: not each.is_leader)  # torchrun decides
        leader, other = nodes
        assert "profile bf16-cpu-tp2-pp2" in leader.log
        for each in nodes:
            assert " built in " in each.log
        expected = greedy(leader.client(), PROMPT, 60)
        ranks = ranks_below(other.process.pid)
        assert len(ranks) == 2 and len(ranks_below(leader.process.pid)) == 1
        chunks = leader.client().completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=60, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        text = ""
        for i, chunk in enumerate(chunks):
            text += chunk.choices[0].text if chunk.choices else ""
            if i == 10:
                ranks[1].kill()
        assert text == expected
        leader.until_logged("on node 1 (127.0.0.1) was killed by SIGKILL")
        until_repaired(leader, other, tmp_path)
    finally:
        for each in nodes:
            each.process.terminate()  # torchrun passes it on
        for each in nodes:
            each.process.wait(60)
