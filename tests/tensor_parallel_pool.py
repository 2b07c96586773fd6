"""Ranks as processes that stay: each takes jobs, runs its share of a model over gloo, and gives its logits back. They
are a tensor-parallel group, or several, one behind the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from model_helpers import PagedRunner, PagedSequence, engine_tensors
from safetensors.torch import load_file
from torch import Tensor, distributed

from appliance import registry
from appliance.builder.shards import shard, stage_of
from appliance.checkpoint import read_model_config
from appliance.distributed import (
    GroupCollectives,
    NeighbourLinks,
    PipelineStage,
    TensorParallel,
)
from appliance.kernels import cpu_linear
from appliance.layers.decoder import Decoder
from appliance.meeting import Meeting, Rendezvous
from appliance.types import WeightSpec

PROMPTS = [[3, 14, 15, 92, 65, 35, 89], [7, 2, 81]]
FOLLOWING = [[5], [44]]


@dataclass(frozen=True)
class Job:
    checkpoint: Path
    size: int  # ranks that run it
    scheme: str
    parameters: Mapping[str, Any]
    dtype: str = "float32"  # of the arithmetic
    packed: bool = False  # products as the CPU backend computes them
    stages: int = 1  # of the pipeline that the ranks are
    stored: str = ""  # dtype of the engine that its numbers come from, if not that of the arithmetic
    mistaken: str = ""  # the layer, by a part of its name, of which each rank has the share of the next


def make_model(job: Job, tp: TensorParallel, stage: PipelineStage | None = None) -> Decoder:
    """A rank's share of the model, prepared, of what a builder would store."""
    stage = stage or PipelineStage()
    config = read_model_config(job.checkpoint)
    plugin = registry.load("models", registry.architectures()[config.architecture].name)
    scheme = registry.load("quantization", job.scheme).Scheme(job.parameters)
    specs: list[WeightSpec] = plugin.weight_specs(config)
    dtype = getattr(torch, job.dtype)
    with torch.device("meta"):
        model: Decoder = plugin.Model(config, scheme, dtype, tp, stage)
    checkpoint = load_file(job.checkpoint / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    for spec in specs:
        if stage_of(spec.name, config, stage.size) != stage.index:
            continue
        whole = dict(engine_tensors([spec], checkpoint, scheme, getattr(torch, job.stored or job.dtype)))
        rank = (tp.rank + 1) % tp.size if job.mistaken and job.mistaken in spec.name else tp.rank
        tensors |= {name: part.clone() for name, part in shard(spec, whole, rank, tp.size).items()}
    model.load(tensors.items(), "cpu")
    if job.packed:
        with cpu_linear.packed():
            model.prepare(config.max_position_embeddings)
    else:
        model.prepare(config.max_position_embeddings)
    return model


def run_job(job: Job, tp: TensorParallel, stage: PipelineStage | None = None) -> Tensor:
    """Logits [tokens, vocab] of two prompts, then of one more token each, on one rank; none of another stage than the
    last."""
    runner = PagedRunner(make_model(job, tp, stage))
    sequences = [PagedSequence() for _ in PROMPTS]
    logits = []
    with torch.inference_mode():
        for tokens in (PROMPTS, FOLLOWING):
            logits += runner.step(list(zip(sequences, tokens, strict=True)))
    return torch.cat(logits) if logits else torch.empty(0)


def _serve(rank: int, size: int, ports: Any, jobs: Any, results: Any) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    meeting = Meeting(Rendezvous(rank, size, master_port=0 if rank == 0 else ports.get(timeout=60)))
    if rank == 0:
        for _ in range(1, size):
            ports.put(meeting.port)
    meeting.join(device)
    groups = {members: distributed.new_group(list(members)) for members in ((0, 1), (2, 3), (0, 1, 2, 3))}
    while (job := jobs.get()) is not None:
        if rank < job.size:
            tp_size = job.size // job.stages
            index, number = divmod(rank, tp_size)
            group = groups.get(tuple(range(index * tp_size, (index + 1) * tp_size)))
            tp = TensorParallel(number, tp_size, GroupCollectives(tp_size, device, group))
            stage = PipelineStage(index, job.stages, NeighbourLinks(rank - tp_size, rank + tp_size))
            try:
                results.put(run_job(job, tp, stage).float().numpy())
            except Exception as error:
                results.put(repr(error))
                raise


class RankPool:
    """Four ranks; two of them serve jobs of two."""

    def __init__(self, size: int = 4) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._jobs = [context.Queue() for _ in range(size)]
        self._results = [context.Queue() for _ in range(size)]
        self._ports = context.Queue()  # kept: a queue is gone for others once its maker drops it
        self._processes = [
            context.Process(
                target=_serve, args=(rank, size, self._ports, jobs, results), name=f"rank-{rank}", daemon=True
            )
            for rank, (jobs, results) in enumerate(zip(self._jobs, self._results, strict=True))
        ]
        for process in self._processes:
            process.start()

    def run(self, job: Job) -> list[Tensor]:
        """Logits of each rank of the last stage."""
        for jobs in self._jobs:
            jobs.put(job)
        found = [results.get(timeout=60) for results in self._results[: job.size]]
        for result in found:
            assert not isinstance(result, str), result
        return [torch.from_numpy(result) for result in found[job.size - job.size // job.stages :]]

    def close(self) -> None:
        for jobs in self._jobs:
            jobs.put(None)
        for process in self._processes:
            process.join(5)
            process.kill()
