"""Random decoders, or ranks' shares of them, and single decode steps over random caches: what tests and measurements of
the persistent kernel run."""

from __future__ import annotations

from typing import Any

import torch

from appliance.batching.step import NewSequence, ScheduledSequence, StepPlan
from appliance.builder.shards import shard
from appliance.distributed import TensorParallel
from appliance.kernels.attention import KvScales, ReferenceAttention
from appliance.kernels.fp8_linear import FP8
from appliance.kernels.paged_attention import TritonAttention
from appliance.kernels.persistent.exchange import Exchange
from appliance.layers.attention import Attention
from appliance.layers.decoder import Decoder
from appliance.layers.linear import Linear
from appliance.layers.weights import decoder_weights
from appliance.quantization.int4_storage import from_stored
from appliance.runtime.loading import build_model
from appliance.runtime.model_runner import ModelRunner, RunnerLimits
from appliance.runtime.persistent_decode import PersistentDecode, refusal
from appliance.types import ModelConfig, SamplingParams

PAGE = 16
BASE = {
    "architecture": "LlamaForCausalLM",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "one-query-per-kv": {"num_key_value_heads": 8},
    "seven-queries-per-kv": {"num_attention_heads": 14, "hidden_size": 896, "intermediate_size": 4864},
    "wide-heads": {"head_dim": 128, "hidden_size": 1024},
    "biases": {"attention_bias": True, "output_bias": True, "mlp_bias": True},
    "head-norms": {"qk_norm": True},
    "window": {"sliding_window": 40},
    "large": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 2,
        "vocab_size": 32000,
    },
}


def random_model(
    scheme: str,
    parameters: dict[str, Any] | None = None,
    *,
    tp: TensorParallel | None = None,
    device: str = "cuda",
    **shape: object,
) -> Decoder:
    """A decoder whose activations keep a sensible size, or a rank's share of it. `parameters`: of the scheme."""
    config = ModelConfig(**(BASE | shape))  # type: ignore[arg-type]
    tp = tp or TensorParallel()
    model = build_model(config, scheme, torch.bfloat16, parameters, tp)
    generator = torch.Generator(device).manual_seed(3)
    plain = build_model(config, "none", torch.bfloat16)
    schemes = {name: module.scheme for name, module in model.named_modules() if isinstance(module, Linear)}
    specs = {spec.name: spec for spec in decoder_weights(config)}
    tensors = []
    for name, parameter in plain.named_parameters():
        value = torch.randn(parameter.shape, generator=generator, device=device)
        if name.endswith("norm.weight"):
            value = 1 + 0.1 * value
        elif value.dim() == 2 and "embedding" not in name:
            value *= value.shape[1] ** -0.5
        value = value.to(torch.bfloat16)
        layer = name.rpartition(".")[0]
        stored = {name: value}
        if value.dim() == 2 and "embedding" not in name:
            stored = {f"{layer}.{suffix}": tensor for suffix, tensor in schemes[layer].quantize(value).items()}
        if layer in specs:
            stored = shard(specs[layer], stored, tp.rank, tp.size)
        tensors += [(name, tensor.clone()) for name, tensor in stored.items()]
    model.load(tensors, device)
    model.prepare(config.max_position_embeddings)
    return model


class Step:
    """One decode step of sequences of given lengths, over caches with random numbers in them; of a rank's model, over
    its heads of them."""

    def __init__(self, model: Decoder, lengths: list[int], kv_dtype: torch.dtype = torch.bfloat16) -> None:
        self.model = model
        config, tp, device = model.config, model.tp, model.embedding.weight.device
        pages = [-(-length // PAGE) for length in lengths]
        generator = torch.Generator(device).manual_seed(4)
        heads = config.num_key_value_heads
        shape = (sum(pages) + 1, 2, PAGE, heads, config.head_dim)
        first = tp.rank * heads // tp.size
        self.caches = []
        for _ in range(config.num_hidden_layers):
            whole = torch.randn(shape, generator=generator, device=device).to(kv_dtype)
            self.caches.append(whole[..., first : first + model.num_kv_heads, :].contiguous())
        for attention in (m for m in model.modules() if isinstance(m, Attention)):
            attention.kv_scales = KvScales(k=0.5, v=2.0) if kv_dtype == FP8 else KvScales()
        self.limits = RunnerLimits(
            max_num_seqs=16,
            max_model_len=8192,
            max_num_batched_tokens=8192,
            page_size=PAGE,
            vocab_size=config.vocab_size,
        )
        self.runner = ModelRunner(model, self.caches, TritonAttention(), self.limits, device)
        plan, first = StepPlan(step_id=0), 1
        for slot, (length, count) in enumerate(zip(lengths, pages, strict=True)):
            ids = [(7 * i + slot) % config.vocab_size for i in range(length)]
            order = list(range(first, first + count))[::-1]
            plan.new.append(NewSequence(slot, ids, length, SamplingParams(), 0, (), order))
            plan.scheduled.append(ScheduledSequence(slot, length - 1, 1, [], samples=True))
            first += count
        self.plan = plan
        self.runner._batch.apply(plan)

    def inputs(self, rows: int):  # type: ignore[no-untyped-def]
        return self.runner._batch.step_inputs(self.plan.scheduled, rows)

    @torch.inference_mode()
    def by_layers(self, rows: int) -> torch.Tensor:
        inputs = self.inputs(rows)
        self.runner._attention.plan(inputs.metadata)
        return self.model.logits(self.runner._hidden(inputs)).float()

    @torch.inference_mode()
    def persistent(self, rows: int, exchange: Exchange | None = None) -> PersistentDecode:
        assert refusal(self.model, self.caches) is None
        return PersistentDecode(self.model, self.caches, self.runner._batch, [rows], exchange)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def dequantized(linear: Linear) -> torch.Tensor:
    tensors = linear.prepared
    if "scale_zero" in tensors:
        return from_stored(tensors).dequantize()
    value = tensors["weight"].float()
    return value * tensors["weight_scale"].view(-1, 1) if "weight_scale" in tensors else value


def exact(step: Step, rows: int) -> torch.Tensor:
    """The step of a whole model in float32, with the weights that the engine's numbers stand for and no rounding of
    activations."""
    config, device = step.model.config, step.model.embedding.weight.device
    model = build_model(config, "none", torch.float32)
    linears = {name: module for name, module in step.model.named_modules() if isinstance(module, Linear)}
    plain = dict(step.model.named_parameters())
    tensors = []
    for name, _ in model.named_parameters():
        linear = linears.get(name.removesuffix(".weight"))
        if linear is None:
            tensors.append((name, plain[name].float()))
            continue
        tensors.append((name, dequantized(linear)[: linear.out_features]))
    model.load(tensors, device)
    model.prepare(config.max_position_embeddings)
    attention = [module for module in step.model.modules() if isinstance(module, Attention)]
    caches = [cache.float() for cache in step.caches]
    for cache, of in zip(caches, attention, strict=True):
        cache[:, 0] *= of.kv_scales.k
        cache[:, 1] *= of.kv_scales.v
    runner = ModelRunner(model, caches, ReferenceAttention(), step.limits, device)
    with torch.inference_mode():
        runner._batch.apply(step.plan)
        inputs = runner._batch.step_inputs(step.plan.scheduled, rows)
        return model.logits(runner._hidden(inputs))


def whole_logits(step: Step, decode: PersistentDecode) -> torch.Tensor:
    """The kernel's, of all ranks."""
    (rows,) = decode.sizes
    columns = decode.logits(step.inputs(rows))
    return step.model.tp.all_gather(columns)[:, : step.model.config.vocab_size]


def check(step: Step, rows: int, exchange: Exchange | None = None, truth: torch.Tensor | None = None) -> None:
    """The kernel is as near to the exact result as the layers are, and writes the same K and V. `truth`: `exact` of the
    whole model, where `step` is a rank's."""
    n = len(step.plan.scheduled)
    truth = (exact(step, rows) if truth is None else truth)[:n]
    expected = step.by_layers(rows)[:n]
    written = [cache.float().clone() for cache in step.caches]
    actual = whole_logits(step, step.persistent(rows, exchange))[:n]
    torch.cuda.synchronize()
    assert torch.isfinite(actual).all()
    assert error(actual, truth) < 1.2 * error(expected, truth) + 1e-3
    for cache, by_layers in zip(step.caches, written, strict=True):
        # The new token's K and V; everything else is untouched.
        assert error(cache, by_layers) < (0.03 if cache.dtype == FP8 else 0.01)
