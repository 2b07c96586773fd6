"""Engines of two and four ranks: what they answer against the same ranks on the CPU (`rank_reference.py`), replayed and
eager; a rank that is killed while the others wait for it. On a machine with fewer GPUs the ranks share them, which is
slow and as good a test of everything but speed and links. Every engine is built and run in a process of its own, as a
process joins one group in its life; these are forked from one that has imported what takes long."""

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
from rank_reference import NUM_BEST, Answer, assert_near
from runtime_helpers import greedy, run_all
from tensor_parallel_pool import Job
from transformers import LlamaConfig

from appliance import registry
from appliance.batching.core import EngineCore
from appliance.builder.build import build
from appliance.engines import read_manifest
from appliance.errors import EngineCrashedError
from appliance.runtime.loading import DTYPES, PhaseTimer
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
    # Channels that are much larger than others make rounding to 8 bits coarser, and a wrong share harder to see.
    return make_source(tmp_path_factory.mktemp("source") / "m", CONFIG, outliers=1.0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def in_own_process(function: Callable[..., Any], *args: Any, log: Path | None = None) -> Any:
    """What `function(*args)` returns, from a fresh process, with no CUDA context. `log`: what its stderr and that of
    its children is appended to."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.llama", "tokenizers"])
    with ProcessPoolExecutor(1, mp_context=context, initializer=log_to, initargs=(log,)) as pool:
        return pool.submit(function, *args).result()


def log_to(log: Path | None) -> None:
    if log is not None:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)


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

    def generate(self, tokens: int) -> list[Answer]:
        """To each prompt, with the most likely tokens at every position."""
        requests = [greedy(f"r{i}", prompt, tokens, logprobs=NUM_BEST) for i, prompt in enumerate(PROMPTS)]
        outputs = run_all(self.core, requests)
        found = []
        for prompt, given in zip(PROMPTS, outputs.values(), strict=True):
            best = [dict(entry.top) for output in given for entry in output.logprobs or () if entry is not None]
            found.append(Answer(prompt, [token for output in given for token in output.token_ids], best))
        return found


def answers(engine_dir: Path, size: int, cuda_graphs: bool, stages: int = 1) -> list[Answer]:
    engine = Engine(engine_dir, size, cuda_graphs=cuda_graphs, stages=stages)
    while engine.executor.prepare_more():
        pass
    found = engine.generate(24)
    if engine.leader is not None:
        engine.leader.close()
    return found


def compare(engine_dir: Path, source: Path, size: int, stages: int = 1, log: Path | None = None) -> None:
    """Eager and replayed answers with each other, and with what they should be. Stages change no number. `log`: as of
    `in_own_process`."""
    manifest = read_manifest(engine_dir)
    assert manifest.kernels and manifest.tactics, manifest.build.notes  # the trial ran on all ranks
    scheme, parameters = manifest.scheme, manifest.key_inputs.scheme_parameters
    job = Job(source, size // stages, scheme, parameters, stored=str(DTYPES[manifest.dtype]).removeprefix("torch."))
    eager, replayed = (in_own_process(answers, engine_dir, size, graphs, stages, log=log) for graphs in (False, True))
    for found in (eager, replayed):
        assert all(len(answer.best) == len(answer.token_ids) == 24 for answer in found)
        assert_near(found, job)
    same = sum(one.token_ids[:8] == other.token_ids[:8] for one, other in zip(eager, replayed, strict=True))
    assert same >= len(PROMPTS) - 2, "graphs and eager steps differ by rounding at most"


@pytest.mark.timeout(280)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "int4"])
def test_ranks_give_what_they_should(precision: str, size: int, source: Path, cache: Path) -> None:
    if size > 2 * GPU_COUNT:
        pytest.skip(f"gpu test: needs {size // 2} GPUs, here are {GPU_COUNT}")
    compare(in_own_process(build_for, source, cache, precision, size), source, size)


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
