"""Times INT4 products (W4A16) of an 8B Llama on a GPU: every config of every kernel, beside bf16 and FP8.

    python tests/perf/int4_products.py --products qkv,o,gate_up,down --rows 1,8,32,64,128,256,1024 --output all.json

Weights rotate over enough copies that no cache serves them; calls are replayed from one CUDA graph, and no kernel
begins before the one in front has ended, unless --dependent says so (then products of the same kernel overlap, as no
model's do). Share: bytes of weight and scales over what the GPU copies in that time. Everything is compared with the
plain product first; what fails or is wrong is named. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from appliance.bench.ceilings import measure_bandwidth
from appliance.kernels import dependent_launch
from appliance.kernels.fp8_linear import fp8_linear_deferred, quantize_rows
from appliance.kernels.int4_linear import Way, dequantize, int4_linear_reference, ways
from appliance.kernels.skinny_linear import MAX_ROWS, likely, multiprocessors, skinny_linear
from appliance.runtime.timing import time_in_graph

PRODUCTS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
ROTATED = 256 << 20  # bytes: five times the L2 cache of a Hopper GPU


def packed(n: int, k: int, group: int, copies: int) -> tuple[list[Tensor], list[Tensor]]:
    """Random words and scales as `int4_layout.py` has them."""
    words = [
        torch.randint(-(2**31), 2**31 - 1, (n, k // 8), dtype=torch.int64, device="cuda").int() for _ in range(copies)
    ]
    scale = (torch.rand(n, k // group, device="cuda") * 0.01 + 0.005).half()
    zero = torch.randint(0, 16, (n, k // group), device="cuda").half()
    scales = [torch.stack([scale, zero], -1) for _ in range(copies)]
    return words, scales


def in_graph(call: Callable[[int], object], copies: int, m: int) -> float:
    for _ in range(2):
        call(0)
    return time_in_graph([lambda i=i: call(i) for i in range(copies)], 48 if m <= 256 else 8)  # type: ignore[misc]


def bf16_and_fp8(n: int, k: int, rows: list[int], device: torch.device) -> dict[int, dict[str, float]]:
    """µs of the library's bf16 product, and of the best of FP8's: own kernel and library."""
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    values, scales = quantize_rows(weight)
    wide = [weight.clone() for _ in range(max(2, -(-ROTATED // (n * k * 2))))]
    narrow = [values.clone() for _ in range(max(2, -(-ROTATED // (n * k))))]
    found: dict[int, dict[str, float]] = {}
    for m in rows:
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        found[m] = {"bf16": in_graph(lambda i: F.linear(x, wide[i]), len(wide), m)}  # noqa: B023
        xq, xs = quantize_rows(x)
        column_scales = scales.view(1, -1)
        calls: list[Callable[[int], object]] = [
            lambda i: fp8_linear_deferred(xq, xs, narrow[i], column_scales, None)  # noqa: B023
        ]
        if m <= MAX_ROWS:
            for config in likely(n, k, m, multiprocessors(device))[:4]:
                calls.append(
                    lambda i, config=config: skinny_linear(
                        xq, narrow[i], None, torch.bfloat16, xs, column_scales, config  # noqa: B023
                    )
                )  # fmt: skip
        found[m]["fp8"] = min(in_graph(call, len(narrow), m) for call in calls)
    return found


def compile_ahead(shapes: list[str], rows: list[int], group: int, device: torch.device) -> None:
    """Each kernel once, several at a time."""
    jobs: dict[tuple[str, int, int], tuple[Way, int, str]] = {}
    for name in shapes:
        n, k = PRODUCTS[name]
        for m in rows:
            for way_name, way in ways(n, k, group, m, device).items():
                shape = n * k if "sliced" in way_name else k if way_name.startswith("tile") else 0
                jobs.setdefault((way_name, max(m, 8), shape), (way, m, name))

    def run(job: tuple[Way, int, str]) -> None:
        way, m, name = job
        k = PRODUCTS[name][1]
        torch.cuda.set_device(device)
        words = torch.zeros(512, k // 8, dtype=torch.int32, device=device)
        scales = torch.zeros(512, k // group, 2, dtype=torch.float16, device=device)
        with contextlib.suppress(Exception):
            way(torch.zeros(m, k, dtype=torch.bfloat16, device=device), words, scales, None)

    first, *others = jobs.values()
    run(first)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(run, others))
    torch.cuda.synchronize()


def time_int4(name: str, m: int, words: list[Tensor], scales: list[Tensor], group: int) -> dict[str, float]:
    """µs by way; those that fail or are wrong are said and left out."""
    n, k = PRODUCTS[name]
    device = words[0].device
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    expected = int4_linear_reference(x, words[0], scales[0], None).float()
    found: dict[str, float] = {}
    for way_name, way in ways(n, k, group, m, device).items():
        try:
            got = way(x, words[0], scales[0], None).float()
            error = float((got - expected).norm() / expected.norm())
            if not error < 1e-2:
                raise ArithmeticError(f"relative error {error:.2g}")
            again = way(x, words[0], scales[0], None).float()
            if not torch.equal(got, again):
                raise ArithmeticError("another result the second time")
            found[way_name] = in_graph(lambda i, way=way: way(x, words[i], scales[i], None), len(words), m)
        except Exception as problem:
            print(f"left out: {name} m={m} {way_name}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", default="qkv,o,gate_up,down")
    parser.add_argument("--rows", default="1,8,16,32,64,128,256,512,1024,2048")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--top", type=int, default=3, help="lines for each product and number of rows")
    parser.add_argument("--output", type=Path, help="write all timings there, as JSON")
    parser.add_argument("--dependent", action="store_true", help="kernels may begin before the one in front has ended")
    args = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    names, rows = args.products.split(","), [int(m) for m in args.rows.split(",")]
    bandwidth = measure_bandwidth(device)
    print(f"{torch.cuda.get_device_name()}, {bandwidth / 1e12:.2f} TB/s copied, groups of {args.group}")
    result: list[dict[str, Any]] = []
    with torch.inference_mode(), contextlib.nullcontext() if args.dependent else dependent_launch.disabled():
        compile_ahead(names, rows, args.group, device)
        for name in names:
            n, k = PRODUCTS[name]
            others = bf16_and_fp8(n, k, rows, device)
            size = n * k // 2 + n * k // args.group * 4
            torch.cuda.empty_cache()
            words, scales = packed(n, k, args.group, max(2, -(-ROTATED // size)))
            written = size + n * k * 2
            whole = in_graph(lambda i: dequantize(words[i], scales[i], torch.bfloat16), len(words), 4096)  # noqa: B023
            print(
                f"\n{name} {n}x{k}: floor {size / bandwidth * 1e6:.1f} µs, dequantizing all {whole:.1f} µs "
                f"({written / whole / 1e6:.2f} TB/s)"
            )
            for m in rows:
                timed = time_int4(name, m, words, scales, args.group)
                ranked = sorted(timed.items(), key=lambda item: item[1])
                print(f" m={m}: bf16 {others[m]['bf16']:.1f}, fp8 {others[m]['fp8']:.1f} µs")
                best = {way_name.split()[0]: (way_name, us) for way_name, us in reversed(ranked)}  # of each kind
                shown = ranked[: args.top] + [item for item in ranked[args.top :] if item in best.values()]
                for way_name, us in shown:
                    print(f"   {us:7.2f} µs {size / (us * 1e-6) / bandwidth:4.0%}  {way_name}")
                result.append({"product": name, "rows": m, **others[m], "int4": {k: round(v, 2) for k, v in ranked}})
    summary = {"bench": "int4_products", "bandwidth_tbs": round(bandwidth / 1e12, 3)}
    if args.output:
        args.output.write_text(json.dumps({**summary, "results": result}) + "\n")
    best = [[r["product"], r["rows"], round(r["bf16"], 1), round(r["fp8"], 1), min(r["int4"].values())] for r in result]
    print(json.dumps({**summary, "product, rows, bf16, fp8, int4 in µs": best}))


if __name__ == "__main__":
    main()
