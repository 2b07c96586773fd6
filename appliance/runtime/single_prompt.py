"""One prompt through a loaded model, with no batch around it: to look at what comes out, or at what it leaves in the KV
cache. Knows the model's interface and the cache layout; knows no tokenizer and no weights' storage form."""

from __future__ import annotations

import torch
from torch import Tensor

from appliance.layers.decoder import Decoder
from appliance.runtime.prompt_batch import prompt_context


@torch.inference_mode()
def run_prompt(model: Decoder, token_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """token_ids int64 [n], on the model's device, n up to what `Decoder.prepare` was called with. Returns the hidden
    states [n, hidden] and each layer's K and V, [2, n, num_kv_heads, head_dim] in the model's dtype, K rotated.

    Of several pipeline stages all call it; the others than the last get what they sent, and layers of others have
    zeros."""
    context = prompt_context(
        model.config,
        [len(token_ids)],
        model.dtype,
        token_ids.device,
        num_kv_heads=model.num_kv_heads,
        keep=True,
    )
    received = None
    if not model.stage.is_first:
        received = torch.empty(len(token_ids), model.config.hidden_size, dtype=model.dtype, device=token_ids.device)
        model.stage.receive(received)
    hidden = model(token_ids, context, received)
    if not model.stage.is_last:
        model.stage.send(hidden)
    return hidden, [cache[0, :, : len(token_ids)] for cache in context.kv_caches]
