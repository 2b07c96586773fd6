"""Predicted speed of an engine: a decode step, and tokens per second at full load. Arithmetic only; knows no policy.

A pass through the model is, layer by layer: four products, each as long as the root of the sum of squares of the time
of its weight bytes and that of its operations (they overlap, but not wholly); K/V and activations at the bandwidth; the
fixed costs of kernels; and with several ranks two all-reduces. Then the head and sampling, each rank of its part of the
vocabulary. Few sequences go through one persistent kernel where that is quicker. With several stages a sequence's next
step waits for its token to come back to the first one.

The constants are fitted to what was measured on one, two and four H200s (tests/test_select_speed.py has the
measurements and a limit of error); bandwidths, rates and links are facts of the GPU (`load.GpuFacts`).
"""

from __future__ import annotations

import math

from appliance.profiles import kernels
from appliance.profiles.load import GpuFacts
from appliance.profiles.predict import Product, Stored, rank_products, stage_layers
from appliance.types import ModelConfig, Struct

_PRODUCT_SECONDS = 3e-6  # of a product beyond its bytes and operations: 4 a layer
_LAYER_SECONDS = 17e-6  # attention, norms, activation: half a dozen graphed kernels of 1 to 5 µs
_SEQUENCE_SECONDS = 0.02e-6  # of a sequence in a layer's decode attention, of all heads
_INT4_WEIGHTS = (8, 3.9e12)  # products of more rows than that first make 16-bit numbers of so many weights per second
_STEP_SECONDS = 80e-6  # embedding, last norm, sampling, and the gap between steps
_PROMPT_PRODUCTS = 0.88  # of the rate of products: at thousands of rows the clock goes down; not on ranks
_PROMPT_ATTENTION = 0.5  # of the rate of 16-bit products
_PROMPT_SECONDS = 1.5e-3  # of the host's, from a prompt to its first token, where no other step hides it
_HAND_OVER_SECONDS = 10e-6  # of a small message from stage to stage inside a node: an estimate
_RETURN_SECONDS = 0.9e-3  # of tokens from the last stage by way of the host to the first one's next step
_NETWORK = (40e-6, 2.5e9)  # from node to node: seconds of a small message, bytes/s; a modest network, likewise
_LOGIT_BYTES = 12  # per logit: written in float32, read by sampling twice
_BEST_BYTES = 8  # per sampled row: what ranks tell each other of their best token
# Elements moved per row and layer, in units of hidden_size, and of a rank's heads and intermediate_size.
_ACTIVATIONS = (7, 5, 4)

# The persistent decode kernel. Every block prepares all rows of a product's input for itself.
_PERSISTENT_SIZES = (1, 2, 4)  # rows that there are kernels for
_PERSISTENT_HIDDEN = 8192  # at most
_PERSISTENT_SECONDS = 10e-6  # of a layer beyond its weights: barriers, attention
_PERSISTENT_INPUT = 0.19e-9  # of an element of a product's input
_PERSISTENT_SUM = 0.2  # of a small all-reduce: one way over the link, and no kernel

# All-reduces, as (of a small message at two ranks, and more per doubling of them; share of the one-way bandwidth).
# NVLink: measured on H200s (its facts file); the others are estimates: peer to peer, and NCCL through host memory.
_ALL_REDUCE = {"nvlink": (3.9e-6, 1e-6), "pcie": (20e-6, 8e-6), "none": (35e-6, 15e-6)}
_PCIE_SHARE = {"pcie": 0.65, "none": 0.3}
# Where ranks deal out the rows of a sum, and of the norm behind it: fixed cost, in all-reduces of a small message; and
# bandwidth of numbers that are pushed, in that of all-reduces. Measured at 4 ranks, 16 to 1024 rows of 8192.
_DEALT = (1.25, 1.13)

# No facts files for CPUs: a modest server with a few memory channels.
_CPU_BANDWIDTH = 34e9  # bytes/s that are reached
_CPU_FLOPS_PER_CORE = 18e9  # FLOP/s in float32, likewise

DECODE_CONTEXT = 1024  # tokens of context, when the time per token of one request is predicted
PROMPT_TOKENS, OUTPUT_TOKENS = 1024, 1024  # of a request, when full load is predicted
LOAD_CONTEXT = PROMPT_TOKENS + OUTPUT_TOKENS // 2  # tokens of context there, on average


class Device(Struct, frozen=True):
    """The speeds of one rank's device, as kernels reach them, and of its link to the others."""

    bandwidth: float  # bytes/s
    flops: float  # FLOP/s at the candidate's precision
    half_flops: float  # in 16 bits
    element: int = 2  # bytes of an activation
    link_seconds: float = 0.0  # of a small all-reduce
    link_bandwidth: float = 1.0  # bytes/s of a rank's traffic
    persistent: bool = False  # has the persistent decode kernel
    dealt: int = 0  # bytes of a norm's result, of ranks that deal out sums with their norms; 0: they do not


def cpu_device(cores: int, sharing: int = 1) -> Device:
    """One of `sharing` ranks and replicas, which have a part of the cores and of the bandwidth each; all-reduces cost
    what a message between processes does."""
    flops = cores * _CPU_FLOPS_PER_CORE / sharing
    return Device(_CPU_BANDWIDTH / sharing, flops, flops, element=4, link_seconds=100e-6, link_bandwidth=4e9)


def gpu_device(
    facts: GpuFacts, precision: str, link: str, tp_size: int, compute_capability: tuple[int, int] = (0, 0)
) -> Device:
    """`link`: the worst among the ranks' GPUs ("nvlink", "pcie", "none")."""
    if link == "nvlink" and not facts.reached_nvlink:
        link = "pcie"
    base, doubling = _ALL_REDUCE[link]
    seconds = base + doubling * (math.log2(tp_size) - 1) if tp_size > 1 else 0.0
    if link == "nvlink":
        known = facts.measured.all_reduce_us.get(tp_size) if facts.measured is not None else None
        seconds = seconds if known is None else known * 1e-6
        bandwidth = facts.reached_nvlink
    else:
        bandwidth = facts.pcie_gbs * 1e9 * _PCIE_SHARE[link]
    half = "fp32" if precision == "fp32" else "bf16"
    result = 1 if precision in ("fp8", "int8") else 2
    return Device(
        bandwidth=facts.reached_bandwidth,
        flops=facts.reached_flops(precision),
        half_flops=facts.reached_flops(half),
        link_seconds=seconds,
        link_bandwidth=bandwidth,
        # Ranks of it have been measured over NVLink only; what cannot be told is not promised.
        persistent=kernels.persistent_decode(precision, compute_capability) and (tp_size == 1 or link == "nvlink"),
        dealt=result if link == "nvlink" and kernels.dealt(compute_capability) else 0,
    )


class Ranks(Struct, frozen=True):
    """An engine spread over ranks: what its speed is made of."""

    model: ModelConfig
    stored: Stored
    kv_per_token: int  # bytes on one rank, all layers of its stage
    device: Device
    tp_size: int = 1
    pp_size: int = 1
    nodes: int = 1  # that the stages are spread over

    @property
    def stages(self) -> list[int]:
        """Layers of each."""
        return stage_layers(self.model, self.pp_size)


def all_reduce_seconds(device: Device, tp_size: int, message: int) -> float:
    """Of `message` bytes on each rank: the better of one-shot, in which a rank reads all messages at once, and of
    two-shot, which adds up parts and then gathers them: twice the fixed cost and less traffic. 0 for one rank."""
    if tp_size == 1:
        return 0.0
    traffic = (tp_size - 1) * message / device.link_bandwidth
    return min(device.link_seconds + traffic, 2 * device.link_seconds + 2 / tp_size * traffic)


def norm_sum_seconds(device: Device, tp_size: int, numbers: int) -> float:
    """Of a sum of `numbers` on each rank with the norm behind it, beyond what a norm takes without ranks: one-shot, or
    each rank adds up its rows, norms them and gives the others what products read."""
    whole = all_reduce_seconds(device, tp_size, numbers * device.element)
    if not device.dealt or tp_size == 1:
        return whole
    fixed, pace = _DEALT
    traffic = (tp_size - 1) / tp_size * numbers * (device.element + device.dealt)
    return min(whole, fixed * device.link_seconds + traffic / (pace * device.link_bandwidth))


def _product(product: Product, device: Device, rows: int, share: float = 1.0) -> float:
    weights = product.out_features * product.in_features
    read = product.nbytes / product.count
    few, pace = _INT4_WEIGHTS
    making = weights / pace if read < 0.75 * weights and rows > few else 0.0
    return math.hypot(read / device.bandwidth, 2 * rows * weights / (device.flops * share)) + making


def _layer(ranks: Ranks, rows: int, share: float = 1.0) -> float:
    """What a layer takes with any rows: products, activations, all-reduces. Fixed costs and attention are apart."""
    device, hidden = ranks.device, ranks.model.hidden_size
    *products, _ = rank_products(ranks.model, ranks.stored, ranks.tp_size)
    whole, heads, inner = _ACTIVATIONS
    part = heads * ranks.model.num_attention_heads * ranks.model.head_dim + inner * ranks.model.intermediate_size
    moved = rows * device.element * (whole * hidden + part / ranks.tp_size)
    seconds = sum(_product(product, device, rows, share) for product in products) + moved / device.bandwidth
    return seconds + 2 * norm_sum_seconds(device, ranks.tp_size, rows * hidden)


def _persistent_layer(ranks: Ranks, num_seqs: int) -> float:
    """A layer of a decode step in the persistent kernel, without reading K/V; infinite where it cannot serve."""
    device, served = ranks.device, [rows for rows in _PERSISTENT_SIZES if rows >= num_seqs]
    if not (device.persistent and served and ranks.pp_size == 1 and ranks.model.hidden_size <= _PERSISTENT_HIDDEN):
        return math.inf
    *products, _ = rank_products(ranks.model, ranks.stored, ranks.tp_size)
    weights = sum(product.nbytes / product.count for product in products) / device.bandwidth
    inputs = served[0] * sum(product.in_features for product in products) * _PERSISTENT_INPUT
    sums = 2 * _PERSISTENT_SUM * device.link_seconds
    return weights + inputs + sums + _PERSISTENT_SECONDS


def _head(ranks: Ranks, rows: int) -> float:
    """The head's product, sampling of its parts, and what else a step has once."""
    *_, head = rank_products(ranks.model, ranks.stored, ranks.tp_size)
    device, logits = ranks.device, rows * ranks.model.vocab_size / ranks.tp_size
    seconds = _product(head, device, rows) + _PRODUCT_SECONDS + _STEP_SECONDS + logits * _LOGIT_BYTES / device.bandwidth
    if ranks.tp_size > 1:  # the best token of each rank
        seconds += all_reduce_seconds(device, ranks.tp_size, rows * _BEST_BYTES)
    return seconds


def _decode_layer(ranks: Ranks, num_seqs: int, context: int) -> float:
    """A layer of a decode step."""
    fixed = 4 * _PRODUCT_SECONDS + _LAYER_SECONDS + num_seqs * _SEQUENCE_SECONDS / ranks.tp_size
    kv_cache = num_seqs * context * ranks.kv_per_token / max(ranks.stages)
    quicker = min(_layer(ranks, num_seqs) + fixed, _persistent_layer(ranks, num_seqs))
    return quicker + kv_cache / ranks.device.bandwidth


def _hand_over(ranks: Ranks, rows: int) -> float:
    """Of activations to the next stage; on average, where only some of them are on another node."""
    if ranks.pp_size == 1:
        return 0.0
    message = rows * ranks.model.hidden_size * ranks.device.element
    inside = max(ranks.device.link_seconds, _HAND_OVER_SECONDS) + message / ranks.device.link_bandwidth
    seconds, bandwidth = _NETWORK
    share = (ranks.nodes - 1) / (ranks.pp_size - 1)  # of the borders between stages
    return (1 - share) * inside + share * (seconds + message / bandwidth)


def decode_seconds(ranks: Ranks, num_seqs: int, context: int = DECODE_CONTEXT) -> float:
    """Seconds from one decode step of `num_seqs` sequences to their next one: through all stages, and back."""
    layers = ranks.model.num_hidden_layers * _decode_layer(ranks, num_seqs, context)
    seconds = layers + _head(ranks, num_seqs) + (ranks.pp_size - 1) * _hand_over(ranks, num_seqs)
    return seconds + (_RETURN_SECONDS if ranks.pp_size > 1 else 0.0)


def _turn(ranks: Ranks, num_seqs: int, context: int) -> float:
    """Seconds from one decode step of a part of the sequences to the next step of another part: as many parts are on
    their way as there are stages, so the slowest stage sets the pace; but no part is ready again before it has been
    through all stages, and its tokens have come back to the first one."""
    layer, head = _decode_layer(ranks, num_seqs, context), _head(ranks, num_seqs)
    *others, last = [count * layer for count in ranks.stages]
    return max(*others, last + head, decode_seconds(ranks, num_seqs, context) / ranks.pp_size)


def prompt_tokens_per_second(ranks: Ranks, rows: int, length: int = PROMPT_TOKENS) -> float:
    """Prompt tokens per second in steps of `rows` tokens, of prompts of `length`; stages work on different steps."""
    model, device = ranks.model, ranks.device
    heads = math.ceil(model.num_attention_heads / ranks.tp_size) * model.head_dim
    attention = 4 * heads * (length / 2) * rows / (device.half_flops * _PROMPT_ATTENTION)
    share = _PROMPT_PRODUCTS if ranks.tp_size == 1 else 1.0
    layer = _layer(ranks, rows, share) + attention + 4 * _PRODUCT_SECONDS + _LAYER_SECONDS
    return rows / (max(ranks.stages) * layer + _hand_over(ranks, rows))


def prompt_seconds(ranks: Ranks, count: int, length: int, max_num_batched_tokens: int) -> float:
    """Seconds until `count` prompts that come at once have their first tokens: the last stage begins when all others
    have seen a part of them (`batching/lanes.py`)."""
    tokens = count * length
    rows = min(tokens, max_num_batched_tokens)
    part = min(rows, math.ceil(tokens / (2 * ranks.pp_size)))
    filled = (ranks.pp_size - 1) * part / prompt_tokens_per_second(ranks, part, length)
    return tokens / prompt_tokens_per_second(ranks, rows, length) + filled + _head(ranks, count) + _PROMPT_SECONDS


def tokens_per_second(
    ranks: Ranks,
    num_seqs: int,
    max_num_batched_tokens: int,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    output_tokens: int = OUTPUT_TOKENS,
) -> float:
    """Output tokens per second of one engine with `num_seqs` requests always running: every prompt is computed once,
    and every output token is a row of a full decode step. Stages each have a part of the sequences in hand."""
    context = prompt_tokens + output_tokens // 2
    part = math.ceil(num_seqs / ranks.pp_size)
    pace = _turn(ranks, part, context) if ranks.pp_size > 1 else decode_seconds(ranks, part, context)
    rows = min(max_num_batched_tokens, num_seqs * prompt_tokens)
    prompts = prompt_tokens / prompt_tokens_per_second(ranks, rows, prompt_tokens)
    return output_tokens / (prompts + output_tokens * pace / part)
