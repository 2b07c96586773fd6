"""Quantized checkpoints that are not served: each is refused by name, with what is allowed, before any long work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from quantized_checkpoints import (
    awq,
    awq_section,
    compressed,
    compressed_act_order,
    fp8,
    gptq,
    gptq_section,
)
from safetensors.torch import load_file, save_file
from test_quantized_checkpoints import MODELOPT, kv_scale_tensors, make, opened, request_of, with_tokenizer
from torch import Tensor

from appliance.builder.build import build
from appliance.checkpoint import digest, read_model_config
from appliance.checkpoint.quantized.source import QuantizedTensors
from appliance.engines import EngineStore
from appliance.errors import CheckpointError

torch.set_num_threads(2)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 160,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
HARDWARE = Path(__file__).parent / "hardware"
PACKED = compressed("pack-quantized", strategy="group", group_size=128)[1]
INT8 = compressed("int-quantized")[1]
FLOAT = compressed("float-quantized")[1]


def group(section: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A compressed-tensors section with other fields in its group; "weights.x": of its weights."""
    copy: dict[str, Any] = json.loads(json.dumps(section))
    only = copy["config_groups"]["group_0"]
    for key, value in changes.items():
        part, _, field = key.rpartition("__")
        (only[part] if part else only)[field] = value
    return copy


def two_groups() -> dict[str, Any]:
    copy = group(PACKED)
    copy["config_groups"]["group_1"] = group(PACKED, weights__group_size=32)["config_groups"]["group_0"]
    return copy


# ---------------------------------------------------------------- by the configuration


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"quant_method": "aqlm"}, r"quantized with 'aqlm', allowed: compressed-tensors, awq, gptq, modelopt, fp8"),
        ({}, "'unknown'"),
        (awq_section(16), r"group_size 16, allowed: 32, 64, 128 or -1"),
        (awq_section("128"), "group_size '128'"),
        (awq_section(bits=8), "AWQ in 8 bits, allowed: 4 bits"),
        (awq_section(version="gemv"), "'gemv' layout, allowed: gemm"),
        (awq_section(zero_point=False), "without zero points"),
        (gptq_section(bits=8), "GPTQ in 8 bits, allowed: 4"),
        (gptq_section(bits=3), "GPTQ in 3 bits"),
        (gptq_section(100), "group_size 100"),
        (gptq_section(checkpoint_format="marlin"), "'marlin' layout, allowed: gptq, gptq_v2"),
        (gptq_section(dynamic={".*down.*": {"bits": 8}}), "another bits for .*down"),
        ({**MODELOPT, "quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}, "'NVFP4', allowed: FP8"),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "INT8"},
            "KV cache in 'INT8', allowed: FP8",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"blocks of \[128, 128\]"),
        ({"quant_method": "fp8", "activation_scheme": "none"}, "activation_scheme 'none', allowed: dynamic, static"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "'e5m2'"),
        (PACKED | {"format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized' .* allowed: float-quantized"),
        (PACKED | {"config_groups": {}}, "without config_groups"),
        (PACKED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        (PACKED | {"transform_config": {"a": {}}}, "transforms"),
        (PACKED | {"kv_cache_scheme": {"num_bits": 8, "type": "int", "strategy": "tensor"}}, "kv_cache_scheme"),
        (two_groups(), "2 different ways"),
        (group(PACKED, weights__num_bits=8), "8-bit int weights in the format pack-quantized"),
        (group(PACKED, weights__group_size=256), "group_size 256"),
        (group(PACKED, input_activations={"num_bits": 8}), "INT4 weights with quantized activations"),
        (group(INT8, weights__symmetric=False), "INT8 weights with zero points"),
        (group(INT8, input_activations__symmetric=False), "zero points of activations"),
        (group(INT8, input_activations__dynamic=False), "static scales of activations per token, allowed: dynamic"),
        (group(INT8, input_activations=None), "INT8 weights but other activations"),
        (group(FLOAT, weights__strategy="block"), "FP8 weights with scales per block"),
        (group(FLOAT, input_activations=None), "FP8 weights but other activations"),
        (group(FLOAT, output_activations={"num_bits": 8}), "quantized outputs"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_configuration(
    tmp_path: Path, section: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": section}))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model_config(tmp_path)
    assert "original, unquantized checkpoint" in str(caught.value.hint)


def test_patterns_of_names(tmp_path: Path) -> None:
    def unquantized(section: dict[str, Any]) -> tuple[str, ...]:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": section}))
        facts = read_model_config(tmp_path).quantization
        assert facts is not None
        return facts.unquantized

    ignored = ["lm_head", "re:.*layers\\.1\\..*proj$", "model.layers.0.mlp.down_proj"]
    expected = (
        "layers.1.attention.qkv",
        "layers.1.attention.o",
        "layers.1.mlp.gate_up",
        "layers.*.mlp.down",
        "lm_head",
    )
    assert unquantized(PACKED | {"ignore": ignored}) == expected
    assert unquantized(group(PACKED, targets=["re:.*mlp.*"])) == (
        "layers.*.attention.qkv",
        "layers.*.attention.o",
        "lm_head",
    )
    assert unquantized(awq_section(modules_to_not_convert=["mlp"]))[:2] == ("layers.*.mlp.gate_up", "layers.*.mlp.down")
    inside = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
    only_attention = gptq_section(modules_in_block_to_quantize=inside)
    assert unquantized(only_attention) == ("layers.*.mlp.gate_up", "layers.*.mlp.down", "lm_head")
    excluded = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["model.layers.0*", "lm_head"]}
    assert unquantized(excluded)[0] == "layers.0.attention.qkv"
    with pytest.raises(CheckpointError, match=r"of layer 0, which are one product here, only .*k_proj"):
        unquantized(awq_section(modules_to_not_convert=["q_proj"]))


def test_the_digest_counts_the_file_that_says_how(tmp_path: Path) -> None:
    make(tmp_path, fp8(input_scale=0.01), MODELOPT, file="hf_quant_config.json")
    first = digest(tmp_path).value
    other = {**MODELOPT, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(other))
    assert digest(tmp_path).value != first


# ---------------------------------------------------------------- by the tensors


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints to damage copies of, each made once."""
    makers: dict[str, Callable[[], tuple[Any, ...]]] = {
        "awq": lambda: (awq(), awq_section()),
        "gptq": lambda: (gptq(32), gptq_section(32)),
        "gptq act": lambda: (gptq(32, act_order=True), gptq_section(32, desc_act=True)),
        "packed": lambda: compressed("pack-quantized", strategy="group", group_size=128, symmetric=False),
        "packed act": compressed_act_order,
        "int8": lambda: compressed("int-quantized"),
        "modelopt": lambda: (
            fp8(input_scale=0.01),
            {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"], "kv_cache_quant_algo": "FP8"},
        ),
    }
    known: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in known:
            known[name] = tmp_path_factory.mktemp("sound")
            make(known[name], *makers[name](), extra=kv_scale_tensors() if name == "modelopt" else None)
            with_tokenizer(known[name])
        return known[name]

    return get


def damaged(sound: Path, to: Path, damage: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(sound, to)
    tensors = load_file(to / "model.safetensors")
    damage(tensors)
    save_file(tensors, to / "model.safetensors")
    return to


DOWN = "model.layers.1.mlp.down_proj"
Q = "model.layers.0.self_attn.q_proj"


def put(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return damage


def replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return damage


def drop(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        for name in names:
            del tensors[name]

    return damage


def unquantize(*modules: str) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        for module in modules:
            for name in [name for name in tensors if name.startswith(f"{module}.")]:
                del tensors[name]
            tensors[f"{module}.weight"] = torch.zeros(128, 128, dtype=torch.float16)

    return damage


def reversed_groups(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.g_idx"] = tensors[f"{Q}.g_idx"].flip(0)


EARLY = [
    ("awq", put(f"{DOWN}.scales", 0.0), rf"tensor {DOWN}\.scales: a scale is 0, allowed: finite numbers above zero"),
    ("awq", put(f"{DOWN}.scales", float("nan")), r"a scale is NaN"),
    ("gptq", put(f"{DOWN}.scales", float("inf")), r"a scale is infinite"),
    ("packed", put(f"{DOWN}.weight_scale", -1.0), rf"{DOWN}\.weight_scale: a scale is -1"),
    ("int8", put(f"{DOWN}.weight_scale", 0.0), r"a scale is 0"),
    ("modelopt", put(f"{DOWN}.input_scale", 0.0), rf"{DOWN}\.input_scale: a scale is 0"),
    (
        "modelopt",
        drop("model.layers.1.self_attn.k_proj.k_scale"),
        r"neither .*k_proj\.k_scale nor .*\.k_scale",
    ),
    ("modelopt", put("model.layers.1.self_attn.v_proj.v_scale", float("nan")), r"v_scale is no scale"),
    ("awq", drop(f"{DOWN}.qzeros"), rf"no tensor {DOWN}\.qzeros"),
    ("gptq act", drop(f"{DOWN}.g_idx"), rf"no tensor {DOWN}\.g_idx"),
    ("packed", drop(f"{DOWN}.weight_zero_point"), r"no tensor .*weight_zero_point"),
    ("awq", replace(f"{DOWN}.qweight", lambda t: t.t()), r"qweight .* has shape \[16, 256\], expected \[256, 16\]"),
    ("gptq", replace(f"{DOWN}.scales", lambda t: t[:3]), r"shape \[3, 128\], expected "),
    ("gptq", replace(f"{DOWN}.qweight", lambda t: t.long()), r"dtype int64, allowed: int32"),
    ("int8", replace(f"{DOWN}.weight", lambda t: t.half()), r"dtype float16, allowed: int8"),
    ("awq", unquantize(Q), r"of self_attn\.q_proj, .* of layer 0, .* only self_attn\.k_proj, self_attn\.v_proj is"),
]
WHILE_READING = [
    ("gptq", reversed_groups, rf"{Q}\.g_idx: inputs are not grouped in order"),
    ("gptq act", reversed_groups, r"q_proj and .*v_proj, which are one product here, group their inputs in different"),
    ("gptq act", put(f"{DOWN}.g_idx", 99), r"g_idx: names groups outside of 0 to 7"),
    (
        "packed act",
        replace(f"{DOWN}.weight_g_idx", torch.zeros_like),
        r"weight_g_idx: its groups are not all of 32 inputs",
    ),
    ("packed", put(f"{DOWN}.weight_shape", 128), r"weight_shape: is \[128, 128\]"),
    ("modelopt", replace(f"{DOWN}.weight", lambda t: (t.float() * float("nan")).to(t.dtype)), r"a value is NaN"),
]


@pytest.mark.parametrize(("kind", "damage", "message"), EARLY)
def test_damage_is_found_before_anything_is_hashed_or_written(
    sound: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, damage: Any, message: str
) -> None:
    def hashed(*others: Any, **named: Any) -> None:
        raise AssertionError("long work began")

    monkeypatch.setattr("appliance.checkpoint.digest", hashed)
    path = damaged(sound(kind), tmp_path / "damaged", damage)
    precision = {"int8": "int8", "modelopt": "fp8"}.get(kind, "int4")
    with pytest.raises(CheckpointError, match=message) as caught:
        build(request_of(path, tmp_path / "cache", precision))
    assert caught.value.hint


@pytest.mark.parametrize(("kind", "damage", "message"), WHILE_READING)
def test_damage_that_only_reading_shows(sound: Any, tmp_path: Path, kind: str, damage: Any, message: str) -> None:
    path = damaged(sound(kind), tmp_path / "damaged", damage)
    precision = {"modelopt": "fp8"}.get(kind, "int4")
    with pytest.raises(CheckpointError, match=message):
        build(request_of(path, tmp_path / "cache", precision))
    assert EngineStore(tmp_path / "cache").list_engines() == []


def test_an_index_of_zeros_says_that_nothing_was_reordered(sound: Any, tmp_path: Path) -> None:
    path = damaged(sound("gptq"), tmp_path / "zeros", replace(f"{DOWN}.g_idx", torch.zeros_like))
    read = []
    for checkpoint in (sound("gptq"), path):
        _, _, tensors, specs = opened(checkpoint)
        read.append(tensors.read(next(spec for spec in specs if spec.name == "layers.1.mlp.down")).dequantize())
    assert torch.equal(*read)


def test_a_group_size_that_does_not_divide(sound: Any) -> None:
    _, facts, tensors, specs = opened(sound("awq"))
    odd = [msgspec.structs.replace(spec, shapes=((128, 192),)) for spec in specs if spec.name == "layers.0.mlp.down"]
    with pytest.raises(CheckpointError, match="has 192 inputs, which groups of 128 do not divide"):
        QuantizedTensors(tensors.checkpoint, facts).check(odd)


def test_float32_scales_that_float16_cannot_hold(sound: Any, tmp_path: Path) -> None:
    def wide(value: float) -> Callable[[dict[str, Tensor]], None]:
        def damage(tensors: dict[str, Tensor]) -> None:
            tensors[f"{DOWN}.weight_scale"] = tensors[f"{DOWN}.weight_scale"].float()
            tensors[f"{DOWN}.weight_scale"][0, 0] = value

        return damage

    for value, name in ((1e5, "large"), (1e-9, "small")):
        path = damaged(sound("packed"), tmp_path / name, wide(value))
        _, _, tensors, specs = opened(path)
        down = next(spec for spec in specs if spec.name == "layers.1.mlp.down")
        if value > 1:
            with pytest.raises(CheckpointError, match=r"weight_scale: a scale is 1e\+05, allowed: up to 65504"):
                tensors.read(down)
        else:
            assert float(tensors.read(down).scales[0, 0]) == 2**-24
