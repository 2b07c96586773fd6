"""Products of a linear layer on the CPU, each way that the appliance has: float32, bfloat16, INT8 (activations rounded
included), INT4. Run by hand:

    python -m tests.perf.cpu_products [--threads 1] [--shapes 768x256,6144x2048] [--rows 1,4,16,128,512]

Ways take turns, and the quickest of each counts, so that a busy machine disturbs less. Prints microseconds, and how
many times as quick as float32 in brackets.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.kernels import cpu_linear
from appliance.kernels.row_quantization import quantize_rows_reference
from appliance.quantization.weights import round_to_nearest

_ROUNDS, _SECONDS = 15, 3.0  # at least so many rounds, or so long


def ways(out: int, size: int) -> dict[str, Callable[[Tensor], Tensor]]:
    weight = torch.randn(out, size, generator=torch.Generator().manual_seed(0)) / size**0.5
    half = weight.bfloat16()
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "float32": lambda x: F.linear(x, weight),
        "bfloat16": lambda x: F.linear(x.bfloat16(), half).float(),
    }
    if cpu_linear.has_int8():
        eight = cpu_linear.pack_int8(*quantize_rows_reference(weight, torch.int8))
        found["int8"] = lambda x: cpu_linear.int8_linear(eight, *quantize_rows_reference(x, torch.int8), None)
    four = round_to_nearest(weight, 128)
    packed = cpu_linear.pack_int4(four.values, four.scales, four.zeros)
    found["int4"] = lambda x: cpu_linear.int4_linear(packed, x, None)
    return found


def quickest(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Seconds of each."""
    best = dict.fromkeys(calls, float("inf"))
    started = time.perf_counter()
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
        if time.perf_counter() - started > _SECONDS:
            break
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", default="768x256,6144x2048,2048x8192", help="OUTxIN of weights")
    parser.add_argument("--rows", default="1,4,16,128,512")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for shape in args.shapes.split(","):
        out, size = map(int, shape.split("x"))
        found = ways(out, size)
        for rows in map(int, args.rows.split(",")):
            x = torch.randn(rows, size, generator=torch.Generator().manual_seed(1))
            calls = {name: functools.partial(way, x) for name, way in found.items()}
            quickest(calls)  # warm
            best = quickest(calls)
            cells = [f"{name} {t * 1e6:.0f} ({best['float32'] / t:.2f})" for name, t in best.items()]
            print(f"{shape} rows {rows}: " + ", ".join(cells), flush=True)


if __name__ == "__main__":
    main()
