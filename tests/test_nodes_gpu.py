"""Two nodes of one GPU each, as two processes of one machine that see different GPUs: NCCL between the stages, plans
and results over TCP. On a machine with one GPU both use it, which tests everything but speed. Prints what a token
costs."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from conftest import GPU_COUNT, GPUS
from test_end_to_end import MODEL, Server, greedy
from test_nodes_served import PROMPT, Group, node, ranks_below

from appliance import registry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        registry.plugins("backends")["cuda"].facts["max_pp"] < 2, reason="pipeline stages are not offered on GPUs"
    ),
]
FLAGS = ("--backend", "cuda", "--max-num-seqs", "8", "--no-persistent-decode")  # which serves whole models only


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", GPUS[0])
        server = Server(tmp_path_factory.mktemp("one") / "cache", *FLAGS)
    try:
        server.until("/v1/health/ready", 300)
        yield server
    finally:
        server.process.kill()
        server.process.wait()


class GpuGroup(Group):
    """Node n on GPU n, or all on the only one, where NCCL is told that the nodes are different machines."""

    def start(self, rank: int) -> Server:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", GPUS[rank % GPU_COUNT])
            if GPU_COUNT == 1:
                patch.setenv("NCCL_HOSTID", f"node-{rank}")
                patch.setenv("APPLIANCE_MEMORY_FRACTION", "0.3")
            return node(self.cache, rank, self.port, *self.flags, backend="cuda")


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuGroup]:
    running = GpuGroup(tmp_path_factory.mktemp("nodes"), *FLAGS[2:])
    try:
        for each in running.nodes:
            each.until("/v1/health/ready", 300)
        yield running
    finally:
        running.kill()


def milliseconds(server: Server, tokens: int = 400) -> float:
    """Of a token of one request."""
    greedy(server.client(), PROMPT, 20)
    began = time.perf_counter()
    greedy(server.client(), PROMPT, tokens)
    return (time.perf_counter() - began) / tokens * 1e3


def test_two_nodes_give_the_tokens_of_one(one: Server, group: GpuGroup) -> None:
    assert greedy(group.leader.client(), PROMPT, 60) == greedy(one.client(), PROMPT, 60) != ""
    single, several = milliseconds(one), milliseconds(group.leader)
    print(f"\nms a token, one request, {MODEL}: one node {single:.2f}, two nodes {several:.2f}")


def test_a_rank_lost_on_the_other_node_is_a_pause(group: GpuGroup) -> None:
    expected = greedy(group.leader.client(), PROMPT, 400)
    chunks = group.leader.client().completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=400, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    text, pause, at = "", 0.0, time.monotonic()
    for i, chunk in enumerate(chunks):
        text, pause, at = text + chunk.choices[0].text, max(pause, time.monotonic() - at), time.monotonic()
        if i == 20:
            ranks_below(group.nodes[1].process.pid)[0].kill()
    assert text == expected
    group.leader.until_logged("rank 1 on node 1 (127.0.0.1) was killed by SIGKILL")
    print(f"\nlongest pause {pause:.1f} s")
