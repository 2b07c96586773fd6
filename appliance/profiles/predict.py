"""Predicted memory of a model under a candidate profile. Arithmetic only; knows no policy, and no speeds (speed.py).

It is a bound, so that what is called runnable runs: weights as the engine stores them, activations of the largest step,
a fixed share for CUDA context, libraries and graphs, and the KV cache.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from appliance.types import ModelConfig, Quantization, Struct

# Bytes per stored weight, and per group of weights that share a scale.
_WEIGHT_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}
_INT4_GROUP, _INT4_GROUP_BYTES = 128, 4  # a 16-bit scale and zero point per group
_KV_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
_ACTIVATION_BYTES = 2  # bytes of an activation on a GPU; float32 on the CPU

# Estimates: CUDA context and modules 0.5 GiB, attention workspace 0.4 GiB, CUDA graphs 0.5 GiB.
GPU_OVERHEAD = 1434 << 20
RANKS_OVERHEAD = 512 << 20  # an estimate too: NCCL's channels and symmetric memory, where there are several ranks
CPU_OVERHEAD = 512 << 20  # interpreter and torch

PAGE_TOKENS = 16
_CPU_KV_PARTS = 4  # the CPU backend's KV cache is at most this part of free memory
USEFUL_TOKENS = 8192  # a KV cache that holds one sequence of this length (or of the model's limit) is useful
ROOMY_TOKENS = 32768  # and one of this many tokens serves several users at once


class Memory(Struct, frozen=True):
    """Bytes on one rank. A GPU engine keeps all of it within `memory_fraction` of the free memory; the CPU engine gives
    its KV cache a quarter of what the rest leaves, because other programs live there."""

    weights: int
    activations: int
    overhead: int
    kv_per_token: int
    on_cpu: bool = False

    @property
    def fixed(self) -> int:
        """Everything but the KV cache."""
        return self.weights + self.activations + self.overhead

    def required(self, kv_tokens: int, fraction: float) -> int:
        """Free memory that is needed for a KV cache of that many tokens (and a page, for rounding)."""
        kv_cache = (kv_tokens + PAGE_TOKENS) * self.kv_per_token
        if self.on_cpu:
            return self.fixed + _CPU_KV_PARTS * kv_cache
        return math.ceil((self.fixed + kv_cache) / fraction)

    def kv_tokens(self, free: int, fraction: float) -> int:
        """Most tokens of KV cache with which `required` stays within `free`; 0 or more."""
        spare = (free - self.fixed) // _CPU_KV_PARTS if self.on_cpu else int(free * fraction) - self.fixed
        tokens = max(0, spare // self.kv_per_token - PAGE_TOKENS)
        while tokens and self.required(tokens, fraction) > free:  # rounding of the fraction
            tokens -= 1
        return tokens


class Product(Struct, frozen=True):
    """One of a layer's four linear layers, or the head, on one rank."""

    out_features: int
    in_features: int
    count: int  # layers; 1 for the head
    nbytes: int  # as stored, of all of them


# Engine names of a layer's products and of the head, in the order of `_rank_shapes`.
_PARTS = ("attention.qkv", "attention.o", "mlp.gate_up", "mlp.down", "lm_head")


def _rank_shapes(model: ModelConfig, tp_size: int) -> list[tuple[int, int, int]]:
    """(out_features, in_features, how many) of the linear layers on one rank; heads and rows are rounded up, so that KV
    heads are repeated where there are fewer than ranks."""
    heads = math.ceil(model.num_attention_heads / tp_size) * model.head_dim
    kv = math.ceil(model.num_key_value_heads / tp_size) * model.head_dim
    inner = math.ceil(model.intermediate_size / tp_size)
    layers = model.num_hidden_layers
    return [
        (heads + 2 * kv, model.hidden_size, layers),
        (model.hidden_size, heads, layers),
        (2 * inner, model.hidden_size, layers),
        (model.hidden_size, inner, layers),
        (math.ceil(model.vocab_size / tp_size), model.hidden_size, 1),
    ]


def _linear_bytes(out_features: int, in_features: int, precision: str, facts: Quantization | None) -> int:
    size = math.ceil(out_features * in_features * _WEIGHT_BYTES[precision])
    if precision in ("fp8", "int8"):
        size += 4 * out_features  # a float32 scale per output channel
    if precision == "int4":
        group = (facts.group_size or in_features) if facts is not None else _INT4_GROUP
        size += out_features * math.ceil(in_features / group) * _INT4_GROUP_BYTES
        size += 4 * in_features if facts is not None and facts.act_order else 0  # the order of the inputs
    return size


def _left_alone(facts: Quantization | None, part: str, layers: int) -> int:
    """How many of `layers` linear layers a checkpoint that is quantized already left as they were; at most all."""
    if facts is None:
        return 0
    if part in facts.unquantized or f"layers.*.{part}" in facts.unquantized:
        return layers
    return min(layers, sum(name.endswith(f".{part}") for name in facts.unquantized))


class Stored(Struct, frozen=True):
    """The precisions in which weights lie in memory while they are served."""

    precision: str
    head: str | None = None  # of lm_head; None: as the others
    left_alone: str = "bf16"  # of layers that an already quantized checkpoint did not quantize


def stored_as(precision: str, *, on_cpu: bool, head: str | None = None, packed: Collection[str] = ()) -> Stored:
    """`head`: of the scheme (`SchemeFacts.head_on`). The CPU backend computes in float32 and widens everything at load
    but `packed` precisions."""
    if not on_cpu:
        return Stored(precision, head)
    rest, last = (kind if kind in packed else "fp32" for kind in (precision, head or precision))
    return Stored(rest, last, left_alone="fp32")


def rank_products(model: ModelConfig, stored: Stored, tp_size: int) -> tuple[Product, ...]:
    """A layer's four linear layers in order, and lm_head, of one of `tp_size` ranks that have all layers."""
    facts, products = model.quantization, []
    for part, (out_features, in_features, count) in zip(_PARTS, _rank_shapes(model, tp_size)):
        plain = _left_alone(facts, part, count)
        other = stored.head if part == "lm_head" and stored.head is not None else stored.precision
        size = plain * _linear_bytes(out_features, in_features, stored.left_alone, None)
        size += (count - plain) * _linear_bytes(out_features, in_features, other, facts)
        products.append(Product(out_features, in_features, count, size))
    return tuple(products)


def stage_layers(model: ModelConfig, pp_size: int) -> list[int]:
    """How many layers each pipeline stage has; of more stages than layers, one each."""
    stages = min(pp_size, model.num_hidden_layers)
    return [len(model.layers_of_stage(stage, stages)) for stage in range(stages)]


def memory(
    model: ModelConfig,
    *,
    stored: Stored,
    kv_cache: str,
    tp_size: int,
    pp_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    on_cpu: bool,
) -> Memory:
    """Predicted bytes of one rank: with several stages the weights of the heaviest and the keys and values of the one
    with the most layers. `kv_cache` is a concrete precision, not "auto"."""
    element = 4 if stored.precision == "fp32" or on_cpu else _ACTIVATION_BYTES
    *products, head = rank_products(model, stored, tp_size)
    # Norms and biases, generously: they are under 0.1%.
    norms = model.num_hidden_layers * (4 * model.hidden_size + 2 * model.intermediate_size) * element
    blocks = sum(product.nbytes for product in products) + norms
    embedding = model.vocab_size * model.hidden_size * element  # whole on every rank of the first stage
    logits = 3 * 4 * max_num_seqs * model.vocab_size  # float32, with two copies for sampling
    layers = stage_layers(model, pp_size)
    heaviest, with_logits = 0, 0
    for stage, count in enumerate(layers):
        last = stage == len(layers) - 1
        weights = math.ceil(blocks * count / model.num_hidden_layers)
        weights += (embedding if stage == 0 else 0) + (head.nbytes if last else 0)
        if weights + last * logits >= heaviest + with_logits:
            heaviest, with_logits = weights, last * logits
    inner = math.ceil(model.intermediate_size / tp_size)
    heads = math.ceil(model.num_attention_heads / tp_size) * model.head_dim
    kv_heads = math.ceil(model.num_key_value_heads / tp_size)
    # Live at once in a step: residual, normed input and its quantized copy, output; q, k, v and attention's output;
    # gate, up and their product.
    per_token = 4 * model.hidden_size + 2 * heads + 2 * kv_heads * model.head_dim + 3 * inner
    on_gpu = GPU_OVERHEAD + (RANKS_OVERHEAD if tp_size * pp_size > 1 else 0)
    return Memory(
        weights=heaviest,
        activations=max_num_batched_tokens * per_token * element + with_logits,
        overhead=CPU_OVERHEAD if on_cpu else on_gpu,
        on_cpu=on_cpu,
        kv_per_token=2 * max(layers) * kv_heads * model.head_dim * _KV_BYTES[kv_cache],
    )


def useful_tokens(model: ModelConfig, max_model_len: int | None, max_num_batched_tokens: int) -> int:
    """The smallest useful KV cache in tokens: a sequence of the asked length, else of the model's limit up to 8192; and
    no less than the sequence that one step can run."""
    longest = max_model_len or model.max_position_embeddings
    return max(max_model_len or min(longest, USEFUL_TOKENS), min(max_num_batched_tokens, longest))
