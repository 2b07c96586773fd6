"""`appliance bench offline`: the engine without HTTP, on a model shape with random weights or on a real model.

Reports decode time per step over batch sizes, prefill speed, and throughput at full load, each beside the floor that
memory bandwidth sets. Bandwidth is measured in the same run. Prompts are random token ids, fixed by the seed; output
runs to its full length. All times in seconds unless named otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from appliance.bench import driver
from appliance.bench.report import Table, environment, numbers, one_precision, say
from appliance.bench.shapes import SHAPES, shape_config
from appliance.errors import SettingsError
from appliance.types import EngineOptions

if TYPE_CHECKING:
    from appliance.bench.subject import Subject

_DEFAULT_SHAPE = "llama-3.1-8b"
_SHORTEST_OUTPUT = 8  # tokens: fewer steps have no median


@dataclass(frozen=True)
class Rows:
    """What is run, as asked for."""

    decode: tuple[int, ...]  # batch sizes
    prefill: tuple[tuple[int, int], ...]  # (prompts, tokens each)
    throughput: tuple[tuple[int, int, int], ...]  # (requests, prompt tokens, output tokens)
    input_len: int  # of the decode rows, tokens
    output_len: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        lengths = [self.input_len + self.output_len] if self.decode else [1]
        lengths += [length + 1 for _, length in self.prefill]
        lengths += [input_len + output_len for _, input_len, output_len in self.throughput]
        return max(lengths)

    def within(self, limit: int, max_num_seqs: int) -> Rows:
        """The rows that an engine with these limits can run; says which are left out."""
        fits = self.input_len + self.output_len <= limit
        kept = Rows(
            tuple(batch for batch in self.decode if batch <= max_num_seqs and fits),
            tuple(row for row in self.prefill if row[1] + 1 <= limit),
            tuple(row for row in self.throughput if row[1] + row[2] <= limit),
            self.input_len,
            self.output_len,
        )
        left_out = [f"decode batch {batch}" for batch in self.decode if batch not in kept.decode]
        left_out += [f"prefill {row[0]}x{row[1]}" for row in self.prefill if row not in kept.prefill]
        too_long = (row for row in self.throughput if row not in kept.throughput)
        left_out += [f"throughput {count}:{inputs}/{outputs}" for count, inputs, outputs in too_long]
        if left_out:
            say(f"left out, beyond {limit} tokens or {max_num_seqs} sequences: {', '.join(left_out)}")
        return kept


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", help=f"{', '.join(SHAPES)}: random weights (default: {_DEFAULT_SHAPE})")
    what.add_argument("--model", help="model directory, hub id, engine directory or builtin, instead of a shape")
    parser.add_argument("--precision", help="fp32, fp16, bf16 or fp8 (default: bf16 for a shape, selected for a model)")
    parser.add_argument("--backend", default="auto", help="auto, cuda or cpu (default: %(default)s)")
    parser.add_argument("--attention", default="auto", help="auto, flashinfer, triton or reference (default: auto)")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="run decode steps eagerly")
    parser.add_argument(
        "--batch-sizes", default="1,8,32,64,128,256", help="of the decode rows; empty: none (default: %(default)s)"
    )
    parser.add_argument(
        "--input-len", type=int, default=128, help="prompt tokens of the decode rows (default: %(default)s)"
    )
    parser.add_argument(
        "--output-len", type=int, default=128, help="output tokens of the decode rows (default: %(default)s)"
    )
    parser.add_argument(
        "--prefill",
        default="8x4096,64x512,1x512,1x4096",
        help="PROMPTSxTOKENS,… run together; empty: none (default: %(default)s)",
    )
    parser.add_argument(
        "--throughput",
        default="256:1024/1024",
        help="REQUESTS:IN/OUT,… tokens, run to completion; empty: none (default: %(default)s)",
    )
    parser.add_argument("--max-num-seqs", type=int, default=256, help="running at once (default: %(default)s)")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=8192, help="computed in one step (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    parser.add_argument("--cache", help="cache directory, with --model (default: the server's)")


def parse_rows(args: argparse.Namespace) -> Rows:
    """SettingsError, naming the flag, for what is not of the form that its help says."""
    rows = Rows(
        tuple(row[0] for row in numbers("--batch-sizes", args.batch_sizes, "N")),
        tuple((row[0], row[1]) for row in numbers("--prefill", args.prefill, "NxN")),
        tuple((row[0], row[1], row[2]) for row in numbers("--throughput", args.throughput, "N:N/N")),
        args.input_len,
        args.output_len,
    )
    least = {"input_len": 1, "output_len": _SHORTEST_OUTPUT, "max_num_seqs": 1, "max_num_batched_tokens": 16}
    for name, low in least.items():
        if getattr(args, name) < low:
            raise SettingsError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {low}")
    if not (rows.decode or rows.prefill or rows.throughput):
        raise SettingsError("--batch-sizes, --prefill and --throughput are all empty: nothing to measure")
    return rows


def open_subject(args: argparse.Namespace, rows: Rows) -> Subject:
    """The model or shape that is measured, loaded. Raises what loading raises."""
    from appliance.bench.random_model import load_random
    from appliance.bench.subject import load_model

    options = EngineOptions(
        engine_dir="",
        backend=args.backend,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        prefix_caching=False,
        cuda_graphs=not args.no_cuda_graphs,
        attention=args.attention,
    )
    chosen = one_precision(args.precision) if args.precision else None
    if args.model:
        return load_model(args.model, chosen, args.backend, args.cache, options)
    shape = args.shape or _DEFAULT_SHAPE
    limit = min(rows.longest, shape_config(shape).max_position_embeddings)
    return load_random(shape, chosen or "bf16", msgspec.structs.replace(options, max_model_len=limit))


def run(args: argparse.Namespace) -> int:
    rows = parse_rows(args)
    subject = open_subject(args, rows)
    rows = rows.within(subject.core.limits.max_length, args.max_num_seqs)
    result: dict[str, Any] = {"bench": "offline", **subject.description, "seed": args.seed, **environment()}
    floor_ms = subject.weight_bytes / subject.bandwidth * 1e3
    result["floor_ms"] = round(floor_ms, 3)
    say(
        f"weights read per step {subject.weight_bytes / 1e9:.2f} GB, bandwidth {subject.bandwidth / 1e12:.2f} TB/s, "
        f"floor {floor_ms:.2f} ms a step"
    )
    result["decode"] = _decode(subject, rows, args.seed, floor_ms)
    result["prefill"] = _prefill(subject, rows, args.seed)
    result["throughput"] = _throughput(subject, rows, args.seed)
    print(json.dumps(result))
    return 0


def _decode(subject: Subject, rows: Rows, seed: int, floor_ms: float) -> list[dict[str, Any]]:
    table = Table("batch", "step ms", "tokens/s", "share of floor")
    found = []
    for batch in rows.decode:
        requests = driver.make_requests(
            batch, rows.input_len, rows.output_len, subject.config.vocab_size, seed=f"decode {seed} {batch}"
        )
        step = driver.run(subject.core, requests).median_step
        row: dict[str, Any] = {"batch": batch, "input_len": rows.input_len}
        if math.isnan(step):
            say(f"decode batch {batch}: no steps with all sequences; raise --output-len or --max-num-batched-tokens")
            row |= {"step_ms": None, "tokens_per_second": None, "floor_share": None}
            table.row(batch, "-", "-", "-")
        else:
            share = floor_ms / (step * 1e3)
            row |= {
                "step_ms": round(step * 1e3, 3),
                "tokens_per_second": round(batch / step, 1),
                "floor_share": round(share, 3),
            }
            table.row(batch, f"{step * 1e3:.3f}", f"{batch / step:,.0f}", f"{share:.0%}")
        found.append(row)
    if found:
        table.show(f"decode, prompts of {rows.input_len} tokens")
    return found


def _prefill(subject: Subject, rows: Rows, seed: int) -> list[dict[str, Any]]:
    table = Table("prompts", "length", "ms", "tokens/s")
    found = []
    for count, length in rows.prefill:
        seconds = []
        for repeat in range(3):
            requests = driver.make_requests(
                count, length, 1, subject.config.vocab_size, seed=f"prefill {seed} {repeat}"
            )
            seconds.append(driver.run(subject.core, requests).seconds)
        median = sorted(seconds)[1]  # the first also warms up
        rate = count * length / median
        found.append({"count": count, "length": length, "ms": round(median * 1e3, 2), "tokens_per_second": round(rate)})
        table.row(count, length, f"{median * 1e3:.1f}", f"{rate:,.0f}")
    if found:
        table.show("prefill")
    return found


def _throughput(subject: Subject, rows: Rows, seed: int) -> list[dict[str, Any]]:
    table = Table("requests", "in/out", "s", "output tokens/s", "total tokens/s")
    found = []
    for count, input_len, output_len in rows.throughput:
        requests = driver.make_requests(
            count, input_len, output_len, subject.config.vocab_size, seed=f"throughput {seed}"
        )
        timing = driver.run(subject.core, requests)
        rate = timing.output_tokens / timing.seconds
        total = (timing.output_tokens + timing.prompt_tokens) / timing.seconds
        found.append(
            {
                "requests": count,
                "input_len": input_len,
                "output_len": output_len,
                "seconds": round(timing.seconds, 2),
                "output_tokens_per_second": round(rate),
                "total_tokens_per_second": round(total),
            }
        )
        table.row(count, f"{input_len}/{output_len}", f"{timing.seconds:.1f}", f"{rate:,.0f}", f"{total:,.0f}")
    if found:
        table.show("throughput, all requests at once")
    return found
