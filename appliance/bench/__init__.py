"""`appliance bench …`: measures the product, with a table for people and one JSON object as the last line.

Each benchmark is one module here with `add_arguments(parser)` and `run(args) -> exit code`.
"""

from __future__ import annotations

import argparse
import importlib
from types import ModuleType

# name -> one line of help. Modules import what is heavy (torch) only when they run.
BENCHMARKS = {
    "all-reduce": "sums over ranks by the library and by own kernels, alone and with the norm behind them",
    "compare": "tokens/s beside `generate` of transformers, same weights and prompts, and whether outputs agree",
    "kernels": "the small FP8 kernels against memory bandwidth, a layer with its products forced (needs a GPU)",
    "offline": "the engine without HTTP: decode steps, prefill, throughput; random weights or a real model",
    "ops": "linear layers with few rows: own kernel in all its configs beside the library's products (needs a GPU)",
    "quality": "what each precision costs: accuracy per task, perplexity, KL divergence and agreement with bf16",
    "serve": "load over HTTP: latencies, gaps between tokens, tokens/s, goodput; on a running server or one of its own",
    "start": "seconds from process start to first token, with and without a built engine",
    "trace": "a profiler trace of decode steps for Perfetto, and how busy they keep the GPU",
}


def add_parsers(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand per benchmark; the chosen one is `args.benchmark`."""
    subparsers = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, help_text in BENCHMARKS.items():
        child = subparsers.add_parser(name, help=help_text, description=help_text)
        _module(name).add_arguments(child)


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark; returns the exit code."""
    code: int = _module(args.benchmark).run(args)
    return code


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"appliance.bench.{name.replace('-', '_')}")
