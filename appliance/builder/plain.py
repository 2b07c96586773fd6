"""The source of an engine whose checkpoint is plain and whose scheme needs no calibration: tensors are read, joined,
cast, and rounded to nearest where the scheme rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from appliance.builder.convert import Tensors, join, source_bytes
from appliance.builder.job import Job
from appliance.builder.shards import joined_shape, plan_tensors
from appliance.engines.manifest import SelfCheck
from appliance.quantization.blocks import quantize, quantizing_bytes
from appliance.types import WeightSpec


class PlainTensors:
    """An `AnyOrder` source of a plain checkpoint."""

    exact = False

    def __init__(self, job: Job) -> None:
        """Raises CheckpointError for a tensor that is missing or of another shape."""
        self._job = job
        job.checkpoint.check(job.specs)

    def work(self, spec: WeightSpec) -> int:
        return source_bytes(self._job.checkpoint, spec)

    @property
    def specs(self) -> Sequence[WeightSpec]:
        return self._job.specs

    def stored(self, spec: WeightSpec, device: torch.device) -> Tensors:
        job = self._job
        weight = self._read(spec.sources, device)
        with job.gpu_turn(device):
            if spec.kind == "plain":
                tensors = {spec.name: weight}
            else:
                stored = quantize(job.scheme.of(spec.name), weight)
                tensors = {f"{spec.name}.{suffix}": tensor for suffix, tensor in stored.items()}
        if spec.bias_sources:
            tensors[f"{spec.name}.bias"] = self._read(spec.bias_sources, device)
        return tensors

    def device_bytes(self, spec: WeightSpec) -> int:
        """Sources, joined and cast, and what quantizing takes; where ranks share it, a copy of a part of the result."""
        numel = math.prod(joined_shape(spec))
        stored = sum(tensor.nbytes for tensor in plan_tensors([spec], self._job.scheme, self._job.dtype))
        joined = self.work(spec) + numel * self._job.dtype.itemsize
        if spec.kind == "plain" or self._job.scheme.of(spec.name).facts["name"] == "none":
            return joined + stored
        return joined + 2 * stored + quantizing_bytes(numel)

    def _read(self, names: tuple[str, ...], device: torch.device) -> Tensor:
        whole = join(self._job.checkpoint, names, device, self._job.dtype)
        for name in names:
            self._job.checkpoint.release(name)
        return whole

    def reference(self, spec: WeightSpec, device: torch.device) -> Tensor | None:
        return join(self._job.checkpoint, spec.sources, device, torch.float32)

    def checks(self) -> tuple[SelfCheck, ...]:
        return ()
