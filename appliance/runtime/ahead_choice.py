"""How much of each product's weight to bring into L2 ahead of it (`kernels/weight_prefetch.py`): timed on the layers
that will be served, as no product tells for how long the kernels in front of it leave memory idle.

Off until a step of several ranks was timed with it (`ENABLED`): on one GPU nothing paid, as norms alone are too short.
Ranks add up within a layer, so all must choose alike: of times the slowest rank's count. Knows neither kernels nor
batches; the choices are in `kernels.tactics.TABLE`, and in the engine if a build has them made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from appliance.distributed import TensorParallel
from appliance.engines.manifest import TimedTactic
from appliance.kernels.deferred_scale import Product
from appliance.kernels.dependent_launch import launch_options
from appliance.kernels.tactics import TABLE
from appliance.kernels.weight_prefetch import KEY, name_of
from appliance.layers.attention import ForwardContext
from appliance.layers.decoder import Decoder, DecoderLayer
from appliance.layers.linear import Linear

log = logging.getLogger(__name__)

ENABLED = False
# Numbers of rows that are timed, as long as anything pays: the more there are, the less products wait for weights. With
# 256, layers of a rank of a 70B were slower with any size.
ROWS = (8, 32, 64, 128)
_MEBIBYTES = (8, 16, 24, 32)  # of the 50 that an H200's L2 holds; with 48 a layer is slower than with none
_LEAST_GAIN = 0.003  # of the layers' time, found twice: timings of the same differ by as much
_LAYERS = 8  # that a timing goes through: no cache holds their weights

Timer = Callable[[int], float]  # rows -> µs of the layers as `TABLE` says at the moment, of all ranks the slowest's


def rows_to_time(most: int) -> list[int]:
    """Ascending numbers of rows, for steps of at most `most` sequences."""
    return sorted({rows for rows in ROWS if rows < most} | {min(most, max(ROWS))})


def layers_timed(model: Decoder) -> list[DecoderLayer]:
    """Of this stage."""
    return [cast(DecoderLayer, model.layers[index]) for index in model.own_layers[:_LAYERS]]


def pays_to_time(layer: DecoderLayer, device: torch.device) -> bool:
    """Whether anything can be brought ahead there, and `TABLE` does not say yet how much."""
    known = TABLE.chosen(KEY, layer.attention.qkv.out_features, layer.attention.qkv.in_features, 1) is not None
    return ENABLED and not known and not TABLE.batch_invariant and bool(launch_options(device)["PDL"])


def run(layers: Sequence[DecoderLayer], stream: Tensor, ctx: ForwardContext) -> Product:
    """`layers` over the residual stream [n, hidden] in front of them, which stays as it is."""
    x: Product = stream.clone()  # the first layer keeps and adds to it
    residual: Tensor | None = None
    for layer in layers:
        x, residual = layer(x, residual, ctx)
    return x


def slowest(tp: TensorParallel, microseconds: float) -> float:
    """The largest of the ranks' times, to a hundredth."""
    return -tp.minimum(-round(microseconds * 100)) / 100


def choose(
    layer: DecoderLayer, rows: Sequence[int], timer: Timer, attention_brings: Callable[[int], bool] = lambda rows: False
) -> tuple[TimedTactic, ...]:
    """For the products of layers like this one that have something in front of them which brings weights, and for each
    number of rows, ascending, up to the first for which nothing pays: one product after the other, what makes layers
    quickest together with what was chosen so far; into the table too. `attention_brings`: whether attention of so many
    rows brings the weight behind it."""
    norms = {"gate_up": layer.mlp.gate_up, "qkv": layer.attention.qkv}
    found: list[TimedTactic] = []
    for count in rows:
        products = norms | ({"o": layer.attention.o} if attention_brings(count) else {})
        for product in products.values():
            _set(product, count, 0)
        before = best = min(timer(count), timer(count))
        for name, product in products.items():
            times = {0: best}
            for size in _sizes(product):
                _set(product, count, size)
                times[size] = timer(count)
                if times[size] > min(times.values()) * (1 + _LEAST_GAIN):
                    break  # more takes longer still
            size = min(times, key=lambda size: times[size])
            _set(product, count, size)
            if size != 0:
                times[size] = max(times[size], timer(count))
                if times[size] > best * (1 - _LEAST_GAIN):
                    size = 0
                    _set(product, count, size)
            best = times[size]
            found.append(_timed(name, product, count, size, times))
        sizes = ", ".join(f"{choice.product} {choice.tactic}" for choice in found[-len(products) :])
        log.info("weights ahead at %d rows: %s: layers take %.1f µs, without %.1f", count, sizes, best, before)
        if best == before:
            break
    return tuple(found)


def _sizes(product: Linear) -> list[int]:
    """MiB worth timing: up to the first that is the whole weight."""
    weight = product.scheme.weight_read(product.prepared)
    if weight is None:
        return []
    whole = weight.numel() * weight.element_size() / (1 << 20)
    return [size for at, size in enumerate(_MEBIBYTES) if at == 0 or _MEBIBYTES[at - 1] < whole]


def _set(product: Linear, rows: int, mebibytes: int) -> None:
    TABLE.choose(KEY, product.out_features, product.in_features, rows, name_of(mebibytes))


def _timed(name: str, product: Linear, rows: int, size: int, times: dict[int, float]) -> TimedTactic:
    others = sorted((value, other) for other, value in times.items() if other != size)
    return TimedTactic(
        product=name,
        scheme=KEY,
        out_features=product.out_features,
        in_features=product.in_features,
        rows=rows,
        tactic=name_of(size),
        microseconds=round(times[size], 2),
        runner_up=name_of(others[0][1]) if others else "",
        runner_up_microseconds=round(others[0][0], 2) if others else None,
    )
