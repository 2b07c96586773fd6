"""What a device reaches at best, measured: bytes/s of a large copy, operations/s of a large product."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from appliance.bench.floors import Ceilings
from appliance.types import Precision

_REPEATS = 8
_PRODUCT_BYTES = 1 << 30  # of a product of 8192 in float32, with what it is made from
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def measure_ceilings(device: torch.device, precision: Precision) -> Ceilings:
    """Of this device for weights in `precision`. On the CPU, where everything is computed in float32, so are both
    products; on a GPU, attention is 16-bit unless the weights are float32."""
    bandwidth = measure_bandwidth(device)
    if device.type == "cpu":
        rate = measure_product(device, torch.float32)
        return Ceilings(bandwidth, rate, rate)
    activations = measure_product(device, _DTYPES.get(precision, torch.bfloat16))
    fp8 = precision == "fp8" and torch.cuda.get_device_capability(device) >= (8, 9)
    linear = measure_product(device, torch.float8_e4m3fn) if fp8 else activations
    return Ceilings(bandwidth, linear, activations)


def measure_bandwidth(device: torch.device) -> float:
    """Bytes/s of a large copy on the device, bytes read and written counted."""
    size = min(1 << 30, _free(device) // 4) if device.type == "cuda" else (1 << 27)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _shortest(lambda: target.copy_(source), device)


def measure_product(device: torch.device, dtype: torch.dtype) -> float:
    """Operations/s of the library's square product: 8192 on a GPU (4096 with little memory left), 1024 on the CPU. FP8
    with one scale per tensor, the fastest that the library has."""
    size = 1024 if device.type == "cpu" else 8192 if _free(device) > _PRODUCT_BYTES else 4096
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    one = torch.ones((), device=device)

    def product() -> Tensor:
        if dtype == torch.float8_e4m3fn:
            return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        return a @ b.t()

    return 2 * size**3 / _shortest(product, device)


def _free(device: torch.device) -> int:
    """Bytes of a GPU that can be had; an engine may hold nearly all of it."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _shortest(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of the quickest of some runs."""
    best = float("inf")
    for _ in range(_REPEATS):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3
        else:
            begin = time.perf_counter()
            call()
            seconds = time.perf_counter() - begin
        best = min(best, seconds)
    return best
