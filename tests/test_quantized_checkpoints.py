"""Checkpoints that others quantized: what is read is bit for bit what they stand for, engines compute with it as
transformers does with the dequantized model, profiles are chosen by what they are, and bad ones are refused early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import PagedRunner, PagedSequence, make_checkpoint
from quantized_checkpoints import (
    Quantizer,
    awq,
    awq_section,
    compressed,
    compressed_act_order,
    fp8,
    gptq,
    gptq_section,
    quantize_checkpoint,
)
from safetensors.torch import load_file
from torch import Tensor

from appliance import registry
from appliance.builder.build import build
from appliance.builder.request import BuildRequest, key_of
from appliance.checkpoint import Checkpoint, read_model_config
from appliance.checkpoint.quantized import LAYOUTS as LAYOUTS_READ
from appliance.checkpoint.quantized.layout import Layer
from appliance.checkpoint.quantized.source import QuantizedTensors
from appliance.engines.manifest import read_manifest
from appliance.engines.published import scheme_of_published
from appliance.errors import EngineBuildError
from appliance.layers.attention import Attention
from appliance.layers.decoder import Decoder
from appliance.runtime.kv_scales import set_kv_scales
from appliance.types import ModelConfig, Quantization

torch.set_num_threads(2)

SHAPE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
PROMPT = [3, 77, 12, 150, 9, 41, 8, 120, 5, 66]
MODELOPT = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": {"quant_algo": "FP8"}}


def hf_config(architecture: str, **changes: Any) -> Any:
    import transformers

    values = SHAPE | {"tie_word_embeddings": False} | changes
    return getattr(transformers, f"{architecture}Config")(**values)


def make(path: Path, quantizer: Quantizer, section: dict[str, Any], *, architecture: str = "Llama", **how: Any) -> Any:
    changes = how.pop("config", {})
    model = make_checkpoint(path, hf_config(architecture, **changes))
    return quantize_checkpoint(path, model, quantizer, section, **how)


def kv_scale_tensors() -> dict[str, Tensor]:
    names = [f"model.layers.{i}.self_attn.{x}_proj.{x}_scale" for i in range(2) for x in "kv"]
    return {name: torch.tensor(0.25 + 0.5 * i) for i, name in enumerate(names)}


# name -> (quantizer, section, what else of `make`)
LAYOUTS: dict[str, Callable[[], tuple[Quantizer, dict[str, Any], dict[str, Any]]]] = {
    "awq": lambda: (awq(), awq_section(), {}),
    "awq, groups of 32, Qwen2": lambda: (awq(32), awq_section(32), {"architecture": "Qwen2"}),
    "awq, one group, older file": lambda: (
        awq(-1),
        {"w_bit": 4, "q_group_size": -1, "version": "GEMM", "zero_point": True},
        {"file": "quant_config.json"},
    ),
    "gptq": lambda: (gptq(), gptq_section(), {}),
    "gptq, older file": lambda: (
        gptq(64),
        {"bits": 4, "group_size": 64, "desc_act": False, "sym": True},
        {"file": "quantize_config.json"},
    ),
    "gptq, one group": lambda: (gptq(-1), gptq_section(-1, desc_act=True), {}),
    "gptq v2, asymmetric, Qwen3": lambda: (
        gptq(64, v2=True, symmetric=False),
        gptq_section(64, sym=False, checkpoint_format="gptq_v2"),
        {"architecture": "Qwen3", "config": {"tie_word_embeddings": True}},
    ),
    "gptq, act-order": lambda: (gptq(32, act_order=True), gptq_section(32, desc_act=True), {"architecture": "Qwen2"}),
    "gptq, one kind of layer and the head left alone": lambda: (
        gptq(),
        gptq_section(dynamic={"-:.*down_proj.*": {}}),
        {"plain": ("lm_head", "down_proj")},
    ),
    "gptq, the head too": lambda: (gptq(), gptq_section(lm_head=True), {"plain": ()}),
    "compressed-tensors int4": lambda: (*compressed("pack-quantized", strategy="group", group_size=128), {}),
    "compressed-tensors int4, asymmetric, Mistral": lambda: (
        *compressed("pack-quantized", strategy="group", group_size=32, symmetric=False),
        {"architecture": "Mistral"},
    ),
    "compressed-tensors int4 per channel": lambda: (*compressed("pack-quantized", strategy="channel"), {}),
    "compressed-tensors int4, act-order": lambda: (*compressed_act_order(), {}),
    "compressed-tensors int8": lambda: (*compressed("int-quantized"), {}),
    "compressed-tensors int8 per tensor, Qwen2": lambda: (
        *compressed("int-quantized", strategy="tensor"),
        {"architecture": "Qwen2"},
    ),
    "compressed-tensors fp8": lambda: (*compressed("float-quantized"), {}),
    "compressed-tensors fp8, static": lambda: (
        *compressed("float-quantized", strategy="tensor", static_input=True),
        {"architecture": "Qwen3"},
    ),
    "fp8": lambda: (fp8(), {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}, {}),
    "modelopt": lambda: (
        fp8(input_scale=0.01),
        {**MODELOPT, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_*"], "kv_cache_quant_algo": "FP8"}},
        {"file": "hf_quant_config.json", "extra": kv_scale_tensors()},
    ),
    "modelopt in config.json, per channel": lambda: (
        fp8(per_channel=True),
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "ignore": ["lm_head"]},
        {},
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A checkpoint of a layout and the transformers model that it stands for, each made once."""
    known: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in known:
            path = tmp_path_factory.mktemp("checkpoint")
            quantizer, section, how = LAYOUTS[name]()
            known[name] = (path, make(path, quantizer, section, **how))
        return known[name]

    return get


def opened(path: Path) -> tuple[ModelConfig, Quantization, QuantizedTensors, list[Any]]:
    config = read_model_config(path)
    assert config.quantization is not None
    plugin = registry.load("models", registry.architectures()[config.architecture].name)
    return (
        config,
        config.quantization,
        QuantizedTensors(Checkpoint(path), config.quantization),
        plugin.weight_specs(config),
    )


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_are_bit_for_bit_what_the_checkpoint_stands_for(made: Any, name: str) -> None:
    path, model = made(name)
    _, _, tensors, specs = opened(path)
    tensors.check(specs)
    tensors.check_scales(specs)
    state = model.state_dict()
    quantized = [spec for spec in specs if tensors.holds(spec)]
    assert len(quantized) >= 6
    for spec in quantized:
        weight = tensors.read(spec)
        assert torch.equal(weight.dequantize(), torch.cat([state[source] for source in spec.sources])), spec.name
    plain = [spec for spec in specs if spec.kind == "linear" and not tensors.holds(spec)]
    assert all(source in tensors.checkpoint.tensors for spec in plain for source in spec.sources)


def test_the_order_of_a_word_by_hand() -> None:
    """As AutoAWQ's and AutoGPTQ's own sources have it: eight outputs interleaved, eight inputs in order."""
    words = {"qweight": torch.full((128, 1), 0x75316420), "qzeros": torch.full((1, 1), 0x11111111)}
    tensors = {f"m.{key}": word.to(torch.int32) for key, word in words.items()} | {"m.scales": torch.ones(1, 8).half()}
    layer = Layer("m", (8, 128), tensors.__getitem__, frozenset(("qweight", "qzeros", "scales")))
    of_awq = LAYOUTS_READ["awq"].read(layer, FACTS["awq"]).dequantize()
    assert torch.equal(of_awq, (torch.arange(8) - 1.0).unsqueeze(1).expand(8, 128))
    tensors["m.qweight"] = torch.full((16, 8), 0x76543210, dtype=torch.int32)
    of_gptq = LAYOUTS_READ["gptq"].read(layer, FACTS["gptq, the head too"]).dequantize()
    assert torch.equal(of_gptq, (torch.arange(128) % 8 - 2.0).expand(8, 128)), "zero points are stored less one"


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_configuration_alone_says_the_same_as_the_weights(made: Any, name: str, tmp_path: Path) -> None:
    """What a start knows of a hub model before its weights are downloaded."""
    path, _ = made(name)
    for file in path.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert read_model_config(tmp_path).quantization == read_model_config(path).quantization


FACTS = {
    "awq": Quantization("awq", "gemm", "int4", group_size=128, symmetric=False, unquantized=("lm_head",)),
    "awq, one group, older file": Quantization(
        "awq", "gemm", "int4", group_size=128, symmetric=False, unquantized=("lm_head",)
    ),
    "gptq, act-order": Quantization("gptq", "gptq", "int4", group_size=32, act_order=True, unquantized=("lm_head",)),
    "gptq, one kind of layer and the head left alone": Quantization(
        "gptq", "gptq", "int4", group_size=128, unquantized=("layers.*.mlp.down", "lm_head")
    ),
    "gptq, the head too": Quantization("gptq", "gptq", "int4", group_size=128),
    "compressed-tensors int8": Quantization("compressed-tensors", "int-quantized", "int8", unquantized=("lm_head",)),
    "compressed-tensors fp8, static": Quantization(
        "compressed-tensors", "float-quantized", "fp8", static_input=True, unquantized=("lm_head",)
    ),
    "modelopt": Quantization("modelopt", "fp8", "fp8", static_input=True, kv_cache="fp8", unquantized=("lm_head",)),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts(made: Any, name: str) -> None:
    assert read_model_config(made(name)[0]).quantization == FACTS[name]


def test_static_scales_of_a_fused_product_are_the_largest(made: Any) -> None:
    path, _ = made("modelopt")
    _, _, tensors, specs = opened(path)
    qkv = next(spec for spec in specs if spec.name == "layers.0.attention.qkv")
    weight = tensors.read(qkv)
    stored = [tensors.checkpoint.read(source.replace(".weight", ".input_scale")) for source in qkv.sources]
    assert weight.input_scale.tolist() == [max(float(scale) for scale in stored)]  # type: ignore[union-attr]


def test_scales_of_the_kv_cache(made: Any) -> None:
    config, _, tensors, _ = opened(made("modelopt")[0])
    assert tensors.kv_scales(config.num_hidden_layers) == ((0.25, 0.75), (1.25, 1.75))
    assert opened(made("fp8")[0])[2].kv_scales(2) is None


def test_an_fp8_kv_cache_without_scales_is_measured_as_any(tmp_path: Path) -> None:
    section = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"], "kv_cache_quant_algo": "FP8"}
    make(tmp_path, fp8(input_scale=0.01), section)
    assert opened(tmp_path)[2].kv_scales(2) is None


# ---------------------------------------------------------------- engines


def with_tokenizer(path: Path) -> Path:
    from tokenizers import Tokenizer, models

    vocabulary = {chr(33 + i): i for i in range(SHAPE["vocab_size"])}
    Tokenizer(models.WordLevel(vocabulary, unk_token="!")).save(str(path / "tokenizer.json"))
    return path


def request_of(path: Path, cache: Path, precision: str, **changes: Any) -> BuildRequest:
    return BuildRequest(
        checkpoint=str(path),
        cache=str(cache),
        precision=precision,
        backend="cpu",
        **changes,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("name", "precision", "scheme", "parameters"),
    [
        ("awq", "int4", "int4_awq", {"group_size": 128, "head": "bf16", "unquantized": ["lm_head"]}),
        ("gptq, act-order", "int4", "int4_gptq", {"group_size": 32, "act_order": True}),
        ("gptq, the head too", "int4", "int4_gptq", {"head": "int4", "unquantized": []}),
        ("compressed-tensors int8 per tensor, Qwen2", "int8", "int8_smoothquant", {"head": "bf16"}),
        ("compressed-tensors fp8", "fp8", "fp8", {"unquantized": ["lm_head"]}),
        ("modelopt", "fp8", "fp8", {"static_input": True}),
    ],
)
def test_an_engine_is_built_and_checked(
    made: Any, tmp_path: Path, name: str, precision: str, scheme: str, parameters: dict[str, Any]
) -> None:
    path = with_tokenizer(made(name)[0])
    engine = build(request_of(path, tmp_path, precision))
    manifest = read_manifest(engine)
    assert manifest.scheme == scheme
    assert parameters.items() <= manifest.key_inputs.scheme_parameters.items()
    assert len([check for check in manifest.self_check if check.passed and "checkpoint tensors" in check.name]) == 8
    assert manifest.quality is None, "its numbers are the checkpoint's own"
    assert key_of(request_of(path, tmp_path, precision)) == manifest.key
    _, _, tensors, specs = opened(path)
    stored, holder = load_file(engine / manifest.rank_files[0]), registry.load("quantization", scheme)
    for spec in filter(tensors.holds, specs):
        for suffix, tensor in holder.Scheme(manifest.key_inputs.scheme_parameters).store(tensors.read(spec)).items():
            assert torch.equal(stored[f"{spec.name}.{suffix}"], tensor), spec.name


def test_scales_of_the_kv_cache_reach_the_layers(made: Any, tmp_path: Path) -> None:
    path = with_tokenizer(made("modelopt")[0])
    engine = build(request_of(path, tmp_path, "fp8"))
    model = engine_of(path)
    scales = set_kv_scales(model, str(engine))
    assert [(scale.k, scale.v) for scale in scales] == [(0.25, 0.75), (1.25, 1.75)]
    assert [layer.kv_scales for layer in model.modules() if isinstance(layer, Attention)] == scales


def test_no_checkpoint_is_quantized_twice(made: Any, tmp_path: Path) -> None:
    path = with_tokenizer(made("awq")[0])
    with pytest.raises(
        EngineBuildError, match=r"already quantized to int4 \(awq, gemm, groups of 128\).* int8; allowed"
    ):
        build(request_of(path, tmp_path, "int8"))


# ---------------------------------------------------------------- what is computed


def engine_of(path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Decoder:
    """The engine's model, loaded from what a builder would store."""
    config, facts, tensors, specs = opened(path)
    name, parameters = scheme_of_published(facts, facts.precision)
    scheme = registry.load("quantization", name).Scheme(parameters)
    checkpoint = tensors.checkpoint

    def stored() -> Iterator[tuple[str, Tensor]]:
        for spec in specs:
            plain = torch.cat([checkpoint.read(source) for source in spec.sources]) if not tensors.holds(spec) else None
            if plain is not None and spec.kind == "plain":
                yield spec.name, plain
                continue
            of = scheme.of(spec.name)
            for suffix, tensor in (of.store(tensors.read(spec)) if plain is None else of.quantize(plain)).items():
                yield f"{spec.name}.{suffix}", tensor
            if spec.bias_sources:
                yield f"{spec.name}.bias", torch.cat([checkpoint.read(source) for source in spec.bias_sources])

    plugin = registry.load("models", registry.architectures()[config.architecture].name)
    with torch.device("meta"):
        model: Decoder = plugin.Model(config, scheme, dtype)
    model.load(stored(), device)
    model.prepare(config.max_position_embeddings)
    return model


@contextmanager
def rounded_inputs(model: Any, facts: Quantization, tensors: QuantizedTensors) -> Iterator[None]:
    """The transformers model with the inputs of its quantized layers rounded as the checkpoint asks for."""

    def hook(scale: float | None) -> Callable[[Any, tuple[Tensor]], tuple[Tensor]]:
        def round_input(module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
            x, largest = inputs[0], 448.0 if facts.precision == "fp8" else 127.0
            scales = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / largest if scale is None else torch.tensor(scale)
            scaled = (x / scales).clamp(-largest, largest)
            rounded = scaled.to(torch.float8_e4m3fn).float() if facts.precision == "fp8" else scaled.round()
            return (rounded * scales,)

        return round_input

    handles = []
    groups = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    for name, module in model.named_modules():
        group = next((group for group in groups if name.endswith(group)), None)
        if group is None or facts.precision == "int4":
            continue
        parent = name.rpartition(".")[0]
        read = tensors.checkpoint.read
        scale = max(float(read(f"{parent}.{part}.input_scale")) for part in group) if facts.static_input else None
        handles.append(module.register_forward_pre_hook(hook(scale)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_those_of_the_dequantized_model(made: Any, name: str) -> None:
    path, reference = made(name)
    _, facts, tensors, _ = opened(path)
    with torch.inference_mode(), rounded_inputs(reference, facts, tensors):
        expected = reference(torch.tensor([PROMPT])).logits[0]
        got = PagedRunner(engine_of(path)).step([(PagedSequence(), PROMPT)])[0]
    error = float((got - expected).norm() / expected.norm())
    assert error < (1e-5 if facts.precision == "int4" else 1e-2), error
