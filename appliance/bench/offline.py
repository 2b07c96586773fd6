"""`appliance bench offline`: the engine without HTTP, on a model shape with random weights or on a real model.

Reports decode time per step over batch sizes, prefill speed, and throughput at full load, each beside the floor that
memory bandwidth sets. Bandwidth is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from typing import Any

from appliance.batching.core import EngineCore
from appliance.bench import driver
from appliance.bench.report import Table, environment, say
from appliance.types import EngineOptions, ModelConfig


@dataclass
class Subject:
    """What is measured."""

    core: EngineCore
    config: ModelConfig
    weight_bytes: int  # read by every decode step: all weights but the embedding table
    bandwidth: float  # bytes/s of a large copy on this device, read + written
    description: dict[str, Any] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", default="llama-3.1-8b", help="model shape with random weights (default: %(default)s)"
    )
    parser.add_argument("--precision", default="bf16", choices=["fp32", "fp16", "bf16", "fp8"])
    parser.add_argument("--backend", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--attention", default="auto", help="auto, flashinfer, triton or reference")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="run decode steps eagerly")
    parser.add_argument("--batch-sizes", default="1,8,32,64,128,256", help="for the decode rows (default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens of the decode rows")
    parser.add_argument("--output-len", type=int, default=128, help="output tokens of the decode rows")
    parser.add_argument("--prefill", default="8x4096,64x512,1x512,1x4096", help="COUNTxLENGTH,… prompts run together")
    parser.add_argument(
        "--throughput", default="256:1024/1024", help="REQUESTS:IN/OUT,… run to completion; empty: none"
    )
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)


def run(args: argparse.Namespace) -> int:
    from appliance.bench.random_model import load_random

    max_len = _longest(args)
    options = EngineOptions(
        engine_dir="",
        backend=args.backend,
        max_model_len=max_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        prefix_caching=False,
        cuda_graphs=not args.no_cuda_graphs,
        attention=args.attention,
    )
    subject = load_random(args.shape, args.precision, options)
    result: dict[str, Any] = {"bench": "offline", **subject.description, **environment()}
    floor_ms = subject.weight_bytes / subject.bandwidth * 1e3
    result["floor_ms"] = round(floor_ms, 3)
    say(
        f"weights read per step {subject.weight_bytes / 1e9:.2f} GB, bandwidth {subject.bandwidth / 1e12:.2f} TB/s, "
        f"floor {floor_ms:.2f} ms a step"
    )
    result["decode"] = _decode(subject, args, floor_ms)
    result["prefill"] = _prefill(subject, args)
    result["throughput"] = _throughput(subject, args)
    print(json.dumps(result))
    return 0


def _decode(subject: Subject, args: argparse.Namespace, floor_ms: float) -> list[dict[str, Any]]:
    table = Table("batch", "step ms", "tokens/s", "share of floor")
    rows = []
    for batch in _numbers(args.batch_sizes):
        if batch > args.max_num_seqs:
            continue
        requests = driver.make_requests(batch, args.input_len, args.output_len, subject.config.vocab_size, seed=batch)
        step = driver.run(subject.core, requests).median_step
        row = {
            "batch": batch,
            "input_len": args.input_len,
            "step_ms": round(step * 1e3, 3),
            "tokens_per_second": round(batch / step, 1),
            "floor_share": round(floor_ms / (step * 1e3), 3),
        }
        rows.append(row)
        table.row(batch, f"{step * 1e3:.3f}", f"{batch / step:,.0f}", f"{floor_ms / (step * 1e3):.0%}")
    table.show(f"decode, prompts of {args.input_len} tokens")
    return rows


def _prefill(subject: Subject, args: argparse.Namespace) -> list[dict[str, Any]]:
    table = Table("prompts", "length", "ms", "tokens/s")
    rows = []
    for spec in filter(None, args.prefill.split(",")):
        count, length = (int(part) for part in spec.split("x"))
        seconds = []
        for repeat in range(3):
            requests = driver.make_requests(count, length, 1, subject.config.vocab_size, seed=1000 + repeat)
            seconds.append(driver.run(subject.core, requests).seconds)
        best = sorted(seconds)[1]  # the median: the first also warms up
        tokens = count * length
        rows.append(
            {"count": count, "length": length, "ms": round(best * 1e3, 2), "tokens_per_second": round(tokens / best)}
        )
        table.row(count, length, f"{best * 1e3:.1f}", f"{tokens / best:,.0f}")
    table.show("prefill")
    return rows


def _throughput(subject: Subject, args: argparse.Namespace) -> list[dict[str, Any]]:
    table = Table("requests", "in/out", "s", "output tokens/s", "total tokens/s")
    rows = []
    for spec in filter(None, args.throughput.split(",")):
        count, lengths = spec.split(":")
        input_len, output_len = (int(part) for part in lengths.split("/"))
        requests = driver.make_requests(int(count), input_len, output_len, subject.config.vocab_size, seed=7)
        timing = driver.run(subject.core, requests)
        rate = timing.output_tokens / timing.seconds
        total = (timing.output_tokens + timing.prompt_tokens) / timing.seconds
        rows.append(
            {
                "requests": int(count),
                "input_len": input_len,
                "output_len": output_len,
                "seconds": round(timing.seconds, 2),
                "output_tokens_per_second": round(rate),
                "total_tokens_per_second": round(total),
            }
        )
        table.row(count, lengths, f"{timing.seconds:.1f}", f"{rate:,.0f}", f"{total:,.0f}")
    if rows:
        table.show("throughput, all requests at once")
    return rows


def _longest(args: argparse.Namespace) -> int:
    """The longest sequence that any row needs, with room for the token after the last."""
    lengths = [args.input_len + args.output_len]
    lengths += [int(spec.split("x")[1]) + 1 for spec in filter(None, args.prefill.split(","))]
    lengths += [sum(map(int, spec.split(":")[1].split("/"))) for spec in filter(None, args.throughput.split(","))]
    return max(lengths) + 1


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]
