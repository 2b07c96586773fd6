"""Times attention of a decode step on a GPU, rotary embedding and cache write included: the own kernel with each number
of warps, and what it replaces, `rope_and_write` and FlashInfer's (or XQA's) attention.

    python tests/perf/decode_attention.py --heads 16/2,32/8 --rows 8x150,64x150,256x150,1x32768 --kv bf16,fp8

rows: sequences x tokens in the cache; "256x~1040": of lengths from 10 to twice that. Each call has a cache of its own
among as many as exceed the L2 cache several times; calls alternate with a kernel that writes the fused product anew, in
one CUDA graph, and what that graph takes without attention is subtracted. The own kernel's output is compared with the
other's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from appliance.kernels.attention import AttentionMetadata, KvScales
from appliance.kernels.decode_attention.kernel import (
    Buffers,
    DecodeAttentionKernel,
    DecodeAttentionShape,
    DecodeInputs,
)
from appliance.kernels.decode_attention.plan import Cutting, make_plan
from appliance.kernels.flashinfer import FlashInferAttention
from appliance.kernels.fp8_linear import FP8
from appliance.kernels.rope_cache import rope_and_write

PAGE, DIM = 16, 128
SCALES = KvScales()
Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # qkv, cache, out -> out


class Step:
    def __init__(self, what: str) -> None:
        rows, _, tokens = what.partition("x")
        count, mean = int(rows), int(tokens.lstrip("~"))
        rng = np.random.default_rng(0)
        self.lens = rng.integers(10, 2 * mean, count) if tokens[0] == "~" else np.full(count, mean)
        width = -(-int(self.lens.max()) // PAGE)
        table = rng.permutation(count * width).reshape(count, width).astype(np.int32)
        self.pages = count * width
        at = self.lens - 1
        slots = table[np.arange(count), at // PAGE].astype(np.int64) * PAGE + at % PAGE
        self.positions = torch.from_numpy(at.astype(np.int64)).cuda()
        self.meta = AttentionMetadata(
            num_seqs=count,
            num_tokens=count,
            max_query_len=1,
            max_seq_len=int(self.lens.max()),
            query_start=torch.arange(count + 1, dtype=torch.int32).cuda(),
            seq_lens=torch.from_numpy(self.lens.astype(np.int32)).cuda(),
            page_table=torch.from_numpy(table).cuda(),
            slot_mapping=torch.from_numpy(slots).cuda(),
            query_start_host=np.arange(count + 1, dtype=np.int32),
            seq_lens_host=self.lens.astype(np.int32),
            page_table_host=table,
        )
        self.cos_sin = torch.rand(int(self.lens.max()), DIM, device="cuda")


def now(step: Step, heads: int, kv_heads: int, kv_dtype: torch.dtype) -> Call:
    attention = FlashInferAttention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=DIM,
        page_size=PAGE,
        dtype=torch.bfloat16,
        kv_dtype=kv_dtype,
        max_num_seqs=step.meta.num_seqs,
        max_model_len=step.meta.max_seq_len,
        device="cuda",
        graph_batch_sizes=(step.meta.num_seqs,),
    )
    attention.plan(step.meta)

    def call(qkv: Tensor, cache: Tensor, out: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (-1, DIM)).split((heads, kv_heads, kv_heads), dim=1)
        q = rope_and_write(q, k, v, step.positions, step.cos_sin, cache, step.meta.slot_mapping, SCALES)
        return attention.attend(q, cache, step.meta, DIM**-0.5, None, SCALES)

    return call


def own(step: Step, kernel: DecodeAttentionKernel, smallest: int) -> tuple[Call, int]:
    shape, rows = kernel.shape, step.meta.num_seqs
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    cutting = Cutting(sms * shape.blocks_per_sm, shape.kv_heads, smallest or 32 * shape.warps)
    items = cutting.capacity(rows)
    plan = make_plan(step.lens, rows, None, cutting)
    buffers = Buffers(
        torch.from_numpy(plan).cuda(),
        torch.zeros(items * shape.heads * DIM, device="cuda"),
        torch.zeros(items * shape.heads * 2, device="cuda"),
        torch.zeros(rows * shape.kv_heads, dtype=torch.int32, device="cuda"),
    )

    def call(qkv: Tensor, cache: Tensor, out: Tensor) -> Tensor:
        table, slots = step.meta.page_table, step.meta.slot_mapping
        kernel.launch(DecodeInputs(qkv, step.cos_sin, cache, table, slots, out, DIM**-0.5, SCALES), buffers, items)
        return out

    return call, int((plan[:, 0] >= 0).sum())


def graphed(calls: list[Callable[[], object]]) -> float:
    """µs of one call, the shortest of eight replays."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best = math.inf
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e3 / len(calls))
    return best


def measure(
    args: argparse.Namespace,
    what: str,
    heads: int,
    kv_heads: int,
    kv_dtype: torch.dtype,
    kernels: list[DecodeAttentionKernel],
) -> list[dict[str, object]]:
    step = Step(what)
    shape = (step.pages, 2, PAGE, kv_heads, DIM)
    one = math.prod(shape) * kv_dtype.itemsize
    count = max(3, min(24, (600 << 20) // one))
    caches = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(kv_dtype) for _ in range(count)]
    loops = caches * max(1, 12 // count)
    rows = step.meta.num_seqs
    source = torch.randn(rows, (heads + 2 * kv_heads) * DIM, device="cuda").bfloat16()
    qkv, out = torch.empty_like(source), torch.empty(rows, heads, DIM, device="cuda", dtype=torch.bfloat16)
    between = graphed([lambda: qkv.copy_(source)] * len(loops))
    floor = 2 * int(step.lens.sum()) * kv_heads * DIM * kv_dtype.itemsize / (args.bandwidth * 1e6)
    calls: dict[str, Call] = {"flashinfer": now(step, heads, kv_heads, kv_dtype)}
    items = {}
    for kernel in kernels:
        for smallest in args.smallest:
            name = f"own {kernel.shape.warps} warps" + (f" from {smallest}" if smallest else "")
            calls[name], items[name] = own(step, kernel, smallest)
    found: list[dict[str, object]] = []
    wanted: Tensor | None = None
    for name, call in calls.items():
        qkv.copy_(source)
        got = call(qkv, caches[0], out).clone().float()
        wanted = got if wanted is None else wanted
        difference = float((got - wanted).norm() / wanted.norm())

        def one_of(cache: Tensor, call: Call = call) -> Callable[[], object]:
            return lambda: (qkv.copy_(source), call(qkv, cache, out))

        us = graphed([one_of(cache) for cache in loops]) - between
        found.append(
            {"heads": f"{heads}/{kv_heads}", "rows": what, "kv": str(kv_dtype)[6:], "way": name, "us": round(us, 2)}
            | {"floor": round(floor, 2), "difference": round(difference, 5), "items": items.get(name)}
        )
    best = min(found, key=lambda row: float(str(row["us"])))
    text = "  ".join(f"{row['way'].replace('own ', '')}: {row['us']} ({row['items'] or '-'})" for row in found)
    worst = max(float(str(row["difference"])) for row in found)
    print(
        f"{heads}/{kv_heads} {what} {str(kv_dtype)[6:]} floor {floor:.1f}: {text}; {best['way']}; differ {worst:.4f}",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="16/2,32/8")
    parser.add_argument("--rows", default="8x150,64x150,256x150,8x1040,64x1040,256x1040,256x~500,1x32768,8x8192")
    parser.add_argument("--kv", default="bf16")
    parser.add_argument("--warps", default="4,8,16")
    parser.add_argument("--smallest", default="0", help="tokens below which no sequence is cut; 0: 32 a warp")
    parser.add_argument("--bandwidth", type=float, default=4.2, help="TB/s that a copy reaches")
    args = parser.parse_args()
    args.smallest = [int(number) for number in args.smallest.split(",")]
    results: list[dict[str, object]] = []
    pool = ThreadPoolExecutor(8)
    for kv in args.kv.split(","):
        kv_dtype = FP8 if kv == "fp8" else torch.bfloat16
        for pair in args.heads.split(","):
            heads, kv_heads = map(int, pair.split("/"))
            shapes = [
                DecodeAttentionShape(heads, kv_heads, DIM, PAGE, torch.bfloat16, kv_dtype, int(warps))
                for warps in args.warps.split(",")
            ]
            able = [s for s in shapes if s.refused(torch.cuda.get_device_capability()) is None]
            kernels = list(pool.map(lambda shape: DecodeAttentionKernel(shape, torch.device("cuda", 0)), able))
            for what in args.rows.split(","):
                try:
                    results += measure(args, what, heads, kv_heads, kv_dtype, kernels)
                except Exception as error:  # a row that does not fit, say: the others are worth having
                    print(f"{pair} {what} {kv}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    print(json.dumps({"bench": "decode attention", "device": torch.cuda.get_device_name(), "rows": results}))


if __name__ == "__main__":
    main()
