"""A pass over many tokens in two halves, so that ranks add up the results of one while they compute the other.

With thousands of tokens an all-reduce takes a third of what the layer's products do, and nothing else can be done until
it is over, except with other tokens. In a layer only attention needs all of them: before and behind it each half goes
its own way. A half's sum is made beside the other half's products, with the norm that follows it where one kernel does
both (`sum_norm.py`), and waited for where the half goes on. (Two halves in turn are what Megatron-LM and DeepSeek's
inference do with micro-batches; here they are of one step.)

The first half's sum behind attention has only the other's output product to hide behind, and the second half's behind
the MLP only the other's q/k/v product: these two are wanted *soon*. The other two have an MLP, and may take their time.

Knows layers as `decoder.py` builds them; nothing of ranks but that sums can be begun. Numbers are those of a pass in
one piece, but for products that round in another order where they have fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from appliance.distributed import TensorParallel
from appliance.kernels.deferred_scale import Product
from appliance.kernels.tactics import TABLE
from appliance.layers.attention import ForwardContext
from appliance.quantization.scheme import Activation

if TYPE_CHECKING:
    from appliance.layers.decoder import DecoderLayer

# Tokens and bytes of a sum, from more of which on halves pay: GPUs are the slower side even though twice as much is
# launched, and halves are no less than what the library adds up anyway. No CUDA graph holds as many tokens.
MIN_TOKENS = 2048
MIN_BYTES = 32 << 20

T = TypeVar("T")
Normed = tuple[Activation, Tensor]  # what the next product takes, and the residual stream
Wait = Callable[[], T]


def pays(stream: Tensor, tp: TensorParallel) -> bool:
    """Whether a pass over the residual stream [n, hidden] should go in halves."""
    many = stream.shape[0] > MIN_TOKENS and stream.numel() * stream.element_size() > MIN_BYTES
    return many and tp.size > 1 and not TABLE.batch_invariant


def forward(
    layers: Sequence[DecoderLayer],
    stream: Tensor,
    ctx: ForwardContext,
    finish: Callable[[Product, Tensor | None], Tensor],
) -> Tensor:
    """`layers` one after the other over the residual stream [n, hidden] in front of the first, whose memory may be
    written over; then what `finish` makes of each half's rows, of what the last layer adds to the stream and of the
    stream that it is to be added to."""
    middle = stream.shape[0] // 2
    halves = slice(0, middle), slice(middle, stream.shape[0])
    entering = [_ready(_input_norm(layers[0], stream[half], None)) for half in halves]
    for layer, following in pairwise(layers):
        entering = _layer(layer, entering, halves, ctx, partial(_input_norm, following))
    return torch.cat([wait() for wait in _layer(layers[-1], entering, halves, ctx, finish)])


def _ready(found: T) -> Wait[T]:
    return lambda: found


def _input_norm(layer: DecoderLayer, x: Product, stream: Tensor | None) -> Normed:
    found: Normed = layer.input_norm(x, stream, layer.attention.qkv.prepared)
    return found


def _layer(
    layer: DecoderLayer,
    entering: Sequence[Wait[Normed]],
    halves: Sequence[slice],
    ctx: ForwardContext,
    behind: Callable[[Product, Tensor], T],
) -> list[Wait[T]]:
    """What `behind` makes, for each half, of what the layer adds to the stream and of the stream."""
    attention, mlp = layer.attention, layer.mlp
    queries, streams = [], []
    for half, wait in zip(halves, entering, strict=True):
        normed, stream = wait()
        queries.append(attention.project(normed, ctx, half))
        streams.append(stream)
    attended = attention.attend(torch.cat(queries), ctx)

    def norm(stream: Tensor, x: Product) -> Normed:
        found: Normed = layer.post_attention_norm(x, stream, mlp.gate_up.prepared)
        return found

    middle = [
        attention.o.begin(attended[half], partial(norm, stream), soon=half is halves[0])
        for half, stream in zip(halves, streams, strict=True)
    ]
    leaving = []
    for half, wait in zip(halves, middle, strict=True):
        normed, stream = wait()
        leaving.append(mlp.down.begin(mlp.inner(normed), partial(_swapped, behind, stream), soon=half is halves[-1]))
    return leaving


def _swapped(act: Callable[[Product, Tensor], T], stream: Tensor, x: Product) -> T:
    return act(x, stream)
