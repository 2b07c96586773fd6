"""`appliance bench compare`: this engine beside `generate` of transformers, same weights and prompts, in one run.

Both run on the same device one after the other, in one process. Prompts are random token ids of one length, fixed by
the seed; output is greedy and runs to its full length. Tokens/s count the whole call, prompts included, the best of the
repeats for either.

Outputs are compared in two ways. Share of equal tokens: both left alone, position by position; where two tokens are all
but equally likely, rounding decides, and everything behind them differs. Agreement: transformers judges our output, at
each position with the same prefix; what must hold is that it finds no token of ours much worse than its own choice.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from appliance.bench import driver
from appliance.bench.options import DEFAULT_SHAPE, add_engine_arguments, at_least, engine_options, shape_checkpoint
from appliance.bench.report import Table, environment, numbers, precisions, say
from appliance.bench.shapes import shape_config
from appliance.errors import RequestFailedError, SettingsError
from appliance.types import EngineRequest, Precision

if TYPE_CHECKING:
    from appliance.bench.peer import Judgement, Peer

# By how many deviations of the logits a token of ours may be worse than the peer's own choice. A wrong token of a
# vocabulary of 128,000 is about 4 deviations worse. FP8 weights and activations are rounded to 4 significant bits.
_TOLERANCE: dict[str, float] = {"fp32": 0.05, "fp16": 0.2, "bf16": 0.4, "fp8": 1.0, "int8": 1.0, "int4": 2.0}
# Random weights double every rounding error within a few layers, where trained ones damp it: of quantized shapes, only
# tokens that are as bad as wrong ones tell anything. (An 8B shape in FP8 on an H200 has a worst of 2.7 to 3.1.)
_RANDOM_TOLERANCE = 3.8
_PEER_DTYPE = {"cuda": "bfloat16", "cpu": "float32"}  # on the CPU we compute in float32 as well


@dataclass
class Ours:
    """One precision of ours: tokens/s and outputs by batch size."""

    precision: Precision
    rates: dict[int, float] = field(default_factory=dict)
    outputs: dict[int, list[list[int]]] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--with", dest="peer", default="transformers", help="the peer (default: %(default)s)")
    add_engine_arguments(parser, several=True)
    parser.add_argument("--batch-sizes", default="1,8,64", help="N,… (default: %(default)s)")
    parser.add_argument("--input-len", "--isl", type=int, default=128, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--output-len", "--osl", type=int, default=128, help="output tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="the best counts (default: %(default)s)")
    parser.add_argument(
        "--judged", type=int, default=4, help="outputs of a batch that are judged (default: %(default)s)"
    )
    parser.add_argument("--work", help="directory; a shape's checkpoint there is used again (default: temporary)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    batches, chosen = _check(args)
    with tempfile.TemporaryDirectory(prefix="appliance-bench-") as scratch:
        work = Path(args.work or scratch)
        work.mkdir(parents=True, exist_ok=True)
        path = _checkpoint(args, work)
        vocab_size = _vocab_size(path)
        prompts = {batch: _requests(args, batch, vocab_size) for batch in batches}
        cache = args.cache or (None if args.model else str(work / "cache"))
        measured = [_measure(args, path, cache, precision, prompts) for precision in chosen]
        with _peer(path, measured[0].description["backend"]) as peer:
            rows = [_compare(args, peer, batch, prompts[batch], measured) for batch in batches]
            version = peer.version
    _show(args, rows, measured)
    agrees = all(each["agrees"] for row in rows for each in row["ours"].values())
    result: dict[str, Any] = {
        "bench": "compare",
        "with": f"transformers {version}",
        "shape" if not args.model else "model": _name(args),
    }
    result |= {"input_len": args.input_len, "output_len": args.output_len, "seed": args.seed, "agrees": agrees}
    result |= {"peer_dtype": _PEER_DTYPE[_device_of(measured)], "ours": {o.precision: o.description for o in measured}}
    print(json.dumps({**result, "rows": rows, **environment()}))
    return 0 if agrees else 1


def _check(args: argparse.Namespace) -> tuple[list[int], list[Precision]]:
    """Batch sizes and precisions. SettingsError for what cannot be compared."""
    if args.peer != "transformers":
        raise SettingsError(f"--with is {args.peer!r}; allowed: transformers")
    at_least(args, {"input_len": 1, "output_len": 2, "repeats": 1, "judged": 1})
    batches = [row[0] for row in numbers("--batch-sizes", args.batch_sizes, "N")]
    if not batches or max(batches) > args.max_num_seqs:
        raise SettingsError(
            f"--batch-sizes is {args.batch_sizes!r}; it needs numbers up to --max-num-seqs, {args.max_num_seqs}"
        )
    engine_options(args)
    if not args.model:
        shape_config(args.shape or DEFAULT_SHAPE)
    chosen = precisions(args.precision or "bf16")
    if len(chosen) > 1 and (args.tp_size or 1) * (args.pp_size or 1) > 1:
        raise SettingsError(
            "--precision has several, which engines of several ranks cannot have in one process",
            hint="run one precision at a time",
        )
    return batches, chosen


def _name(args: argparse.Namespace) -> str:
    return args.model or args.shape or DEFAULT_SHAPE


def _checkpoint(args: argparse.Namespace, work: Path) -> Path:
    """The directory that both read their weights from. SettingsError for an engine, which only one of them can."""
    if not args.model:
        return shape_checkpoint(args.shape or DEFAULT_SHAPE, work)
    from appliance.checkpoint import resolve
    from appliance.settings import load

    settings = load({"model": args.model, **({"cache": args.cache} if args.cache else {})})
    path = resolve(settings.model, settings.cache_dir, offline=settings.offline, token=settings.hf_token)
    if (path / "engine.json").exists():
        raise SettingsError(
            f"--model {args.model} is an engine; transformers needs the checkpoint that it was made from"
        )
    return path


def _vocab_size(path: Path) -> int:
    from appliance.checkpoint import read_model_config

    return read_model_config(path).vocab_size


def _requests(args: argparse.Namespace, batch: int, vocab_size: int) -> list[EngineRequest]:
    seed = f"compare {args.seed} {batch}"
    return driver.make_requests(batch, args.input_len, args.output_len, vocab_size, seed=seed)


# ---------------------------------------------------------------- measuring


def _measure(
    args: argparse.Namespace,
    path: Path,
    cache: str | None,
    precision: Precision,
    prompts: dict[int, list[EngineRequest]],
) -> Ours:
    """Ours in one precision; its memory is free afterwards."""
    from appliance.bench.peer import release
    from appliance.bench.subject import load_model

    backend = None if args.backend == "auto" else args.backend
    options = engine_options(args)
    # No more KV cache than is used, so that the peer has the memory that it may need.
    pages = max(prompts) * (-(-(args.input_len + args.output_len) // options.page_size) + 1)
    options = msgspec.structs.replace(options, num_pages=pages)
    subject = load_model(
        str(path),
        precision,
        backend,
        cache,
        options,
        tactics=not args.no_tactics,
        tp_size=args.tp_size or 1,  # as many devices as the peer has, unless more are asked for
        pp_size=args.pp_size or 1,
    )
    if args.input_len + args.output_len > subject.core.limits.max_length:
        raise SettingsError(
            f"--isl {args.input_len} and --osl {args.output_len} are more than the context of "
            f"{subject.core.limits.max_length} tokens"
        )
    ours = Ours(precision, description={**subject.description, "model": _name(args)})
    for batch, requests in prompts.items():
        runs = [driver.run(subject.core, requests, keep_tokens=True) for _ in range(args.repeats + 1)][1:]  # warm
        ours.rates[batch] = batch * args.output_len / min(timing.seconds for timing in runs)
        ours.outputs[batch] = [runs[-1].token_ids[request.request_id] for request in requests]
    device = subject.device
    subject.close()
    release(device)
    return ours


def _peer(path: Path, backend: str) -> Peer:
    import torch

    from appliance.bench.peer import Peer
    from appliance.bench.random_engine import devices_of

    (device,) = devices_of(backend, 1)
    say(f"transformers in {_PEER_DTYPE[device.type]}")
    return Peer(path, device, getattr(torch, _PEER_DTYPE[device.type]))


def _compare(
    args: argparse.Namespace, peer: Peer, batch: int, requests: Sequence[EngineRequest], measured: Sequence[Ours]
) -> dict[str, Any]:
    """One batch size: the peer's speed, and each precision of ours beside it."""
    import torch

    prompts = [request.prompt_token_ids for request in requests]
    theirs: list[list[int]] | None = None
    rate = None
    try:
        peer.generate(prompts, min(args.output_len, 8))  # warm
        seconds = []
        for _ in range(args.repeats):
            theirs, taken = peer.generate(prompts, args.output_len)
            seconds.append(taken)
        rate = batch * args.output_len / min(seconds)
    except torch.OutOfMemoryError:
        say(f"batch {batch}: transformers ran out of memory")
    if theirs is not None and any(len(output) != args.output_len for output in theirs):
        raise RequestFailedError("transformers ended an output early: its lengths cannot be compared")
    row: dict[str, Any] = {"batch": batch, "transformers_tokens_per_second": rate and round(rate, 1), "ours": {}}
    for ours in measured:
        judged = [peer.judge(p, o) for p, o in zip(prompts[: args.judged], ours.outputs[batch])]
        row["ours"][ours.precision] = {
            "tokens_per_second": round(ours.rates[batch], 1),
            "ratio": round(ours.rates[batch] / rate, 2) if rate else None,
            **_likeness(ours.outputs[batch], theirs),
            **_agreement(judged, _tolerance(args, ours.precision)),
        }
    return row


def _tolerance(args: argparse.Namespace, precision: Precision) -> float:
    random_weights, quantized = not args.model, precision in ("fp8", "int8", "int4")
    return _RANDOM_TOLERANCE if random_weights and quantized else _TOLERANCE[precision]


def _likeness(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]] | None) -> dict[str, float | None]:
    """Share of equal tokens, and of outputs that are equal as a whole."""
    if theirs is None:
        return {"equal_tokens": None, "equal_outputs": None}
    pairs = [(a, b) for own, other in zip(ours, theirs, strict=True) for a, b in zip(own, other, strict=True)]
    same = sum(a == b for a, b in pairs)
    whole = sum(list(own) == list(other) for own, other in zip(ours, theirs, strict=True))
    return {"equal_tokens": round(same / len(pairs), 4), "equal_outputs": round(whole / len(ours), 4)}


def _agreement(judged: Sequence[Judgement], tolerance: float) -> dict[str, Any]:
    """Share of our tokens that are the peer's own choice, and the worst of the others."""
    same, positions = sum(j.same for j in judged), sum(j.positions for j in judged)
    worst = max(j.deficit for j in judged)
    return {
        "agreement": round(same / positions, 4),
        "worst_deficit": round(worst, 4),
        "agrees": worst <= tolerance,
    }


# ---------------------------------------------------------------- showing


def _device_of(measured: Sequence[Ours]) -> str:
    return "cpu" if measured[0].description["backend"] == "cpu" else "cuda"


def _show(args: argparse.Namespace, rows: list[dict[str, Any]], measured: Sequence[Ours]) -> None:
    table = Table("batch", "transformers", "ours", "tokens/s", "ratio", "equal tokens", "agreement", "worst")
    for row in rows:
        rate = row["transformers_tokens_per_second"]
        for precision, ours in row["ours"].items():
            ratio = "-" if ours["ratio"] is None else f"{ours['ratio']:.1f}x"
            equal = "-" if ours["equal_tokens"] is None else f"{ours['equal_tokens']:.1%}"
            cells = (precision, f"{ours['tokens_per_second']:,.0f}", ratio, equal, f"{ours['agreement']:.1%}")
            worst = f"{ours['worst_deficit']:.3f}{'' if ours['agrees'] else ' !'}"
            table.row(row["batch"], "-" if rate is None else f"{rate:,.0f}", *cells, worst)
    table.show(f"{_name(args)}, {args.input_len}/{args.output_len} tokens, output tokens/s of the whole call")
    say(
        "agreement: tokens of ours that transformers chooses too, given the same prefix; worst: logit deviations behind"
    )
    for ours in measured:
        limit = _tolerance(args, ours.precision)
        wrong = ", ".join(str(row["batch"]) for row in rows if not row["ours"][ours.precision]["agrees"])
        if wrong:
            say(f"DIFFERENT OUTPUTS: {ours.precision} at batch {wrong} is beyond {limit} deviations")
