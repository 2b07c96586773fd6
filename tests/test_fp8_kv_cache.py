"""FP8 KV caches through whole models on the CPU: scales measured at load, close logits, equal tokens in any batch."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from model_helpers import PagedRunner, PagedSequence, load_model, make_checkpoint
from runtime_helpers import greedy, make_core, run_all, tokens_of
from safetensors.torch import load_file, save_file

from appliance import registry
from appliance.builtin import checkpoint_dir, tasks
from appliance.kernels.attention import UNIT_SCALES, KvScales
from appliance.kernels.fp8_linear import FP8
from appliance.llm import LLM
from appliance.runtime.kv_scales import choose_scale, sample_token_ids, set_kv_scales
from appliance.runtime.loading import KV_DTYPES, LoadedModel, PhaseTimer, kv_dtype_name
from appliance.runtime.single_prompt import run_prompt
from appliance.types import EngineOptions, SamplingParams

VOCAB = 199


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    make_checkpoint(path, config)
    return path


@pytest.mark.parametrize(
    ("largest", "rms", "scale"),
    [
        (3.0, 0.5, 1.0),
        (112.0, 1.0, 1.0),  # four times as much still fits
        (113.0, 1.0, 2.0),
        (448.0, 30.0, 4.0),
        (0.01, 0.001, 2.0**-13),  # would fall where e4m3 has one or two bits: up to 0.04 must fit into 448
        (0.5, 0.02, 2.0**-7),
        (0.0, 0.0, 1.0),
        (math.inf, math.inf, 1.0),
        (math.nan, math.nan, 1.0),
    ],
)
def test_choice_of_a_scale(largest: float, rms: float, scale: float) -> None:
    assert choose_scale(largest, rms) == scale


def test_run_prompt_returns_hidden_states_and_the_keys_and_values(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    ids = list(range(3, 40))
    hidden, caches = run_prompt(model, torch.tensor(ids))
    runner, sequence = PagedRunner(model, page_size=4), PagedSequence()
    logits = runner.step([(sequence, ids)])[0]
    torch.testing.assert_close(model.logits(hidden), logits, rtol=1e-4, atol=1e-4)
    for cache, paged in zip(caches, runner.caches, strict=True):
        in_order = paged[sequence.pages].transpose(0, 1).flatten(1, 2)[:, : len(ids)]
        torch.testing.assert_close(cache, in_order, rtol=1e-4, atol=1e-4)


def test_sample_text_is_tokenized_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes((checkpoint_dir() / "tokenizer.json").read_bytes())
    ids = sample_token_ids(str(tmp_path), 2048)
    assert len(ids) > 512 and max(ids) < 2048 and len(set(ids)) > 100
    assert max(sample_token_ids(str(tmp_path), 300)) < 300, "a model with a smaller vocabulary than its tokenizer"
    for nowhere in ("", str(tmp_path / "missing")):
        assert len(set(sample_token_ids(nowhere, 2048))) == 512


def scaled_checkpoint(source: Path, target: Path, factor_k: float, factor_v: float) -> Path:
    """The same model but for sizes: layer 0's keys and values times factors that its queries and o product undo."""
    tensors = load_file(source / "model.safetensors")
    layer = "model.layers.0.self_attn."
    for name, factor in (("k", factor_k), ("q", 1 / factor_k), ("v", factor_v), ("o", 1 / factor_v)):
        tensors[f"{layer}{name}_proj.weight"] *= factor
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


def test_measured_scales_bring_back_what_a_scale_of_one_loses(checkpoint: Path, tmp_path: Path) -> None:
    """Keys of some hundreds and values of some thousandths: cut off and flushed to zero without scales."""
    path = scaled_checkpoint(checkpoint, tmp_path / "scaled", 256.0, 2.0**-12)
    prompt = [i * 37 % VOCAB for i in range(60)]

    def logits_of(kv_dtype: torch.dtype, measured: bool) -> torch.Tensor:
        model = load_model(path)
        if measured:
            found = set_kv_scales(model, "")
            assert found[0].k > 1 > found[0].v and found == [layer.attention.kv_scales for layer in model.layers]
        return PagedRunner(model, kv_dtype=kv_dtype).step([(PagedSequence(), prompt)])[0]

    want = logits_of(torch.float32, False)
    error = {m: float((logits_of(FP8, m) - want).norm() / want.norm()) for m in (True, False)}
    plain = load_model(checkpoint)
    exact = PagedRunner(plain).step([(PagedSequence(), prompt)])[0]
    rounded = PagedRunner(plain, kv_dtype=FP8).step([(PagedSequence(), prompt)])[0]
    usual = float((rounded - exact).norm() / exact.norm())
    assert error[True] < 1.5 * usual and error[False] > 3 * error[True], (error, usual)


def test_a_wider_cache_needs_no_scales(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    assert all(layer.attention.kv_scales == UNIT_SCALES == KvScales(1.0, 1.0) for layer in model.layers)


def test_engine_with_an_fp8_cache(checkpoint: Path) -> None:
    """A byte a number in the pool; the name in EngineInfo is that of the settings."""
    infos = {}
    for name, dtype in KV_DTYPES.items():
        model = load_model(checkpoint)
        options = EngineOptions(
            engine_dir="", backend="cpu", num_pages=8, page_size=4, max_num_seqs=2, kv_cache_dtype=name
        )
        loaded = LoadedModel(model, model.config, "test")
        _, info = registry.load("backends", "cpu").assemble(loaded, options, lambda *args: None, PhaseTimer())
        infos[name] = info
        assert info.kv_cache_dtype == name == kv_dtype_name(dtype)
        assert (
            info.kv_cache_bytes == 8 * 4 * 2 * 2 * 2 * 16 * dtype.itemsize
        )  # pages, page, K and V, layers, heads, dim
    assert infos["fp8"].kv_cache_bytes * 4 == infos["fp32"].kv_cache_bytes


def test_tokens_do_not_depend_on_the_batch(checkpoint: Path) -> None:
    """Alone, and among others with chunked prefill, prefix hits and preemption: every path reads the same bytes."""
    rng = random.Random(4)
    shared = [rng.randrange(VOCAB) for _ in range(24)]
    prompts = {
        f"r{i}": (shared if i % 3 == 0 else []) + [rng.randrange(VOCAB) for _ in range(rng.choice([1, 5, 13, 40, 70]))]
        for i in range(16)
    }
    requests = {name: greedy(name, prompt, 12) for name, prompt in prompts.items()}
    together = run_all(make_core(checkpoint, kv_cache_dtype="fp8", max_num_batched_tokens=48), list(requests.values()))
    for name, request in requests.items():
        alone = run_all(make_core(checkpoint, kv_cache_dtype="fp8", prefix_caching=False), [request])[name]
        assert tokens_of(together[name]) == tokens_of(alone), name


def test_recall_of_the_builtin_model_at_long_context(tmp_path: Path) -> None:
    samples = tasks.evaluation_set("recall", 2, 0, length=2048)
    with LLM("builtin", precision="fp8", backend="cpu", cache=tmp_path, kv_cache_dtype="fp8", num_pages=400) as llm:
        assert llm.info.kv_cache_dtype == "fp8"
        answers = llm.chat([list(s.messages) for s in samples], SamplingParams(temperature=0.0, max_tokens=16))
    assert [tasks.score(sample, answer.text) for sample, answer in zip(samples, answers, strict=True)] == [True, True]
