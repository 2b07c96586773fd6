"""The token embedding. Knows nothing of the output projection, which is a linear layer of its own even when tied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from appliance.layers.linear import parameter


class Embedding(nn.Module):
    """Token embedding, whole on every rank: token_ids int64 [n] -> [n, size]."""

    def __init__(self, num_embeddings: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter((num_embeddings, size), dtype)

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)
