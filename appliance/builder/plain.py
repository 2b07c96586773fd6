"""The source of an engine whose checkpoint is plain and whose scheme needs no calibration: tensors are read ahead,
joined, cast, and rounded to nearest where the scheme rounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from appliance.builder.convert import join, quantize, source_bytes
from appliance.builder.job import Job
from appliance.engines.manifest import SelfCheck
from appliance.engines.meter import ByteMeter
from appliance.types import WeightSpec

_AHEAD = 2  # tensors read ahead


class PlainTensors:
    """A `StoredTensors` of a plain checkpoint."""

    exact = False

    def __init__(self, job: Job) -> None:
        """Raises CheckpointError for a tensor that is missing or of another shape."""
        self._job = job
        job.checkpoint.check(job.specs)

    def work(self, spec: WeightSpec) -> int:
        return source_bytes(self._job.checkpoint, spec)

    def tensors(self, meter: ByteMeter) -> Generator[tuple[WeightSpec, dict[str, Tensor]], None, None]:
        job = self._job
        reads = ThreadPoolExecutor(1, thread_name_prefix="read")
        try:
            for spec, (weight, *bias) in _read_ahead(reads, job):
                if spec.kind == "plain":
                    tensors = {spec.name: weight}
                else:
                    stored = quantize(job.scheme.of(spec.name), weight)
                    tensors = {f"{spec.name}.{suffix}": tensor for suffix, tensor in stored.items()}
                tensors |= {f"{spec.name}.bias": tensor for tensor in bias}
                yield spec, tensors
        finally:
            reads.shutdown(cancel_futures=True)

    def reference(self, spec: WeightSpec, device: torch.device) -> Tensor | None:
        return join(self._job.checkpoint, spec.sources, device, torch.float32)

    def checks(self) -> tuple[SelfCheck, ...]:
        return ()


def _read(job: Job, spec: WeightSpec) -> list[Tensor]:
    """The joined weight, then the joined bias if there is one."""
    groups = [spec.sources] + ([spec.bias_sources] if spec.bias_sources else [])
    tensors = [join(job.checkpoint, names, job.device, job.dtype) for names in groups]
    for name in (*spec.sources, *spec.bias_sources):
        job.checkpoint.release(name)
    return tensors


def _read_ahead(pool: ThreadPoolExecutor, job: Job) -> Iterator[tuple[WeightSpec, list[Tensor]]]:
    pending: deque[Future[list[Tensor]]] = deque()
    for i, spec in enumerate(job.specs):
        for ahead in job.specs[i + len(pending) : i + _AHEAD]:
            pending.append(pool.submit(_read, job, ahead))
        yield spec, pending.popleft().result()
