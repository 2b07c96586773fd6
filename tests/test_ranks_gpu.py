"""Engines of two and four ranks against one: the same tokens, replayed and eager; a rank that is killed while the
others wait for it. On a machine with fewer GPUs the ranks share them, which is slow and as good a test of everything
but speed and links. Every engine is built and run in a process of its own, as a process joins one group in its life."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_models import SHAPE, make_source, request_of
from conftest import GPU_COUNT
from runtime_helpers import greedy, run_all
from transformers import LlamaConfig

from appliance import registry
from appliance.batching.core import EngineCore
from appliance.builder.build import build
from appliance.engines import read_manifest
from appliance.errors import EngineCrashedError
from appliance.runtime.loading import PhaseTimer
from appliance.runtime.ranks import Leader
from appliance.settings import share_gpu
from appliance.types import EngineOptions

pytestmark = pytest.mark.gpu

# 8 K/V heads of 64: groups of 128 inputs divide what each of four ranks has.
CONFIG = LlamaConfig(
    **SHAPE
    | {
        "vocab_size": 2051,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    }
)
PROMPTS = [[(7 * i + 13 * j) % 2051 for j in range(5 + 40 * i)] for i in range(5)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "m", CONFIG)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """What `function(*args)` returns, from a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def build_for(source: Path, cache: Path, precision: str, size: int, stages: int = 1) -> Path:
    if size > GPU_COUNT:
        share_gpu(0)
    capability = torch.cuda.get_device_capability(0)
    wanted = {"precision": precision, "backend": "cuda", "compute_capability": capability}
    sizes = {"tp_size": size // stages, "pp_size": stages}
    return build(request_of(source, cache, calibration_data="none", **wanted, **sizes))


class Engine:
    def __init__(self, engine: Path, size: int, *, cuda_graphs: bool, stages: int = 1) -> None:
        options = EngineOptions(
            str(engine),
            "cuda",
            devices=tuple(str(rank % GPU_COUNT) for rank in range(size)),
            num_pages=256,
            max_num_seqs=16,
            max_num_batched_tokens=256,
            max_model_len=256,
            cuda_graphs=cuda_graphs,
            persistent_decode=False,
        )
        self.leader = Leader(options, size, pp_size=stages) if size > 1 else None
        backend, timer = registry.load("backends", "cuda"), PhaseTimer()
        loaded = backend.load(options, lambda *_: None, timer, self.leader)
        self.executor, self.info = backend.assemble(loaded, options, lambda *_: None, timer)
        self.core = EngineCore(self.executor)

    def generate(self, tokens: int) -> tuple[dict[str, list[int]], dict[str, dict[int, float]]]:
        """Tokens of each prompt, and the first one's five best with their log probabilities."""
        requests = [greedy(f"r{i}", prompt, tokens, logprobs=5) for i, prompt in enumerate(PROMPTS)]
        outputs = run_all(self.core, requests)
        found = {name: [token for o in given for token in o.token_ids] for name, given in outputs.items()}
        best = {name: dict(given[0].logprobs[0].top) for name, given in outputs.items()}  # type: ignore[index]
        return found, best


def answers(
    engine_dir: Path, size: int, cuda_graphs: bool, stages: int = 1
) -> tuple[dict[str, list[int]], dict[str, dict[int, float]]]:
    engine = Engine(engine_dir, size, cuda_graphs=cuda_graphs, stages=stages)
    while engine.executor.prepare_more():
        pass
    found = engine.generate(24)
    if engine.leader is not None:
        engine.leader.close()
    return found


def assert_near(best: dict[str, dict[int, float]], expected: dict[str, dict[int, float]], precision: str) -> None:
    """Log probabilities of the best tokens. Ranks scale their own halves of 8-bit activations, which this model of
    random numbers answers by up to 0.7, on the CPU too; tokens that share nothing with the right ones are what a wrong
    share gives."""
    both = [
        (one, best[name][token]) for name in expected for token, one in expected[name].items() if token in best[name]
    ]
    assert len(both) >= 3 * len(PROMPTS), (precision, expected, best)
    apart = [abs(one - other) for one, other in both]
    assert sum(apart) / len(apart) < (0.05 if precision == "bf16" else 0.35), (precision, expected, best)


@pytest.mark.timeout(280)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "int4"])
def test_ranks_give_what_one_gpu_does(precision: str, size: int, source: Path, cache: Path) -> None:
    if size > 2 * GPU_COUNT:
        pytest.skip(f"gpu test: needs {size // 2} GPUs, here are {GPU_COUNT}")
    alone = in_own_process(build_for, source, cache, precision, 1)
    _, expected = in_own_process(answers, alone, 1, False)
    engine_dir = in_own_process(build_for, source, cache, precision, size)
    manifest = read_manifest(engine_dir)
    assert manifest.kernels and manifest.tactics, manifest.build.notes  # the trial ran on all ranks
    eager, _ = in_own_process(answers, engine_dir, size, False)
    replayed, best = in_own_process(answers, engine_dir, size, True)
    assert_near(best, expected, precision)
    same = sum(eager[name][:8] == replayed[name][:8] for name in eager)
    assert same >= len(PROMPTS) - 1, "graphs and eager steps differ by rounding at most"


def lose_a_rank(engine_dir: Path, stages: int = 1) -> tuple[str, float]:
    """Why the engine of two ranks ended, and after how many seconds."""
    engine = Engine(engine_dir, 2, cuda_graphs=True, stages=stages)
    engine.generate(4)
    assert engine.leader is not None
    begin = time.monotonic()
    threading.Timer(0.5, lambda: os.kill(engine.leader.pids[0], signal.SIGKILL)).start()  # type: ignore[union-attr]
    reason = ""
    try:
        while time.monotonic() - begin < 60:
            engine.generate(100)
    except EngineCrashedError as error:
        reason = str(error)
    seconds = time.monotonic() - begin
    engine.leader.close()
    return reason, seconds


@pytest.mark.timeout(200)
def test_a_rank_killed_on_a_gpu_is_named_within_seconds(source: Path, cache: Path) -> None:
    engine_dir = in_own_process(build_for, source, cache, "bf16", 2)
    reason, seconds = in_own_process(lose_a_rank, engine_dir)
    assert "rank 1 was killed by SIGKILL" in reason and seconds < 20, (reason, seconds)
