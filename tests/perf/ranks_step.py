"""Times what ranks do together in a step, on GPUs of one host, apart from single sums (`bench all-reduce` has these).

    torchrun --nproc-per-node 4 tests/perf/ranks_step.py

- sampling, µs on the GPU and from call to result: from each rank's columns of the logits, rows shared out ("sharded");
  from logits that NCCL gathers first; as `ShardedSampler` does it, which gathers few rows ("served"). The tokens are
  compared.
- decode, µs a layer in a CUDA graph: with sums as they are tuned, with norms by kernels that read their peers' memory,
  by the library only, and without the other ranks; which kernels a layer launches.
- prefill, ms a layer: see ranks_prefill.py.

Attention is left out, products are not tuned. Times are those of the slowest rank; where ranks share a GPU they mean
nothing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
os.environ["NCCL_NVLS_ENABLE"] = "0"

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from ranks_prefill import APART, NoSums, prefill, sums_alone

from appliance.distributed import GroupCollectives, TensorParallel
from appliance.kernels.all_reduce_group import AllReduce, connect
from appliance.kernels.attention import AttentionMetadata
from appliance.kernels.row_quantization import FP8
from appliance.kernels.sum_norm_group import Norms
from appliance.kernels.tactics import TABLE
from appliance.layers.attention import ForwardContext
from appliance.layers.decoder import Decoder
from appliance.runtime import random_weights
from appliance.runtime.loading import build_model
from appliance.runtime.sampler import Sampler
from appliance.runtime.sharded_sampler import ShardedSampler
from appliance.runtime.timing import time_in_graph
from appliance.settings import gpus_shared, share_gpu
from appliance.types import ModelConfig, SamplingParams

LAYERS = 4
VOCAB = 128256
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
}
SAMPLED = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "greedy with logprobs": {"temperature": 0.0, "logprobs": 5},
}
PAGE = 16


class NoAttention:
    """Gives the queries back."""

    name = "none"

    def plan(self, metadata: AttentionMetadata) -> None:
        pass

    def attend(self, q: Tensor, *_: Any) -> Tensor:
        return q


class Ranks:
    def __init__(self, arguments: argparse.Namespace) -> None:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.group = GroupCollectives(size, self.device)
        self.tp = TensorParallel(rank, size, self.group)
        self.begin = time.perf_counter()
        own = connect(self.group.library(), rank, size, self.device)
        if own is None:
            raise SystemExit(f"rank {rank}: no own kernels here")
        self.own: AllReduce = own
        self.group.own = own
        shape = SHAPES[arguments.model]
        self.hidden = shape["hidden_size"]
        self.norms = Norms(self.hidden, torch.bfloat16, {"fp8": FP8, "bf16": None}[arguments.scheme])
        own.connect_norms(self.norms)
        config = {"architecture": "LlamaForCausalLM", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": VOCAB}
        config |= {"num_hidden_layers": LAYERS, "max_position_embeddings": 8192}
        scheme = {"fp8": "fp8", "bf16": "none"}[arguments.scheme]
        self.model: Decoder = build_model(ModelConfig(**(config | shape)), scheme, torch.bfloat16, None, self.tp)
        random_weights.fill(self.model, self.device, rank)
        self.model.prepare(8192)

    def say(self, *words: object) -> None:
        if self.tp.rank == 0:
            print(f"{time.perf_counter() - self.begin:5.1f} s", *words, flush=True)

    def slowest(self, value: float) -> float:
        every = self.group.library().all_gather(torch.tensor([[value]], dtype=torch.float32, device=self.device))
        return round(float(every.max()), 2)

    def in_graph(self, call: Callable[[], object], launches: int = 8) -> float:
        call()
        return self.slowest(time_in_graph([call], launches))

    def eager(self, call: Callable[[], object], times: int) -> float:
        """µs from call to result."""
        best = float("inf")
        for _ in range(times):
            torch.cuda.synchronize()
            self.tp.minimum(0)
            begin = time.perf_counter()
            call()
            torch.cuda.synchronize()
            best = min(best, (time.perf_counter() - begin) * 1e6)
        return self.slowest(best)

    def context(self, tokens: int) -> ForwardContext:
        pages = -(-tokens // PAGE)
        heads = self.model.num_kv_heads
        cache = torch.zeros(pages, 2, PAGE, heads, 128, dtype=torch.bfloat16, device=self.device)
        positions = torch.arange(tokens, device=self.device) % 4096
        empty = torch.zeros(1, dtype=torch.int32, device=self.device)
        host = np.zeros(1, dtype=np.int32)
        metadata = AttentionMetadata(
            1, tokens, tokens, tokens, empty, empty, empty[None], torch.arange(tokens, device=self.device), host, host,
            host[None],
        )  # fmt: skip
        return ForwardContext(positions, [cache] * LAYERS, metadata, NoAttention())  # type: ignore[arg-type]

    @contextmanager
    def sums_by(self, own: Any) -> Iterator[None]:
        self.group.own = own
        try:
            yield
        finally:
            self.group.own = self.own


# ---------------------------------------------------------------- sampling


def sampling(ranks: Ranks, rows: int, name: str) -> dict[str, Any]:
    device, tp = ranks.device, ranks.tp
    share = tp.padded_share(VOCAB)
    logits = 3 * torch.randn(rows, VOCAB, generator=torch.Generator(device).manual_seed(rows), device=device)
    mine = logits.bfloat16()[:, tp.rank * share : (tp.rank + 1) * share].contiguous()
    slots, table = torch.arange(rows, device=device), torch.zeros(rows, 64, dtype=torch.int32, device=device)
    samplers: dict[str, Any] = {
        "sharded": ShardedSampler(rows, VOCAB, 64, device, tp, worth=0),
        "gathered": Sampler(rows, VOCAB, 64, device),
        "served": ShardedSampler(rows, VOCAB, 64, device, tp),
    }
    found: dict[str, Any] = {}
    tokens = []
    for way, sampler in samplers.items():
        for slot in range(rows):
            sampler.set_slot(slot, SamplingParams(**SAMPLED[name]), slot, (), 5)
        batch = sampler.prepare(np.arange(rows), 20)

        def call(sampler: Any = sampler, batch: Any = batch, way: str = way) -> Any:
            given = gathered(ranks, mine) if way == "gathered" else mine
            return sampler.sample(given, slots, slots + 10, table, batch)

        tokens.append(call().token_ids)
        found[way] = ranks.in_graph(call)
        found[f"{way}, from the CPU"] = ranks.eager(call, 5)
    found["same"] = all(torch.equal(tokens[0], other) for other in tokens)
    return found


def gathered(ranks: Ranks, mine: Tensor) -> Tensor:
    return ranks.group.library().all_gather(mine).transpose(0, 1).flatten(1)[:, :VOCAB].contiguous()


# ---------------------------------------------------------------- decode


def decode(ranks: Ranks, rows: int) -> dict[str, Any]:
    ctx, ids = ranks.context(rows), torch.arange(rows, device=ranks.device) + 5

    def step() -> Tensor:
        return ranks.model(ids, ctx)

    def per_layer() -> float:
        return round(ranks.in_graph(step) / LAYERS, 2)

    found: dict[str, Any] = {"tuned": per_layer()}
    stream = torch.empty(rows, ranks.hidden, dtype=torch.bfloat16, device="meta")
    found["way"] = ranks.own._norm_tactic(stream, stream)
    sums, ranks.own._sums = ranks.own._sums, None
    found["reading peers"] = per_layer()
    ranks.own._sums = sums
    with ranks.sums_by(None):
        found["library"] = per_layer()
    with ranks.sums_by(NoSums()):
        found["alone"] = per_layer()
    found["us_per_sum"] = round((found["tuned"] - found["alone"]) / 2, 2)
    return found


def kernels(ranks: Ranks, rows: int) -> dict[str, float]:
    """Launched a layer, by name."""
    ctx, ids = ranks.context(rows), torch.arange(rows, device=ranks.device) + 5
    ranks.model(ids, ctx)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ranks.model(ids, ctx)
        torch.cuda.synchronize()
    names = Counter(event.name[:48] for event in profile.events())
    return {name: round(count / LAYERS, 2) for name, count in names.most_common() if count >= LAYERS // 2}


@torch.inference_mode()
def measure(ranks: Ranks, arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"ranks": ranks.tp.size, "model": arguments.model, "scheme": arguments.scheme}
    if not gpus_shared():
        ranks.own.tune(ranks.hidden, torch.bfloat16, time_in_graph, ranks.norms.quantized)
        ranks.say("sums are tuned")
    for part, act in (("sampling", None), ("decode", decode), ("prefill", prefill)):
        if part not in arguments.parts.split(","):
            continue
        found = result[part] = {}
        for rows in [int(n) for n in getattr(arguments, "tokens" if part == "prefill" else "rows").split(",")]:
            if act is not None:
                found[str(rows)] = act(ranks, rows)
                ranks.say(part, rows, found[str(rows)])
                continue
            for name in SAMPLED:
                found[f"{name} x {rows}"] = sampling(ranks, rows, name)
                ranks.say(part, rows, name, found[f"{name} x {rows}"])
    if "prefill" in arguments.parts:
        for rows in (1024, 2048, 4096):
            result[f"sum of {rows}"] = sums_alone(ranks, rows)
            ranks.say("sum of", rows, "rows:", result[f"sum of {rows}"])
    if "decode" in arguments.parts:
        result["kernels"] = kernels(ranks, 64)
        ranks.say("kernels a layer, 64 rows:", result["kernels"])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="70b")
    parser.add_argument("--scheme", choices=("fp8", "bf16"), default="fp8")
    parser.add_argument("--parts", default="sampling,decode,prefill")
    parser.add_argument("--rows", default="1,8,64,256")
    parser.add_argument("--tokens", default="4096,8192", help="of prefill")
    arguments = parser.parse_args()
    rank, gpus = int(os.environ["RANK"]), torch.cuda.device_count()
    if gpus < int(os.environ["WORLD_SIZE"]):
        share_gpu(rank)
    torch.cuda.set_device(rank % gpus)
    logging.basicConfig(level=logging.WARNING if rank else logging.INFO, format="%(message)s")
    torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", rank % gpus))
    ranks = Ranks(arguments)
    result = measure(ranks, arguments)
    wrong = [name for name, found in result.get("sampling", {}).items() if not found["same"]]
    for tokens, found in result.get("prefill", {}).items():
        wrong += [f"{way} of {tokens}" for way, apart in found["apart"].items() if not apart < APART[arguments.scheme]]
    if ranks.tp.rank == 0:
        print(json.dumps(result | {"wrong": wrong}), flush=True)
    TABLE.clear()
    torch.distributed.destroy_process_group()
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
