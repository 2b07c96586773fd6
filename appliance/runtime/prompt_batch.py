"""Several prompts side by side through a model's layers, with no scheduler around them: what measures activations and
logits runs models by. Knows the KV cache's layout and step metadata; knows no text and no weights' storage form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from appliance.kernels.attention import AttentionMetadata, ReferenceAttention
from appliance.layers.attention import ForwardContext
from appliance.types import ModelConfig

_MULTIPLE = 16  # of page sizes, which kernels like


def prompt_context(
    config: ModelConfig,
    lengths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    num_kv_heads: int | None = None,
    keep: bool = False,
    longest: int = 0,
) -> ForwardContext:
    """What `Decoder.forward` or a single layer needs for whole prompts of these lengths, one behind the other in the
    batch, each attending to itself only. `dtype`: of the KV cache. Every prompt has one page, as long as the longest,
    or as `longest` if that is more: with the same one for several batches, kernels are compiled once.

    `keep`: each layer has a KV cache of its own, to look at afterwards; otherwise all share one, since a layer reads
    only what it has just written."""
    total = sum(lengths)
    size = -(-max(*lengths, longest) // _MULTIPLE) * _MULTIPLE
    start = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    seq_lens = np.asarray(lengths, np.int32)
    table = np.arange(len(lengths), dtype=np.int32)[:, None]
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    slots = positions + np.repeat(np.arange(len(lengths), dtype=np.int64) * size, lengths)
    metadata = AttentionMetadata(
        num_seqs=len(lengths),
        num_tokens=total,
        max_query_len=max(lengths),
        max_seq_len=max(lengths),
        query_start=torch.from_numpy(start).to(device),
        seq_lens=torch.from_numpy(seq_lens).to(device),
        page_table=torch.from_numpy(table).to(device),
        slot_mapping=torch.from_numpy(slots).to(device),
        query_start_host=start,
        seq_lens_host=seq_lens,
        page_table_host=table,
    )
    attention = ReferenceAttention()
    attention.plan(metadata)
    shape = (len(lengths), 2, size, num_kv_heads or config.num_key_value_heads, config.head_dim)
    layers = config.num_hidden_layers
    caches = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers if keep else 1)]
    return ForwardContext(
        torch.from_numpy(positions).to(device), caches if keep else caches * layers, metadata, attention
    )
