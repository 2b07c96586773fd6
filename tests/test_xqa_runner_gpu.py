"""Engines whose decode steps go through XQA: in graphs, eagerly and beside prompts, rated by Triton's attention."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from model_helpers import make_checkpoint
from runtime_helpers import greedy, make_core, run_all, tokens_of

from appliance.types import EngineOutput, EngineRequest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]
VOCAB = 512
# Nats, on average. In float32 on a CPU, rounding q and probabilities as XQA does costs 0.2, leaving a token out 0.8 or
# more, twice the right scale 1.1; bf16 adds up to 0.15.
LIMIT = 0.45


@pytest.fixture(scope="module", params=["llama", "mistral"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four query heads per K/V head; mistral with a window."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 2048,
    }
    llama, mistral = transformers.LlamaConfig, transformers.MistralConfig
    config = llama(**sizes) if request.param == "llama" else mistral(**sizes, sliding_window=48)
    path = tmp_path_factory.mktemp(request.param)
    make_checkpoint(path, config)
    return path


def workload() -> list[EngineRequest]:
    rng = random.Random(5)
    lengths = [1, 2, 15, 16, 17, 100, 333, 640]  # in chunks of 256 tokens, so decodes run beside prompts
    return [greedy(f"r{i}", [rng.randrange(VOCAB) for _ in range(n)], 24, logprobs=0) for i, n in enumerate(lengths)]


def run(checkpoint: Path, requests: list[EngineRequest], **options: Any) -> dict[str, list[EngineOutput]]:
    sizes = {"num_pages": 256, "page_size": 16, "max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 1024}
    core = make_core(checkpoint, kv_cache_dtype="fp8", **sizes | options)
    outputs = run_all(core, requests)
    core.check_integrity()
    return outputs


def off_by(
    checkpoint: Path, decoded: dict[str, list[EngineOutput]], requests: list[EngineRequest], **options: Any
) -> float:
    """Mean absolute difference, in nats, of the decoded tokens' log probabilities from those that a prefill of the same
    tokens gives."""
    import torch

    whole = [
        greedy(r.request_id, [*r.prompt_token_ids, *tokens_of(decoded[r.request_id])], 1, prompt_logprobs=0)
        for r in requests
    ]
    rated = run(checkpoint, whole, **options)
    differences = []
    for request in requests:
        own = [entry.logprob for output in decoded[request.request_id] for entry in output.logprobs or []]
        entries = next(o.prompt_logprobs for o in rated[request.request_id] if o.prompt_logprobs)
        again = [entry.logprob for entry in entries[-len(own) :] if entry is not None]
        assert len(own) == len(again) == 24
        differences += [abs(a - b) for a, b in zip(own[1:], again[1:], strict=True)]  # the first came from a prefill
    return float(torch.tensor(differences).mean())


@pytest.mark.parametrize("graphs", [True, False])
def test_log_probabilities_are_those_of_triton(checkpoint: Path, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded by XQA and rated by Triton's prefill: a wrong page, length or scale moves this random model by nats."""
    import torch

    from appliance.kernels import flashinfer, xqa

    shape = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 64, "page_size": 16, "dtype": torch.bfloat16}
    reason = flashinfer.available(64, torch.bfloat16, torch.float8_e4m3fn) or xqa.unsupported(
        capability=torch.cuda.get_device_capability(), kv_dtype=torch.float8_e4m3fn, **shape
    )
    if reason:
        pytest.skip(reason)
    calls = 0
    attend = xqa.XqaDecode.attend

    def counted(*args: Any) -> None:
        nonlocal calls
        calls += 1
        attend(*args)

    monkeypatch.setattr(xqa.XqaDecode, "attend", counted)
    cuda = {"backend": "cuda", "dtype": torch.bfloat16, "persistent_decode": False}
    decoded = run(checkpoint, workload(), attention="flashinfer", cuda_graphs=graphs, **cuda)
    assert calls > 0
    calls = 0
    assert off_by(checkpoint, decoded, workload(), attention="triton", cuda_graphs=False, **cuda) < LIMIT
    assert calls == 0
