"""One rank of tests/test_persistent_decode.py: its share of models by the persistent kernel, beside the other ranks."""

from __future__ import annotations

import time
from typing import Any

import torch
from persistent_models import SHAPES, Step, check, exact, random_model, whole_logits
from torch import distributed

from appliance.distributed import GroupCollectives, TensorParallel
from appliance.kernels.all_reduce_group import connect
from appliance.kernels.fp8_linear import FP8
from appliance.kernels.persistent import exchange
from appliance.runtime.cuda_graphs import capture
from appliance.runtime.persistent_choice import choose
from appliance.settings import share_gpu

# Scheme, its parameters, shape, rows, lengths, cache. Inner sizes are such that four ranks have whole groups of 128.
CASES: list[tuple[str, dict[str, Any] | None, str, int, list[int], torch.dtype]] = [
    ("fp8", None, "wide-heads", 1, [300], torch.bfloat16),
    ("fp8", None, "biases", 4, [1, 33, 1000], FP8),
    ("none", None, "biases", 2, [64, 65], torch.bfloat16),
    ("none", None, "head-norms", 1, [7], torch.bfloat16),
    ("int4_awq", {"head": "bf16"}, "biases", 1, [300], torch.bfloat16),
    ("int4_awq", {"head": "fp8"}, "one-query-per-kv", 4, [1, 33, 1000], torch.bfloat16),
    ("fp8", None, "large", 2, [500, 3], torch.bfloat16),
]
_REPLAYS = 200


def run(rank: int, size: int, address: str) -> None:
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", rank % gpus)
    if gpus < size:
        share_gpu(rank)
    torch.cuda.set_device(device)
    distributed.init_process_group("nccl", init_method=address, rank=rank, world_size=size, device_id=device)
    group = GroupCollectives(size, device)
    group.own = connect(group.library(), rank, size, device)
    assert group.own is not None, "no peer access here"
    tp = TensorParallel(rank, size, group)
    for case in CASES:
        agrees(tp, *case)
    replays(tp, 20 if gpus < size else _REPLAYS)  # ranks that share a GPU take turns, some milliseconds each
    chosen(tp)
    lets_go(tp)
    distributed.destroy_process_group()


def rank_model(tp: TensorParallel, scheme: str, parameters: dict[str, Any] | None, name: str, **shape: Any) -> Any:
    """The whole model and a rank's share of it."""
    wanted = SHAPES[name] | ({} if "intermediate_size" in SHAPES[name] else {"intermediate_size": 1536}) | shape
    return random_model(scheme, parameters, **wanted), random_model(scheme, parameters, tp=tp, **wanted)


@torch.inference_mode()
def agrees(
    tp: TensorParallel,
    scheme: str,
    parameters: dict[str, Any] | None,
    name: str,
    rows: int,
    lengths: list[int],
    kv_dtype: torch.dtype,
) -> None:
    whole, model = rank_model(tp, scheme, parameters, name)
    truth = exact(Step(whole, lengths, kv_dtype), rows)
    step = Step(model, lengths, kv_dtype)
    shared = exchange.connect(tp, tp.rank, tp.size, model.config.hidden_size, [rows], truth.device)
    check(step, rows, shared, truth)
    decode = step.persistent(rows, shared)
    logits = whole_logits(step, decode)
    assert torch.equal(logits, whole_logits(step, decode)), "two steps are different"


@torch.inference_mode()
def replays(tp: TensorParallel, count: int) -> None:
    """The same bits from a graph, while ranks are late in turns."""
    _, model = rank_model(tp, "fp8", None, "wide-heads")
    step = Step(model, [2000, 3, 77])
    shared = exchange.connect(tp, tp.rank, tp.size, model.config.hidden_size, [4], step.caches[0].device)
    decode, inputs = step.persistent(4, shared), step.inputs(4)
    first = decode.logits(inputs).clone()
    graph, logits = capture(lambda: decode.logits(inputs))
    for turn in range(count):
        if turn % tp.size == tp.rank:
            torch.cuda._sleep(20_000)
        logits.zero_()
        graph.replay()
        if turn % 20 == 0:
            assert torch.equal(logits[:3], first[:3]), f"replay {turn}"
    torch.cuda.synchronize()
    assert torch.equal(logits[:3], first[:3])


@torch.inference_mode()
def chosen(tp: TensorParallel) -> None:
    """Ranks find different times and make the same choice."""
    _, model = rank_model(tp, "fp8", None, "wide-heads")
    step = Step(model, [20])
    # The last rank finds two rows slow, the others do not.
    times = {1: (10.0, 20.0), 2: (10.0 if tp.rank < tp.size - 1 else 30.0, 20.0)}
    found = choose(model, step.caches, step.runner._batch, (1, 2), lambda _, rows: times[rows])
    assert not isinstance(found, str) and found.sizes == [1]
    first = found.logits(step.inputs(1))
    assert torch.isfinite(first).all()


@torch.inference_mode()
def lets_go(tp: TensorParallel) -> None:
    """A kernel that waits for ranks that never come ends once the host says so, though it fills the GPU."""
    _, model = rank_model(tp, "fp8", None, "wide-heads")
    step = Step(model, [20])
    shared = exchange.connect(tp, tp.rank, tp.size, model.config.hidden_size, [1], step.caches[0].device)
    decode, inputs = step.persistent(1, shared), step.inputs(1)
    if tp.rank == 0:
        ended = torch.cuda.Event()
        decode.logits(inputs)
        ended.record()
        time.sleep(0.3)
        assert not ended.query(), "it did not wait for the others"
        shared.abort()
        limit = time.monotonic() + 20
        while not ended.query():
            assert time.monotonic() < limit, "it does not end"
            time.sleep(0.01)
    tp.minimum(0)
