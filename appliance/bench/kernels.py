"""`appliance bench kernels`: the small kernels around the products of an FP8 model, and a decoder layer of both.

Each kernel is timed in a CUDA graph that runs it again and again, with programmatic dependent launch and without,
beside the bytes that it must move. "deferred": it applies the product's scales, too. A layer is everything but its
attention, with the products left to the appliance's choice or forced; its weights rotate through memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from appliance.bench.report import Table, environment, numbers, say
from appliance.bench.shapes import SHAPES
from appliance.errors import HardwareError

_MODEL = SHAPES["llama-3.1-8b"]
_LAUNCHES = 48  # in one graph
_LAYERS = 4  # rotated: their weights are far more than any L2 cache
_MOST_LOGIT_ROWS = 512
_PAGE_SIZE = 16


@dataclass(frozen=True)
class Kernel:
    """One launch to time, and the bytes that it must read and write."""

    name: str
    run: Callable[[], object]
    bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", default="1,16,64,256,2048,8192", help="tokens in the batch (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    import torch

    rows = [n for (n,) in numbers("--rows", args.rows, "N")]
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise HardwareError("`bench kernels` times FP8 kernels and found no GPU that has FP8 products")
    from appliance.bench.ceilings import measure_bandwidth

    device = torch.device("cuda", torch.cuda.current_device())
    bandwidth = measure_bandwidth(device)
    say(f"{torch.cuda.get_device_name(device)}, {bandwidth / 1e12:.2f} TB/s of a large copy, read and written")
    with torch.inference_mode():
        kernels = [timing for m in rows for timing in _time_kernels(m, device, bandwidth)]
        layers = list(_time_layers(rows, device))
    _show_kernels(kernels)
    _show_layers(layers)
    result = {"bench": "kernels", **environment(), "bandwidth_tbs": round(bandwidth / 1e12, 3)}
    print(json.dumps({**result, "kernels": kernels, "layers": layers}))
    return 0


def _both_ways(call: Callable[[], object], launches: int) -> tuple[float, float]:
    """µs of a call with programmatic dependent launch, and without."""
    import torch

    from appliance.kernels import dependent_launch
    from appliance.runtime.timing import time_in_graph

    found = []
    for launches_so in (nullcontext, dependent_launch.disabled):
        with launches_so():
            call()
            torch.cuda.synchronize()
            found.append(round(time_in_graph([call], launches), 3))
    return found[0], found[1]


# ---------------------------------------------------------------- kernels


def _time_kernels(rows: int, device: Any, bandwidth: float) -> Iterator[dict[str, Any]]:
    for kernel in _kernels(rows, device):
        with_, without = _both_ways(kernel.run, _LAUNCHES)
        share = kernel.bytes / (with_ * 1e-6) / bandwidth
        yield {"kernel": kernel.name, "rows": rows, "us": with_, "us_without": without, "share": round(share, 3)}


def _kernels(rows: int, device: Any) -> Iterator[Kernel]:
    """The small kernels of a decode step or a prefill of so many tokens."""
    import torch

    from appliance.kernels import activation, norm, sampling
    from appliance.kernels.deferred_scale import materialize
    from appliance.kernels.fp8_linear import quantize_rows

    hidden, wide, vocab = _MODEL.hidden_size, _MODEL.intermediate_size, _MODEL.vocab_size
    residual = torch.randn(rows, hidden, device=device, dtype=torch.bfloat16)
    weight = torch.ones(hidden, device=device, dtype=torch.bfloat16)
    for name, x in _forms(rows, hidden, device):
        yield Kernel(
            f"add, norm, quantize{name}",
            lambda x=x: norm.rms_norm_quantize(x, residual, weight, 1e-5),  # type: ignore[misc]
            7 * rows * hidden,
        )
    for name, x in _forms(rows, 2 * wide, device):
        yield Kernel(f"silu, mul, quantize{name}", lambda x=x: activation.silu_mul_quantize(x), 5 * rows * wide)  # type: ignore[misc]
    yield from _rotations(rows, device)
    attended = torch.randn(rows, hidden, device=device, dtype=torch.bfloat16)
    yield Kernel("quantize", lambda: quantize_rows(attended), 3 * rows * hidden)
    if rows > _MOST_LOGIT_ROWS:
        return
    for name, x in _forms(rows, vocab, device):
        yield Kernel(f"logits to float32{name}", lambda x=x: materialize(x, torch.float32), 6 * rows * vocab)  # type: ignore[misc]
        yield Kernel(f"argmax{name}", lambda x=x: sampling.argmax(x), 2 * rows * vocab)  # type: ignore[misc]
    logits = torch.randn(rows, vocab, device=device)
    yield Kernel("argmax, float32", lambda: sampling.argmax(logits), 4 * rows * vocab)
    yield Kernel("argmax, float32, torch", lambda: logits.argmax(1), 4 * rows * vocab)


def _forms(rows: int, size: int, device: Any) -> list[tuple[str, Any]]:
    """A product of random numbers as it comes, and with its scales deferred."""
    import torch

    from appliance.kernels.deferred_scale import DeferredScale

    x = torch.randn(rows, size, device=device, dtype=torch.bfloat16)
    scales = torch.ones(rows, 1, device=device), torch.ones(1, size, device=device)
    return [("", x), (", deferred", DeferredScale(x.clone(), *scales, None))]


def _rotations(rows: int, device: Any) -> Iterator[Kernel]:
    import torch

    from appliance.kernels.deferred_scale import DeferredScale
    from appliance.kernels.rope_cache import rope_and_write

    heads, kv_heads, dim = _MODEL.num_attention_heads, _MODEL.num_key_value_heads, _MODEL.head_dim
    width = (heads + 2 * kv_heads) * dim
    where = _where(rows, device)
    for name, product in _forms(rows, width, device):
        deferred = product if isinstance(product, DeferredScale) else None
        values = product if deferred is None else product.values
        q, k, v = values.unflatten(-1, (-1, dim)).split((heads, kv_heads, kv_heads), dim=1)

        def rotate(q: Any = q, k: Any = k, v: Any = v, deferred: Any = deferred) -> torch.Tensor:
            return rope_and_write(q, k, v, *where, deferred=deferred)

        yield Kernel(f"rope, cache write{name}", rotate, 4 * rows * width)


def _where(rows: int, device: Any) -> tuple[Any, Any, Any, Any]:
    """Positions, table of cosines and sines, KV cache, slots: what the rotation of `rows` tokens takes."""
    import torch

    pages = -(-rows // _PAGE_SIZE)
    shape = (pages, 2, _PAGE_SIZE, _MODEL.num_key_value_heads, _MODEL.head_dim)
    positions = torch.arange(rows, device=device)
    cos_sin = torch.rand(rows, _MODEL.head_dim, device=device)
    return positions, cos_sin, torch.zeros(shape, dtype=torch.bfloat16, device=device), positions


# ---------------------------------------------------------------- layers


def _time_layers(rows: list[int], device: Any) -> Iterator[dict[str, Any]]:
    """µs of a layer without its attention, per way to compute its products."""
    from appliance import registry
    from appliance.kernels.tactics import TABLE

    scheme = registry.load("quantization", "fp8").Scheme()
    layers = [_weights(scheme, device) for _ in range(_LAYERS)]
    for m in rows:
        for method in ("default", "skinny", "rowwise", "deferred"):
            if method == "skinny" and m > 64:
                continue
            TABLE.clear()
            if method != "default":
                _force(scheme, layers[0], m, method, device)
            call = _chain(scheme, layers, m, device)
            with_, without = _both_ways(call, 4)
            yield {
                "layer": method,
                "rows": m,
                "us": round(with_ / _LAYERS, 2),
                "us_without": round(without / _LAYERS, 2),
            }
    TABLE.clear()


def _weights(scheme: Any, device: Any) -> dict[str, Any]:
    import torch

    hidden, wide, dim = _MODEL.hidden_size, _MODEL.intermediate_size, _MODEL.head_dim
    heads = _MODEL.num_attention_heads + 2 * _MODEL.num_key_value_heads
    shapes = {
        "qkv": (heads * dim, hidden),
        "o": (hidden, hidden),
        "gate_up": (2 * wide, hidden),
        "down": (hidden, wide),
    }
    return {
        name: scheme.prepare(scheme.quantize(torch.randn(shape, device=device, dtype=torch.bfloat16) / shape[1] ** 0.5))
        for name, shape in shapes.items()
    }


def _force(scheme: Any, layer: dict[str, Any], rows: int, method: str, device: Any) -> None:
    """All products of `rows` rows by the first tactic of that name."""
    from appliance.kernels.tactics import TABLE, row_bucket

    bucket = row_bucket(rows)
    if bucket is None:
        return
    for prepared in layer.values():
        n, k = prepared["weight"].shape
        names = scheme.tactics(n, k, bucket, device)
        TABLE.choose("fp8", n, k, bucket, next(name for name in names if name.partition(" ")[0] == method))


def _chain(scheme: Any, layers: list[dict[str, Any]], rows: int, device: Any) -> Callable[[], object]:
    import torch

    from appliance.kernels.deferred_scale import DeferredScale
    from appliance.kernels.rope_cache import rope_and_write

    heads, kv_heads, dim = _MODEL.num_attention_heads, _MODEL.num_key_value_heads, _MODEL.head_dim
    start = torch.randn(rows, _MODEL.hidden_size, device=device, dtype=torch.bfloat16)
    stream = torch.randn_like(start)
    weight = torch.ones(_MODEL.hidden_size, device=device, dtype=torch.bfloat16)
    where = _where(rows, device)

    def call() -> object:
        x: Any = start
        residual = stream
        for layer in layers:
            normed, residual = scheme.rms_norm(x, residual, weight, 1e-5)
            product = scheme.apply_deferred(layer["qkv"], normed, None, torch.bfloat16)
            deferred = product if isinstance(product, DeferredScale) else None
            values = product if deferred is None else deferred.values
            q, k, v = values.unflatten(-1, (-1, dim)).split((heads, kv_heads, kv_heads), dim=1)
            q = rope_and_write(q, k, v, *where, deferred=deferred)
            x = scheme.apply_deferred(layer["o"], q.flatten(1), None, torch.bfloat16)
            normed, residual = scheme.rms_norm(x, residual, weight, 1e-5)
            gate_up = scheme.apply_deferred(layer["gate_up"], normed, None, torch.bfloat16)
            x = scheme.apply_deferred(layer["down"], scheme.silu_mul(gate_up), None, torch.bfloat16)
        return x

    return call


# ---------------------------------------------------------------- tables


def _show_kernels(kernels: list[dict[str, Any]]) -> None:
    table = Table("rows", "kernel", "µs", "without", "share")
    for timing in kernels:
        times = f"{timing['us']:.2f}", f"{timing['us_without']:.2f}"
        table.row(timing["rows"], timing["kernel"], *times, f"{timing['share']:.0%}")
    table.show("kernels; without: dependent launch off; share of the measured bandwidth")


def _show_layers(layers: list[dict[str, Any]]) -> None:
    table = Table("rows", "products", "µs", "without")
    for timing in layers:
        table.row(timing["rows"], timing["layer"], f"{timing['us']:.1f}", f"{timing['us_without']:.1f}")
    table.show("a layer without its attention; without: dependent launch off")
