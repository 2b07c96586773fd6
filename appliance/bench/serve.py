"""`appliance bench serve`: load over HTTP, on a server that runs or on one that is started for it.

Closed loop (N clients that stream, each sending its next request when the last has ended) or open loop (requests arrive
at a rate, whatever has ended), with long prompts arriving beside it if asked for. Prompts are random token ids, output
runs to its full length, and tokens are counted by the server (`usage`), so what is counted is exact. Terms are defined
in `load_report.py`. Works on any server of the OpenAI API that takes token ids and `ignore_eos`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from appliance.bench.load import Flow, Lengths, arrival_times, parse_lengths
from appliance.bench.load_report import LONG, MAIN, Limits, client_load, summarize
from appliance.bench.load_run import Target, run_load
from appliance.bench.options import (
    DEFAULT_SHAPE,
    add_engine_arguments,
    at_least,
    cache_of,
    engine_options,
    random_engine_of,
    shape_checkpoint,
    weights_of,
)
from appliance.bench.own_server import OwnServer, get_json
from appliance.bench.report import environment, say
from appliance.bench.serve_engines import engine_facts, per_device
from appliance.bench.serve_table import show
from appliance.bench.shapes import shape_config
from appliance.errors import ApplianceError, SettingsError, UnavailableError

_UNKNOWN_VOCABULARY = 1000  # ids that every tokenizer has
_WAITING = 1024  # the server's own limit of waiting requests


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="a server that runs, http://HOST:PORT (default: one is started)")
    parser.add_argument("--served-model", help="its name in requests, with --url (default: the first it lists)")
    parser.add_argument("--api-key", help="sent as bearer token, with --url")
    add_engine_arguments(parser)
    parser.add_argument("--replicas", type=int, help="engines that serve beside each other (default: `serve` decides)")
    parser.add_argument(
        "--weights",
        default="device",
        help="of a shape: device, random numbers made on each GPU; checkpoint, written, then built (default: device)",
    )
    parser.add_argument(
        "--serve-flags", default="", help="further flags of `serve` for the started server (default: none)"
    )
    parser.add_argument("--work", help="directory; a checkpoint and engine there are used again (default: temporary)")
    parser.add_argument("--start-timeout", type=float, default=1800.0, help="seconds to ready (default: %(default)s)")
    load = parser.add_argument_group("load")
    load.add_argument("--concurrency", type=int, default=256, help="clients of a closed loop (default: %(default)s)")
    load.add_argument("--rate", type=float, help="requests a second: an open loop (default: a closed loop)")
    load.add_argument(
        "--arrivals", default="poisson", help="of an open loop, poisson or constant (default: %(default)s)"
    )
    load.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        help="shape of the gaps, less is burstier (default: %(default)s, Poisson)",
    )
    load.add_argument("--requests", type=int, default=0, help="in all (default: one a client, or rate x duration)")
    load.add_argument("--duration", type=float, default=0.0, help="seconds in which requests start (default: no limit)")
    load.add_argument("--input-len", "--isl", default="128", help="prompt tokens, N or N-M (default: %(default)s)")
    load.add_argument("--output-len", "--osl", default="128", help="output tokens, N or N-M (default: %(default)s)")
    load.add_argument(
        "--long-prompt-every", type=float, default=0.0, help="seconds between long prompts (default: none)"
    )
    load.add_argument("--long-prompt-len", default="8192", help="their tokens, N or N-M (default: %(default)s)")
    load.add_argument("--long-prompt-output-len", default="16", help="their output (default: %(default)s)")
    load.add_argument("--temperature", type=float, default=0.0, help="of every request (default: %(default)s, greedy)")
    load.add_argument("--warmup", type=int, default=8, help="requests before, not counted (default: %(default)s)")
    load.add_argument("--processes", type=int, default=0, help="of clients (default: one for four cores, 8 at most)")
    load.add_argument("--timeout", type=float, default=600.0, help="seconds for one request (default: %(default)s)")
    load.add_argument("--seed", type=int, default=0, help="of prompts, lengths and arrivals (default: %(default)s)")
    good = parser.add_argument_group("goodput: requests a second that are within all limits given")
    good.add_argument("--ttft-limit-ms", type=float, help="to the first token (default: none)")
    good.add_argument("--tpot-limit-ms", type=float, help="mean time per token behind the first (default: none)")
    good.add_argument("--itl-limit-ms", type=float, help="99th percentile of a request's gaps (default: none)")
    parser.add_argument(
        "--compare-offline", action="store_true", help="first the same requests without HTTP, then the ratio"
    )


def run(args: argparse.Namespace) -> int:
    flows, processes = flows_of(args), args.processes or min(8, max(1, (os.cpu_count() or 1) // 4))
    limits = Limits(args.ttft_limit_ms, args.tpot_limit_ms, args.itl_limit_ms)
    result: dict[str, Any] = {"bench": "serve"}
    with _target(args, flows[0]) as (target, server, about):
        if args.warmup:
            _warm_up(args, target)
        used: dict[str, float] = {}

        def at_start() -> None:
            used.update(server.cpu_seconds() if server else {})

        say(f"load: {_describe(args)}, from {processes} client process{'es' if processes > 1 else ''}")
        options = {"processes": processes, "timeout": args.timeout, "temperature": args.temperature}
        seen = run_load(target, flows, seed=f"{args.seed} load", at_start=at_start, **options)
        wall = max(each.wall_seconds for each in seen)
        now = server.cpu_seconds() if server else {}
        result |= about | {"load": _load(args)} | summarize(seen, limits)
        result |= per_device(result)
        result["client"] = client_load(seen)
        result["server_cpu_share"] = {name: round((now[name] - used[name]) / wall, 3) for name in now if name in used}
    if args.compare_offline:
        result["http_over_offline"] = _ratio(result)
    show(result)
    print(json.dumps({**result, **environment()}))
    return 0 if result["completed"] else 1


# ---------------------------------------------------------------- the load


def flows_of(args: argparse.Namespace) -> list[Flow]:
    """The main flow, then the one of long prompts if there is one. SettingsError for what is no load."""
    at_least(args, {"concurrency": 1, "requests": 0, "warmup": 0, "processes": 0})
    positive = {"burstiness": args.burstiness, "timeout": args.timeout}
    positive |= {"rate": args.rate} if args.rate is not None else {}
    for name, value in positive.items():
        if not value > 0:
            raise SettingsError(f"--{name} is {value:g}; it must be more than 0")
    for name in ("duration", "long_prompt_every"):
        if getattr(args, name) < 0:
            raise SettingsError(f"--{name.replace('_', '-')} is {getattr(args, name):g}; it cannot be negative")
    lengths = [
        parse_lengths(f"--{name.replace('_', '-')}", getattr(args, name)) for name in ("input_len", "output_len")
    ]
    flows = [_closed(args, *lengths) if args.rate is None else _open(args, *lengths)]
    if args.long_prompt_every:
        own = parse_lengths("--long-prompt-len", args.long_prompt_len)
        output = parse_lengths("--long-prompt-output-len", args.long_prompt_output_len)
        flows.append(Flow(LONG, "every", own, output, interval=args.long_prompt_every))
    if args.compare_offline:
        _check_comparable(args, flows)
    return flows


def _closed(args: argparse.Namespace, input_len: Lengths, output_len: Lengths) -> Flow:
    requests = args.requests or (0 if args.duration else args.concurrency)
    concurrency = min(args.concurrency, requests or args.concurrency)
    return Flow(MAIN, "closed", input_len, output_len, concurrency, requests, args.duration)


def _open(args: argparse.Namespace, input_len: Lengths, output_len: Lengths) -> Flow:
    if args.arrivals not in ("poisson", "constant"):
        raise SettingsError(f"--arrivals is {args.arrivals!r}; allowed: poisson, constant")
    if not args.requests and not args.duration:
        raise SettingsError("--rate needs to know when to end: give --requests or --duration")
    count = args.requests or 100 + round(2 * args.rate * args.duration)  # more than will arrive in that time
    times = arrival_times(args.rate, count, args.arrivals, args.burstiness, str(args.seed))
    if args.duration:
        times = [at for at in times if at < args.duration]
    return Flow(MAIN, "open", input_len, output_len, arrivals=tuple(times))


def _check_comparable(args: argparse.Namespace, flows: list[Flow]) -> None:
    """SettingsError where nothing without HTTP is the same work."""
    main = flows[0]
    fixed = main.input.low == main.input.high and main.output.low == main.output.high
    if (
        args.url
        or len(flows) > 1
        or main.kind != "closed"
        or main.duration
        or not fixed
        or args.serve_flags
        or args.replicas
    ):
        raise SettingsError(
            "--compare-offline needs a server of its own and a closed loop of --requests with one length each, "
            "without --duration, --long-prompt-every, --replicas and --serve-flags"
        )


def _warm_up(args: argparse.Namespace, target: Target) -> None:
    """Some requests of the main flow's lengths, all at once."""
    lengths = [parse_lengths("", getattr(args, name)) for name in ("input_len", "output_len")]
    few = min(16, lengths[1].high)
    flow = Flow(MAIN, "closed", lengths[0], Lengths(few, few), args.warmup, args.warmup)
    (seen,) = run_load(target, [flow], processes=1, seed=f"{args.seed} warm-up", timeout=args.timeout)
    problems = {record.error for record in seen.records if record.error}
    if problems:
        say(f"warm-up: {len(problems)} kinds of errors, the first: {min(problems)}")


def _load(args: argparse.Namespace) -> dict[str, Any]:
    """The load as asked for, for the JSON line."""
    names = ["input_len", "output_len", "temperature", "seed", "warmup"]
    names += ["rate", "arrivals", "burstiness"] if args.rate is not None else ["concurrency"]
    names += ["requests"] if args.requests else []
    names += ["duration"] if args.duration else []
    if args.long_prompt_every:
        names += ["long_prompt_every", "long_prompt_len", "long_prompt_output_len"]
    return {name: getattr(args, name) for name in names}


def _describe(args: argparse.Namespace) -> str:
    rate = f"{args.rate:g} requests/s ({args.arrivals})" if args.rate is not None else f"{args.concurrency} clients"
    long = f", and {args.long_prompt_len} tokens every {args.long_prompt_every:g} s" if args.long_prompt_every else ""
    return f"{rate}, {args.input_len}/{args.output_len} tokens{long}"


# ---------------------------------------------------------------- the server


@contextlib.contextmanager
def _target(args: argparse.Namespace, main: Flow) -> Iterator[tuple[Target, OwnServer | None, dict[str, Any]]]:
    """The server that is measured, the process if it is ours, and what the JSON line says of it."""
    options = engine_options(args)
    if args.url:
        started = ("model", "shape", "precision", "tp_size", "pp_size", "replicas")
        for flag in (name.replace("_", "-") for name in started if getattr(args, name) is not None):
            raise SettingsError(f"--url is of a server that runs; --{flag} is for one that is started")
        yield _look_up(args.url, args.served_model, args.api_key), None, {"url": args.url}
        return
    _check_weights(args)
    shape = None if args.model else args.shape or DEFAULT_SHAPE
    work = Path(args.work or tempfile.mkdtemp(prefix="appliance-bench-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        cache = args.cache or (str(work / "cache") if shape else None)
        model, own = _model(args, work, cache)
        about: dict[str, Any] = {"shape": shape} if shape else {"model": model}
        about["precision"] = weights_of(args)[0]
        if args.compare_offline:
            about["offline"] = _offline(args, model, cache, main, own)
        flags = ["--max-num-seqs", str(options.max_num_seqs), "--attention", options.attention]
        flags += ["--max-num-batched-tokens", str(options.max_num_batched_tokens)]
        flags += ["--kv-cache-dtype", options.kv_cache_dtype, *own]
        flags += ["--backend", args.backend] if args.backend != "auto" else []
        flags += ["--max-waiting-requests", str(max(_WAITING, main.concurrency, len(main.arrivals)))]
        flags += ["--replicas", str(args.replicas)] if args.replicas else []
        flags += [*_switches(args), *shlex.split(args.serve_flags)]
        with OwnServer(model, cache, flags=flags, log=work / "server.log") as server:
            about["ready_seconds"] = round(server.until("/v1/health/ready", args.start_timeout), 2)
            server.until_replicas(args.start_timeout)
            about |= engine_facts(server.url, options, main)
            yield _look_up(server.url, None, None), server, about
    finally:
        if not args.work:
            shutil.rmtree(work, ignore_errors=True)


def _check_weights(args: argparse.Namespace) -> None:
    """SettingsError for what a server cannot be started with."""
    if args.weights not in ("device", "checkpoint"):
        raise SettingsError(f"--weights is {args.weights!r}; allowed: device, checkpoint")
    at_least(args, {"replicas": 1} if args.replicas is not None else {})
    _, scheme = weights_of(args)
    if scheme is not None and (args.model or args.weights == "checkpoint"):
        raise SettingsError(
            f"--precision is {scheme!r}; a server takes a precision", hint="choose a profile with --serve-flags"
        )
    if not args.model:
        shape_config(args.shape or DEFAULT_SHAPE)


def _model(args: argparse.Namespace, work: Path, cache: str | None) -> tuple[str, list[str]]:
    """What the server is to serve, and its flags that say how it is to be built, if it is."""
    if not args.model and args.weights == "device":
        from appliance.bench.random_engine import make_elsewhere

        where = cache_of(args) if args.cache else work / "cache"
        return str(make_elsewhere(random_engine_of(args), where)), []
    flags = ["--tp-size", str(args.tp_size)] if args.tp_size else []
    flags += ["--pp-size", str(args.pp_size)] if args.pp_size else []
    flags += ["--precision", args.precision] if args.precision else []
    return args.model or str(shape_checkpoint(args.shape or DEFAULT_SHAPE, work)), flags


def _switches(args: argparse.Namespace) -> list[str]:
    """Those of the engine that were given, which `serve` and `bench offline` have under the same names."""
    names = ("no_cuda_graphs", "no_persistent_decode", "batch_invariant", "no_tactics")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]


def _look_up(url: str, model: str | None, api_key: str | None) -> Target:
    """Name and vocabulary, as far as the server tells. UnavailableError if it does not answer."""
    target = Target(url.rstrip("/"), model, api_key, _UNKNOWN_VOCABULARY)
    host, port = target.address
    status, listed = get_json(f"http://{host}:{port}/v1/models", api_key)
    if status == 0:
        raise UnavailableError(f"nothing answers at {url}", hint="start the server, or leave out --url")
    names = [entry.get("id") for entry in listed.get("data", [])]
    config = get_json(f"http://{host}:{port}/v1/manifest", api_key)[1].get("model") or {}
    vocab_size = int(config.get("vocab_size", _UNKNOWN_VOCABULARY)) if isinstance(config, dict) else _UNKNOWN_VOCABULARY
    return Target(target.url, model or (names[0] if names else None), api_key, vocab_size)


# ---------------------------------------------------------------- without HTTP


def _offline(args: argparse.Namespace, model: str, cache: str | None, main: Flow, built: list[str]) -> dict[str, Any]:
    """`bench offline` of the same requests, in a process of its own so that the device is free afterwards. Its
    throughput row. ApplianceError if it fails."""
    running = min(main.concurrency, args.max_num_seqs)
    command = [sys.executable, "-m", "appliance.cli", "bench", "offline", "--model", model, "--batch-sizes="]
    command += ["--prefill", f"2x{main.input.low}"]  # also warms up
    command += ["--throughput", f"{main.requests}:{main.input.low}/{main.output.low}"]
    command += ["--max-num-seqs", str(running), "--max-num-batched-tokens", str(args.max_num_batched_tokens)]
    command += ["--backend", args.backend, "--attention", args.attention]
    command += ["--kv-cache-dtype", args.kv_cache_dtype, *built]
    command += [*_switches(args), *(["--cache", cache] if cache else [])]
    say("without HTTP:")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise ApplianceError(f"bench offline ended with exit code {done.returncode}", hint="its own messages are above")
    rows = json.loads(done.stdout.splitlines()[-1])["throughput"]
    if not rows:
        raise SettingsError("the model's context is too short for these requests", hint="lower --isl or --osl")
    row: dict[str, Any] = rows[0]
    return row


def _ratio(result: dict[str, Any]) -> float | None:
    """Output tokens/s through HTTP over those without."""
    without, through = result["offline"]["output_tokens_per_second"], result["output_tokens_per_second"]
    return round(through / without, 4) if without and through else None
