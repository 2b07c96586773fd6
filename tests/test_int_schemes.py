"""INT4 and INT8 engines on the CPU: what they store and compute, on every architecture, and what is in their keys."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from model_helpers import PagedRunner, PagedSequence, load_model, make_checkpoint
from safetensors.torch import load_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from appliance import registry
from appliance.bench.vocabulary import write_tokenizer
from appliance.builder import BuildRequest, key_of
from appliance.builder.build import build
from appliance.builder.plain import PlainTensors
from appliance.builder.request import key_inputs_of
from appliance.engines import parameters_of, read_manifest
from appliance.engines.manifest import write_manifest
from appliance.errors import EngineBuildError, EngineDamagedError
from appliance.kernels.int4_linear import int4_linear
from appliance.quantization import int4_awq, int4_gptq, int8_smoothquant
from appliance.quantization.int4_storage import from_stored, to_stored
from appliance.quantization.scheme import PrecisionScheme
from appliance.quantization.weights import (
    GroupedWeight,
    round_to_nearest,
    round_to_nearest_fp8,
    round_to_nearest_int8,
)
from appliance.runtime.loading import load_engine
from appliance.types import EngineOptions

torch.set_num_threads(1)
SHAPE: dict[str, Any] = {
    "vocab_size": 300,  # no multiple of a group
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ARCHITECTURES = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=13),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
}
GROUPS = {"group_size": 32}
SCHEMES: dict[str, PrecisionScheme] = {
    "int4_awq": int4_awq.Scheme(GROUPS),
    "int4_gptq, ordered": int4_gptq.Scheme(GROUPS | {"act_order": True}),
    "int4, one group, fp8 head": int4_awq.Scheme({"group_size": 0, "head": "fp8"}),
    "int8": int8_smoothquant.Scheme(),
    "int8, partly": int8_smoothquant.Scheme({"unquantized": ["layers.0.attention.*", "lm_head"]}),
}
PROMPT = torch.randint(3, 100, (40,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp(request.param)
    return path, ARCHITECTURES[request.param]


# ---------------------------------------------------------------- models


def engine_name(module: str) -> str:
    """Of the engine's layer that a module of `transformers` is a part of."""
    names = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o"}
    names |= {"gate_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down"}
    if module == "lm_head":
        return module
    _, layers, index, block, last = module.split(".")
    return f"{layers}.{index}.{'attention' if block == 'self_attn' else 'mlp'}.{names[last]}"


def int8_inputs(x: torch.Tensor) -> torch.Tensor:
    return round_to_nearest_int8(x.flatten(0, -2)).dequantize().view(x.shape)


def fp8_inputs(x: torch.Tensor) -> torch.Tensor:
    return round_to_nearest_fp8(x.flatten(0, -2)).dequantize().view(x.shape)


@torch.no_grad()
def reference_logits(hf_model: Any, scheme: PrecisionScheme, tokens: list[int]) -> torch.Tensor:
    """`transformers`, with every weight (and input, where the scheme rounds it) replaced by what quantizing leaves."""
    for name, module in hf_model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        weight, kind = module.weight.detach().clone(), scheme.of(engine_name(name)).facts["name"]
        if kind.startswith("int4"):
            size = scheme.parameters["group_size"] or weight.shape[1]
            weight = round_to_nearest(weight, size).dequantize()
        elif kind == "int8_smoothquant":
            weight = round_to_nearest_int8(weight).dequantize()
            module.register_forward_pre_hook(lambda _, inputs: (int8_inputs(inputs[0]),))
        elif kind == "fp8":
            weight = round_to_nearest_fp8(weight).dequantize()
            module.register_forward_pre_hook(lambda _, inputs: (fp8_inputs(inputs[0]),))
        module.weight = torch.nn.Parameter(weight)
    return hf_model(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("name", SCHEMES)
def test_every_architecture_computes_with_the_dequantized_weights(case: tuple[Path, Any], name: str) -> None:
    path, config = case
    hf_model = make_checkpoint(path, config)
    got = PagedRunner(load_model(path, scheme=SCHEMES[name])).step([(PagedSequence(), PROMPT)])[0]
    exact = hf_model(torch.tensor([PROMPT])).logits[0].detach()
    expected = reference_logits(hf_model, SCHEMES[name], PROMPT)
    assert (got - exact).norm() / exact.norm() > 0.003, "quantization must show"
    # Where inputs are rounded too, the last bit of a float32 sum now and then decides a rounding.
    rounded = "int8" in name or "fp8" in name
    assert (got - expected).norm() / expected.norm() < (0.01 if rounded else 1e-5)


def test_layers_are_stored_as_their_names_say() -> None:
    scheme = int4_awq.Scheme({"head": "fp8", "unquantized": ["layers.*.mlp.down", "layers.1.attention.qkv"]})
    kinds = {name: scheme.of(name).facts["name"] for name in ("layers.0.attention.qkv", "layers.1.attention.qkv")}
    assert kinds == {"layers.0.attention.qkv": "int4_awq", "layers.1.attention.qkv": "none"}
    assert scheme.of("layers.7.mlp.down").facts["name"] == "none" and scheme.of("lm_head").facts["name"] == "fp8"
    assert scheme.of("layers.7.mlp.down") is scheme.of("layers.1.attention.qkv"), "one object for all alike"
    assert int4_awq.Scheme({"head": "int4"}).of("lm_head").facts["name"] == "int4_awq"
    assert int4_awq.Scheme({"head": "fp8", "unquantized": ["lm_head"]}).of("lm_head").facts["name"] == "none"
    with pytest.raises(EngineDamagedError, match="int8_smoothquant has no parameter 'group_size'; allowed: head, unq"):
        int8_smoothquant.Scheme(GROUPS)
    with pytest.raises(EngineBuildError, match="head is 'int2'; allowed: fp8, bf16, int4"):
        int4_awq.Scheme({"head": "int2"})
    with pytest.raises(EngineBuildError, match="group_size is -1; allowed: 0 for all inputs"):
        int4_awq.Scheme({"group_size": -1})


# ---------------------------------------------------------------- storage


def ordered_weight(rows: int = 24, size: int = 64) -> GroupedWeight:
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(size, generator=generator).to(torch.int32)
    weight = round_to_nearest(torch.randn(rows, size, generator=generator), 32)
    return GroupedWeight(weight.values, weight.scales, weight.zeros, order)


def test_int4_is_stored_without_loss_and_multiplied_as_it_dequantizes() -> None:
    weight = ordered_weight()
    tensors = to_stored(weight)
    scheme = int4_gptq.Scheme(GROUPS | {"act_order": True})
    announced = scheme.tensors(24, 64, torch.bfloat16)
    assert {suffix: (tuple(t.shape), t.dtype) for suffix, t in tensors.items()} == announced
    back = from_stored(tensors)
    for field in ("values", "scales", "zeros", "order"):
        assert torch.equal(getattr(back, field), getattr(weight, field)), field
    x, bias = torch.randn(5, 64), torch.randn(24)
    expected = x @ weight.dequantize().T + bias
    product = int4_linear(x, tensors["weight"], tensors["scale_zero"], bias, tensors["order"])
    torch.testing.assert_close(product, expected)
    prepared = scheme.prepare(scheme.store(weight))
    torch.testing.assert_close(scheme.apply(prepared, x, bias, torch.float32), expected)


def test_layers_without_an_order_among_ordered_ones() -> None:
    plain = round_to_nearest(torch.randn(8, 64), 32)
    scheme = int4_gptq.Scheme(GROUPS | {"act_order": True})
    assert torch.equal(from_stored(scheme.store(plain)).dequantize(), plain.dequantize())


@pytest.mark.parametrize(
    ("scheme", "weight", "words"),
    [
        (int4_awq.Scheme(GROUPS), round_to_nearest(torch.randn(8, 64), 64), "groups of 64, without an order"),
        (int4_awq.Scheme(GROUPS), ordered_weight(), "with an order, does not fit an engine of .* act_order False"),
        (int4_awq.Scheme(GROUPS), round_to_nearest_int8(torch.randn(8, 64)), "does not store ChannelWeight"),
        (int8_smoothquant.Scheme(), round_to_nearest(torch.randn(8, 64), 64), "does not store GroupedWeight"),
    ],
)
def test_weights_that_a_scheme_cannot_hold_are_refused(scheme: PrecisionScheme, weight: Any, words: str) -> None:
    with pytest.raises(EngineBuildError, match=words):
        scheme.store(weight)


# ---------------------------------------------------------------- engines


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen2")
    make_checkpoint(path, ARCHITECTURES["qwen2"])
    write_tokenizer(300, path)
    return path


def request_of(source: Path, cache: Path, precision: str, **changes: Any) -> BuildRequest:
    """Rounded to nearest."""
    fixed: dict[str, Any] = {"backend": "cpu", "device": "cpu", "calibration_data": "none"}
    if precision == "int4":
        fixed["scheme_parameters"] = GROUPS
    return BuildRequest(str(source), str(cache), precision, **(fixed | changes))  # type: ignore[arg-type]


def logits_of(engine: Path) -> torch.Tensor:
    loaded = load_engine(EngineOptions(str(engine), "cpu"), torch.device("cpu"), torch.float32, lambda *_: None)
    loaded.model.prepare(64)
    return PagedRunner(loaded.model).step([(PagedSequence(), PROMPT)])[0]


@pytest.mark.parametrize(
    ("precision", "scheme", "stored"),
    [("int4", "int4_awq", torch.int32), ("int4", "int4_gptq", torch.int32), ("int8", None, torch.int8)],
)
def test_an_engine_is_built_and_loads(
    source: Path, tmp_path: Path, precision: str, scheme: str | None, stored: torch.dtype
) -> None:
    request = request_of(source, tmp_path, precision, scheme=scheme)
    engine = build(request)
    tensors = load_file(engine / "rank-0.safetensors")
    assert tensors["layers.1.mlp.down.weight"].dtype == stored
    assert torch.equal(tensors["lm_head.weight"], tensors["embedding.weight"]), "a head in 16 bits, tied"
    manifest = read_manifest(engine)
    assert manifest.key == key_of(request) == engine.name and manifest.dtype == "bfloat16"
    assert manifest.scheme == (scheme or "int8_smoothquant")
    checked = {check.name.partition(" ")[0]: check for check in manifest.self_check}
    error = checked["layers.0.attention.qkv"].value
    assert error is not None and 0.003 < error < (0.15 if precision == "int4" else 0.02)
    parameters = GROUPS if precision == "int4" else {}
    plugin = registry.load("quantization", manifest.scheme).Scheme(parameters)
    model = load_model(source, scheme=plugin, stored_dtype=torch.bfloat16)
    expected = PagedRunner(model).step([(PagedSequence(), PROMPT)])[0]
    torch.testing.assert_close(logits_of(engine), expected)


def test_layers_that_stay_plain_and_parameters_survive_in_the_engine(source: Path, tmp_path: Path) -> None:
    parameters = {"group_size": 16, "head": "fp8", "unquantized": ["layers.0.*"]}
    engine = build(request_of(source, tmp_path, "int4", scheme_parameters=parameters))
    tensors = load_file(engine / "rank-0.safetensors")
    assert tensors["layers.0.attention.qkv.weight"].dtype == torch.bfloat16
    assert tensors["layers.1.attention.qkv.scale_zero"].shape == (128, 4, 2)
    assert tensors["lm_head.weight"].dtype == torch.float8_e4m3fn
    assert read_manifest(engine).key_inputs.scheme_parameters == {**parameters, "act_order": False}
    scheme = int4_awq.Scheme(parameters)
    expected = PagedRunner(load_model(source, scheme=scheme, stored_dtype=torch.bfloat16))
    torch.testing.assert_close(logits_of(engine), expected.step([(PagedSequence(), PROMPT)])[0])


def test_an_engine_with_parameters_of_another_version_is_refused(source: Path, tmp_path: Path) -> None:
    engine = build(request_of(source, tmp_path, "int8"))
    manifest = read_manifest(engine)
    inputs = msgspec.structs.replace(manifest.key_inputs, scheme_parameters={"clipping": True})
    write_manifest(engine, msgspec.structs.replace(manifest, key_inputs=inputs))
    with pytest.raises(EngineDamagedError, match="no parameter 'clipping'"):
        logits_of(engine)


def test_what_is_in_the_key(source: Path, tmp_path: Path) -> None:
    on_gpu = {"backend": "cuda", "compute_capability": (9, 0)}
    requests = [
        request_of(source, tmp_path, "int4"),
        request_of(source, tmp_path, "int4", scheme="int4_gptq"),
        request_of(source, tmp_path, "int4", scheme_parameters={"group_size": 64}),
        request_of(source, tmp_path, "int4", scheme_parameters={**GROUPS, "unquantized": ["lm_head"]}),
        request_of(source, tmp_path, "int8"),
        request_of(source, tmp_path, "int4", **on_gpu),
        request_of(source, tmp_path, "int4", **on_gpu, scheme_parameters={**GROUPS, "head": "bf16"}),
    ]
    assert len({key_of(request) for request in requests}) == len(requests)
    default = {"group_size": 32, "act_order": False, "head": "bf16", "unquantized": []}
    assert key_of(requests[0]) == key_of(request_of(source, tmp_path, "int4", scheme_parameters=default))


@pytest.mark.parametrize(
    ("capability", "head", "dtype"),
    [
        (None, "bf16", "bfloat16"),
        ((7, 5), "bf16", "float16"),
        ((8, 0), "bf16", "bfloat16"),
        ((8, 9), "fp8", "bfloat16"),
    ],
)
def test_head_and_dtype_follow_the_gpu(
    source: Path, tmp_path: Path, capability: tuple[int, int] | None, head: str, dtype: str
) -> None:
    """FP8 from 8.9 on; float16 where there are no tensor cores for bfloat16."""
    backend = "cpu" if capability is None else "cuda"
    for precision in ("int4", "int8"):
        inputs = key_inputs_of(request_of(source, tmp_path, precision, backend=backend, compute_capability=capability))
        assert (inputs.scheme_parameters["head"], inputs.dtype) == (head, dtype)
    assert parameters_of(registry.plugins("quantization")["int4_awq"], (12, 0))["head"] == "fp8"


def test_an_engine_in_float16(source: Path, tmp_path: Path) -> None:
    request = request_of(source, tmp_path, "int4", backend="cuda", compute_capability=(7, 5))
    tensors = load_file(build(request) / "rank-0.safetensors")
    assert tensors["lm_head.weight"].dtype == tensors["norm.weight"].dtype == torch.float16


def test_a_group_that_does_not_divide_is_found_before_hashing(source: Path, tmp_path: Path) -> None:
    words = r"int4 needs input sizes that are multiples of 64; layers\.0\.mlp\.down has 96"
    with pytest.raises(EngineBuildError, match=words):
        build(request_of(source, tmp_path, "int4", scheme_parameters={"group_size": 64}))
    assert not (tmp_path / "digests").exists()


def test_self_check_of_an_engine_whose_scales_have_moved(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no single product can be compared, a layer is."""
    reference = PlainTensors.reference
    monkeypatch.setattr(
        PlainTensors,
        "reference",
        lambda self, spec, device: reference(self, spec, device) if spec.name == "lm_head" else None,
    )
    engine = build(request_of(source, tmp_path, "int4"))
    checked = {check.name: check for check in read_manifest(engine).self_check}
    for part in ("attention", "mlp"):
        check = checked[f"layers.0.{part} against its checkpoint tensors"]
        assert check.value is not None and 0.02 < check.value < 0.3

    class Wrong(int4_awq.Scheme):
        """Nibbles in an order that no kernel knows."""

        def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
            stored = super().quantize(weight)
            return stored | {"weight": stored["weight"].roll(1, 1)}

    def load_plugin(kind: str, name: str) -> Any:
        return SimpleNamespace(Scheme=Wrong) if kind == "quantization" else registry.load(kind, name)

    with pytest.raises(EngineBuildError, match=r"self-check, layers\.0\.attention against its checkpoint tensors"):
        build(request_of(source, tmp_path / "wrong", "int4"), load_plugin=load_plugin)
