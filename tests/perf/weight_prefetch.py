"""Times a chain of decoder layers with and without a part of the next product's weight brought into L2 ahead, on one
GPU: µs a layer in a CUDA graph.

    python tests/perf/weight_prefetch.py --model 70b/4 --rows 1,8,32,64,128,256 --mebibytes 8,16,24,32

`70b/4`: the share of a rank, where a kernel that does nothing for 8 µs stands for each sum over ranks; `8b`: whole
layers. Another such kernel stands for attention, which brings nothing. Products are timed first, as a build does. Then
the weight of each product behind a norm is brought ahead alone, by so many MiB, and both as a start chooses. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from appliance.builder import tactics
from appliance.builder.timings import Timings
from appliance.distributed import TensorParallel
from appliance.kernels import norm
from appliance.kernels.attention import AttentionMetadata
from appliance.kernels.deferred_scale import Product, materialize
from appliance.kernels.dependent_launch import launch_options
from appliance.kernels.tactics import TABLE
from appliance.kernels.weight_prefetch import KEY, name_of
from appliance.layers.attention import ForwardContext
from appliance.layers.decoder import Decoder
from appliance.layers.linear import Linear
from appliance.runtime import ahead_choice, random_weights
from appliance.runtime.loading import build_model
from appliance.runtime.timing import time_in_graph
from appliance.types import ModelConfig

MODELS: dict[str, tuple[dict[str, Any], int, int]] = {  # shape, ranks, layers: 2 GB of weights
    "8b": ({"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}, 1, 10),
    "70b/4": ({"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}, 4, 10),
}
PAGE = 16
SUM, ATTENTION = 8.0, 8.0  # µs


@triton.jit
def _busy_kernel(x_ptr, nanoseconds, PDL: tl.constexpr):
    """A program each of few multiprocessors, which touches nothing."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    begin = tl.extra.cuda.globaltimer()
    now = begin
    while now - begin < nanoseconds:
        now = tl.extra.cuda.globaltimer()


def busy(like: Tensor, microseconds: float) -> None:
    _busy_kernel[(32,)](like, int(microseconds * 1000), num_warps=8, **launch_options(like.device))


class BusySums:
    """A reducer of a rank that is alone, and takes its time."""

    def rms_norm(self, x: Product, *rest: Any) -> Any:
        return norm.rms_norm(self._summed(x), *rest)

    def rms_norm_quantize(self, x: Product, *rest: Any) -> Any:
        return norm.rms_norm_quantize(self._summed(x), *rest)

    def _summed(self, x: Product) -> Tensor:
        total = materialize(x, x.dtype)
        busy(total, SUM)
        return total


class Alone:
    """What a rank of several asks of the others."""

    own = BusySums()


class BusyAttention:
    name = "none"

    def plan(self, metadata: AttentionMetadata) -> None:
        pass

    def attend(self, q: Tensor, *_: Any) -> Tensor:
        busy(q, ATTENTION)
        return q


class Chain:
    """Layers of a model."""

    def __init__(self, name: str, precision: str, device: torch.device) -> None:
        shape, ranks, layers = MODELS[name]
        config = {"architecture": "LlamaForCausalLM", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
        config |= {"num_hidden_layers": layers, "max_position_embeddings": 8192}
        scheme = {"fp8": "fp8", "bf16": "none"}[precision]
        tp = TensorParallel(0, ranks, Alone()) if ranks > 1 else None  # type: ignore[arg-type]
        self.device = device
        self.model: Decoder = build_model(ModelConfig(**(config | shape)), scheme, torch.bfloat16, None, tp)
        random_weights.fill(self.model, self.device, 0)
        self.model.prepare(8192)
        first = self.model._layers()[0]
        self.products: dict[str, Linear] = {
            "qkv": first.attention.qkv,
            "gate_up": first.mlp.gate_up,
        }

    def context(self, rows: int) -> ForwardContext:
        heads, layers = self.model.num_kv_heads, len(self.model.layers)
        cache = torch.zeros(rows, 2, PAGE, heads, 128, dtype=torch.bfloat16, device=self.device)
        positions = torch.arange(rows, device=self.device)
        empty, host = torch.zeros(1, dtype=torch.int32, device=self.device), np.zeros(1, dtype=np.int32)
        slots = torch.arange(rows, device=self.device)
        metadata = AttentionMetadata(1, rows, rows, rows, empty, empty, empty[None], slots, host, host, host[None])
        return ForwardContext(positions, [cache] * layers, metadata, BusyAttention())  # type: ignore[arg-type]

    @torch.inference_mode()
    def microseconds(self, rows: int, ahead: dict[str, int] | None = None) -> float:
        """Of a layer, with so many MiB of each product's weight brought ahead, or as `TABLE` says."""
        for name, layer in self.products.items() if ahead is not None else ():
            assert ahead is not None
            TABLE.choose(KEY, layer.out_features, layer.in_features, rows, name_of(ahead.get(name, 0)))
        ctx = self.context(rows)
        x = torch.randn(rows, self.model.config.hidden_size, device=self.device).bfloat16()

        def step() -> object:
            product: Product = x.clone()
            stream: Tensor | None = None
            for layer in self.model._layers():
                product, stream = layer(product, stream, ctx)
            return product

        step()
        return time_in_graph([step], 2) / len(self.model.layers)


def explore(chain: Chain, rows: int, sizes: list[int]) -> dict[str, Any]:
    """Each product alone; then all as a start chooses them."""
    found: dict[str, Any] = {"rows": rows, "none": round(chain.microseconds(rows, {}), 2)}
    for name in chain.products:
        times = {size: chain.microseconds(rows, {name: size}) for size in sizes}
        found[name] = {size: round(value, 2) for size, value in times.items()}
    chosen = ahead_choice.choose(chain.model._layers()[0], [rows], chain.microseconds)
    found["chosen"] = {choice.product: choice.tactic for choice in chosen}
    found["all"] = round(chain.microseconds(rows), 2)
    found["none again"] = round(chain.microseconds(rows, {}), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="70b/4")
    parser.add_argument("--precision", choices=("fp8", "bf16"), default="fp8")
    parser.add_argument("--rows", default="1,8,32,64,128,256")
    parser.add_argument("--mebibytes", default="8,16,24,32")
    parser.add_argument("--seconds", type=float, default=10.0, help="for timing products")
    parser.add_argument("--cache", type=Path)
    args = parser.parse_args()
    begin = time.perf_counter()
    rows, sizes = ([int(part) for part in text.split(",")] for text in (args.rows, args.mebibytes))
    chain = Chain(args.model, args.precision, torch.device("cuda", 0))
    print(f"{time.perf_counter() - begin:.1f} s: model", flush=True)
    del chain.model.lm_head  # not timed
    tactics._ORDER = tuple(rows)  # type: ignore[assignment]
    timings = Timings(args.cache, torch.cuda.get_device_name(0))
    chosen = tactics.Tuner(torch.bfloat16, chain.device, timings, seconds=args.seconds).tune(chain.model)
    for choice in chosen:
        if choice.product != "lm_head":
            print(choice.product, choice.rows, choice.tactic, choice.microseconds, choice.runner_up_microseconds)
    print(f"{time.perf_counter() - begin:.1f} s: products", flush=True)
    everything = []
    for count in rows:
        everything.append(explore(chain, count, sizes))
        print(f"{time.perf_counter() - begin:.1f} s:", json.dumps(everything[-1]), flush=True)
    print(json.dumps(everything))


if __name__ == "__main__":
    main()
