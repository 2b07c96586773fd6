"""An engine's predictions against its checkpoint's: measured block by block, and judged."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
import torch
from model_helpers import engine_tensors, load_model, make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from appliance import builtin, registry
from appliance.builder.quality import Clock, Subject, measure_quality
from appliance.builder.quality_text import BUILTIN_TEXT, SHIPPED_TEXT, default_prompts, windows
from appliance.checkpoint import Checkpoint, read_model_config
from appliance.engines.quality import Quality, judge, numbers
from appliance.errors import EngineQualityError
from appliance.runtime.divergence import Divergence
from appliance.runtime.prompt_batch import prompt_context

CPU = torch.device("cpu")
TRAINED = builtin.checkpoint_dir()


def architecture_of(checkpoint: Path) -> ModuleType:
    return registry.load("models", registry.architectures()[read_model_config(checkpoint).architecture].name)


def measure(
    checkpoint: Path,
    scheme: Any,
    rank_file: Path,
    seconds: float = 60.0,
    clock: Clock = time.monotonic,
    device: str = "cpu",
) -> Quality:
    """Of an engine that a builder would write with this scheme."""
    config, architecture = read_model_config(checkpoint), architecture_of(checkpoint)
    specs = architecture.weight_specs(config)
    stored: dict[str, Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        stored |= load_file(file)
    if not rank_file.exists():
        tensors = engine_tensors(specs, stored, scheme, torch.bfloat16)
        save_file({name: tensor.clone() for name, tensor in tensors}, rank_file)
    subject = Subject(config, architecture, specs, scheme, torch.bfloat16, torch.device(device))
    with Checkpoint(checkpoint) as opened:
        return measure_quality([rank_file], checkpoint, opened, subject, seconds, clock)


def fp8() -> Any:
    return registry.load("quantization", "fp8").Scheme()


class Damaged:
    """A scheme that loses the sign of every eighth row."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def of(self, name: str) -> Any:
        return self

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = self._inner.quantize(weight)
        stored["weight_scale"][::8] *= -1
        return stored


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random")
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    make_checkpoint(path, config)
    return path


def test_block_by_block_is_the_whole_model(tmp_path: Path) -> None:
    """The same numbers as both models loaded whole, prompt by prompt."""
    found = measure(TRAINED, fp8(), tmp_path / "rank.safetensors")
    config = read_model_config(TRAINED)
    text, prompts = default_prompts(TRAINED, config.vocab_size, 1024, 513)
    expected = Divergence()
    models = load_model(TRAINED), load_model(TRAINED, scheme="fp8", stored_dtype=torch.bfloat16)
    with torch.inference_mode():
        for prompt in prompts:
            ids, rows = torch.tensor(prompt.ids), torch.arange(prompt.positions)
            hidden = [m(ids, prompt_context(config, [len(ids)], torch.float32, CPU)) for m in models]
            logits = [model.logits(h[rows]) for model, h in zip(models, hidden, strict=True)]
            expected.add(logits[0], logits[1], ids[rows + 1])
    assert found.text == text == BUILTIN_TEXT and found.note == "" and found.reference == "float32"
    assert found.tokens == expected.positions >= 1024
    assert found.kl_divergence == pytest.approx(expected.kl_divergence, rel=0.02, abs=1e-7)
    assert found.top1_agreement == pytest.approx(expected.top1_agreement, abs=0.01)
    assert expected.top1_agreement > 0.9
    assert found.reference_perplexity == pytest.approx(expected.reference_perplexity, rel=1e-4)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    assert expected.reference_perplexity < config.vocab_size / 2, "so that it is judged"


def test_a_damaged_quantization_is_seen_and_refused(tmp_path: Path) -> None:
    good = measure(TRAINED, fp8(), tmp_path / "good.safetensors")
    bad = measure(TRAINED, Damaged(fp8()), tmp_path / "bad.safetensors")
    assert good.kl_divergence is not None and bad.kl_divergence is not None
    assert good.kl_divergence < 0.05 and bad.kl_divergence > 1
    vocab = read_model_config(TRAINED).vocab_size
    assert judge(good, 0.1, vocab, "it") == msgspec.structs.replace(good, limit=0.1)
    with pytest.raises(EngineQualityError, match=rf"it differs too much.*KL {bad.kl_divergence:.3g} .*allows KL 0\.1"):
        judge(bad, 0.1, vocab, "it")


def test_random_weights_are_measured_but_not_judged(tmp_path: Path, random_checkpoint: Path) -> None:
    found = measure(random_checkpoint, Damaged(fp8()), tmp_path / "rank.safetensors")
    assert found.kl_divergence is not None and found.kl_divergence > 0.1
    assert found.tokens == 1020  # of four prompts, each as long as the model allows
    judged = judge(found, 0.1, 512, "it")
    assert judged.limit is None and "does not predict" in judged.note
    broken = msgspec.structs.replace(found, kl_divergence=math.inf)
    with pytest.raises(EngineQualityError, match="not finite"):
        judge(broken, None, 512, "it")


def test_a_slow_machine_compares_fewer_tokens_or_says_that_it_does_not(tmp_path: Path) -> None:
    """By a clock that goes on by a second whenever somebody looks."""
    whole = measure(TRAINED, fp8(), tmp_path / "rank.safetensors")
    fewer = measure(TRAINED, fp8(), tmp_path / "rank.safetensors", seconds=58, clock=itertools.count().__next__)
    assert fewer.note == "" and 32 <= fewer.tokens < whole.tokens
    assert fewer.kl_divergence is not None and fewer.kl_divergence < 0.05
    none = measure(TRAINED, fp8(), tmp_path / "rank.safetensors", seconds=1, clock=itertools.count().__next__)
    assert none.tokens == 0 and none.kl_divergence is None and none.note.startswith("not measured: on this machine")
    assert judge(none, 0.1, 2048, "it") is none and numbers(none) == none.note


def test_prompts(random_checkpoint: Path, tmp_path: Path) -> None:
    text, prompts = default_prompts(TRAINED, 2048, 300, 200)
    assert text == BUILTIN_TEXT and sum(p.positions for p in prompts) >= 300
    assert all(len(p.ids) <= 200 and p.positions == len(p.ids) - 1 for p in prompts)
    assert all(answer.start > 0 and answer.stop == p.positions for p in prompts for answer in p.answers[-1:])
    assert all(len(p.answers) == 1 for p in prompts), "one turn of the assistant each"
    assert default_prompts(TRAINED, 2048, 300, 200) == (text, prompts)
    _, others = default_prompts(TRAINED, 2048, 300, 200, seed=1)
    assert [p.ids for p in others] != [p.ids for p in prompts]
    text, prompts = default_prompts(tmp_path, 100, 300, 200)
    assert "spread" in text and {t for p in prompts for t in p.ids} <= set(range(100))
    assert [len(p.ids) for p in windows(list(range(401)), 200)] == [200, 200]
    copied = tmp_path / "tokenizer.json"
    copied.write_text((TRAINED / "tokenizer.json").read_text() + "\n")  # another tokenizer, then
    text, prompts = default_prompts(tmp_path, 2048, 300, 200)
    assert text == SHIPPED_TEXT and [p.positions for p in prompts] == [199, 100] and not prompts[0].answers


@pytest.mark.gpu
@pytest.mark.parametrize(
    # Three times what an H200 gave: 0.016, 0.0024, 0.071.
    ("scheme", "most"),
    [("fp8", 0.05), ("int8_smoothquant", 0.01), ("int4_awq", 0.2), ("none", 0.01)],
)
def test_on_a_gpu_kernels_give_what_the_cpu_gives(tmp_path: Path, scheme: str, most: float) -> None:
    """The engine's own kernels against the checkpoint in its own dtype; weights rounded to nearest."""
    plugin = registry.load("quantization", scheme).Scheme()
    on_cpu = measure(TRAINED, plugin, tmp_path / "rank.safetensors")
    on_gpu = measure(TRAINED, plugin, tmp_path / "rank.safetensors", device="cuda")
    assert on_gpu.reference == "bfloat16" and on_gpu.tokens == on_cpu.tokens
    assert on_gpu.kl_divergence is not None and on_gpu.kl_divergence < most
    assert on_gpu.top1_agreement is not None and on_gpu.top1_agreement > 0.85
