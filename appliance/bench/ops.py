"""`appliance bench ops`: linear layers, the own kernels in all their configs beside the library's products.

FP8 in the library: "row" applies a scale per row of either side itself; "deferred" leaves scales to the kernel that
reads the result (where the appliance does, it costs nothing), "deferred, scaled" has a kernel of its own for them.
INT8: "deferred" leaves exact int32 sums to that kernel, "tiled" is an own kernel for many rows.
INT4 with 16-bit activations (int4_ops.py): "stream", "wide" and "tile" are own kernels, "dequantize" the library's
behind one.

Weights rotate over enough copies that no cache serves them; launches are timed in a CUDA graph, as in a decode step.
Every config is compared with a plain product first. One that does not compile, or is wrong, is left out and named.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from appliance.bench.report import Table, environment, say
from appliance.errors import HardwareError, SettingsError

# Linear layers of an 8B Llama: rows and columns of the weight.
PRODUCTS = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "lm_head": (128256, 4096),
}
PRECISIONS = ("fp8", "bf16", "int8", "int4")
_OWN = ("skinny", "tiled", "stream", "wide", "tile")  # methods with configs: own kernels
ROTATED_BYTES = 256 << 20  # five times the L2 cache of a Hopper GPU
_MIN_LAUNCHES = 24  # in one graph, so that starting it does not count
_REPLAYS = 7
_MOST_ROWS = 8192
_MOST_LOGIT_ROWS = 512  # logits are computed for a token of each sequence, not for all of a prompt


@dataclass
class Case:
    """One product: rotated weights, and x of the number of rows that is being timed."""

    name: str
    precision: str
    m: int
    x: Any  # Tensor [m, k]
    weights: Any  # Tensor [copies, n, k]; with INT4 a list of (packed weight, scales and zero points)
    scales: Any = None  # float32 [m, 1] with FP8 and INT8
    weight_scales: Any = None  # float32 [1, n] with FP8 and INT8
    timings: list[dict[str, Any]] = field(default_factory=list)

    @property
    def weight_bytes(self) -> int:
        """With the scales of groups; those of channels are too few to count."""
        first = self.weights[0]
        return sum(part.numel() * part.element_size() for part in (first if isinstance(first, tuple) else (first,)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--products", default=",".join(PRODUCTS), help="of an 8B Llama (default: %(default)s)")
    parser.add_argument(
        "--rows", default="1,8,16,32,64", help=f"tokens in the batch, 1 to {_MOST_ROWS} (default: %(default)s)"
    )
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="(default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="a line for every config, not only the best")
    parser.add_argument("--output", type=Path, help="write all timings there, as JSON")


def run(args: argparse.Namespace) -> int:
    import torch

    products = _chosen("--products", args.products, tuple(PRODUCTS))
    precisions = _chosen("--precisions", args.precisions, PRECISIONS)
    rows = [int(part) for part in _chosen("--rows", args.rows, tuple(str(m) for m in range(1, _MOST_ROWS + 1)))]
    if not torch.cuda.is_available():
        raise HardwareError("`bench ops` times GPU kernels and found no CUDA GPU", hint="run it on a machine with one")
    from appliance.bench.ceilings import measure_bandwidth
    from appliance.kernels import dependent_launch

    device = torch.device("cuda", torch.cuda.current_device())
    fp8 = torch.cuda.get_device_capability(device) >= (8, 9)
    if "fp8" in precisions and not fp8:
        say("fp8 left out: this GPU has no FP8 products (compute capability 8.9 or newer)")
    bandwidth = measure_bandwidth(device)
    say(f"{torch.cuda.get_device_name(device)}, {bandwidth / 1e12:.2f} TB/s of a large copy, read and written")
    best: list[dict[str, Any]] = []
    everything: list[dict[str, Any]] = []
    for precision in precisions:
        if precision == "fp8" and not fp8:
            continue
        # In a model there are other kernels between two products. Here there are not, so none may begin early.
        with dependent_launch.disabled():
            _compile_ahead(precision, products, rows, device)
            for name in products:
                cases = list(_time_product(name, precision, rows, device))
                _show(cases, bandwidth, every=args.all)
                best += [_summary(case, bandwidth) for case in cases]
                everything += [{**_key(case), **timing} for case in cases for timing in case.timings]
    result = {"bench": "ops", **environment(), "bandwidth_tbs": round(bandwidth / 1e12, 3)}
    if args.output:
        args.output.write_text(json.dumps({**result, "timings": everything}) + "\n")
    print(json.dumps({**result, "best": best}))
    return 0


def _chosen(option: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    """A comma-separated option's parts; raises SettingsError for one that is not allowed."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in parts if part not in allowed]
    if wrong or not parts:
        known = f"{allowed[0]} to {allowed[-1]}" if len(allowed) > 8 else ", ".join(allowed)
        raise SettingsError(f"{option} is {text!r}: {', '.join(wrong) or 'nothing'} is not among {known}")
    return parts


def _dtype(precision: str) -> Any:
    """Of weights, and of x."""
    import torch

    return {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "bf16": torch.bfloat16}[precision]


def _compile_ahead(precision: str, products: list[str], rows: list[int], device: Any) -> None:
    """Compile each candidate once, several at a time. What fails here is met again, and named, when it is timed."""
    import os

    import torch

    from appliance.bench import int4_ops
    from appliance.kernels import skinny_linear as skinny

    if precision == "int4":
        int4_ops.compile_ahead(products, rows, device)
        return
    dtype = _dtype(precision)
    sms = skinny.multiprocessors(device)
    wanted = {
        (config, skinny.block_m(m))
        for name in products
        for m in rows
        if m <= skinny.MAX_ROWS
        for config in skinny.candidates(*PRODUCTS[name], m, sms, dtype.itemsize)
    }

    def compile_one(item: tuple[Any, int]) -> None:
        config, m = item
        k = config.k_bytes // dtype.itemsize * config.split * 2  # a product of that config, as small as can be
        x, weight = (torch.zeros(size, k, device=device).to(dtype) for size in (m, config.block_n))
        scales = (torch.ones(m, 1, device=device), torch.ones(1, config.block_n, device=device))
        row_scales, weight_scales = scales if dtype.itemsize == 1 else (None, None)
        try:
            torch.cuda.set_device(device)
            skinny.skinny_linear(x, weight, None, torch.bfloat16, row_scales, weight_scales, config)
        except Exception:
            return

    workers = min(16, os.cpu_count() or 1)
    say(f"compiling {len(wanted)} {precision} kernels, {workers} at a time")
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(compile_one, sorted(wanted, key=str)))
    torch.cuda.synchronize()


def _time_product(name: str, precision: str, rows: list[int], device: Any) -> Any:
    """Cases of one weight shape, timed, one by one."""
    import torch

    from appliance.bench import int4_ops
    from appliance.kernels.row_quantization import quantize_rows

    if precision == "int4":
        yield from int4_ops.time_product(name, rows, device)
        return
    n, k = PRODUCTS[name]
    dtype = _dtype(precision)
    torch.manual_seed(0)
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    weight_scales = None
    if dtype.itemsize == 1:
        weight, weight_scales = quantize_rows(weight, dtype)
        weight_scales = weight_scales.view(1, -1)
    copies = max(2, -(-ROTATED_BYTES // (n * k * dtype.itemsize)))
    weights = torch.empty((copies, n, k), dtype=dtype, device=device)
    for copy in weights:
        copy.copy_(weight)
    for m in rows:
        if not is_timed(name, m):
            continue
        x, scales = torch.randn(m, k, device=device, dtype=torch.bfloat16), None
        if dtype.itemsize == 1:
            x, scales = quantize_rows(x, dtype)
        case = Case(name, precision, m, x, weights, scales, weight_scales)
        _time_case(case)
        yield case


def is_timed(name: str, m: int) -> bool:
    return name != "lm_head" or m <= _MOST_LOGIT_ROWS


def _time_case(case: Case) -> None:
    from appliance.kernels import skinny_linear as skinny

    n, k = PRODUCTS[case.name]
    expected = _expected(case)
    for method, call in _library(case).items():
        time_one(case, method, None, call, expected)
    size = case.weights.element_size()
    configs = skinny.candidates(n, k, case.m, skinny.multiprocessors(case.x.device), size)
    for config in configs if case.m <= skinny.MAX_ROWS else ():

        def call(weight: Any, config: Any = config) -> Any:
            return skinny.skinny_linear(
                case.x, weight, None, _out_dtype(), case.scales, case.weight_scales, config=config
            )

        time_one(case, "skinny", list(astuple(config)), call, expected)
    if case.precision == "int8":
        _time_tiles(case, expected)


def _time_tiles(case: Case, expected: Any) -> None:
    """The own INT8 kernel for many rows, in each of its configs."""
    from appliance.kernels import int8_linear as int8
    from appliance.kernels.skinny_linear import shared_memory

    for tile in int8.tiles_for(case.m, shared_memory(case.x.device)):

        def call(weight: Any, tile: Any = tile) -> Any:
            return int8.int8_linear_triton(
                case.x, case.scales, weight, case.weight_scales, None, _out_dtype(), config=tile
            )

        time_one(case, "tiled", list(astuple(tile)), call, expected)


def _out_dtype() -> Any:
    import torch

    return torch.bfloat16


def _expected(case: Case) -> Any:
    """float32 [m, n]: the product in plain torch, some weight rows at a time."""
    import torch

    from appliance.kernels.skinny_linear import skinny_linear_reference

    weight = case.weights[0]
    parts = []
    for start in range(0, weight.shape[0], 16384):
        some = slice(start, start + 16384)
        scales = None if case.weight_scales is None else case.weight_scales[:, some]
        parts.append(skinny_linear_reference(case.x, weight[some], None, torch.float32, case.scales, scales))
    return torch.cat(parts, 1)


def _library(case: Case) -> dict[str, Callable[[Any], Any]]:
    """What torch offers for the product: name -> function of the weight."""
    import torch
    import torch.nn.functional as F

    if case.precision == "bf16":
        return {"cuBLAS bf16": lambda weight: F.linear(case.x, weight)}
    from appliance.kernels.fp8_linear import fp8_linear_deferred
    from appliance.kernels.int8_linear import int8_linear_deferred

    def by_row(weight: Any) -> Any:
        return torch._scaled_mm(
            case.x, weight.t(), scale_a=case.scales, scale_b=case.weight_scales, out_dtype=_out_dtype()
        )

    def deferred(weight: Any) -> Any:
        if case.precision == "int8":
            return int8_linear_deferred(case.x, case.scales, weight, case.weight_scales, None, _out_dtype())
        return fp8_linear_deferred(case.x, case.scales, weight, case.weight_scales, None)

    def scaled(weight: Any) -> Any:
        return deferred(weight).materialize(_out_dtype())

    found: dict[str, Callable[[Any], Any]] = {"deferred": deferred, "deferred, scaled": scaled}
    return found if case.precision == "int8" else {"_scaled_mm row": by_row, **found}


def time_one(case: Case, method: str, config: list[Any] | None, call: Callable[[Any], Any], expected: Any) -> None:
    """Check and time one way to compute a case; a failure is said and recorded in place of a time."""
    from appliance.kernels.deferred_scale import as_float

    timing: dict[str, Any] = {"method": method, "config": config}
    try:
        got = as_float(call(case.weights[0]))
        error = float((got - expected).norm() / expected.norm())
        del got
        if not error < 1e-2:
            raise ArithmeticError(f"relative error {error:.2g} against the plain product")
        timing["us"] = round(_microseconds(call, case.weights), 3)
    except Exception as error:
        timing["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        say(f"left out: {case.precision} {case.name} of {case.m} rows, {method} {config}: {timing['failed']}")
    case.timings.append(timing)


def _microseconds(call: Callable[[Any], Any], weights: Any) -> float:
    """Of one launch: the median over replays of a graph of launches that go through all copies of the weight."""
    import torch

    rounds = max(1, -(-_MIN_LAUNCHES // len(weights)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for weight in weights:
                call(weight)
    times = []
    for _ in range(_REPLAYS + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[1:])[_REPLAYS // 2] * 1e3 / (rounds * len(weights))


def _key(case: Case) -> dict[str, Any]:
    n, k = PRODUCTS[case.name]
    return {"precision": case.precision, "product": case.name, "n": n, "k": k, "rows": case.m}


def _best(case: Case) -> dict[str, Any] | None:
    """The quickest config of an own kernel."""
    timed = [timing for timing in case.timings if timing["method"] in _OWN and "us" in timing]
    return min(timed, key=lambda timing: float(timing["us"]), default=None)


def _summary(case: Case, bandwidth: float) -> dict[str, Any]:
    """A case for the JSON line: microseconds of each library product and of the best config, which is named."""
    summary: dict[str, Any] = {"precision": case.precision, "product": case.name, "rows": case.m}
    for timing in case.timings:
        if timing["method"] not in _OWN:
            summary[timing["method"]] = timing.get("us")
    own = [timing for timing in case.timings if timing["method"] in _OWN]
    if own and own[0]["method"] != "tiled":  # of which none serves untimed
        summary["default"] = own[0].get("us")
    if best := _best(case):
        share = case.weight_bytes / (best["us"] * 1e-6) / bandwidth
        summary |= {best["method"]: best["us"], "share": round(share, 3), "config": best["config"]}
    return summary


def _show(cases: list[Case], bandwidth: float, *, every: bool) -> None:
    configs = "block_n, k_bytes, split, warps, stages, weight_first"
    if cases[0].precision in ("int4", "int8"):
        configs = "config"
    n, k = PRODUCTS[cases[0].name]
    table = Table("rows", "method", "µs", "TB/s", "share", "TFLOP/s", configs)
    for case in cases:
        best = _best(case)
        shown = sorted((t for t in case.timings if "us" in t), key=lambda timing: float(timing["us"]))
        for timing in shown:
            own = timing["method"] in _OWN
            if own and not every and timing is not best:
                continue
            rate = case.weight_bytes / (timing["us"] * 1e-6)
            config = ", ".join(map(str, timing["config"])) if own else ""
            method = f"{timing['method']}, best" if timing is best else timing["method"]
            work = 2 * case.m * n * k / (timing["us"] * 1e-6)
            cells = (
                f"{timing['us']:.2f}",
                f"{rate / 1e12:.2f}",
                f"{rate / bandwidth:.0%}",
                f"{work / 1e12:.0f}",
                config,
            )
            table.row(case.m, method, *cells)
    table.show(f"{cases[0].precision} {cases[0].name}, weight {n} x {k}; share of the measured bandwidth")
