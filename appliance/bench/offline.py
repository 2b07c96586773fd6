"""`appliance bench offline`: the engine without HTTP, on a model shape with random weights or on a real model.

Reports decode time per step over batch sizes and prompt lengths, prefill speed, and throughput at full load, each
beside the floor that memory bandwidth and matrix products set (`floors.py`), both measured in the same run, and beside
what the selection predicts (`predictions.py`). Prompts are random token ids, fixed by the seed; output runs to its full
length. Of several ranks this process is the first. All times in seconds unless named otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
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
    result |= _limits(subject)
    try:
        for kind, measure in (("decode", _decode), ("prefill", _prefill), ("throughput", _throughput)):
            result[kind] = measure(subject, rows, args.seed)
    finally:  # what was measured is not lost with what fails
        print(json.dumps(result), flush=True)
    subject.close()
    return 0


def _limits(subject: Subject) -> dict[str, Any]:
    """What the device reaches, and how ranks add up; said, and for the JSON line."""
    floors, ceilings = subject.floors, subject.floors.ceilings
    say(
        f"weights read per step {floors.weight_bytes / 1e9:.2f} GB{' a rank' if subject.ranks > 1 else ''}, floor "
        f"{floors.weights * 1e3:.2f} ms; measured here: copies {ceilings.bandwidth / 1e12:.2f} TB/s, products of the "
        f"weights' precision {ceilings.linear_rate / 1e12:,.1f} TFLOP/s, of attention's "
        f"{ceilings.attention_rate / 1e12:,.1f}"
    )
    if floors.knows_reductions:
        timed = ", ".join(f"{rows}: {seconds * 1e6:.1f}" for rows, seconds in sorted(floors.reductions.items()))
        say(f"a sum over the ranks, µs by rows: {timed}; floors with sums have two a layer")
    return {
        "floor_ms": round(floors.weights * 1e3, 3),
        "ceilings": {
            "bandwidth_tbs": round(ceilings.bandwidth / 1e12, 3),
            "linear_tflops": round(ceilings.linear_rate / 1e12, 2),
            "attention_tflops": round(ceilings.attention_rate / 1e12, 2),
        },
        "all_reduce_us": {rows: round(seconds * 1e6, 2) for rows, seconds in sorted(floors.reductions.items())},
    }


_BESIDE = ("floor ms", "of it", "with sums", "predicted", "ratio")  # columns behind what was measured
_EXPLAINED = (
    "of it: share of the floor that was reached; with sums: floor and the sums over ranks; predicted: ms, by the "
    "selection; ratio: predicted over measured"
)


def _beside(
    subject: Subject, floor_of: Callable[..., float], sizes: tuple[float, ...], predicted: float | None, seconds: float
) -> dict[str, Any]:
    """What stands beside a measured time: its floor, one of the methods of `Floors` with its arguments, and what the
    selection predicts. Milliseconds; ratio: predicted over measured."""
    floor, measured = floor_of(*sizes), not math.isnan(seconds)
    reduced = floor_of(*sizes, reduced=True) if subject.floors.knows_reductions else None
    return {
        "floor_ms": round(floor * 1e3, 3),
        "floor_share": round(floor / seconds, 3) if measured else None,
        "floor_reduced_ms": None if reduced is None else round(reduced * 1e3, 3),
        "predicted_ms": None if predicted is None else round(predicted * 1e3, 3),
        "predicted_ratio": round(predicted / seconds, 3) if predicted is not None and measured else None,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    """`_BESIDE` of a row."""
    kinds = {
        "floor_ms": ",.3f",
        "floor_share": ".0%",
        "floor_reduced_ms": ",.3f",
        "predicted_ms": ",.3f",
        "predicted_ratio": ".2f",
    }
    return ["-" if row[key] is None else format(row[key], kind) for key, kind in kinds.items()]


def _decode(subject: Subject, rows: Rows, seed: int) -> list[dict[str, Any]]:
    table = Table("prompt", "batch", "step ms", "tokens/s", *_BESIDE)
    found = []
    title = f"decode, {rows.output_len} tokens of output; floor: weights and K/V read, products done"
    with table.shown(title, _EXPLAINED):
        for batch, input_len in rows.decode:
            row = _decode_row(subject, batch, input_len, rows.output_len, seed)
            found.append(row)
            step, rate = row["step_ms"], row["tokens_per_second"]
            measured = ("-", "-") if step is None else (f"{step:.3f}", f"{rate:,.0f}")
            table.row(input_len, batch, *measured, *_cells(row))
    return found


def _decode_row(subject: Subject, batch: int, input_len: int, output_len: int, seed: int) -> dict[str, Any]:
    requests = driver.make_requests(
        batch, input_len, output_len, subject.config.vocab_size, seed=f"decode {seed} {batch} {input_len}"
    )
    step = driver.run(subject.core, requests).median_step
    if math.isnan(step):
        say(f"decode batch {batch}: no steps with all sequences; raise --output-len or --max-num-batched-tokens")
    context = input_len + output_len / 2
    predicted = None if subject.predictions is None else subject.predictions.decode(batch, context)
    return {
        "batch": batch,
        "input_len": input_len,
        "step_ms": None if math.isnan(step) else round(step * 1e3, 3),
        "tokens_per_second": None if math.isnan(step) else round(batch / step, 1),
        **_beside(subject, subject.floors.decode, (batch, context), predicted, step),
    }


def _prefill(subject: Subject, rows: Rows, seed: int) -> list[dict[str, Any]]:
    table = Table("prompts", "length", "ms", "tokens/s", *_BESIDE)
    found = []
    with table.shown("prefill; floor: products at the measured rate"):
        for count, length in rows.prefill:
            row = _prefill_row(subject, count, length, seed)
            found.append(row)
            table.row(count, length, f"{row['ms']:.1f}", f"{row['tokens_per_second']:,}", *_cells(row))
    return found


def _prefill_row(subject: Subject, count: int, length: int, seed: int) -> dict[str, Any]:
    seconds = []
    for repeat in range(3):
        requests = driver.make_requests(count, length, 1, subject.config.vocab_size, seed=f"prefill {seed} {repeat}")
        seconds.append(driver.run(subject.core, requests).seconds)
    median = sorted(seconds)[1]  # the first also warms up
    predicted = None if subject.predictions is None else subject.predictions.prefill(count, length)
    return {
        "count": count,
        "length": length,
        "ms": round(median * 1e3, 2),
        "tokens_per_second": round(count * length / median),
        **_beside(subject, subject.floors.prefill, (count, length), predicted, median),
    }


def _throughput(subject: Subject, rows: Rows, seed: int) -> list[dict[str, Any]]:
    table = Table("requests", "in/out", "s", "output/s", "total/s", "a rank", *_BESIDE)
    found = []
    with table.shown("throughput, all requests at once, tokens/s; floor: each prompt once, then full decode steps"):
        for count, input_len, output_len in rows.throughput:
            row = _throughput_row(subject, count, input_len, output_len, seed)
            found.append(row)
            rates = ("output_tokens_per_second", "total_tokens_per_second", "output_tokens_per_second_per_rank")
            cells = [f"{row[name]:,.0f}" for name in rates]
            table.row(count, f"{input_len}/{output_len}", f"{row['seconds']:.1f}", *cells, *_cells(row))
    return found


def _throughput_row(subject: Subject, count: int, input_len: int, output_len: int, seed: int) -> dict[str, Any]:
    vocab_size = subject.config.vocab_size
    requests = driver.make_requests(count, input_len, output_len, vocab_size, seed=f"throughput {seed}")
    timing = driver.run(subject.core, requests)
    rate = timing.output_tokens / timing.seconds
    sizes = (count, input_len, output_len)
    known = None if subject.predictions is None else subject.predictions.output_rate(*sizes)
    predicted = None if known is None else timing.output_tokens / known
    floor_of, of = subject.floors.throughput, (*sizes, subject.max_num_seqs)
    return {
        "requests": count,
        "input_len": input_len,
        "output_len": output_len,
        "seconds": round(timing.seconds, 3),
        "output_tokens_per_second": round(rate),
        "output_tokens_per_second_per_rank": round(rate / subject.ranks, 1),
        "total_tokens_per_second": round((timing.output_tokens + timing.prompt_tokens) / timing.seconds),
        **_beside(subject, floor_of, of, predicted, timing.seconds),
    }
