"""How long calibrating a decoder block takes on this GPU, per algorithm and step, and what is left of the error of
rounding to nearest. Random weights and inputs of the shape of Llama 3.1 8B (`--small`: of a tiny one, for CPUs).

    python tests/perf/calibration_speed.py [--tokens 65536] [--layers 32]

The last line is one JSON object. Inputs have outliers and correlated channels, but they are no model's: what is left of
the error says that the code works, not what a model loses.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from appliance.kernels.gptq_block import gptq_block_reference, gptq_block_triton
from appliance.quantization.calibration import awq, gptq, smoothquant
from appliance.quantization.calibration.block import BlockWeights, LinearWeights, QuantizedBlock
from appliance.quantization.calibration.statistics import BlockStatistics

BATCH = 4096  # tokens of an update
SHAPES = {"large": (4096, 14336, 32, 8, 128), "small": (256, 768, 4, 2, 64)}  # hidden, intermediate, heads, kv, dim


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """(result, seconds), the device's queue empty before and after."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def random_block(shape: tuple[int, ...], device: torch.device) -> BlockWeights:
    hidden, intermediate, heads, kv_heads, dim = shape
    generator = torch.Generator(device).manual_seed(0)

    def linear(out_features: int, in_features: int) -> LinearWeights:
        weight = torch.randn(out_features, in_features, generator=generator, device=device)
        return LinearWeights((weight / in_features**0.5).bfloat16())

    norm = torch.ones(hidden, dtype=torch.bfloat16, device=device)
    qkv, o = linear((heads + 2 * kv_heads) * dim, hidden), linear(hidden, heads * dim)
    gate_up, down = linear(2 * intermediate, hidden), linear(hidden, intermediate)
    return BlockWeights("layers.0", norm, qkv, o, norm, gate_up, down, heads, kv_heads, dim)


def inputs(in_features: int, count: int, seed: int, device: torch.device) -> Tensor:
    """bf16 [count, in]: a few directions that all channels share, and one channel in 64 that is 20 times as loud."""
    generator = torch.Generator(device).manual_seed(seed)
    shared = torch.randn(64, in_features, generator=torch.Generator(device).manual_seed(1000), device=device)
    x = torch.randn(count, in_features, generator=generator, device=device)
    x += torch.randn(count, 64, generator=generator, device=device) @ shared * 0.25
    x[:, ::64] *= 20
    return x.bfloat16()


def gather(block: BlockWeights, num_tokens: int, *, hessian: bool) -> tuple[BlockStatistics, float]:
    """Statistics and the seconds that updates took, making inputs not counted."""
    statistics, seconds = BlockStatistics(block, hessian=hessian), 0.0
    for start in range(0, num_tokens, BATCH):
        for at, (key, linear) in enumerate(block.products()):
            x = inputs(linear.weight.shape[1], min(BATCH, num_tokens - start), start + at, linear.weight.device)
            seconds += timed(lambda key=key, x=x: statistics.update(key, x))[1]
    return statistics, seconds


def kernel_line(device: torch.device) -> dict[str, float]:
    """Kernel and loop on one block of 4096 rows: microseconds of the kernel, share of rows with the same values."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(4096, 128, generator=generator, device=device)
    factor = torch.eye(128, device=device) + 0.1 * torch.randn(128, 128, generator=generator, device=device).triu(1)
    scales = torch.full((4096, 1), 0.3, device=device)
    case = (weight, weight, factor, scales, torch.full_like(scales, 8.0))
    values = gptq_block_triton(*case)[0]
    equal = (values == gptq_block_reference(*case)[0]).all(1).float().mean()
    seconds = timed(lambda: [gptq_block_triton(*case) for _ in range(50)])[1] / 50
    return {"microseconds": round(seconds * 1e6, 1), "equal_rows": round(float(equal), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--layers", type=int, default=32, help="of the model whose time is projected")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    block = random_block(SHAPES["small" if arguments.small else "large"], device)
    summary: dict[str, Any] = {"device": device.type, "tokens": arguments.tokens}
    gather(block, BATCH, hessian=True)  # libraries load, kernels compile
    if device.type == "cuda":
        summary["kernel"] = kernel_line(device)
        print(f"gptq_block, 4096 x 128: {summary['kernel']}", flush=True)
    plain, summary["gather_s"] = gather(block, arguments.tokens, hessian=False)
    with_hessian, summary["gather_hessian_s"] = gather(block, arguments.tokens, hessian=True)
    print(f"gathering: {summary['gather_s']:.2f} s, with Hessians {summary['gather_hessian_s']:.2f} s", flush=True)
    options = gptq.GptqOptions()
    runs: dict[str, Callable[[], QuantizedBlock]] = {
        "awq": lambda: awq.calibrate(block, plain),
        "smoothquant": lambda: smoothquant.calibrate(block, plain),
        **{
            f"gptq {order}": lambda order=order: gptq.calibrate(block, with_hessian, replace(options, act_order=order))
            for order in ("off", "static", "on")
        },
    }
    for name, work in runs.items():
        work()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        quantized, seconds = timed(work)
        left = {key: round(e.result / e.nearest, 3) for key, e in quantized.errors.items()}
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
        total = arguments.layers * (seconds + summary["gather_hessian_s" if "gptq" in name else "gather_s"])
        summary[name] = {"block_s": round(seconds, 3), "model_s": round(total, 1), "left": left}
        print(
            f"{name}: {seconds:.2f} s a block, {total:.0f} s for {arguments.layers} with gathering, "
            f"peak {peak:.1f} GB, error left {left}",
            flush=True,
        )
    for key, linear in block.products():
        hessian = with_hessian[key].hessian
        assert hessian is not None
        (_, seconds) = timed(lambda w=linear.weight, h=hessian: gptq.quantize(w, h, options))
        order = gptq._column_order(hessian, options)
        (_, factorizing) = timed(lambda h=hessian, o=order: gptq._factorize(h, o, options, "hessian"))
        summary[f"gptq {key}"] = {"product_s": round(seconds, 3), "factorizing_s": round(factorizing, 3)}
        print(f"gptq of {key} {tuple(linear.weight.shape)}: {seconds:.2f} s, {factorizing:.2f} of it factorizing")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
