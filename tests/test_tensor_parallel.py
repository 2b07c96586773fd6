"""Two and four ranks, as processes over gloo, give the logits of one, as a tensor-parallel group, as pipeline stages
and as both: every architecture, every scheme."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import make_checkpoint
from tensor_parallel_pool import Job, RankPool, run_job
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from appliance.distributed import TensorParallel

# Four ranks share two key/value heads, a vocabulary that none divides, and groups of 32 inputs.
SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 32,
}
ARCHITECTURES: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=5),
    "qwen2": Qwen2Config(**SHAPE | {"hidden_size": 256}, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, attention_bias=True),
}
# Scheme, its parameters, and how far logits may be off, relative to their norm. Activations in 8 bits are rounded by a
# scale of the inputs that a rank has, so they are other numbers on several ranks; everything else is added up in
# another order only.
SCHEMES: dict[str, tuple[str, dict[str, Any], float]] = {
    "fp32": ("none", {}, 1e-5),
    "fp8": ("fp8", {}, 0.16),
    "int8": ("int8_smoothquant", {}, 0.06),
    "int4": ("int4_awq", {"group_size": 32, "head": "int4"}, 1e-4),
    "int4 with a plain layer": ("int4_gptq", {"group_size": 32, "unquantized": ["layers.0.*"]}, 1e-4),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    ranks = RankPool()
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, config in ARCHITECTURES.items():
        made[name] = tmp_path_factory.mktemp("models") / name
        make_checkpoint(made[name], config)
    return made


def compare(job: Job, pool: RankPool, limit: float) -> None:
    alone = run_job(job, TensorParallel())
    ranks = pool.run(job)
    for other in ranks[1:]:
        assert torch.equal(ranks[0], other), "ranks must sample the same token from the same bits"
    assert ranks[0].shape == alone.shape
    error = float((ranks[0] - alone.float()).norm() / alone.float().norm())
    assert error <= limit, error


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ranks_compute_what_one_does(
    architecture: str, scheme: str, size: int, checkpoints: dict[str, Path], pool: RankPool
) -> None:
    name, parameters, limit = SCHEMES[scheme]
    compare(Job(checkpoints[architecture], size, name, parameters), pool, limit)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stages_compute_what_one_rank_does(
    architecture: str, scheme: str, checkpoints: dict[str, Path], pool: RankPool
) -> None:
    name, parameters, limit = SCHEMES[scheme]
    stages = Job(checkpoints[architecture], 2, name, parameters, stages=2)
    assert torch.equal(pool.run(stages)[0], run_job(stages, TensorParallel())), "stages change no number"
    compare(Job(checkpoints[architecture], 4, name, parameters, stages=2), pool, limit)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stages_round_what_they_hand_over_as_the_next_layer_would(
    dtype: str, checkpoints: dict[str, Path], pool: RankPool
) -> None:
    job = Job(checkpoints["llama"], 2, "none", {}, dtype, stages=2)
    assert torch.equal(pool.run(job)[0], run_job(job, TensorParallel()).float())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_in_16_bits_are_the_same_on_every_rank(dtype: str, checkpoints: dict[str, Path], pool: RankPool) -> None:
    for size in (2, 4):
        compare(Job(checkpoints["llama"], size, "none", {}, dtype), pool, 0.03)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_products_of_the_cpu_backend(scheme: str, checkpoints: dict[str, Path], pool: RankPool) -> None:
    name, parameters, limit = SCHEMES[scheme]
    for size in (2, 4):
        compare(Job(checkpoints["qwen3"], size, name, parameters, packed=True), pool, max(limit, 0.02))
