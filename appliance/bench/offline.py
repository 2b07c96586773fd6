"""`appliance bench offline`: the engine without HTTP, on a model shape with random weights or on a real model.

Reports decode time per step over batch sizes and prompt lengths, prefill speed, and throughput at full load, each
beside the floor that memory bandwidth and matrix products set (`floors.py`), both measured in the same run. Prompts are
random token ids, fixed by the seed; output runs to its full length. All times in seconds unless named otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from appliance.bench import driver
from appliance.bench.options import add_engine_arguments, at_least, open_subject
from appliance.bench.report import Table, environment, numbers, say
from appliance.errors import SettingsError

if TYPE_CHECKING:
    from appliance.bench.subject import Subject

_SHORTEST_OUTPUT = 8  # tokens: fewer steps have no median


@dataclass(frozen=True)
class Rows:
    """What is run, as asked for."""

    decode: tuple[tuple[int, int], ...]  # (batch size, prompt tokens)
    prefill: tuple[tuple[int, int], ...]  # (prompts, tokens each)
    throughput: tuple[tuple[int, int, int], ...]  # (requests, prompt tokens, output tokens)
    output_len: int  # of the decode rows, tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        lengths = [1] + [input_len + self.output_len for _, input_len in self.decode]
        lengths += [length + 1 for _, length in self.prefill]
        lengths += [input_len + output_len for _, input_len, output_len in self.throughput]
        return max(lengths)

    def within(self, limit: int, max_num_seqs: int) -> Rows:
        """The rows that an engine with these limits can run; says which are left out."""
        kept = replace(
            self,
            decode=tuple(r for r in self.decode if r[0] <= max_num_seqs and r[1] + self.output_len <= limit),
            prefill=tuple(row for row in self.prefill if row[1] + 1 <= limit),
            throughput=tuple(row for row in self.throughput if row[1] + row[2] <= limit),
        )
        left_out = [f"decode batch {b} of {length}" for b, length in self.decode if (b, length) not in kept.decode]
        left_out += [f"prefill {row[0]}x{row[1]}" for row in self.prefill if row not in kept.prefill]
        too_long = (row for row in self.throughput if row not in kept.throughput)
        left_out += [f"throughput {count}:{inputs}/{outputs}" for count, inputs, outputs in too_long]
        if left_out:
            say(f"left out, beyond {limit} tokens or {max_num_seqs} sequences: {', '.join(left_out)}")
        return kept


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    parser.add_argument(
        "--batch-sizes", default="1,8,32,64,128,256", help="of the decode rows; empty: none (default: %(default)s)"
    )
    parser.add_argument(
        "--input-len", "--isl", default="128", help="prompt tokens of the decode rows, N,… (default: %(default)s)"
    )
    parser.add_argument(
        "--output-len", "--osl", type=int, default=128, help="output tokens of the decode rows (default: %(default)s)"
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
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")


def parse_rows(args: argparse.Namespace) -> Rows:
    """SettingsError, naming the flag, for what is not of the form that its help says."""
    batches = [row[0] for row in numbers("--batch-sizes", args.batch_sizes, "N")]
    lengths = [row[0] for row in numbers("--input-len", args.input_len, "N")]
    rows = Rows(
        tuple((batch, length) for length in lengths for batch in batches),
        tuple((row[0], row[1]) for row in numbers("--prefill", args.prefill, "NxN")),
        tuple((row[0], row[1], row[2]) for row in numbers("--throughput", args.throughput, "N:N/N")),
        args.output_len,
    )
    at_least(args, {"output_len": _SHORTEST_OUTPUT})
    if not (rows.decode or rows.prefill or rows.throughput):
        raise SettingsError("--batch-sizes, --prefill and --throughput are all empty: nothing to measure")
    return rows


def run(args: argparse.Namespace) -> int:
    rows = parse_rows(args)
    subject = open_subject(args, rows.longest)
    rows = rows.within(subject.core.limits.max_length, subject.max_num_seqs)
    result: dict[str, Any] = {"bench": "offline", **subject.description, "seed": args.seed, **environment()}
    floors = subject.floors
    ceilings = floors.ceilings
    result["floor_ms"] = round(floors.weights * 1e3, 3)
    result["ceilings"] = {
        "bandwidth_tbs": round(ceilings.bandwidth / 1e12, 3),
        "linear_tflops": round(ceilings.linear_rate / 1e12, 2),
        "attention_tflops": round(ceilings.attention_rate / 1e12, 2),
    }
    say(
        f"weights read per step {floors.weight_bytes / 1e9:.2f} GB, floor {floors.weights * 1e3:.2f} ms; "
        f"measured here: copies {ceilings.bandwidth / 1e12:.2f} TB/s, products of the weights' precision "
        f"{ceilings.linear_rate / 1e12:,.1f} TFLOP/s, of attention's {ceilings.attention_rate / 1e12:,.1f}"
    )
    result["decode"] = _decode(subject, rows, args.seed)
    result["prefill"] = _prefill(subject, rows, args.seed)
    result["throughput"] = _throughput(subject, rows, args.seed)
    print(json.dumps(result))
    return 0


def _decode(subject: Subject, rows: Rows, seed: int) -> list[dict[str, Any]]:
    table = Table("prompt", "batch", "step ms", "tokens/s", "floor ms", "share of floor")
    found = []
    for batch, input_len in rows.decode:
        requests = driver.make_requests(
            batch, input_len, rows.output_len, subject.config.vocab_size, seed=f"decode {seed} {batch} {input_len}"
        )
        step = driver.run(subject.core, requests).median_step
        floor = subject.floors.decode(batch, input_len + rows.output_len / 2)
        row: dict[str, Any] = {"batch": batch, "input_len": input_len, "floor_ms": round(floor * 1e3, 3)}
        if math.isnan(step):
            say(f"decode batch {batch}: no steps with all sequences; raise --output-len or --max-num-batched-tokens")
            row |= {"step_ms": None, "tokens_per_second": None, "floor_share": None}
            table.row(input_len, batch, "-", "-", f"{floor * 1e3:.3f}", "-")
        else:
            row |= {
                "step_ms": round(step * 1e3, 3),
                "tokens_per_second": round(batch / step, 1),
                "floor_share": round(floor / step, 3),
            }
            rate = f"{batch / step:,.0f}"
            table.row(input_len, batch, f"{step * 1e3:.3f}", rate, f"{floor * 1e3:.3f}", f"{floor / step:.0%}")
        found.append(row)
    if found:
        table.show(f"decode, {rows.output_len} tokens of output; floor: weights and K/V read, products done")
    return found


def _prefill(subject: Subject, rows: Rows, seed: int) -> list[dict[str, Any]]:
    table = Table("prompts", "length", "ms", "tokens/s", "floor ms", "share of floor")
    found = []
    for count, length in rows.prefill:
        seconds = []
        for repeat in range(3):
            requests = driver.make_requests(
                count, length, 1, subject.config.vocab_size, seed=f"prefill {seed} {repeat}"
            )
            seconds.append(driver.run(subject.core, requests).seconds)
        median = sorted(seconds)[1]  # the first also warms up
        rate, floor = count * length / median, subject.floors.prefill(count, length)
        found.append(
            {
                "count": count,
                "length": length,
                "ms": round(median * 1e3, 2),
                "tokens_per_second": round(rate),
                "floor_ms": round(floor * 1e3, 3),
                "floor_share": round(floor / median, 3),
            }
        )
        table.row(count, length, f"{median * 1e3:.1f}", f"{rate:,.0f}", f"{floor * 1e3:.2f}", f"{floor / median:.0%}")
    if found:
        table.show("prefill; floor: products at the measured rate")
    return found


def _throughput(subject: Subject, rows: Rows, seed: int) -> list[dict[str, Any]]:
    table = Table("requests", "in/out", "s", "output tokens/s", "total tokens/s", "share of floor")
    found = []
    for count, input_len, output_len in rows.throughput:
        requests = driver.make_requests(
            count, input_len, output_len, subject.config.vocab_size, seed=f"throughput {seed}"
        )
        timing = driver.run(subject.core, requests)
        rate = timing.output_tokens / timing.seconds
        total = (timing.output_tokens + timing.prompt_tokens) / timing.seconds
        share = subject.floors.throughput(count, input_len, output_len, subject.max_num_seqs) / timing.seconds
        found.append(
            {
                "requests": count,
                "input_len": input_len,
                "output_len": output_len,
                "seconds": round(timing.seconds, 3),
                "output_tokens_per_second": round(rate),
                "total_tokens_per_second": round(total),
                "floor_share": round(share, 3),
            }
        )
        cells = (f"{input_len}/{output_len}", f"{timing.seconds:.1f}", f"{rate:,.0f}", f"{total:,.0f}", f"{share:.0%}")
        table.row(count, *cells)
    if found:
        table.show("throughput, all requests at once; floor: each prompt once, then full decode steps")
    return found
