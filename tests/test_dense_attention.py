"""Attention of whole prompts by torch's fused attention, against the reference."""

from __future__ import annotations

import pytest
import torch

from appliance.kernels.attention import KvScales, ReferenceAttention
from appliance.kernels.dense_attention import DenseAttention
from appliance.runtime.prompt_batch import prompt_context
from appliance.types import ModelConfig


def _config(heads: int, kv_heads: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=16,
        hidden_size=heads * 16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=64,
    )


@pytest.mark.parametrize("window", [None, 5, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("lengths", [[24], [7, 31, 1, 16]])
def test_agrees_with_the_reference(lengths: list[int], heads: int, kv_heads: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    context = prompt_context(_config(heads, kv_heads), lengths, torch.float32, torch.device("cpu"))
    cache = context.kv_caches[0]
    cache.copy_(torch.randn(cache.shape, generator=generator))
    q = torch.randn(sum(lengths), heads, 16, generator=generator)
    dense = DenseAttention()
    dense.plan(context.metadata)
    for scales in (KvScales(), KvScales(k=0.5, v=2.0)):
        got = dense.attend(q, cache, context.metadata, 0.25, window, scales)
        expected = ReferenceAttention().attend(q, cache, context.metadata, 0.25, window, scales)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_refuses_what_is_cached_before() -> None:
    context = prompt_context(_config(4, 2), [8, 8], torch.float32, torch.device("cpu"))
    context.metadata.seq_lens_host[1] = 9
    with pytest.raises(AssertionError, match="cached before"):
        DenseAttention().plan(context.metadata)
