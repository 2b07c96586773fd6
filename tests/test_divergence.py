"""Divergence of two models' predictions, and prompts side by side against the same prompts alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from model_helpers import load_model, make_checkpoint
from transformers import LlamaConfig

from appliance.kernels.fp8_linear import FP8
from appliance.runtime import divergence
from appliance.runtime.divergence import Divergence, kl_reference
from appliance.runtime.prompt_batch import prompt_context
from appliance.runtime.single_prompt import run_prompt


def logits(seed: int, n: int = 37, vocab: int = 50) -> torch.Tensor:
    return 3 * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed))


def test_sums_equal_their_definitions_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = logits(0), logits(0) + 0.5 * logits(1)
    following = torch.arange(37) % 50
    nll = torch.nn.functional.cross_entropy
    for at_once in (50 * 8, 1 << 23):
        monkeypatch.setattr(divergence, "_AT_ONCE", at_once)
        found = Divergence()
        found.add(p[:20], q[:20], following[:20])
        found.add(p[20:], q[20:], following[20:])
        assert found.kl_divergence == pytest.approx(kl_reference(p, q), rel=1e-5) and found.kl_divergence > 0.01
        assert found.top1_agreement == pytest.approx(float((p.argmax(1) == q.argmax(1)).float().mean()))
        assert 0 < found.top1_agreement < 1
        assert found.perplexity == pytest.approx(math.exp(nll(q, following)), rel=1e-5)
        assert found.reference_perplexity == pytest.approx(math.exp(nll(p, following)), rel=1e-5)
        assert found.positions == 37


def test_equal_models_do_not_diverge_and_broken_ones_do_infinitely() -> None:
    same = Divergence()
    same.add(logits(0), logits(0), torch.zeros(37, dtype=torch.int64))
    assert same.kl_divergence == pytest.approx(0, abs=1e-6) and same.top1_agreement == 1
    assert same.perplexity == same.reference_perplexity
    for wrong in (math.nan, math.inf):
        broken = Divergence()
        bad = logits(0)
        bad[3, 7] = wrong
        broken.add(logits(0), bad, torch.zeros(37, dtype=torch.int64))
        assert broken.kl_divergence == math.inf and broken.perplexity == math.inf


@pytest.mark.parametrize("kv_dtype", [torch.float32, FP8])
def test_prompts_side_by_side_do_not_see_each_other(tmp_path: Path, kv_dtype: torch.dtype) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    make_checkpoint(tmp_path, config)
    model = load_model(tmp_path)
    prompts = [torch.arange(n) * 7 % 64 for n in (5, 1, 17)]
    context = prompt_context(model.config, [len(p) for p in prompts], kv_dtype, torch.device("cpu"))
    with torch.inference_mode():
        together = model(torch.cat(prompts), context)
    alone = torch.cat([run_prompt(model, prompt)[0] for prompt in prompts])
    tolerance = 1e-4 if kv_dtype == torch.float32 else 0.5  # an FP8 cache rounds, and does not mix prompts up
    torch.testing.assert_close(together, alone, rtol=0, atol=tolerance)
