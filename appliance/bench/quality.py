"""`appliance bench quality`: exact-match accuracy of a model on the built-in tasks, per precision.

Samples are fresh (seeded, of the evaluation split, which training never draws from). Recall is reported per context
length: it is what shows that paged K/V, prefix reuse and chunked prefill keep every token.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from appliance.bench.report import Table, environment, say
from appliance.builtin import tasks
from appliance.llm import LLM
from appliance.types import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="builtin", help="model directory, hub id or engine (default: %(default)s)")
    parser.add_argument("--precision", default="bf16,fp8", help="comma-separated (default: %(default)s)")
    parser.add_argument("--backend", default=None, help="cuda or cpu (default: what selection chooses)")
    parser.add_argument("--attention", default="auto", help="auto, flashinfer, triton or reference")
    parser.add_argument("--samples", type=int, default=200, help="per task (default: %(default)s)")
    parser.add_argument("--recall-lengths", default="256,1024,2048,3800", help="prompt tokens (default: %(default)s)")
    parser.add_argument("--tasks", default="", help="comma-separated; empty: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", default=None, help="cache directory")


def run(args: argparse.Namespace) -> int:
    sets = sample_sets(args)
    accuracy: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    for precision in args.precision.split(","):
        begin = time.perf_counter()
        accuracy[precision] = measure(args, precision, sets)
        seconds[precision] = round(time.perf_counter() - begin, 1)
    table = Table("task", *accuracy)
    for name in sets:
        table.row(name, *(f"{column[name]:.1%}" for column in accuracy.values()))
    means = {p: sum(column.values()) / len(column) for p, column in accuracy.items()}
    table.row("mean", *(f"{mean:.1%}" for mean in means.values()))
    table.show(f"exact match, {args.samples} samples a row")
    result: dict[str, Any] = {
        "bench": "quality",
        "model": args.model,
        "samples": args.samples,
        "seed": args.seed,
        "accuracy": {p: {n: round(v, 4) for n, v in column.items()} for p, column in accuracy.items()},
        "mean": {p: round(mean, 4) for p, mean in means.items()},
        "seconds": seconds,
        **environment(),
    }
    print(json.dumps(result))
    return 0


def sample_sets(args: argparse.Namespace) -> dict[str, list[tasks.Sample]]:
    """Row name -> samples. Recall gives one row per context length."""
    chosen = [name for name in args.tasks.split(",") if name] or list(tasks.TASKS)
    sets: dict[str, list[tasks.Sample]] = {}
    for name in chosen:
        if name != "recall":
            sets[name] = tasks.evaluation_set(name, args.samples, args.seed)
            continue
        for length in (int(part) for part in args.recall_lengths.split(",")):
            sets[f"recall {length}"] = tasks.evaluation_set("recall", args.samples, args.seed, length=length)
    return sets


def measure(args: argparse.Namespace, precision: str, sets: dict[str, list[tasks.Sample]]) -> dict[str, float]:
    """Accuracy per row, all samples of all rows in one batch: they share the engine as requests of users do."""
    with LLM(args.model, precision=precision, backend=args.backend, cache=args.cache, attention=args.attention) as llm:
        say(f"{precision}: {llm.info.device_name}, attention {llm.info.attention}")
        conversations = [list(sample.messages) for samples in sets.values() for sample in samples]
        answers = iter(llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=256)))
        found: dict[str, float] = {}
        for name, samples in sets.items():
            right = sum(tasks.score(sample, next(answers).text) for sample in samples)
            found[name] = right / len(samples)
        return found
