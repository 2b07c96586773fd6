"""A pass over many tokens in two halves, or more parts, so that ranks add up the results of one while they compute the
others.

With thousands of tokens an all-reduce takes a third of what the layer's products do, and nothing else can be done until
it is over, except with other tokens. In a layer only attention needs all of them: before and behind it each part goes
its own way. What is added up in the background is waited for where the part's next norm begins: the first part's sum
behind attention has the other parts' output products to hide behind, the last one's behind the MLP the other parts'
q/k/v products. Two halves leave some of it uncovered, more parts less, but smaller products take longer. (Two halves in
turn are what Megatron-LM and DeepSeek's inference do with micro-batches; here they are of one step.)

Knows layers as `decoder.py` builds them; nothing of ranks but that sums can be begun. Numbers are those of a pass in
one piece, but for products that round in another order where they have fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from appliance.distributed import TensorParallel
from appliance.kernels.tactics import TABLE
from appliance.layers.attention import ForwardContext

if TYPE_CHECKING:
    from appliance.layers.decoder import DecoderLayer

# Tokens and bytes of a sum, from more of which on halves pay: GPUs are the slower side even though twice as much is
# launched, and halves are no less than what the library adds up anyway. No CUDA graph holds as many tokens.
MIN_TOKENS = 2048
MIN_BYTES = 32 << 20
PART_TOKENS = 2048  # where there are enough for more than two parts
MAX_PARTS = 2

Wait = Callable[[], Tensor]


def pays(stream: Tensor, tp: TensorParallel) -> bool:
    """Whether a pass over the residual stream [n, hidden] should go in halves."""
    many = stream.shape[0] > MIN_TOKENS and stream.numel() * stream.element_size() > MIN_BYTES
    return many and tp.size > 1 and not TABLE.batch_invariant


def forward(layers: Sequence[DecoderLayer], stream: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
    """`layers` one after the other over the residual stream [n, hidden] in front of the first: what the last adds to
    the stream, and the stream it is to be added to, which may be memory of the one given."""
    parts = parts_of(stream.shape[0])
    adding: list[Wait] = [_ready(stream[part]) for part in parts]
    streams: list[Tensor | None] = [None] * len(parts)
    for layer in layers:
        adding, streams = _layer(layer, adding, streams, parts, ctx)
    return torch.cat([wait() for wait in adding]), torch.cat([part for part in streams if part is not None])


def parts_of(tokens: int) -> list[slice]:
    """Two, or as many as have PART_TOKENS, up to MAX_PARTS, of equal size."""
    number = max(2, min(tokens // PART_TOKENS, MAX_PARTS))
    bounds = [tokens * part // number for part in range(number + 1)]
    return [slice(begin, end) for begin, end in pairwise(bounds)]


def _ready(x: Tensor) -> Wait:
    return lambda: x


def _layer(
    layer: DecoderLayer,
    adding: Sequence[Wait],
    streams: Sequence[Tensor | None],
    parts: Sequence[slice],
    ctx: ForwardContext,
) -> tuple[list[Wait], list[Tensor | None]]:
    """What is being added to each part's stream, and the streams, in front of a layer and behind it."""
    attention, mlp = layer.attention, layer.mlp
    queries, streams = [], list(streams)
    for at, part in enumerate(parts):
        normed, streams[at] = layer.input_norm(adding[at](), streams[at], attention.qkv.prepared)
        queries.append(attention.project(normed, ctx, part))
    attended = attention.attend(torch.cat(queries), ctx)
    adding = [attention.o.begin(attended[part]) for part in parts]
    behind: list[Wait] = []
    for at in range(len(parts)):
        normed, streams[at] = layer.post_attention_norm(adding[at](), streams[at], mlp.gate_up.prepared)
        behind.append(mlp.down.begin(mlp.inner(normed)))
    return behind, streams
