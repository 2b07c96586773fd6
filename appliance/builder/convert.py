"""Checkpoint tensors into one rank's weight file: read, join, cast, quantize, write, as a pipeline of three threads.

Holds a few tensors at a time, however large the model. Knows nothing of architectures (the specs do) nor of number
formats (the scheme does).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from appliance.checkpoint import Checkpoint, SafetensorsWriter, TensorPlan
from appliance.engines.meter import ByteMeter
from appliance.quantization.scheme import PrecisionScheme
from appliance.types import WeightSpec

_AHEAD = 2  # tensors read ahead, and tensors waiting to be written
_QUANTIZE_AT_ONCE = 64 << 20  # weights; a scheme's float32 intermediates take some 12 bytes for each


def joined_shape(spec: WeightSpec) -> tuple[int, ...]:
    """Shape of a spec's sources on top of each other."""
    return (sum(shape[0] for shape in spec.shapes), *spec.shapes[0][1:])


def plan_tensors(specs: Iterable[WeightSpec], scheme: PrecisionScheme, dtype: torch.dtype) -> list[TensorPlan]:
    """Every tensor of the weight file, in the order in which `convert` writes them."""
    plan: list[TensorPlan] = []

    def add(name: str, shape: tuple[int, ...], stored: torch.dtype) -> None:
        plan.append(TensorPlan(name, str(stored).removeprefix("torch."), tuple(shape)))

    for spec in specs:
        shape = joined_shape(spec)
        if spec.kind == "plain":
            add(spec.name, shape, dtype)
            continue
        for suffix, (stored_shape, stored_dtype) in scheme.tensors(shape[0], shape[1], dtype).items():
            add(f"{spec.name}.{suffix}", stored_shape, stored_dtype)
        if spec.bias_sources:
            add(f"{spec.name}.bias", shape[:1], dtype)
    return plan


def source_bytes(checkpoint: Checkpoint, spec: WeightSpec) -> int:
    return sum(checkpoint.info(name).nbytes for name in (*spec.sources, *spec.bias_sources))


def join(checkpoint: Checkpoint, names: Iterable[str], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sources on top of each other in `dtype` on `device`; a copy, so that the disk is read here."""
    parts = [checkpoint.read(name).to(device) for name in names]
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole.to(dtype, copy=len(parts) == 1 and device.type == "cpu")


def quantize(scheme: PrecisionScheme, weight: Tensor) -> dict[str, Tensor]:
    """`scheme.quantize` over blocks of rows, which are independent, to bound what it needs in between."""
    rows = max(1, _QUANTIZE_AT_ONCE // weight.shape[1])
    if weight.shape[0] <= rows:
        return scheme.quantize(weight)
    blocks = [scheme.quantize(block) for block in torch.split(weight, rows)]
    return {suffix: torch.cat([block[suffix] for block in blocks]) for suffix in blocks[0]}


def _read(checkpoint: Checkpoint, spec: WeightSpec, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The joined weight, then the joined bias if there is one."""
    groups = [spec.sources] + ([spec.bias_sources] if spec.bias_sources else [])
    tensors = [join(checkpoint, names, device, dtype) for names in groups]
    for name in (*spec.sources, *spec.bias_sources):
        checkpoint.release(name)
    return tensors


def _read_ahead(
    pool: ThreadPoolExecutor,
    checkpoint: Checkpoint,
    specs: list[WeightSpec],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[WeightSpec, list[Tensor]]]:
    pending: deque[Future[list[Tensor]]] = deque()
    for i, spec in enumerate(specs):
        for ahead in specs[i + len(pending) : i + _AHEAD]:
            pending.append(pool.submit(_read, checkpoint, ahead, device, dtype))
        yield spec, pending.popleft().result()


def convert(
    checkpoint: Checkpoint,
    specs: list[WeightSpec],
    scheme: PrecisionScheme,
    dtype: torch.dtype,
    device: torch.device,
    writer: SafetensorsWriter,
    meter: ByteMeter,
) -> None:
    """Write every tensor of `plan_tensors(specs, …)`; `meter` counts the source bytes behind what is written."""

    def write(spec: WeightSpec, tensors: list[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            writer.write(name, tensor)
        meter.advance(source_bytes(checkpoint, spec), spec.name)

    with (
        ThreadPoolExecutor(1, thread_name_prefix="read") as reads,
        ThreadPoolExecutor(1, thread_name_prefix="write") as writes,
    ):
        writing: deque[Future[None]] = deque()
        try:
            for spec, (weight, *bias) in _read_ahead(reads, checkpoint, specs, device, dtype):
                if spec.kind == "plain":
                    tensors = [(spec.name, weight)]
                else:
                    tensors = [(f"{spec.name}.{suffix}", t) for suffix, t in quantize(scheme, weight).items()]
                tensors += [(f"{spec.name}.bias", t) for t in bias]
                writing.append(writes.submit(write, spec, tensors))
                if len(writing) > _AHEAD:
                    writing.popleft().result()
            for job in writing:
                job.result()
        finally:
            reads.shutdown(cancel_futures=True)
            writes.shutdown(cancel_futures=True)
