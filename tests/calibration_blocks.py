"""Random decoder blocks with channels of outliers, and what such a block computes, for tests of calibration."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.quantization.calibration.block import BlockWeights, LinearWeights, QuantizedBlock
from appliance.quantization.calibration.folding import Folding
from appliance.quantization.calibration.statistics import BlockStatistics

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 128, 4, 2, 32, 192
EPS = 1e-6


def random_block(
    *, bias: bool = False, kv_heads: int = KV_HEADS, dtype: torch.dtype = torch.float32, seed: int = 0
) -> BlockWeights:
    """Norm weights differ by a factor of 50: a few input channels of qkv and gate_up are outliers; some rows of v and
    up are large, so those of o and down have outliers too."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def linear(out_features: int, in_features: int, loud_from: int | None = None) -> LinearWeights:
        weight = normal(out_features, in_features) / in_features**0.5
        if loud_from is not None:
            weight[loud_from::16] *= 12
        return LinearWeights(weight.to(dtype), normal(out_features).mul_(0.3).to(dtype) if bias else None)

    def norm() -> Tensor:
        weight = 0.5 + 0.5 * torch.rand(HIDDEN, generator=generator)
        weight[torch.randperm(HIDDEN, generator=generator)[:5]] *= 25
        weight[3] *= -1
        return weight.to(dtype)

    q_size, kv_size = HEADS * HEAD_DIM, kv_heads * HEAD_DIM
    qkv = linear(q_size + 2 * kv_size, HIDDEN, q_size + kv_size)
    qkv.weight[: q_size + kv_size] *= 0.1  # attention that looks at many tokens
    return BlockWeights(
        "layers.7",
        norm(),
        qkv,
        linear(HIDDEN, q_size),
        norm(),
        linear(2 * INTERMEDIATE, HIDDEN, INTERMEDIATE),
        linear(HIDDEN, INTERMEDIATE),
        HEADS,
        kv_heads,
        HEAD_DIM,
    )


def tokens(count: int = 192, seed: int = 1) -> Tensor:
    """float32 [count, hidden]: correlated channels, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(99)) / HIDDEN**0.5
    return torch.randn(count, HIDDEN, generator=generator) @ (torch.eye(HIDDEN) + mixing)


def relative(result: Tensor, reference: Tensor) -> float:
    """||result - reference|| / ||reference||."""
    return float((result - reference).norm() / reference.norm())


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.to(x.dtype)


def run(block: BlockWeights, x: Tensor, statistics: BlockStatistics | None = None, head_norm: bool = False) -> Tensor:
    """The block over x [n, hidden], one sequence, causal; no rotation. Inputs of products go to `statistics`."""

    def product(key: str, inputs: Tensor) -> Tensor:
        if statistics is not None:
            statistics.update(key, inputs)
        linear = getattr(block, key)
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        return F.linear(inputs, linear.weight.to(x.dtype), bias)

    heads, kv_heads, dim = block.num_heads, block.num_kv_heads, block.head_dim
    qkv = product("qkv", _norm(x, block.input_norm)).unflatten(1, (-1, dim)).transpose(0, 1)
    q, k, v = qkv.split((heads, kv_heads, kv_heads))
    if head_norm:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    attended = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=heads != kv_heads)[
        0
    ]
    x = x + product("o", attended.transpose(0, 1).flatten(1))
    gate, up = product("gate_up", _norm(x, block.post_attention_norm)).chunk(2, dim=1)
    return x + product("down", F.silu(gate) * up)


def gathered(block: BlockWeights, x: Tensor, *, hessian: bool = False) -> BlockStatistics:
    """Statistics of two batches."""
    statistics = BlockStatistics(block, hessian=hessian)
    for part in x.chunk(2):
        run(block, part, statistics)
    return statistics


def folded_block(block: BlockWeights, folding: Folding) -> BlockWeights:
    """With float weights: before any rounding."""
    biases = folding.biases()
    linears = {key: LinearWeights(folding.weight(key), biases.get(key)) for key, _ in block.products()}
    return replace(block, **folding.norms, **linears)


def dequantized_block(block: BlockWeights, quantized: QuantizedBlock) -> BlockWeights:
    linears = {
        key: LinearWeights(weight.dequantize(), quantized.biases.get(key)) for key, weight in quantized.weights.items()
    }
    return replace(block, **quantized.norms, **linears)
