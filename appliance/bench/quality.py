"""`appliance bench quality`: exact-match accuracy of a model on the built-in tasks, per precision of weights and cache.

Samples are fresh (seeded, of the evaluation split, which training never draws from). Recall is reported per context
length: it is what shows that paged K/V, prefix reuse and chunked prefill keep every token.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any, get_args

from appliance.bench.report import Table, environment, numbers, precisions, say
from appliance.builtin import tasks
from appliance.errors import SettingsError
from appliance.llm import LLM
from appliance.types import KvCacheDtype, Precision, SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="builtin", help="model directory, hub id or builtin (default: %(default)s)")
    parser.add_argument(
        "--precision", default="bf16,fp8", help="fp32, fp16, bf16, fp8; several by comma (default: %(default)s)"
    )
    parser.add_argument("--backend", help="cuda or cpu (default: what selection chooses)")
    parser.add_argument("--attention", default="auto", help="auto, flashinfer, triton or reference (default: auto)")
    parser.add_argument(
        "--kv-cache",
        default="auto",
        help=f"precisions of the KV cache: {', '.join(get_args(KvCacheDtype))}; several by comma, each with each "
        "--precision (default: %(default)s)",
    )
    parser.add_argument("--samples", type=int, default=200, help="per row (default: %(default)s)")
    parser.add_argument("--tasks", default="", help=f"several by comma, of {', '.join(tasks.TASKS)} (default: all)")
    parser.add_argument(
        "--recall-lengths", default="256,1024,2048,3800", help="prompt tokens of the recall rows (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    parser.add_argument("--cache", help="cache directory (default: the server's)")


def run(args: argparse.Namespace) -> int:
    chosen, sets = columns(args.precision, args.kv_cache), sample_sets(args)
    accuracy: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    for column, (precision, kv_cache) in chosen.items():
        begin = time.perf_counter()
        accuracy[column] = measure(args, precision, kv_cache, sets)
        seconds[column] = round(time.perf_counter() - begin, 1)
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


def columns(precision_text: str, kv_cache_text: str) -> dict[str, tuple[Precision, str]]:
    """Name -> precision of the weights and of the KV cache: "fp8", and "fp8 + fp8 KV" where that is not left open.
    SettingsError for an unknown one."""
    allowed = get_args(KvCacheDtype)
    kv_caches = [part.strip() for part in kv_cache_text.split(",") if part.strip()]
    if not kv_caches or not set(kv_caches) <= set(allowed):
        raise SettingsError(f"--kv-cache is {kv_cache_text!r}; allowed: {', '.join(allowed)}")
    return {
        precision if kv_cache == "auto" else f"{precision} + {kv_cache} KV": (precision, kv_cache)
        for precision in precisions(precision_text)
        for kv_cache in kv_caches
    }


def sample_sets(args: argparse.Namespace) -> dict[str, list[tasks.Sample]]:
    """Row name -> samples. Recall gives one row per context length. SettingsError for what cannot be drawn."""
    if args.samples < 1:
        raise SettingsError(f"--samples is {args.samples}; it must be at least 1")
    chosen = [name.strip() for name in args.tasks.split(",") if name.strip()] or list(tasks.TASKS)
    unknown = [name for name in chosen if name not in tasks.TASKS]
    if unknown:
        raise SettingsError(f"--tasks has {unknown[0]!r}; allowed: {', '.join(tasks.TASKS)}")
    lengths = [row[0] for row in numbers("--recall-lengths", args.recall_lengths, "N")]
    shortest, longest = tasks.RECALL_LENGTHS
    if "recall" in chosen and not (lengths and all(shortest <= length <= longest for length in lengths)):
        raise SettingsError(f"--recall-lengths is {args.recall_lengths!r}; allowed: {shortest} to {longest}")
    sets: dict[str, list[tasks.Sample]] = {}
    try:
        for name in chosen:
            if name != "recall":
                sets[name] = tasks.evaluation_set(name, args.samples, args.seed)
                continue
            for length in lengths:
                sets[f"recall {length}"] = tasks.evaluation_set("recall", args.samples, args.seed, length=length)
    except ValueError as error:  # fewer different samples than asked for
        raise SettingsError(f"--samples is {args.samples}: {error}") from None
    return sets


def measure(
    args: argparse.Namespace, precision: Precision, kv_cache: str, sets: dict[str, list[tasks.Sample]]
) -> dict[str, float]:
    """Accuracy per row, all samples of all rows in one batch: they share the engine as requests of users do."""
    kernels = {"attention": args.attention, "kv_cache_dtype": kv_cache}
    with LLM(args.model, precision=precision, backend=args.backend, cache=args.cache, **kernels) as llm:
        info = llm.info
        say(f"{precision}: {info.device_name}, attention {info.attention}, {info.kv_cache_dtype} KV cache")
        conversations = [list(sample.messages) for samples in sets.values() for sample in samples]
        answers = iter(llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=256)))
        found: dict[str, float] = {}
        for name, samples in sets.items():
            right = sum(tasks.score(sample, next(answers).text) for sample in samples)
            found[name] = right / len(samples)
        return found
