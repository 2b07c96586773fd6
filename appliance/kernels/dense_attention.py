"""Attention of whole prompts through torch's fused attention: for passes that have nothing cached before them, such as
calibration, where thousands of tokens at a time matter and pages do not.

Knows the interface of kernels/attention.py and one layout of pages only, the one of `runtime/prompt_batch.py`: prompt i
has page i, which holds all of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.kernels.attention import UNIT_SCALES, AttentionMetadata, KvScales


class DenseAttention:
    """Causal attention of each prompt to itself. Prompts may differ in length: the rest of a page is computed too, and
    thrown away. Agrees with `ReferenceAttention` but for rounding to the dtype of q."""

    name = "dense"

    def plan(self, metadata: AttentionMetadata) -> None:
        lengths = metadata.query_start_host[1:] - metadata.query_start_host[:-1]
        assert (lengths == metadata.seq_lens_host).all(), "nothing may be cached before"
        assert (metadata.page_table_host[:, 0] == range(len(lengths))).all(), "prompt i has page i"

    def attend(
        self,
        q: Tensor,
        kv_cache: Tensor,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None,
        kv_scales: KvScales = UNIT_SCALES,
    ) -> Tensor:
        pages, _, size = kv_cache.shape[:3]
        assert metadata.max_seq_len <= size, "a page holds a whole prompt"
        # Queries into the slots of their keys, so that both are [pages, size, heads, head_dim].
        queries = q.new_zeros(pages * size, *q.shape[1:])
        queries[metadata.slot_mapping] = q
        attended = F.scaled_dot_product_attention(
            queries.unflatten(0, (pages, size)).transpose(1, 2),
            kv_cache[:, 0].to(q.dtype).transpose(1, 2),
            kv_cache[:, 1].to(q.dtype).transpose(1, 2),
            attn_mask=_window_mask(size, window, q.device),
            is_causal=window is None or window >= size,
            scale=scale * kv_scales.k,
            enable_gqa=q.shape[1] != kv_cache.shape[3],
        )
        out = attended.transpose(1, 2).flatten(0, 1)[metadata.slot_mapping]
        return out if kv_scales.v == 1.0 else out * kv_scales.v


def _window_mask(size: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool [size, size], True where a query (row) sees a key: positions (p - window, p]. None: no window in effect."""
    if window is None or window >= size:
        return None
    positions = torch.arange(size, device=device)
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) & (distance < window)
