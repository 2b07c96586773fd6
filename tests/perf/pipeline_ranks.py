"""Whether engines of pipeline stages give the tokens of one rank, and how long their steps take, in about a minute.

    python tests/perf/pipeline_ranks.py --sizes 1x2,2x2 --layers 16 --batch 64

A random checkpoint is built for one rank and for each TPxPP (on the CPU, with no trial, so that it is quick), and every
engine answers the same greedy requests in a process of its own: eagerly, and on GPUs with CUDA graphs. On a machine
with fewer GPUs than ranks they share them, which says nothing of speed. Printed for each: how many of the
requests begin with the same tokens as on one rank (rounding may turn a few), how far apart the log probabilities of the
first tokens' best are, and milliseconds in which every request gets one token. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

_SAME = 8  # tokens
_VOCABULARY = 2051


def answer(engine_dir: str, tp: int, pp: int, backend: str, graphs: bool, batch: int, tokens: int) -> dict[str, Any]:
    """Tokens of each request, log probabilities of the five best of their first ones, ms of a step."""
    from runtime_helpers import greedy, run_all

    from appliance import registry
    from appliance.batching.core import EngineCore
    from appliance.runtime.loading import PhaseTimer
    from appliance.runtime.ranks import lead
    from appliance.settings import share_gpu
    from appliance.types import EngineOptions

    devices: tuple[str, ...] = ()
    if backend == "cuda":
        import torch

        count = torch.cuda.device_count()
        if tp * pp > count:
            share_gpu(0)
        devices = tuple(str(rank % count) for rank in range(tp * pp))
    options = EngineOptions(
        engine_dir,
        backend,
        devices=devices,
        num_pages=4096,
        max_num_seqs=max(16, batch),
        max_num_batched_tokens=2048,
        max_model_len=512,
        cuda_graphs=graphs,
        persistent_decode=False,
    )
    member = lead(options)
    loader, timer = registry.load("backends", backend), PhaseTimer()
    loaded = loader.load(options, lambda *_: None, timer, member)
    executor, _ = loader.assemble(loaded, options, lambda *_: None, timer)
    while executor.prepare_more():
        pass
    prompts = [[(7 * i + 13 * j) % _VOCABULARY for j in range(5 + 40 * (i % 5))] for i in range(batch)]
    core = EngineCore(executor)
    first = run_all(core, [greedy(f"f{i}", prompt, 1, logprobs=5) for i, prompt in enumerate(prompts)])
    best = {name[1:]: [value for _, value in (given[0].logprobs or [])[0].top] for name, given in first.items()}
    begin, begun = 0.0, 0
    for i, prompt in enumerate(prompts):
        core.add_request(greedy(str(i), prompt, tokens))
    found: dict[str, list[int]] = {str(i): [] for i in range(batch)}
    while core.has_work:
        for output in core.step():
            found[output.request_id] += output.token_ids
        if not begun and all(found.values()):  # nothing but decodes from here on
            begin, begun = time.perf_counter(), sum(map(len, found.values()))
    seconds = time.perf_counter() - begin
    member.close()
    return {"tokens": found, "best": best, "ms": 1000 * seconds * batch / (sum(map(len, found.values())) - begun)}


def in_own_process(*args: Any) -> dict[str, Any]:
    """A process joins one group of ranks in its life."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(answer, *args).result()


def build_engine(source: Path, cache: Path, backend: str, precision: str, tp: int, pp: int) -> str:
    from calibrated_models import request_of

    from appliance.builder.build import build

    capability = None
    if backend == "cuda":
        import torch

        capability = torch.cuda.get_device_capability(0)
    wanted: dict[str, Any] = {"precision": precision, "backend": backend, "compute_capability": capability}
    sizes = {"tp_size": tp, "pp_size": pp}
    return str(build(request_of(source, cache, calibration_data="none", device="cpu", **wanted, **sizes)))


def compared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    same = sum(other["tokens"][name][:_SAME] == tokens[:_SAME] for name, tokens in one["tokens"].items())
    apart = max(abs(a - b) for name, values in one["best"].items() for a, b in zip(values, other["best"][name]))
    return {"same": same, "of": len(one["tokens"]), "apart": round(apart, 4), "ms": round(other["ms"], 3)}


def main() -> None:
    from calibrated_models import SHAPE, make_source
    from transformers import LlamaConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1x2", help="TPxPP, separated by commas")
    parser.add_argument("--backend", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    shape = {"vocab_size": _VOCABULARY, "hidden_size": args.hidden, "intermediate_size": 2 * args.hidden}
    shape |= {"num_hidden_layers": args.layers, "num_attention_heads": 16, "num_key_value_heads": 4}
    config = LlamaConfig(**SHAPE | shape | {"max_position_embeddings": 512})
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        source = make_source(Path(directory) / "m", config)
        run = (args.backend, args.batch, args.tokens)

        def answers(tp: int, pp: int, graphs: bool) -> dict[str, Any]:
            engine = build_engine(source, Path(directory) / "cache", args.backend, args.precision, tp, pp)
            return in_own_process(engine, tp, pp, run[0], graphs, *run[1:])

        one = answers(1, 1, False)
        for size in args.sizes.split(","):
            tp, pp = map(int, size.split("x"))
            for graphs in (False, True) if args.backend == "cuda" else (False,):
                name = f"TP{tp} PP{pp} {'graphs' if graphs else 'eager'}"
                results[name] = compared(one, answers(tp, pp, graphs))
                print(name, results[name], flush=True)
    print(json.dumps({"one_rank_ms": round(one["ms"], 3), **results}))


if __name__ == "__main__":
    main()
