"""Times attention kernels on a GPU, bf16 and FP8 KV caches, beside what reading K and V takes at the bandwidth given.

    python tests/perf/attention_kernels.py decode  --rows 1x1024,64x1024,256x1024,16x16384
    python tests/perf/attention_kernels.py prefill --rows 1x4096,8x1024,1x512@8192

decode rows: sequences x tokens in the cache. prefill rows: sequences x new tokens [@ tokens cached before]. Heads are
those of Llama-3.1-8B unless said otherwise. Every call has a cache of its own among as many as exceed the L2 cache
several times; calls are replayed from one CUDA graph (decode) or timed as a run of launches (prefill). The largest
difference from the plain reference is printed too (of small rows: it is slow). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from appliance.kernels.attention import AttentionMetadata, ReferenceAttention
from appliance.kernels.flashinfer import FlashInferAttention
from appliance.kernels.fp8_linear import FP8
from appliance.kernels.paged_attention import TritonAttention

PAGE = 16
Call = Callable[[Tensor], Tensor]  # cache -> output


def metadata(sequences: int, new: int, length: int, first_page: int = 0) -> AttentionMetadata:
    pages = -(-length // PAGE)
    order = np.random.default_rng(0).permutation(sequences * pages) + first_page
    table = order.reshape(sequences, pages).astype(np.int32)
    starts = np.arange(sequences + 1, dtype=np.int32) * np.int32(new)
    lens = np.full(sequences, length, np.int32)
    return AttentionMetadata(
        num_seqs=sequences,
        num_tokens=sequences * new,
        max_query_len=new,
        max_seq_len=length,
        query_start=torch.from_numpy(starts).cuda(),
        seq_lens=torch.from_numpy(lens).cuda(),
        page_table=torch.from_numpy(table).cuda(),
        slot_mapping=torch.full((sequences * new,), -1, dtype=torch.int64, device="cuda"),
        query_start_host=starts,
        seq_lens_host=lens,
        page_table_host=table,
    )


def candidates(
    args: argparse.Namespace, meta: AttentionMetadata, q: Tensor, kv_dtype: torch.dtype
) -> dict[str, Callable[[], Call]]:
    """By name: what makes the call, planned for this step."""
    scale = args.head_dim**-0.5
    decode = meta.max_query_len == 1

    def ours(attention: FlashInferAttention | TritonAttention) -> Call:
        attention.plan(meta)
        return lambda cache: attention.attend(q, cache, meta, scale, None)

    def flashinfer() -> FlashInferAttention:
        return FlashInferAttention(
            num_heads=args.heads,
            num_kv_heads=args.kv_heads,
            head_dim=args.head_dim,
            page_size=PAGE,
            dtype=torch.bfloat16,
            kv_dtype=kv_dtype,
            max_num_seqs=meta.num_seqs,
            max_model_len=meta.max_seq_len,
            device="cuda",
            graph_batch_sizes=(meta.num_seqs,) if decode else (),
        )

    def on_bytes() -> Call:
        attention = flashinfer()
        attention._wide = attention._xqa = None
        return ours(attention)

    found: dict[str, Callable[[], Call]] = {
        "flashinfer": lambda: ours(flashinfer()),
        "triton": lambda: ours(TritonAttention()),
    }
    if kv_dtype == FP8:
        found["flashinfer, FA2 on bytes"] = on_bytes
    if decode:
        found["flashinfer without tensor cores"] = lambda: cuda_cores(args, meta, q, kv_dtype)
        found["xqa (FP8: q rounded to FP8 too)"] = lambda: xqa(meta, q, scale)
    return found


def cuda_cores(args: argparse.Namespace, meta: AttentionMetadata, q: Tensor, kv_dtype: torch.dtype) -> Call:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    n, pages = meta.page_table.shape
    indptr = torch.arange(n + 1, dtype=torch.int32, device="cuda") * pages
    indices = meta.page_table.flatten().contiguous()
    last = torch.full((n,), (meta.max_seq_len - 1) % PAGE + 1, dtype=torch.int32, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=False,
        paged_kv_indptr_buffer=indptr,
        paged_kv_indices_buffer=indices,
        paged_kv_last_page_len_buffer=last,
    )
    shape = (args.heads, args.kv_heads, args.head_dim, PAGE)
    wrapper.plan(indptr, indices, last, *shape, q_data_type=torch.bfloat16, kv_data_type=kv_dtype)
    return lambda cache: wrapper.run(q, cache)


def xqa(meta: AttentionMetadata, q: Tensor, scale: float) -> Call:
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    lens = meta.seq_lens.view(torch.uint32)
    out = torch.empty_like(q)
    return lambda cache: xqa_batch_decode_with_kv_cache(
        q, cache, workspace, meta.page_table, lens, meta.max_seq_len, bmm1_scale=scale, bmm2_scale=1.0, out=out
    )


def microseconds(call: Call, caches: list[Tensor], graphed: bool) -> float:
    """Of one call, the shortest of five runs over all caches."""

    def once() -> None:
        for cache in caches:
            call(cache)

    once()
    torch.cuda.synchronize()
    run: Callable[[], None] = once
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        run = graph.replay
    best = math.inf
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e3 / len(caches))
    return best


def measure(args: argparse.Namespace, sequences: int, new: int, length: int) -> list[dict[str, object]]:
    meta = metadata(sequences, new, length)
    torch.manual_seed(0)
    q = torch.randn(meta.num_tokens, args.heads, args.head_dim, device="cuda", dtype=torch.bfloat16)
    rows = []
    for kv_dtype in (torch.bfloat16, FP8):
        shape = (meta.page_table.numel(), 2, PAGE, args.kv_heads, args.head_dim)
        nbytes = math.prod(shape) * kv_dtype.itemsize
        count = max(2, min(64, (256 << 20) // nbytes))
        caches = [torch.randn(shape, device="cuda").to(kv_dtype) for _ in range(count)]
        wanted = None
        if meta.num_tokens * length <= 1 << 22:
            wanted = ReferenceAttention().attend(q, caches[0], meta, args.head_dim**-0.5, None)
        floor = nbytes / (args.bandwidth * 1e6)  # µs
        products = 4 * args.heads * args.head_dim * sequences * (new * (length - new) + new * (new + 1) / 2)
        for name, make in candidates(args, meta, q, kv_dtype).items():
            what = f"{sequences}x{new}@{length - new}"
            row: dict[str, object] = {"row": what, "kv": str(kv_dtype)[6:], "kernel": name}
            try:
                call = make()
                us = microseconds(call, caches, graphed=new == 1)
                difference = None if wanted is None else float((call(caches[0]) - wanted).abs().max())
            except Exception as error:  # a kernel that cannot do this row is a row of the table too
                print(f"{row['row']:>16} {row['kv']:>14} {name:<34} {type(error).__name__}: {str(error)[:80]}")
                continue
            row |= {"us": round(us, 2), "share_of_bandwidth": round(floor / us, 3)}
            row |= {"tflops": round(products / us / 1e6, 1), "difference": difference}
            rows.append(row)
            print(
                f"{row['row']:>16} {row['kv']:>14} {name:<34} {us:10.1f} µs {floor / us:7.1%} of bandwidth "
                f"{row['tflops']:>8} TFLOP/s  differs by {difference}"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("decode", "prefill"))
    parser.add_argument("--rows", default="")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--bandwidth", type=float, default=4.2, help="TB/s that a copy reaches")
    args = parser.parse_args()
    default = (
        "1x1024,8x1024,64x1024,256x1024,16x16384" if args.mode == "decode" else "1x4096,8x1024,1x512@8192,1x32@8192"
    )
    results: list[dict[str, object]] = []
    for text in (args.rows or default).split(","):
        sizes, _, cached = text.partition("@")
        sequences, tokens = (int(part) for part in sizes.split("x"))
        new, length = (1, tokens) if args.mode == "decode" else (tokens, tokens + int(cached or 0))
        results += measure(args, sequences, new, length)
    print(json.dumps({"bench": f"attention {args.mode}", "device": torch.cuda.get_device_name(), "rows": results}))


if __name__ == "__main__":
    main()
