"""The CUDA backend against the CPU reference: both attentions, CUDA graphs on and off, three precisions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from model_helpers import make_checkpoint
from runtime_helpers import greedy, make_core, run_all, tokens_of

from appliance.types import EngineOutput, EngineRequest

pytestmark = pytest.mark.gpu
VOCAB = 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    configs = {
        "llama": lambda: transformers.LlamaConfig(**SIZES),
        "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=48),
        "qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
        "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    }
    path = tmp_path_factory.mktemp(request.param)
    make_checkpoint(path, configs[request.param]())
    return path


def workload(**params: Any) -> list[EngineRequest]:
    rng = random.Random(5)
    lengths = [1, 2, 15, 16, 17, 100, 333, 640]
    return [
        greedy(f"r{i}", [rng.randrange(VOCAB) for _ in range(length)], 24, **params) for i, length in enumerate(lengths)
    ]


def core_options(**options: Any) -> dict[str, Any]:
    return {
        "num_pages": 256,
        "page_size": 16,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "max_model_len": 1024,
    } | options


def prompt_logprobs(outputs: dict[str, list[EngineOutput]]) -> dict[str, list[float]]:
    found = {}
    for name, items in outputs.items():
        entries = next((o.prompt_logprobs for o in items if o.prompt_logprobs), [])
        found[name] = [entry.logprob for entry in entries if entry is not None]
    return found


def differences(got: dict[str, list[float]], wanted: dict[str, list[float]]) -> Any:
    """float32 [n]: absolute differences over all positions of all prompts."""
    import torch

    return torch.tensor([abs(a - b) for name in wanted for a, b in zip(wanted[name], got[name], strict=True)])


@pytest.mark.parametrize("graphs", [True, False])
def test_float32_tokens_equal_the_cpu(checkpoint: Path, graphs: bool) -> None:
    import torch

    expected = run_all(make_core(checkpoint, **core_options()), workload())
    core = make_core(
        checkpoint, backend="cuda", dtype=torch.float32, **core_options(attention="triton", cuda_graphs=graphs)
    )
    got = run_all(core, workload())
    for name in expected:
        assert tokens_of(got[name]) == tokens_of(expected[name]), name
    core.check_integrity()


@pytest.mark.parametrize("scheme", ["none", "fp8"])
@pytest.mark.parametrize("attention", ["flashinfer", "triton"])
def test_logprobs_as_close_to_float32_as_the_precision_allows(checkpoint: Path, attention: str, scheme: str) -> None:
    """Teacher-forced over the prompts, so that one differing token can neither hide others nor cause them.

    bf16 is compared with float32 on the CPU; FP8 by its distance from float32, which the CPU's emulation of the same
    rounding sets the measure for. A wrong mask or page moves these random models by whole nats.
    """
    import torch

    from appliance.kernels import flashinfer

    if attention == "flashinfer" and (reason := flashinfer.available(64, torch.bfloat16)):
        pytest.skip(reason)
    requests = workload(prompt_logprobs=0)
    exact = prompt_logprobs(run_all(make_core(checkpoint, **core_options()), requests))
    options = core_options(attention=attention)
    core = make_core(checkpoint, backend="cuda", dtype=torch.bfloat16, scheme=scheme, **options)
    error = differences(prompt_logprobs(run_all(core, requests)), exact)
    if scheme == "none":
        assert error.mean() < 0.15, error.mean()
        assert error.quantile(0.99) < 0.6, error.quantile(0.99)
    else:
        emulated = prompt_logprobs(run_all(make_core(checkpoint, scheme=scheme, **core_options()), requests))
        allowed = differences(emulated, exact)
        assert error.mean() < 1.25 * allowed.mean(), (error.mean(), allowed.mean())
        assert error.quantile(0.99) < 1.5 * allowed.quantile(0.99), (error.quantile(0.99), allowed.quantile(0.99))


@pytest.mark.parametrize("attention", ["flashinfer", "triton"])
def test_fp8_cache_is_as_close_to_float32_as_the_cpus(checkpoint: Path, attention: str) -> None:
    """The CPU rounds K and V to the same bytes; what the GPU computes in bf16 adds little to that."""
    import torch

    from appliance.kernels import flashinfer

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 on this GPU")
    if attention == "flashinfer" and (reason := flashinfer.available(64, torch.bfloat16, torch.float8_e4m3fn)):
        pytest.skip(reason)
    requests = workload(prompt_logprobs=0)
    exact = prompt_logprobs(run_all(make_core(checkpoint, **core_options()), requests))
    emulated = prompt_logprobs(run_all(make_core(checkpoint, **core_options(kv_cache_dtype="fp8")), requests))
    options = core_options(attention=attention, kv_cache_dtype="fp8")
    got = prompt_logprobs(run_all(make_core(checkpoint, backend="cuda", dtype=torch.bfloat16, **options), requests))
    error, allowed = differences(got, exact), differences(emulated, exact)
    assert 0.75 * allowed.mean() < error.mean() < 1.25 * allowed.mean(), (error.mean(), allowed.mean())
    assert error.quantile(0.99) < 1.5 * allowed.quantile(0.99), (error.quantile(0.99), allowed.quantile(0.99))


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("attention", ["flashinfer", "triton"])
def test_graphs_give_the_tokens_of_eager_steps(checkpoint: Path, attention: str, kv_cache_dtype: str) -> None:
    """Graphs pad the batch, so products may round differently; a model this random rarely has near-ties."""
    import torch

    from appliance.kernels import flashinfer

    kv_dtype = torch.float8_e4m3fn if kv_cache_dtype == "fp8" else None
    if kv_dtype and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 on this GPU")
    if attention == "flashinfer" and (reason := flashinfer.available(64, torch.bfloat16, kv_dtype)):
        pytest.skip(reason)
    results = []
    for graphs in (True, False):
        options = core_options(attention=attention, cuda_graphs=graphs, kv_cache_dtype=kv_cache_dtype)
        options["persistent_decode"] = False  # rounds otherwise than the layers; test_persistent_decode.py compares it
        core = make_core(checkpoint, backend="cuda", dtype=torch.bfloat16, **options)
        results.append(run_all(core, workload()))
    same = sum(tokens_of(results[0][n])[:8] == tokens_of(results[1][n])[:8] for n in results[0])
    allowed = 1 if kv_dtype is None else 2  # of a key that rounds to another byte, the difference is larger
    assert same >= len(results[0]) - allowed, {
        n: (tokens_of(results[0][n]), tokens_of(results[1][n])) for n in results[0]
    }


def test_seeded_sampling_equals_the_cpu_in_float32(checkpoint: Path) -> None:
    import torch

    params = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 11, "repetition_penalty": 1.1}
    expected = run_all(make_core(checkpoint, **core_options()), workload(**params))
    core = make_core(checkpoint, backend="cuda", dtype=torch.float32, **core_options(attention="triton"))
    got = run_all(core, workload(**params))
    same = sum(tokens_of(got[n]) == tokens_of(expected[n]) for n in expected)
    assert same >= len(expected) - 1  # a float32 rounding at the edge of top-p may turn one
