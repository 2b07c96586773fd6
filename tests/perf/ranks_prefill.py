"""The part of ranks_step.py about prompts, ms a layer: in one piece, with sums by NCCL and with sum, norm and rounding
in one kernel; in halves with sums by NCCL; without the other ranks; how far apart they are. Then the two sums by
themselves, µs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from appliance.kernels import norm
from appliance.kernels.deferred_scale import Product
from appliance.kernels.row_quantization import FP8
from appliance.kernels.sum_norm import Launch, Way
from appliance.layers import halves

if TYPE_CHECKING:
    from ranks_step import Ranks

# How far a pass may be from one in one piece, relative. Products over fewer rows may round in another order, and NCCL
# rounds after each summand: a bit of bf16 in 256, over four layers with two sums each. 8-bit activations round to one
# of 8 values between powers of two (half of 1/8 at most), and what falls to the other side of such a step is that much
# apart in all that follows.
APART = {"bf16": 0.02, "fp8": 0.1}


class NoSums:
    """A reducer of a rank that is alone."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def rms_norm(self, x: Product, *rest: Any) -> Any:
        return norm.rms_norm(x, *rest)

    def rms_norm_quantize(self, x: Product, *rest: Any) -> Any:
        return norm.rms_norm_quantize(x, *rest)

    def fuses(self, x: Product) -> bool:
        return True


def prefill(ranks: Ranks, tokens: int) -> dict[str, Any]:
    ctx, ids = ranks.context(tokens), torch.arange(tokens, device=ranks.device) % 1000

    def step() -> Tensor:
        return ranks.model(ids, ctx)

    found: dict[str, Any] = {}
    outputs: dict[str, Tensor] = {}

    def measure(name: str) -> None:
        step()
        found[name] = round(ranks.eager(step, 4) / ranks.model.config.num_hidden_layers / 1e3, 3)
        outputs[name] = step().float()

    measure("one kernel")
    with by_nccl(ranks):
        with in_halves():
            measure("halves, NCCL")
        measure("NCCL")
    with ranks.sums_by(NoSums()):
        step()
        found["alone"] = round(ranks.eager(step, 4) / ranks.model.config.num_hidden_layers / 1e3, 3)
    whole = outputs["NCCL"]
    found["apart"] = {name: round(float((x - whole).norm() / whole.norm()), 5) for name, x in outputs.items()}
    return found


@contextmanager
def by_nccl(ranks: Ranks) -> Iterator[None]:
    """In one piece, if not in halves."""
    sums, before = ranks.own.sums, halves.MIN_BYTES
    ranks.own._sums, halves.MIN_BYTES = None, 1 << 62
    try:
        yield
    finally:
        ranks.own._sums, halves.MIN_BYTES = sums, before


@contextmanager
def in_halves() -> Iterator[None]:
    before, halves.MIN_BYTES = halves.MIN_BYTES, 0
    try:
        yield
    finally:
        halves.MIN_BYTES = before


def sums_alone(ranks: Ranks, rows: int) -> dict[str, float]:
    """µs in a graph: NCCL's sum, and sum, norm and rounding in one kernel."""
    x = torch.zeros(rows, ranks.hidden, dtype=torch.bfloat16, device=ranks.device)
    residual, weight, sums = torch.zeros_like(x), torch.ones_like(x[0]), ranks.own.sums
    calls: dict[str, Callable[[], object]] = {"NCCL": partial(ranks.group.library().all_reduce, x)}
    if sums is not None:
        given = (Launch(Way.DEALT), x, residual, weight, 1e-5, FP8, None)
        calls["one kernel"] = partial(sums.rms_norm_quantize, *given)
    return {name: ranks.in_graph(call, 4) for name, call in calls.items()}
