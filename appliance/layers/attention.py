"""Self-attention of a decoder layer: fused q/k/v product, optional norm per head, rotary embedding with cache write,
paged attention, output product.

Which implementation attends over the pages, and where they are, comes in with each step's `ForwardContext`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from appliance.distributed import TensorParallel
from appliance.kernels import attention as paged
from appliance.kernels.deferred_scale import DeferredScale, Product
from appliance.kernels.norm import qk_rms_norm_
from appliance.kernels.rope_cache import rope_and_write
from appliance.layers.linear import ColumnParallelLinear, RowParallelLinear
from appliance.layers.norm import HeadRMSNorm
from appliance.layers.rotary import RotaryEmbedding
from appliance.quantization.scheme import Activation, PrecisionScheme
from appliance.types import ModelConfig


@dataclass
class ForwardContext:
    """What one forward pass needs beside the token ids; the same for every layer."""

    positions: Tensor  # int64 [num_tokens], of each token in its sequence; 0 for padding
    kv_caches: list[Tensor]  # one per layer, layout in kernels/attention.py; written by the pass
    metadata: paged.AttentionMetadata
    attention: paged.Attention  # `plan` already called with this metadata


class Attention(nn.Module):
    """Grouped-query attention of layer `index`; a rank holds an even share of the query heads and the key/value heads
    that these attend to, which other ranks may hold as well.

    `name`: of the block in the engine, "layers.3.attention", by which `scheme` tells how each product is stored.
    `kv_scales`: of this layer's FP8 KV cache; whoever allocates the caches sets them before the first pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        name: str,
        *,
        rotary: RotaryEmbedding,
        scheme: PrecisionScheme,
        dtype: torch.dtype,
        tp: TensorParallel,
    ) -> None:
        super().__init__()
        self.num_heads = tp.share(config.num_attention_heads, "attention heads")
        self.num_kv_heads = tp.share_or_copy(config.num_key_value_heads, "key/value heads")
        self.head_dim = config.head_dim
        self.index = index
        self._eps = config.rms_norm_eps
        self._scale = config.head_dim**-0.5
        self.window = config.window_of(index)
        self.rotary = rotary
        self.kv_scales = paged.UNIT_SCALES
        heads = self.num_heads + 2 * self.num_kv_heads
        self.qkv = ColumnParallelLinear(
            config.hidden_size,
            heads * self.head_dim,
            bias=config.attention_bias,
            scheme=scheme.of(f"{name}.qkv"),
            dtype=dtype,
            defer=True,
        )
        self.q_norm = HeadRMSNorm(self.head_dim, dtype) if config.qk_norm else None
        self.k_norm = HeadRMSNorm(self.head_dim, dtype) if config.qk_norm else None
        self.o = RowParallelLinear(
            self.num_heads * self.head_dim,
            config.hidden_size,
            bias=config.output_bias,
            scheme=scheme.of(f"{name}.o"),
            dtype=dtype,
            tp=tp,
            defer=True,
        )

    def forward(self, x: Activation, ctx: ForwardContext) -> Product:
        """x: [n, hidden] as the scheme takes it. Returns [n, hidden]; writes this layer's KV cache."""
        fused = paged.fused_decode(ctx.attention)
        attended = self.attend(self.project(x, ctx), ctx) if fused is None else self._decode(x, ctx, fused)
        out: Product = self.o(attended)
        return out

    def _decode(self, x: Activation, ctx: ForwardContext, fused: paged.FusedDecode) -> Tensor:
        """`project` and `attend` of a decode step in one launch behind the product."""
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = paged.HeadNorms(self.q_norm.weight, self.k_norm.weight, self._eps)
        return fused.attend(
            self.qkv(x),
            self.rotary.cos_sin,
            ctx.kv_caches[self.index],
            ctx.metadata,
            self._scale,
            self.window,
            self.kv_scales,
            norms,
        ).flatten(1)

    def _heads(self, x: Activation) -> Product:
        """The fused product [n, (heads + 2 * kv_heads) * head_dim], its heads normed if the model norms them."""
        product: Product = self.qkv(x)
        if self.q_norm is None or self.k_norm is None:
            return product
        if isinstance(product, DeferredScale) and not product.in_place:
            product = product.materialize(product.dtype)  # heads are normalized in place
        deferred = product if isinstance(product, DeferredScale) else None
        values = product.values if isinstance(product, DeferredScale) else product
        q, k, v = self._split(values)
        qk_rms_norm_(q, k, self.q_norm.weight, self.k_norm.weight, self._eps, v, deferred)  # applies scales
        return values

    def _split(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each [n, its heads, head_dim], of the fused product."""
        qkv = values.unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        return q, k, v

    def project(self, x: Activation, ctx: ForwardContext, rows: slice = slice(None)) -> Tensor:
        """Queries [n, heads, head_dim] of tokens whose positions are `rows` of the pass; writes their keys and values
        to this layer's KV cache."""
        product = self._heads(x)
        deferred = product if isinstance(product, DeferredScale) else None
        q, k, v = self._split(product.values if isinstance(product, DeferredScale) else product)
        positions, slots = ctx.positions[rows], ctx.metadata.slot_mapping[rows]
        cache = ctx.kv_caches[self.index]
        return rope_and_write(q, k, v, positions, self.rotary.cos_sin, cache, slots, self.kv_scales, deferred)

    def attend(self, q: Tensor, ctx: ForwardContext) -> Tensor:
        """What the output product takes, [n, heads * head_dim], of the queries of all tokens of the pass."""
        cache = ctx.kv_caches[self.index]
        return ctx.attention.attend(q, cache, ctx.metadata, self._scale, self.window, self.kv_scales).flatten(1)
