"""Engines of two and four GPUs against one GPU: the same tokens, replayed and eager; a rank that is killed while the
others wait for it in NCCL."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
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
from appliance.distributed import leave
from appliance.engines import read_manifest
from appliance.errors import EngineCrashedError
from appliance.runtime.loading import PhaseTimer
from appliance.runtime.ranks import Leader
from appliance.types import EngineOptions

pytestmark = pytest.mark.gpu
several = pytest.mark.skipif(GPU_COUNT < 2, reason="needs two GPUs")

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


@pytest.fixture
def no_group() -> Iterator[None]:
    yield
    leave()


def build_for(source: Path, cache: Path, precision: str, size: int, **changes: Any) -> Path:
    capability = torch.cuda.get_device_capability(0)
    wanted = {"precision": precision, "backend": "cuda", "compute_capability": capability, "tp_size": size}
    return build(request_of(source, cache, calibration_data="none", **wanted, **changes))


class Engine:
    def __init__(self, engine: Path, size: int, *, cuda_graphs: bool) -> None:
        options = EngineOptions(
            str(engine),
            "cuda",
            devices=tuple(map(str, range(size))),
            num_pages=256,
            max_num_seqs=16,
            max_num_batched_tokens=256,
            max_model_len=256,
            cuda_graphs=cuda_graphs,
            persistent_decode=False,
        )
        self.leader = Leader(options, size) if size > 1 else None
        backend, timer = registry.load("backends", "cuda"), PhaseTimer()
        loaded = backend.load(options, lambda *_: None, timer, self.leader)
        self.executor, self.info = backend.assemble(loaded, options, lambda *_: None, timer)
        self.core = EngineCore(self.executor)

    def generate(self, tokens: int) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
        """Tokens of each prompt, and the log probabilities of the first one's five best."""
        requests = [greedy(f"r{i}", prompt, tokens, logprobs=5) for i, prompt in enumerate(PROMPTS)]
        outputs = run_all(self.core, requests)
        found = {name: [token for o in given for token in o.token_ids] for name, given in outputs.items()}
        best = {name: [value for _, value in given[0].logprobs[0].top] for name, given in outputs.items()}  # type: ignore[index]
        return found, best


@several
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "int4"])
def test_ranks_give_what_one_gpu_does(precision: str, size: int, source: Path, cache: Path, no_group: None) -> None:
    if size > GPU_COUNT:
        pytest.skip(f"needs {size} GPUs")
    _, expected = Engine(build_for(source, cache, precision, 1), 1, cuda_graphs=False).generate(1)
    engine_dir = build_for(source, cache, precision, size)
    manifest = read_manifest(engine_dir)
    assert manifest.kernels and manifest.tactics, manifest.build.notes  # the trial ran on all ranks
    tokens = []
    for cuda_graphs in (False, True):
        engine = Engine(engine_dir, size, cuda_graphs=cuda_graphs)
        while engine.executor.prepare_more():
            pass
        found, best = engine.generate(24)
        tokens.append(found)
        for name, values in expected.items():
            assert best[name] == pytest.approx(values, abs=0.25), (precision, name)
        assert engine.leader is not None
        engine.leader.close()
        del engine
        leave()
    same = sum(tokens[0][name][:8] == tokens[1][name][:8] for name in tokens[0])
    assert same >= len(PROMPTS) - 1, "graphs and eager steps differ by rounding at most"


@several
def test_a_rank_killed_on_a_gpu_is_named_within_seconds(source: Path, cache: Path, no_group: None) -> None:
    engine = Engine(build_for(source, cache, "bf16", 2), 2, cuda_graphs=True)
    engine.generate(4)
    assert engine.leader is not None
    begin = time.monotonic()
    threading.Timer(0.5, lambda: os.kill(engine.leader.pids[0], signal.SIGKILL)).start()  # type: ignore[union-attr]
    with pytest.raises(EngineCrashedError, match="rank 1 was killed by SIGKILL"):
        while time.monotonic() - begin < 60:
            engine.generate(100)
    assert time.monotonic() - begin < 20
    engine.leader.close()
