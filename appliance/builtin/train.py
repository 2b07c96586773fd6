"""`python -m appliance.builtin.train --out DIR --minutes 8`: trains the built-in model from nothing.

Only arguments, signals and the order of start-up; torch is imported after the worker processes are on their way,
because they import this file too.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path

from appliance.builtin import checkpoint_dir
from appliance.builtin.data import BatchSource
from appliance.builtin.tokenizer import train_tokenizer


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m appliance.builtin.train", description=__doc__)
    p.add_argument("--out", type=Path, default=checkpoint_dir(), help="directory of the checkpoint")
    p.add_argument("--minutes", type=float, default=8.0, help="wall-clock budget of the whole run, start to last line")
    p.add_argument("--steps", type=int, help="train this many steps instead (a smoke test)")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--cpu-workers", type=int, help="processes that generate data (default: cores less two, at most 14)")
    p.add_argument("--batch-tokens", type=int, help="tokens per step (default: 65536 on CUDA, 1024 on CPU)")
    p.add_argument("--evaluation-samples", type=int, help="per task at the end (default: 256 on CUDA, 2 on CPU)")
    p.add_argument("--evaluation-seconds", type=float, help="kept free for it (default: 40 on CUDA, 10 on CPU)")
    p.add_argument("--layers", type=int, help="another depth than that of the shipped model (an experiment)")
    p.add_argument("--no-compile", action="store_true", help="do not use torch.compile (never used on CPU)")
    p.add_argument("--seed", type=int, default=0)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the training; 0 when done, 143 when ended by SIGTERM or SIGINT (the checkpoint is written in both cases)."""
    started = time.monotonic()
    arguments = parser().parse_args(argv)
    cuda = arguments.device == "cuda"
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: signals.append(received))
    tokenizer = train_tokenizer(arguments.seed)
    batch_tokens = arguments.batch_tokens or (65536 if cuda else 1024)
    workers = arguments.cpu_workers or max(1, min(14, (os.cpu_count() or 2) - 2))
    source = BatchSource(tokenizer, batch_tokens, workers, arguments.seed)
    print(f"tokenizer trained, {workers} workers started after {time.monotonic() - started:.1f}s", flush=True)

    import torch

    from appliance.builtin.network import NetworkConfig
    from appliance.builtin.trainer import Plan, train

    reserved = arguments.evaluation_seconds if arguments.evaluation_seconds is not None else (40.0 if cuda else 10.0)
    plan = Plan(
        out=arguments.out,
        device=torch.device(arguments.device),
        deadline=None if arguments.steps else started + arguments.minutes * 60 - reserved,
        steps=arguments.steps,
        batch_tokens=batch_tokens,
        compile=cuda and not arguments.no_compile,
        evaluation_samples=arguments.evaluation_samples or (256 if cuda else 2),
        recall_lengths=(256, 1024, 2048, 3072, 3800) if cuda else (256,),
        report_seconds=10.0 if cuda else 5.0,
        seed=arguments.seed,
    )
    config = NetworkConfig(num_layers=arguments.layers) if arguments.layers else NetworkConfig()
    try:
        train(plan, tokenizer, source, config, lambda: bool(signals))
    finally:
        source.close()
    return 143 if signals else 0


if __name__ == "__main__":
    raise SystemExit(main())
