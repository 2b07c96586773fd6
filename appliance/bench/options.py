"""What benchmarks of an engine ask in the same words: which model or shape, in which precision, with which limits.

Knows arguments and `EngineOptions`; imports no torch before an engine is opened.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import msgspec

from appliance.bench.report import one_scheme
from appliance.bench.shapes import SHAPES, shape_config
from appliance.checkpoint.files import INDEX_NAME
from appliance.errors import ApplianceError, SettingsError
from appliance.settings import load
from appliance.types import EngineOptions, KvCacheDtype, Precision

if TYPE_CHECKING:
    from appliance.bench.random_engine import RandomEngine
    from appliance.bench.subject import Subject

DEFAULT_SHAPE = "llama-3.1-8b"
_LEAST = {"max_num_seqs": 1, "max_num_batched_tokens": 16}


def add_engine_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Model or shape, precision (with `several`, more than one may be given), backend, kernels and limits."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", help=f"{', '.join(SHAPES)}: random weights (default: {DEFAULT_SHAPE})")
    what.add_argument("--model", help="model directory, hub id, engine directory or builtin, instead of a shape")
    default = "bf16; several by comma" if several else "bf16 for a shape, selected for a model"
    schemes = "" if several else ", or a scheme by name, such as int4_gptq"
    parser.add_argument("--precision", help=f"{', '.join(get_args(Precision))}{schemes} (default: {default})")
    parser.add_argument(
        "--tp-size", type=int, help="ranks that share each layer (default: 1 for a shape, else selected)"
    )
    parser.add_argument("--pp-size", type=int, help="stages, each of --tp-size ranks (default: likewise)")
    parser.add_argument("--backend", default="auto", help="auto, cuda or cpu (default: %(default)s)")
    parser.add_argument("--attention", default="auto", help="auto, flashinfer, triton or reference (default: auto)")
    parser.add_argument(
        "--kv-cache-dtype",
        default="auto",
        help=f"precision of the KV cache: {', '.join(get_args(KvCacheDtype))} (default: auto)",
    )
    parser.add_argument("--no-cuda-graphs", action="store_true", help="run decode steps eagerly")
    parser.add_argument("--no-persistent-decode", action="store_true", help="run decode steps layer by layer")
    parser.add_argument("--batch-invariant", action="store_true", help="outputs that no batch changes; slower")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="running at once (default: %(default)s)")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=8192, help="computed in one step (default: %(default)s)"
    )
    parser.add_argument("--no-tactics", action="store_true", help="do not time the ways to compute each product")
    parser.add_argument("--cache", help="directory of engines, timings and kernels (default: the server's)")


def at_least(args: argparse.Namespace, least: dict[str, int]) -> None:
    """SettingsError, naming the flag, for a number below its smallest."""
    for name, low in least.items():
        if getattr(args, name) < low:
            raise SettingsError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {low}")


def kv_cache(args: argparse.Namespace) -> KvCacheDtype:
    """SettingsError for a name that is none of a precision."""
    if args.kv_cache_dtype not in get_args(KvCacheDtype):
        allowed = ", ".join(get_args(KvCacheDtype))
        raise SettingsError(f"--kv-cache-dtype is {args.kv_cache_dtype!r}; allowed: {allowed}")
    return cast(KvCacheDtype, args.kv_cache_dtype)


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """The options that the arguments name; which engine is left open. SettingsError for what cannot be."""
    at_least(args, _LEAST | {name: 1 for name in ("tp_size", "pp_size") if getattr(args, name) is not None})
    return EngineOptions(
        engine_dir="",
        backend=args.backend,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        prefix_caching=False,
        cuda_graphs=not args.no_cuda_graphs,
        persistent_decode=not args.no_persistent_decode,
        batch_invariant=args.batch_invariant,
        attention=args.attention,
        kv_cache_dtype=kv_cache(args),
    )


def weights_of(args: argparse.Namespace) -> tuple[Precision | None, str | None]:
    """The precision, and the scheme if it was named. None: nothing was said. SettingsError for one that cannot be
    built, or several."""
    return one_scheme(args.precision) if args.precision else (None, None)


def cache_of(args: argparse.Namespace) -> Path:
    """Where engines, timings and kernels are kept."""
    return load({"cache": args.cache} if args.cache else {}).cache_dir


def random_engine_of(args: argparse.Namespace, *, files: bool = False) -> RandomEngine:
    """The engine that stands for the shape, of the backend that was asked for or the best there is. SettingsError for
    an unknown shape."""
    from appliance.bench.random_engine import RandomEngine, best_backend

    precision, scheme = weights_of(args)
    shape = args.shape or DEFAULT_SHAPE
    shape_config(shape)
    return RandomEngine(
        shape=shape,
        precision=precision or "bf16",
        backend=best_backend() if args.backend == "auto" else args.backend,
        scheme=scheme,
        tp_size=args.tp_size or 1,
        pp_size=args.pp_size or 1,
        files=files,
        tactics=not args.no_tactics,
    )


def open_subject(args: argparse.Namespace, longest: int) -> Subject:
    """The model or shape that is measured, loaded; `longest`: tokens of the longest sequence that a shape must hold.
    Raises what loading raises."""
    options, (precision, scheme) = engine_options(args), weights_of(args)
    config = None if args.model else shape_config(args.shape or DEFAULT_SHAPE)
    from appliance.bench.subject import load_model, load_random

    if config is not None:
        limit = min(longest, config.max_position_embeddings)
        options = msgspec.structs.replace(options, max_model_len=limit)
        return load_random(random_engine_of(args), options, cache_of(args))
    return load_model(
        args.model,
        precision,
        None if args.backend == "auto" else args.backend,
        args.cache,
        options,
        tactics=not args.no_tactics,
        scheme=scheme,
        tp_size=args.tp_size,
        pp_size=args.pp_size,
    )


def shape_checkpoint(shape: str, work: Path) -> Path:
    """A checkpoint of a shape with random weights below `work`; one that was written there before is taken again.

    Written by a process of its own, so that none of the GPU's memory is held here while a server is measured.
    SettingsError for an unknown shape, ApplianceError if it fails."""
    shape_config(shape)
    path = work / shape
    if not (path / INDEX_NAME).exists():
        command = [sys.executable, "-m", "appliance.bench.random_model", shape, str(path)]
        if subprocess.run(command).returncode:
            raise ApplianceError(f"the checkpoint in {path} could not be written", hint="its own messages are above")
    return path
