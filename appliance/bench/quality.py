"""`appliance bench quality`: what a precision of weights and KV cache costs, side by side.

Two measurements. Exact-match accuracy on the tasks of the built-in model: samples are fresh (seeded, of the evaluation
split, which training never draws from), and recall is reported per context length, as it is what shows that paged K/V,
prefix reuse and chunked prefill keep every token. And for any model, over a text: perplexity, KL divergence and top-1
agreement with the first column, at every position of the text. The built-in model's text are conversations of the
evaluation split, questions as well as answers (builder/quality_text.py says why); answers are also shown apart.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from appliance.bench.options import at_least
from appliance.bench.quality_columns import Column, columns, open_column, tokenizer_dir
from appliance.bench.report import Table, environment, numbers, say
from appliance.builder.quality_text import is_builtin
from appliance.builtin import tasks
from appliance.engines.manifest import read_manifest
from appliance.errors import SettingsError
from appliance.llm import LLM
from appliance.types import EngineOptions, KvCacheDtype, SamplingParams

if TYPE_CHECKING:
    from appliance.bench.quality_divergence import Compared, Reference
    from appliance.runtime.divergence import Divergence

_LEAST = {"samples": 1, "text_tokens": 16, "window": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="builtin", help="model directory, hub id or builtin (default: %(default)s)")
    parser.add_argument(
        "--precision",
        default="bf16,fp8",
        help="precisions and schemes, several by comma, compared with the first: fp32, fp16, bf16, fp8, int8, int4, "
        "int8_smoothquant, int4_awq, int4_gptq; int8_rtn and int4_rtn: rounded to nearest, not calibrated; fp8+fp8: "
        "with its KV cache; all: the whole table (default: %(default)s)",
    )
    parser.add_argument("--backend", help="cuda or cpu (default: what selection chooses)")
    parser.add_argument("--attention", default="auto", help="auto, flashinfer, triton or reference (default: auto)")
    parser.add_argument(
        "--kv-cache-dtype",
        default="auto",
        help=f"precisions of the KV cache: {', '.join(get_args(KvCacheDtype))}; several by comma, each with each "
        "--precision (default: %(default)s)",
    )
    parser.add_argument("--samples", type=int, default=200, help="per row (default: %(default)s)")
    parser.add_argument(
        "--tasks",
        default="",
        help=f"several by comma, of {', '.join(tasks.TASKS)}, or none (default: all for the built-in model, else none)",
    )
    parser.add_argument(
        "--recall-lengths", default="256,1024,2048,3800", help="prompt tokens of the recall rows (default: %(default)s)"
    )
    parser.add_argument(
        "--text", metavar="FILE", help="text that predictions are compared over (default: one that ships)"
    )
    parser.add_argument("--text-tokens", type=int, default=16384, help="taken of the text (default: %(default)s)")
    parser.add_argument(
        "--window", type=int, default=1024, help="tokens of a prompt of the text (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the samples and of the conversations that predictions are compared over (default: %(default)s)",
    )
    parser.add_argument("--cache", help="cache directory (default: the server's)")


def run(args: argparse.Namespace) -> int:
    chosen = columns(args.precision, args.kv_cache_dtype)
    at_least(args, _LEAST)
    sets: dict[str, list[tasks.Sample]] | None = sample_sets(args)
    if args.text is not None and not Path(args.text).expanduser().is_file():
        raise SettingsError(f"--text: there is no file {args.text}")
    accuracy: dict[str, dict[str, float]] = {}
    compared: dict[str, Compared] = {}
    seconds: dict[str, float] = {}
    comparison = Comparison(args)
    for name, column in chosen.items():
        begin = time.perf_counter()
        options = open_column(args, column)
        compared[name] = comparison.measure(options)
        if not args.tasks and not is_builtin(tokenizer_dir(options)):
            sets = {}
        if sets:
            accuracy[name] = measure(args, column, options, sets)
        seconds[name] = round(time.perf_counter() - begin, 1)
    if sets:
        show_accuracy(accuracy, args.samples)
    everywhere = {name: found.everywhere for name, found in compared.items()}
    answers = {name: found.answers for name, found in compared.items() if found.answers.positions}
    show_divergence(everywhere, f"all positions of {comparison.text}")
    if answers:
        show_divergence(answers, "those of them that predict answers")
    for line in against_nearest(chosen, everywhere):
        say(line)
    means = {name: mean(column) for name, column in accuracy.items()}
    result: dict[str, Any] = {
        "bench": "quality",
        "model": args.model,
        "samples": args.samples,
        "seed": args.seed,
        "accuracy": {name: {n: round(v, 4) for n, v in column.items()} for name, column in accuracy.items()},
        "mean": {name: round(value, 4) for name, value in means.items()},
        "text": comparison.text,
        "divergence": {name: figures(found) for name, found in everywhere.items()},
        "divergence_answers": {name: figures(found) for name, found in answers.items()},
        "seconds": seconds,
        **environment(),
    }
    print(json.dumps(result))
    return 0


def mean(column: Mapping[str, float]) -> float:
    return sum(column.values()) / len(column)


def show_accuracy(accuracy: Mapping[str, Mapping[str, float]], samples: int) -> None:
    """Accuracy per task and column, then by how many points each is off the first column."""
    first, *others = accuracy
    table = Table("task", *accuracy)
    for row in accuracy[first]:
        table.row(row, *(f"{column[row]:.1%}" for column in accuracy.values()))
    table.row("mean", *(f"{mean(column):.1%}" for column in accuracy.values()))
    table.show(f"exact match, {samples} samples a row")
    if not others:
        return
    table = Table("task", *others)
    for row in accuracy[first]:
        table.row(row, *(f"{100 * (accuracy[name][row] - accuracy[first][row]):+.1f}" for name in others))
    table.row("mean", *(f"{100 * (mean(accuracy[name]) - mean(accuracy[first])):+.1f}" for name in others))
    table.show(f"points against {first}")


def show_divergence(divergence: Mapping[str, Divergence], where: str) -> None:
    first, *_ = divergence
    table = Table("", "perplexity", f"KL({first} || it), nats/token", f"same top token as {first}")
    for name, found in divergence.items():
        kl, agreement = (f"{found.kl_divergence:.3g}", f"{found.top1_agreement:.2%}") if name != first else ("", "")
        table.row(name, f"{found.perplexity:.6g}", kl, agreement)
    table.show(f"predictions, {divergence[first].positions} positions: {where}")


def against_nearest(chosen: Mapping[str, Column], divergence: Mapping[str, Divergence]) -> list[str]:
    """What calibration gained: per column rounded to nearest, the KL divergence of the calibrated ones of its precision
    and KV cache as a share of its own."""
    lines = []
    for name, nearest in chosen.items():
        kl = divergence[name].kl_divergence
        if not nearest.nearest or not kl:
            continue
        same = [
            (other, divergence[other].kl_divergence / kl)
            for other, column in chosen.items()
            if (column.precision, column.kv_cache) == (nearest.precision, nearest.kv_cache) and not column.nearest
        ]
        if same:
            lines.append(f"KL as a share of {name}'s: " + ", ".join(f"{other} {share:.2f}" for other, share in same))
    return lines


def figures(found: Divergence) -> dict[str, float]:
    return {
        "perplexity": round(found.perplexity, 6),
        "kl_divergence": float(f"{found.kl_divergence:.6g}"),
        "top1_agreement": round(found.top1_agreement, 6),
        "positions": found.positions,
    }


class Comparison:
    """Each engine's predictions with those of the first that is measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.text = ""  # what it is
        self._args = args
        self._reference: Reference | None = None

    def measure(self, options: EngineOptions) -> Compared:
        from appliance.bench import quality_divergence as work

        args = self._args
        config = read_manifest(Path(options.engine_dir)).model
        window = min(args.window, config.max_position_embeddings)
        try:
            if self._reference is None:
                self.text, prompts = work.prompts_of(
                    options, config.vocab_size, args.text, args.text_tokens, window, args.seed
                )
                self._reference = work.Reference(work.load_model(options, window), options, prompts)
            return self._reference.compare(work.load_model(options, window), options)
        finally:
            work.release()


def sample_sets(args: argparse.Namespace) -> dict[str, list[tasks.Sample]]:
    """Row name -> samples. Recall gives one row per context length. Empty for --tasks none. SettingsError for what
    cannot be drawn."""
    if args.tasks.strip() == "none":
        return {}
    chosen = [name.strip() for name in args.tasks.split(",") if name.strip()] or list(tasks.TASKS)
    unknown = [name for name in chosen if name not in tasks.TASKS]
    if unknown:
        raise SettingsError(f"--tasks has {unknown[0]!r}; allowed: {', '.join(tasks.TASKS)}, none")
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
    args: argparse.Namespace, column: Column, options: EngineOptions, sets: dict[str, list[tasks.Sample]]
) -> dict[str, float]:
    """Accuracy per row, all samples of all rows in one batch: they share the engine as requests of users do."""
    kernels = {"attention": args.attention, "kv_cache_dtype": column.kv_cache}
    with LLM(options.engine_dir, cache=args.cache, **kernels) as llm:
        info = llm.info
        say(f"{column.name}: {info.device_name}, attention {info.attention}, {info.kv_cache_dtype} KV cache")
        conversations = [list(sample.messages) for samples in sets.values() for sample in samples]
        answers = iter(llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=256)))
        found: dict[str, float] = {}
        for name, samples in sets.items():
            right = sum(tasks.score(sample, next(answers).text) for sample in samples)
            found[name] = right / len(samples)
        return found
