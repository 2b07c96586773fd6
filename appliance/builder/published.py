"""The source of an engine whose checkpoint others quantized: weights are read as they are, and stored by the scheme
that holds them. Nothing is rounded; what they left alone is stored plain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from appliance.builder.convert import Tensors, join, source_bytes
from appliance.builder.job import Job
from appliance.builder.shards import joined_shape, plan_tensors
from appliance.checkpoint import Checkpoint
from appliance.checkpoint.quantized.source import QuantizedTensors
from appliance.engines.manifest import SelfCheck
from appliance.errors import EngineBuildError
from appliance.quantization.blocks import quantizing_bytes
from appliance.types import ModelConfig, WeightSpec


def check_tensors(checkpoint: Checkpoint, config: ModelConfig, specs: list[WeightSpec]) -> None:
    """What can be known of a checkpoint without reading its weights: their shapes and dtypes, and, of a quantized one,
    that its scales are numbers. Raises CheckpointError."""
    if config.quantization is None:
        checkpoint.check(specs)
        return
    tensors = QuantizedTensors(checkpoint, config.quantization)
    tensors.check(specs)
    tensors.kv_scales(config.num_hidden_layers)
    tensors.check_scales(specs)


def kv_scales_of(job: Job) -> tuple[tuple[float, float], ...]:
    """(K, V) scales of an FP8 KV cache per layer, if the checkpoint brings them; else empty."""
    if job.config.quantization is None:
        return ()
    return QuantizedTensors(job.checkpoint, job.config.quantization).kv_scales(job.config.num_hidden_layers) or ()


class PublishedTensors:
    """An `AnyOrder` source of a checkpoint that is quantized already."""

    exact = True

    def __init__(self, job: Job) -> None:
        """Raises CheckpointError for a tensor that is missing or of another shape or dtype, EngineBuildError if the
        scheme would store a layer otherwise than the checkpoint has it."""
        assert job.config.quantization is not None
        self._job = job
        self._quantized = QuantizedTensors(job.checkpoint, job.config.quantization)
        self._quantized.check(job.specs)
        for spec in job.specs:
            stored_plain = job.scheme.of(spec.name).facts["name"] == "none"
            if spec.kind == "linear" and stored_plain == self._quantized.holds(spec):
                raise EngineBuildError(
                    f"{spec.name} is {'quantized' if stored_plain else 'not quantized'} in the checkpoint, but the "
                    f"engine would store it {'plain' if stored_plain else 'quantized'}",
                    hint="build it without scheme parameters of your own",
                )

    def work(self, spec: WeightSpec) -> int:
        info = self._job.checkpoint.info
        if not self._quantized.holds(spec):
            return source_bytes(self._job.checkpoint, spec)
        return sum(info(name).nbytes for name in (*self._quantized.tensor_names(spec), *spec.bias_sources))

    @property
    def specs(self) -> Sequence[WeightSpec]:
        return self._job.specs

    def stored(self, spec: WeightSpec, device: torch.device) -> Tensors:
        job = self._job
        names: list[str] = [*spec.bias_sources]
        if self._quantized.holds(spec):
            weight = self._quantized.read(spec, device)
            with job.gpu_turn(device):
                stored = job.scheme.of(spec.name).store(weight)
            tensors = {f"{spec.name}.{suffix}": tensor for suffix, tensor in stored.items()}
            names += self._quantized.tensor_names(spec)
        else:
            plain = join(job.checkpoint, spec.sources, device, job.dtype)
            tensors = {spec.name if spec.kind == "plain" else f"{spec.name}.weight": plain}
            names += spec.sources
        if spec.bias_sources:
            tensors[f"{spec.name}.bias"] = join(job.checkpoint, spec.bias_sources, device, job.dtype)
        for name in names:
            job.checkpoint.release(name)
        return tensors

    def device_bytes(self, spec: WeightSpec) -> int:
        """The checkpoint's numbers, unpacked (layouts store several in one integer), and the engine's."""
        numel = math.prod(joined_shape(spec))
        stored = sum(tensor.nbytes for tensor in plan_tensors([spec], self._job.scheme, self._job.dtype))
        return 2 * self.work(spec) + 2 * stored + (quantizing_bytes(numel) + 4 * numel if spec.kind == "linear" else 0)

    def reference(self, spec: WeightSpec, device: torch.device) -> Tensor | None:
        if self._quantized.holds(spec):
            return self._quantized.read(spec, device).dequantize()
        return join(self._job.checkpoint, spec.sources, device, torch.float32)

    def checks(self) -> tuple[SelfCheck, ...]:
        return ()
