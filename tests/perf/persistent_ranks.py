"""Times the persistent decode kernel of a tensor-parallel group on GPUs of one host, ms a step.

    torchrun --nproc-per-node 4 tests/perf/persistent_ranks.py --model 70b --scheme fp8 --rows 1,2,4 --context 128,1024

Every layer is there, but only four different ones, which take turns: the caches of a GPU do not hold as much. For each
number of rows and context: a step; the same share of the model on each GPU without the other ranks, and the difference
for each sum of ranks (two a layer), µs; layer by layer, with all-reduces tuned and products not. First, on four layers,
how far the kernel is from the layers. Times are those of the slowest rank. The last line is JSON. With one process it
is the whole model on one GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
os.environ["NCCL_NVLS_ENABLE"] = "0"

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from persistent_models import BASE, Step, error

from appliance.distributed import GroupCollectives, TensorParallel
from appliance.kernels.all_reduce_group import connect
from appliance.kernels.persistent import exchange
from appliance.kernels.persistent.kernel import compile_all
from appliance.kernels.row_quantization import FP8
from appliance.kernels.sum_norm_group import Norms
from appliance.layers.decoder import Decoder
from appliance.layers.linear import Linear, RowParallelLinear
from appliance.runtime.loading import build_model
from appliance.runtime.persistent_decode import shape_of
from appliance.runtime.timing import time_in_graph
from appliance.types import ModelConfig

_LLAMA = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
MODELS: dict[str, dict[str, Any]] = {
    "8b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
    "70b": _LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
}
SCHEMES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "fp8": ("fp8", None),
    "bf16": ("none", None),
    "int4": ("int4_awq", {"head": "fp8"}),
}
DIFFERENT = 4  # layers
_LAUNCHES = 6


def random_share(scheme: str, parameters: dict[str, Any] | None, tp: TensorParallel, shape: dict[str, Any]) -> Decoder:
    """A rank's share of a model: of each layer but the first four, the weights of one of these."""
    model = build_model(ModelConfig(**(BASE | shape)), scheme, torch.bfloat16, parameters, tp)
    made: dict[str, torch.Tensor] = {}
    for index in range(min(DIFFERENT, shape["num_hidden_layers"])):
        _fill(model.layers[index], f"layers.{index}.", tp, 1 + index, made)
    _fill(model, "", tp, 0, made)
    tensors = []
    for name, _ in model.named_parameters():
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(int(parts[1]) % DIFFERENT)
        tensors.append((name, made[".".join(parts)]))
    model.load(tensors, "cuda")
    model.prepare(8192)
    return model


def _fill(module: torch.nn.Module, prefix: str, tp: TensorParallel, seed: int, made: dict[str, torch.Tensor]) -> None:
    """Random tensors for what `module` has outside of `layers`: shares differ between ranks, the rest does not."""
    own, same = (torch.Generator("cuda").manual_seed(seed + 1000 * (1 + rank)) for rank in (tp.rank, -1))
    for name, part in module.named_modules():
        if name.startswith("layers."):
            continue
        at = f"{prefix}{name}." if name else prefix
        if isinstance(part, Linear):
            inputs = part.in_features * (tp.size if isinstance(part, RowParallelLinear) else 1)
            value = torch.randn(part.out_features, part.in_features, generator=own, device="cuda") * inputs**-0.5
            made |= {at + key: stored for key, stored in part.scheme.quantize(value.bfloat16()).items()}
            continue
        for key, parameter in part.named_parameters(recurse=False):
            value = torch.randn(parameter.shape, generator=same, device="cuda")
            made[at + key] = (1 + 0.1 * value if "norm" in at else value).bfloat16()


def connected(tp: TensorParallel, shape: dict[str, Any], sizes: list[int]) -> exchange.Exchange | None:
    device = torch.device("cuda", torch.cuda.current_device())
    return exchange.connect(tp, tp.rank, tp.size, shape["hidden_size"], sizes, device) if tp.size > 1 else None


def slowest(tp: TensorParallel, call: Callable[[], object]) -> float:
    """ms"""
    call()
    return -tp.minimum(-round(time_in_graph([call], _LAUNCHES) * 10)) / 10_000


@torch.inference_mode()
def difference(
    tp: TensorParallel, scheme: tuple[str, dict[str, Any] | None], shape: dict[str, Any], rows: int
) -> float:
    """Between the kernel and the layers, relative, over four layers."""
    model = random_share(*scheme, tp, shape | {"num_hidden_layers": DIFFERENT})
    step = Step(model, [100 + 50 * row for row in range(rows)])
    shared = connected(tp, shape, [rows])
    expected = step.by_layers(rows)
    columns = step.persistent(rows, shared).logits(step.inputs(rows))
    return error(tp.all_gather(columns)[:, : expected.shape[1]], expected)


@torch.inference_mode()
def times(model: Decoder, rows: int, context: int, shared: exchange.Exchange | None) -> dict[str, float]:
    step = Step(model, [context] * rows)
    inputs = step.inputs(rows)
    ways = {"kernel": step.persistent(rows, shared).logits}
    if shared is not None:
        ways["alone"] = step.persistent(rows).logits
    found = {name: slowest(model.tp, lambda way=way: way(inputs)) for name, way in ways.items()}  # type: ignore[misc]
    step.runner._attention.plan(inputs.metadata)
    found["layers"] = slowest(model.tp, lambda: model.raw_logits(step.runner._hidden(inputs)))
    if shared is not None:
        sums = 2 * model.config.num_hidden_layers
        found["us_per_sum"] = round((found["kernel"] - found["alone"]) * 1000 / sums, 2)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="70b")
    parser.add_argument("--scheme", choices=SCHEMES, default="fp8")
    parser.add_argument("--rows", default="1,2,4")
    parser.add_argument("--context", default="128,1024")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.distributed.init_process_group("nccl", device_id=device)
    tp = TensorParallel()
    if size > 1:
        group = GroupCollectives(size, device)
        group.own = connect(group.library(), rank, size, device)
        if group.own is None:
            print(f"rank {rank}: no own kernels here", flush=True)
            return 1
        tp = TensorParallel(rank, size, group)
    shape, scheme = MODELS[arguments.model], SCHEMES[arguments.scheme]

    def say(*words: object) -> None:
        if rank == 0:
            print(f"{time.perf_counter() - begin:5.1f} s", *words, flush=True)

    sizes = [int(rows) for rows in arguments.rows.split(",")]
    apart = difference(tp, scheme, shape, sizes[-1])
    say(f"four layers: the kernel is {apart:.4f} from the layers")
    if size > 1:
        norms = Norms(shape["hidden_size"], torch.bfloat16, FP8 if arguments.scheme == "fp8" else None)
        tp.own_reducer.connect_norms(norms)
        tp.own_reducer.tune(norms.hidden, norms.dtype, time_in_graph, norms.quantized)
    model = random_share(*scheme, tp, shape)
    say("model")
    probe = Step(model, [1])
    compile_all(shape_of(model, probe.caches[0], rows, ranks) for rows in sizes for ranks in {1, size})
    say("kernels")
    shared = connected(tp, shape, sizes)
    result = {}
    for rows in sizes:
        for context in map(int, arguments.context.split(",")):
            found = result[f"{rows} x {context}"] = times(model, rows, context, shared)
            say(f"rows {rows} context {context}: {found}")
    failed = apart > 0.2
    if rank == 0:
        setup = {"model": arguments.model, "scheme": arguments.scheme, "ranks": size}
        print(json.dumps(setup | {"apart": round(apart, 4), "wrong": failed, "ms": result}), flush=True)
    torch.distributed.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
