"""INT4 products of `appliance bench ops`: every way to multiply packed 4-bit weights with 16-bit activations.

Knows how such weights are made up and rotated; checking, timing and showing are `ops.py`'s.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from appliance.bench import ops
from appliance.bench.report import say
from appliance.kernels.int4_linear import Way, int4_linear_reference, ways

GROUP = 128  # inner positions of a scale, as the int4 profile has them
_WORKERS = 16


def random_weight(n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Packed values and scales with zero points, as `kernels/int4_layout.py` has them."""
    words = torch.randint(-(2**31), 2**31, (n, k // 8), dtype=torch.int64, device=device).to(torch.int32)
    scales = torch.rand(n, k // GROUP, device=device) * 0.01 + 0.005
    zeros = torch.randint(0, 16, (n, k // GROUP), device=device)
    return words, torch.stack([scales.half(), zeros.half()], -1)


def compile_ahead(products: list[str], rows: list[int], device: torch.device) -> None:
    """Run each way once on a small weight, several at a time. What fails here is met again, and named, when timed."""
    wanted: dict[tuple[str, int], tuple[Way, int, int]] = {}
    for name in products:
        n, k = ops.PRODUCTS[name]
        for m in rows:
            if ops.is_timed(name, m):
                wanted |= {(way, m): (call, m, k) for way, call in ways(n, k, GROUP, m, device).items()}

    def run(job: tuple[Way, int, int]) -> None:
        way, m, k = job
        if device.type == "cuda":
            torch.cuda.set_device(device)
        words, scales = random_weight(256, k, device)
        with contextlib.suppress(Exception):
            way(torch.zeros(m, k, dtype=torch.bfloat16, device=device), words, scales, None)

    workers = min(_WORKERS, os.cpu_count() or 1)
    say(f"compiling {len(wanted)} int4 kernels, {workers} at a time")
    first, *others = wanted.values()
    run(first)  # what all launches share is made once
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, others))
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_product(name: str, rows: list[int], device: torch.device) -> Iterator[ops.Case]:
    """Cases of one weight shape, timed, one by one."""
    n, k = ops.PRODUCTS[name]
    torch.manual_seed(0)
    first = random_weight(n, k, device)
    copies = max(2, -(-ops.ROTATED_BYTES // (n * k // 2)))
    weights = [first, *((first[0].clone(), first[1].clone()) for _ in range(copies - 1))]
    for m in rows:
        if not ops.is_timed(name, m):
            continue
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        case = ops.Case(name, "int4", m, x, weights)
        expected = int4_linear_reference(x, *first, None).float()
        for way_name, way in ways(n, k, GROUP, m, device).items():

            def call(weight: tuple[Tensor, Tensor], x: Tensor = x, way: Way = way) -> Any:
                return way(x, *weight, None)

            method, _, config = way_name.partition(" ")
            own = method in ("stream", "wide", "tile")
            ops.time_one(case, method if own else way_name, [config] if own else None, call, expected)
        yield case
