"""The part of ranks_step.py about prompts: passes in parts, whose sums run in the background, and these sums alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from appliance.kernels import copy_sums, norm
from appliance.kernels.deferred_scale import Product
from appliance.layers import halves

if TYPE_CHECKING:
    from ranks_step import Ranks

# How far a pass in parts may be from one in one piece, relative. Products over fewer rows may round in another order: a
# bit of bf16 in 256, over four layers with two sums each. 8-bit activations round to one of 8 values between powers of
# two (half of 1/8 at most), and what falls to the other side of such a step is that much apart in all that follows.
APART = {"bf16": 0.02, "fp8": 0.1}


class NoSums:
    """A reducer of a rank that is alone."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def begin_all_reduce(self, x: Tensor) -> Callable[[], Tensor]:
        return lambda: x

    def rms_norm(self, x: Product, *rest: Any) -> Any:
        return norm.rms_norm(x, *rest)

    def rms_norm_quantize(self, x: Product, *rest: Any) -> Any:
        return norm.rms_norm_quantize(x, *rest)


def prefill(ranks: Ranks, tokens: int) -> dict[str, Any]:
    ctx, ids = ranks.context(tokens), torch.arange(tokens, device=ranks.device) % 1000

    def step() -> Tensor:
        return ranks.model(ids, ctx)

    def per_layer() -> float:
        step()
        return round(ranks.eager(step, 4) / ranks.model.config.num_hidden_layers / 1e3, 3)

    found: dict[str, Any] = {}
    outputs: dict[str, Tensor] = {}
    for way, parts in itertools.product(ways_of_adding(ranks), (2, 4)):
        with background(ranks, way), in_parts(parts):
            name = f"{way.name}, {parts} parts"
            found[name] = per_layer()
            outputs[name] = step().float()
    with in_parts(1):
        found["one piece"] = per_layer()
        whole = step().float()
    for parts in (1, 2, 4):
        with ranks.sums_by(NoSums()), in_parts(parts):
            found["alone" if parts == 1 else f"alone, {parts} parts"] = per_layer()
    found["apart"] = {name: round(float((x - whole).norm() / whole.norm()), 5) for name, x in outputs.items()}
    if ranks.copies is not None:
        with background(ranks, Way(1)), in_parts(2):
            found["copies ran as"] = copy_events(step)
    return found


@dataclass(frozen=True)
class Way:
    """What adds up in the background."""

    lanes: int = 0  # streams that copies of a step are dealt out to; 0: NCCL
    round_bytes: int = copy_sums.ROUND_BYTES

    @property
    def name(self) -> str:
        lanes = "1 lane" if self.lanes == 1 else f"{self.lanes} lanes"
        return f"copies ({lanes}, {self.round_bytes >> 20} MiB)" if self.lanes else "NCCL"


def ways_of_adding(ranks: Ranks) -> list[Way]:
    if ranks.copies is None:
        return [Way()]
    return [Way(), Way(1), Way(ranks.tp.size - 1), Way(1, copy_sums.ROUND_BYTES // 2)]


@contextmanager
def background(ranks: Ranks, way: Way) -> Iterator[None]:
    """Sums in the background go this way."""
    before = ranks.own.copies
    torch.cuda.synchronize()
    ranks.tp.minimum(0)  # nobody is in a round of another size
    ranks.own.use_copies(ranks.copies if way.lanes else None)
    if way.lanes and ranks.copies is not None:
        ranks.copies.use_lanes(way.lanes)
        ranks.copies._round_bytes = way.round_bytes
    try:
        yield
    finally:
        ranks.own.use_copies(before)


@contextmanager
def in_parts(number: int) -> Iterator[None]:
    before = halves.MIN_BYTES, halves.MAX_PARTS, halves.PART_TOKENS
    halves.MIN_BYTES, halves.MAX_PARTS, halves.PART_TOKENS = (0 if number > 1 else 1 << 62), number, 1
    try:
        yield
    finally:
        halves.MIN_BYTES, halves.MAX_PARTS, halves.PART_TOKENS = before


def copy_events(step: Callable[[], object]) -> dict[str, str]:
    """What the profiler calls the copies and the kernel that adds up: number, µs together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if "mem" in event.name.lower() or "add_up" in event.name]
    times: dict[str, list[float]] = {}
    for event in events:
        times.setdefault(event.name[:48], []).append(event.time_range.elapsed_us())
    return {name: f"{len(found)} x, {sum(found):.0f} us" for name, found in times.items()}


def alone_in_the_background(ranks: Ranks, rows: int) -> dict[str, str]:
    """One sum by itself: µs, GB/s into each GPU."""
    x = torch.zeros(rows, ranks.hidden, dtype=torch.bfloat16, device=ranks.device)
    size = ranks.tp.size
    arriving = 2 * (size - 1) / size * x.numel() * 2
    found = {}
    for way in ways_of_adding(ranks):
        with background(ranks, way):
            best = host = float("inf")
            for _ in range(6):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                ranks.tp.minimum(0)
                torch.cuda._sleep(2_000_000)  # the host is ahead of the GPU
                begin.record()
                started = time.perf_counter()
                ranks.group.begin_all_reduce(x)()
                host = min(host, (time.perf_counter() - started) * 1e6)
                end.record()
                torch.cuda.synchronize()
                best = min(best, begin.elapsed_time(end) * 1e3)
            slowest = ranks.slowest(best)
            gb = arriving / slowest / 1e3
            found[way.name] = f"{slowest:.1f} us, {gb:.0f} GB/s, host {host:.0f} us"
    return found
