"""Decode steps of whole models by the own decode attention kernel: log probabilities against those that a prefill of
the same tokens gives, which another kernel computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from model_helpers import make_checkpoint
from runtime_helpers import greedy, make_core, run_all, tokens_of
from test_runtime_gpu import SIZES, workload

from appliance.types import EngineOutput

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    configs = {
        "llama": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True),
        "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=48),
        "qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
        "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    }
    path = tmp_path_factory.mktemp(request.param)
    make_checkpoint(path, configs[request.param]())
    return path


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    from appliance.kernels.tactics import TABLE

    TABLE.clear()
    yield
    TABLE.clear()


def run(checkpoint: Path, requests: list[Any], **options: Any) -> dict[str, list[EngineOutput]]:
    sizes = {"num_pages": 256, "page_size": 16, "max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 1024}
    core = make_core(checkpoint, backend="cuda", **sizes | options)
    outputs = run_all(core, requests)
    core.check_integrity()
    return outputs


def off_by(checkpoint: Path, decoded: dict[str, list[EngineOutput]], requests: list[Any], **options: Any) -> float:
    """Mean absolute difference, in nats, of the decoded tokens' log probabilities from a prefill's by Triton."""
    import torch

    whole = [
        greedy(r.request_id, [*r.prompt_token_ids, *tokens_of(decoded[r.request_id])], 1, prompt_logprobs=0)
        for r in requests
    ]
    rated = run(checkpoint, whole, attention="triton", cuda_graphs=False, **options)
    found = []
    for request in requests:
        own = [entry.logprob for output in decoded[request.request_id] for entry in output.logprobs or []]
        entries = next(o.prompt_logprobs for o in rated[request.request_id] if o.prompt_logprobs)
        again = [entry.logprob for entry in entries[-len(own) :] if entry is not None]
        found += [abs(a - b) for a, b in zip(own[1:], again[1:], strict=True)]  # the first came from a prefill
    return float(torch.tensor(found).mean())


@pytest.mark.parametrize(("kv_cache_dtype", "scheme"), [("auto", "none"), ("auto", "fp8"), ("fp8", "none")])
@pytest.mark.parametrize(("graphs", "warps"), [(True, 4), (True, 8), (False, 16)])
def test_as_close_to_a_prefill_as_the_librarys(
    checkpoint: Path, kv_cache_dtype: str, scheme: str, graphs: bool, warps: int
) -> None:
    """A wrong page, length, scale or angle moves these random models by nats."""
    import torch

    from appliance.kernels import flashinfer
    from appliance.kernels.decode_attention.decode import DecodeAttention, attention_shape, name_of, table_key
    from appliance.kernels.tactics import TABLE

    kv_dtype = torch.float8_e4m3fn if kv_cache_dtype == "fp8" else torch.bfloat16
    if reason := flashinfer.available(64, torch.bfloat16, kv_dtype):
        pytest.skip(reason)
    shape = attention_shape(4, 2, 64, 16, torch.bfloat16, kv_dtype)
    options = {"kv_cache_dtype": kv_cache_dtype, "scheme": scheme, "dtype": torch.bfloat16, "persistent_decode": False}
    requests = workload(logprobs=0)
    errors, calls, attend = [], [], DecodeAttention.attend

    def counted(self: DecodeAttention, *args: Any, **named: Any) -> Any:
        calls.append(self)
        return attend(self, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeAttention, "attend", counted)
        for own in (False, True):
            TABLE.clear()
            if own:
                TABLE.choose(*table_key(shape), 512, name_of(warps))
            decoded = run(checkpoint, requests, attention="flashinfer", cuda_graphs=graphs, **options)
            assert bool(calls) == own
            TABLE.clear()
            errors.append(off_by(checkpoint, decoded, requests, **options))
    assert errors[1] < 1.25 * errors[0] + 0.01, errors
