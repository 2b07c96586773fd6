"""One prompt through a loaded model, with no batch around it: to look at what comes out, or at what it leaves in the KV
cache. Knows the model's interface and the cache layout; knows no tokenizer and no weights' storage form."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from appliance.kernels.attention import AttentionMetadata, ReferenceAttention
from appliance.layers.attention import ForwardContext
from appliance.layers.decoder import Decoder


@torch.inference_mode()
def run_prompt(model: Decoder, token_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """token_ids int64 [n], on the model's device, n up to what `Decoder.prepare` was called with. Returns the hidden
    states [n, hidden] and each layer's K and V, [2, n, num_kv_heads, head_dim] in the model's dtype, K rotated."""
    n, device = len(token_ids), token_ids.device
    start, lengths, table = np.array([0, n], np.int32), np.array([n], np.int32), np.zeros((1, 1), np.int32)
    attention = ReferenceAttention()
    metadata = AttentionMetadata(
        num_seqs=1,
        num_tokens=n,
        max_query_len=n,
        max_seq_len=n,
        query_start=torch.from_numpy(start).to(device),
        seq_lens=torch.from_numpy(lengths).to(device),
        page_table=torch.from_numpy(table).to(device),
        slot_mapping=torch.arange(n, device=device),
        query_start_host=start,
        seq_lens_host=lengths,
        page_table_host=table,
    )
    attention.plan(metadata)
    shape = (1, 2, n, model.num_kv_heads, model.config.head_dim)  # one page holds it all
    caches = [torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(model.config.num_hidden_layers)]
    positions = torch.arange(n, device=device)
    hidden = model(token_ids, ForwardContext(positions, caches, metadata, attention))
    return hidden, [cache[0] for cache in caches]
