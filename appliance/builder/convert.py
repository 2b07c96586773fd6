"""An engine's tensors into the ranks' weight files: where they come from, in which order they are written, and a
thread that writes while the source goes on. Which part goes to which rank: `shards.py`.

A *source* gives the tensors as they are stored, spec by spec. Three kinds: a plain checkpoint, whose weights the scheme
rounds to nearest (`plain.py`); a plain checkpoint that is calibrated, layer by layer (`calibrate.py`); and a checkpoint
that somebody else quantized (`checkpoint/quantized/`). Holds a few tensors at a time, however large the model. Knows
nothing of architectures (the specs do) nor of number formats (the scheme does).
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from appliance.builder.phases import Phases
from appliance.builder.shards import shard
from appliance.checkpoint import Checkpoint, SafetensorsWriter
from appliance.engines.manifest import SelfCheck
from appliance.engines.meter import ByteMeter
from appliance.quantization.scheme import PrecisionScheme
from appliance.types import WeightSpec

_WAITING = 2  # specs waiting to be written
_QUANTIZE_AT_ONCE = 64 << 20  # weights; a scheme's float32 intermediates take some 12 bytes for each


class StoredTensors(Protocol):
    """A source. It is made before anything is written; making it checks what can be checked without long work, and
    raises CheckpointError, SettingsError or EngineBuildError."""

    # Whether `reference` is exactly what the stored tensors stand for, rounding of products apart.
    exact: bool

    def work(self, spec: WeightSpec) -> int:
        """What writing this spec counts in the progress of the build: bytes of the checkpoint behind it."""

    def tensors(self, meter: ByteMeter) -> Generator[tuple[WeightSpec, dict[str, Tensor]], None, None]:
        """Every spec of `Job.specs`, in that order, with its tensors by engine name, in the order in which
        `shards.plan_tensors` announces them. A source may keep a tensor only until the next one is asked for. With
        `meter.advance(0, detail)` it says what it is doing; `convert` counts the work. Closing the iterator ends its
        threads."""

    def reference(self, spec: WeightSpec, device: torch.device) -> Tensor | None:
        """float32 [out, in] on `device`: the weight that the stored product of a linear spec stands for; None if only a
        whole layer can be compared, as calibration moves scales from one weight to another."""

    def checks(self) -> tuple[SelfCheck, ...]:
        """What the source itself measured while it gave the tensors, for the manifest. One that failed ends the
        build."""


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
    announced = scheme.tensors(weight.shape[0], weight.shape[1], weight.dtype)
    stacked = {}
    for suffix, (shape, _) in announced.items():
        parts = [block[suffix] for block in blocks]
        # What does not belong to rows, such as an order of the inputs, is the same in every block.
        stacked[suffix] = torch.cat(parts) if sum(map(len, parts)) == shape[0] else parts[0]
    return stacked


def convert(
    source: StoredTensors, writers: Sequence[SafetensorsWriter], meter: ByteMeter, phases: Phases | None = None
) -> None:
    """Write all tensors of a source, each rank's part of them to its writer; `meter` counts the work behind what is
    written. A tensor is read and computed once, however many ranks there are."""
    phases = phases or Phases()

    def write(spec: WeightSpec, tensors: dict[str, Tensor]) -> None:
        begin = time.monotonic()
        for rank, writer in enumerate(writers):
            for name, tensor in shard(spec, tensors, rank, len(writers)).items():
                writer.write(name, tensor)
        meter.advance(source.work(spec), spec.name)
        phases.add("convert.write", time.monotonic() - begin)

    with (
        contextlib.closing(source.tensors(meter)) as given,
        ThreadPoolExecutor(1, thread_name_prefix="write") as writes,
    ):
        writing: deque[Future[None]] = deque()
        try:
            while True:
                with phases.phase("convert.source"):  # reading and computing, as far as it was not done ahead
                    spec, tensors = next(given, (None, {}))
                if spec is None:
                    break
                writing.append(writes.submit(write, spec, tensors))
                if len(writing) > _WAITING:
                    with phases.phase("convert.waiting for writes"):
                        writing.popleft().result()
            for job in writing:
                job.result()
        finally:
            writes.shutdown(cancel_futures=True)
