"""Every architecture against `transformers` on the same small random weights, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import PagedRunner, PagedSequence, load_model, make_checkpoint
from msgspec.structs import replace
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from appliance import registry
from appliance.checkpoint import read_model_config
from appliance.distributed import TensorParallel
from appliance.errors import CheckpointError, EngineDamagedError, HardwareError
from appliance.layers.attention import ForwardContext

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


CASES = {
    "llama": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama3": LlamaConfig(
        **SHAPE,
        **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "llama-linear": LlamaConfig(**SHAPE, **rope("linear", factor=4.0)),
    "llama-dynamic": LlamaConfig(**SHAPE, **rope("dynamic", factor=4.0)),
    "llama-yarn": LlamaConfig(**SHAPE, **rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "mistral": MistralConfig(**SHAPE, sliding_window=13),
    "mistral-full": MistralConfig(**SHAPE, sliding_window=None, head_dim=32),
    "qwen2-tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2-window": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=13, max_window_layers=1),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "qwen3-tied-window": Qwen3Config(
        **SHAPE, head_dim=32, tie_word_embeddings=True, use_sliding_window=True, sliding_window=13, max_window_layers=2
    ),
}
PROMPT = torch.randint(3, 128, (90,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    path = tmp_path_factory.mktemp(request.param)
    return request.param, path, make_checkpoint(path, CASES[request.param])


@torch.no_grad()
def reference_logits(hf_model: Any, tokens: list[int]) -> torch.Tensor:
    return hf_model(torch.tensor([tokens])).logits[0]


def test_logits_and_greedy_continuation_equal_transformers(case: tuple[str, Path, Any]) -> None:
    _, path, hf_model = case
    runner = PagedRunner(load_model(path))
    expected = reference_logits(hf_model, PROMPT)
    logits = runner.step([(PagedSequence(), PROMPT)])[0]
    assert expected.std() > 0.3, "logits too flat to show a difference"
    assert (logits - expected).abs().max() < 1e-4

    tokens = hf_model.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert runner.greedy(PROMPT, 24, chunk=17) == tokens[0, len(PROMPT) :].tolist()


def test_sequences_of_a_mixed_step_do_not_see_each_other(case: tuple[str, Path, Any]) -> None:
    """A decode token, a chunk in mid-prompt and a fresh prompt in one pass."""
    _, path, hf_model = case
    runner = PagedRunner(load_model(path))
    decoding, chunked, fresh = PagedSequence(), PagedSequence(), PagedSequence()
    prompts = PROMPT[:40], PROMPT[30:90], PROMPT[5:12]
    runner.step([(decoding, prompts[0][:-1]), (chunked, prompts[1][:25])])
    got = runner.step([(decoding, prompts[0][-1:]), (chunked, prompts[1][25:]), (fresh, prompts[2])])
    for logits, prompt in zip(got, prompts, strict=True):
        assert (logits - reference_logits(hf_model, list(prompt))[-len(logits) :]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama3", {"rope_scaling": None}),
        ("llama-linear", {"rope_scaling": None}),
        ("llama-yarn", {"rope_scaling": None}),
        ("llama", {"rope_theta": 10000.0}),
        ("mistral", {"sliding_window": 14}),
        ("mistral", {"sliding_window": None}),
        ("qwen2-window", {"sliding_window_layers": None}),
        ("qwen2-window", {"sliding_window_layers": (2,)}),
    ],
)
def test_the_comparison_notices_a_wrong_configuration(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    hf_model = make_checkpoint(tmp_path, CASES[name])
    config = replace(read_model_config(tmp_path), **change)
    logits = PagedRunner(load_model(tmp_path, config=config)).step([(PagedSequence(), PROMPT)])[0]
    assert (logits - reference_logits(hf_model, PROMPT)).abs().max() > 1e-2


@pytest.mark.parametrize("scheme_name", sorted(registry.plugins("quantization")))
def test_weight_specs_name_exactly_the_parameters(case: tuple[str, Path, Any], scheme_name: str) -> None:
    """Names and shapes of engine tensors are those of the module, biases and tied output included."""
    _, path, _ = case
    config = read_model_config(path)
    plugin = registry.load("models", registry.architectures()[config.architecture].name)
    parameters: dict[str, Any] = {"unquantized": ["layers.1.*"]} if scheme_name != "none" else {}
    parameters |= {"group_size": 16} if scheme_name.startswith("int4") else {}
    scheme = registry.load("quantization", scheme_name).Scheme(parameters)
    with torch.device("meta"):
        model = plugin.Model(config, scheme, torch.bfloat16)
    expected: dict[str, tuple[int, ...]] = {}
    for spec in plugin.weight_specs(config):
        rows = sum(shape[0] for shape in spec.shapes)
        if spec.kind == "plain":
            expected[spec.name] = (rows, *spec.shapes[0][1:])
            assert spec.shard == "none"
            continue
        for suffix, (shape, _) in scheme.of(spec.name).tensors(rows, spec.shapes[0][1], torch.bfloat16).items():
            expected[f"{spec.name}.{suffix}"] = shape
        if spec.bias_sources:
            expected[f"{spec.name}.bias"] = (rows,)
        shards = {"lm_head": "vocabulary"} | dict.fromkeys((".o", ".down"), "row")
        assert spec.shard == next((kind for end, kind in shards.items() if spec.name.endswith(end)), "column")
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected


def test_tied_output_is_an_entry_of_its_own(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, CASES["qwen2-tied"])
    config = read_model_config(tmp_path)
    specs = {spec.name: spec for spec in registry.load("models", "qwen2").weight_specs(config)}
    assert specs["lm_head"].sources == specs["embedding.weight"].sources == ("model.embed_tokens.weight",)
    assert specs["lm_head"].kind == "linear"


def test_bfloat16_engine_in_float32_equals_rounded_weights(tmp_path: Path) -> None:
    """The CPU backend's way: weights stored in bfloat16, upcast at load, arithmetic in float32."""
    hf_model = make_checkpoint(tmp_path, CASES["llama"])
    model = load_model(tmp_path, stored_dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        for parameter in hf_model.parameters():  # and not the buffers: rotary frequencies stay float32
            parameter.copy_(parameter.bfloat16())
    logits = PagedRunner(model).step([(PagedSequence(), PROMPT)])[0]
    assert (logits - reference_logits(hf_model, PROMPT)).abs().max() < 1e-4


def test_padding_tokens_write_nothing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, CASES["llama"])
    runner = PagedRunner(load_model(tmp_path))
    runner.step([(PagedSequence(), PROMPT[:7])])
    before = [cache.clone() for cache in runner.caches]
    sequence = PagedSequence()
    metadata = runner.metadata([(sequence, [])], [])
    metadata.num_tokens, metadata.slot_mapping = 3, torch.full((3,), -1)
    zeros = torch.zeros(3, dtype=torch.int64)
    hidden = runner.model(zeros, ForwardContext(zeros, runner.caches, metadata, runner.attention))
    assert hidden.isfinite().all()
    for cache, old in zip(runner.caches, before, strict=True):
        assert torch.equal(cache, old)


class TestLoading:
    def model(self, tmp_path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
        make_checkpoint(tmp_path, CASES["llama"])
        config = read_model_config(tmp_path)
        plugin = registry.load("models", "llama")
        with torch.device("meta"):
            model = plugin.Model(config, registry.load("quantization", "none").Scheme(), torch.float32)
        return model, {name: torch.zeros(p.shape) for name, p in model.named_parameters()}

    def test_missing_tensor(self, tmp_path: Path) -> None:
        model, tensors = self.model(tmp_path)
        del tensors["layers.1.mlp.down.weight"]
        with pytest.raises(EngineDamagedError, match=r"layers\.1\.mlp\.down\.weight"):
            model.load(tensors.items(), "cpu")

    def test_unknown_tensor(self, tmp_path: Path) -> None:
        model, tensors = self.model(tmp_path)
        with pytest.raises(EngineDamagedError, match="extra"):
            model.load([*tensors.items(), ("extra", torch.zeros(1))], "cpu")

    def test_wrong_shape(self, tmp_path: Path) -> None:
        model, tensors = self.model(tmp_path)
        tensors["norm.weight"] = torch.zeros(63)
        with pytest.raises(EngineDamagedError, match=r"\[63\], expected \[64\]"):
            model.load(tensors.items(), "cpu")

    def test_wrong_dtype(self, tmp_path: Path) -> None:
        model, tensors = self.model(tmp_path)
        tensors["norm.weight"] = tensors["norm.weight"].to(torch.float8_e4m3fn)
        with pytest.raises(EngineDamagedError, match=r"float8_e4m3fn, expected torch\.float32"):
            model.load(tensors.items(), "cpu")


def test_preparing_again_only_resizes_the_rotary_table(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, CASES["llama3"])
    model = load_model(tmp_path)
    before = PagedRunner(model).step([(PagedSequence(), PROMPT[:30])])[0]
    model.prepare(30)
    assert model.rotary.cos_sin.shape == (30, 16)
    assert torch.equal(PagedRunner(model).step([(PagedSequence(), PROMPT[:30])])[0], before)


def test_what_the_layers_cannot_express_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, CASES["llama"])
    config = read_model_config(tmp_path)
    scheme = registry.load("quantization", "none").Scheme()
    build = registry.load("models", "llama").Model
    with torch.device("meta"), pytest.raises(CheckpointError, match="gelu"):
        build(replace(config, hidden_act="gelu"), scheme, torch.float32)
    with torch.device("meta"), pytest.raises(HardwareError, match=r"2 key/value heads .* 3 ranks"):
        build(config, scheme, torch.float32, TensorParallel(rank=0, size=3))
