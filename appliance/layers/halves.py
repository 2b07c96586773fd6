"""A pass over many tokens in two halves, so that ranks add up the results of one while they compute the other.

With thousands of tokens an all-reduce takes a third of what the layer's products do, and nothing else can be done until
it is over, except with other tokens. In a layer only attention needs all of them: before and behind it each half goes
its own way. What is added up in the background is waited for where the half's next norm begins. (Two halves in turn are
what Megatron-LM and DeepSeek's inference do with micro-batches; here they are of one step.)

Where the norm comes in one kernel with the sum (`sum_norm.py`), halves do not pay: that kernel moves three quarters of
the bytes and makes a quarter of the norms, and a library's products with fewer multiprocessors than there are lose more
than is hidden. A layer of a 70B in FP8 without attention, on four H200s, ms with 4096 / 8192 tokens: in one piece with
that kernel 1.80 / 3.57, with NCCL 2.14 / 4.18; in halves with NCCL 1.98 / 3.69 at best; in halves with that kernel
beside products 1.99 / 3.80 at best, whatever its blocks (16 to all) and whether or not products were told to leave it
multiprocessors (8 to 48); without sums 1.42 / 2.98.

Knows layers as `decoder.py` builds them; nothing of ranks but that sums can be begun. Numbers are those of a pass in
one piece, but for products that round in another order where they have fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

Wait = Callable[[], Tensor]


def pays(stream: Tensor, tp: TensorParallel) -> bool:
    """Whether a pass over the residual stream [n, hidden] should go in halves."""
    many = stream.shape[0] > MIN_TOKENS and stream.numel() * stream.element_size() > MIN_BYTES
    if not many or tp.size == 1 or TABLE.batch_invariant:
        return False
    return tp.own_reducer is None or not tp.own_reducer.fuses(stream)


def forward(layers: Sequence[DecoderLayer], stream: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
    """`layers` one after the other over the residual stream [n, hidden] in front of the first: what the last adds to
    the stream, and the stream it is to be added to, which may be memory of the one given."""
    middle = stream.shape[0] // 2
    halves = slice(0, middle), slice(middle, stream.shape[0])
    adding: list[Wait] = [_ready(stream[half]) for half in halves]
    streams: list[Tensor | None] = [None, None]
    for layer in layers:
        adding, streams = _layer(layer, adding, streams, halves, ctx)
    return torch.cat([wait() for wait in adding]), torch.cat([part for part in streams if part is not None])


def _ready(x: Tensor) -> Wait:
    return lambda: x


def _layer(
    layer: DecoderLayer,
    adding: Sequence[Wait],
    streams: Sequence[Tensor | None],
    halves: Sequence[slice],
    ctx: ForwardContext,
) -> tuple[list[Wait], list[Tensor | None]]:
    """What is being added to each half's stream, and the streams, in front of a layer and behind it."""
    attention, mlp = layer.attention, layer.mlp
    queries, streams = [], list(streams)
    for at, half in enumerate(halves):
        normed, streams[at] = layer.input_norm(adding[at](), streams[at], attention.qkv.prepared)
        queries.append(attention.project(normed, ctx, half))
    attended = attention.attend(torch.cat(queries), ctx)
    adding = [attention.o.begin(attended[half]) for half in halves]
    behind: list[Wait] = []
    for at in range(len(halves)):
        normed, streams[at] = layer.post_attention_norm(adding[at](), streams[at], mlp.gate_up.prepared)
        behind.append(mlp.down.begin(mlp.inner(normed)))
    return behind, streams
