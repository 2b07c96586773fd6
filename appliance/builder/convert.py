"""An engine's tensors into the ranks' weight files: where they come from, and the threads that take them there. Which
part goes to which rank: `shards.py`.

A *source* gives the tensors as they are stored, spec by spec. Three kinds: a plain checkpoint, whose weights the scheme
rounds to nearest (`plain.py`); a checkpoint that somebody else quantized (`published.py`); both give any spec at any
time, so several threads, on one device or more, take one after the other, each from reading to writing. The third, a
plain checkpoint that is calibrated (`calibrate.py`), gives them in order. However large the model, memory holds a few
tensors: how many bytes is known beforehand (`memory.py`). Knows nothing of architectures (the specs do) nor of number
formats (the scheme does).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from appliance.builder.memory import READ_LANES, Memory, plan_memory, return_what_is_freed
from appliance.builder.phases import Phases
from appliance.builder.shards import shard
from appliance.checkpoint import Checkpoint, SafetensorsWriter
from appliance.engines.disk import gib
from appliance.engines.manifest import SelfCheck
from appliance.engines.meter import ByteMeter
from appliance.runtime.weights import read_tensors
from appliance.types import WeightSpec

log = logging.getLogger(__name__)

_WAITING = 2  # specs of a source in order that wait to be written
_LARGE = 256 << 20  # bytes of a source; those come first, so that no thread is left alone with one at the end

Tensors = dict[str, Tensor]


class StoredTensors(Protocol):
    """A source. It is made before anything is written; making it checks what can be checked without long work, and
    raises CheckpointError, SettingsError or EngineBuildError."""

    # Whether `reference` is exactly what the stored tensors stand for, rounding of products apart.
    exact: bool

    def work(self, spec: WeightSpec) -> int:
        """What writing this spec counts in the progress of the build: bytes of the checkpoint behind it."""

    def reference(self, spec: WeightSpec, device: torch.device) -> Tensor | None:
        """float32 [out, in] on `device`: the weight that the stored product of a linear spec stands for; None if only a
        whole layer can be compared, as calibration moves scales from one weight to another."""

    def checks(self) -> tuple[SelfCheck, ...]:
        """What the source itself measured while it gave the tensors, for the manifest. One that failed ends the
        build."""


@runtime_checkable
class AnyOrder(StoredTensors, Protocol):
    """A source whose specs do not depend on each other."""

    @property
    def specs(self) -> Sequence[WeightSpec]: ...

    def stored(self, spec: WeightSpec, device: torch.device) -> Tensors:
        """The stored tensors of a spec by engine name, computed on `device`, on the calling thread's stream. Called by
        several threads."""

    def device_bytes(self, spec: WeightSpec) -> int:
        """Memory of the device that `stored` takes, at most, its result included."""


class InOrder(StoredTensors, Protocol):
    """A source that gives one spec after the other."""

    def tensors(self, meter: ByteMeter) -> Generator[tuple[WeightSpec, Tensors], None, None]:
        """Every spec of `Job.specs`, in that order, with its tensors by engine name. It may keep a tensor only until
        the next one is asked for. With `meter.advance(0, detail)` it says what it is doing; `convert` counts the work.
        Closing the iterator ends its threads."""


def source_bytes(checkpoint: Checkpoint, spec: WeightSpec) -> int:
    return sum(checkpoint.info(name).nbytes for name in (*spec.sources, *spec.bias_sources))


def join(checkpoint: Checkpoint, names: Iterable[str], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sources on top of each other in `dtype` on `device`; a copy, so that the disk is read here."""
    names = list(names)
    if device.type == "cpu":
        parts = [checkpoint.read(name) for name in names]
    else:  # by way of page-locked memory, which is several times as fast as copying from the file's pages
        read = read_tensors([checkpoint.info(name) for name in names], device, lanes=READ_LANES)
        parts = [read.pop(name) for name in names]
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole.to(dtype, copy=len(parts) == 1 and device.type == "cpu")


def convert(
    source: AnyOrder | InOrder,
    writers: Sequence[SafetensorsWriter],
    meter: ByteMeter,
    phases: Phases | None = None,
    devices: Sequence[torch.device] = (torch.device("cpu"),),
) -> None:
    """Write all tensors of a source, each rank's part of them to its writer; `meter` counts the work behind what is
    written. A tensor is read and computed once, however many ranks there are. `devices`: where the tensors of a source
    in any order are computed, all at once."""
    target = _Target(source, writers, meter, phases or Phases())
    if isinstance(source, AnyOrder):
        _convert_apart(source, target, devices)
    else:
        _convert_in_order(source, target, meter)


class _Target:
    """The ranks' files, and who is told of what went there. For any thread."""

    def __init__(
        self, source: StoredTensors, writers: Sequence[SafetensorsWriter], meter: ByteMeter, phases: Phases
    ) -> None:
        self.phases = phases
        self._source, self._writers, self._meter = source, writers, meter

    def write(self, spec: WeightSpec, tensors: Tensors) -> None:
        with self.phases.phase("convert.write"):
            holders = [writer for writer in self._writers if writer.names >= tensors.keys()]  # those of a stage
            for rank, writer in enumerate(holders):
                for name, tensor in shard(spec, tensors, rank, len(holders)).items():
                    writer.write(name, tensor)
        self._meter.advance(self._source.work(spec), spec.name)


def _convert_in_order(source: InOrder, target: _Target, meter: ByteMeter) -> None:
    with (
        contextlib.closing(source.tensors(meter)) as given,
        ThreadPoolExecutor(1, thread_name_prefix="write") as writes,
    ):
        writing: deque[Future[None]] = deque()
        try:
            for spec, tensors in given:
                writing.append(writes.submit(_in_inference_mode, target, spec, tensors))
                if len(writing) > _WAITING:
                    writing.popleft().result()
            for job in writing:
                job.result()
        finally:
            writes.shutdown(cancel_futures=True)


def _in_inference_mode(target: _Target, spec: WeightSpec, tensors: Tensors) -> None:
    with torch.inference_mode():
        target.write(spec, tensors)


def _convert_apart(source: AnyOrder, target: _Target, devices: Sequence[torch.device]) -> None:
    """Threads on every device, each of which takes a spec from reading to writing, then the next that is left."""
    needed = [source.device_bytes(spec) for spec in source.specs]
    memory = plan_memory(devices, max(needed, default=0))
    log.info(
        "converting with %d threads on %s; at most %s of host memory",
        sum(part.threads for part in memory),
        ", ".join(str(part.device) for part in memory),
        gib(sum(part.host_bytes for part in memory)),
    )
    if any(part.device.type == "cpu" for part in memory):
        return_what_is_freed()
    queue = _Queue(sorted(source.specs, key=lambda spec: source.work(spec) < _LARGE))

    def work(part: Memory) -> None:
        with _on(part.device):
            for spec in queue:
                with part.hold(source.device_bytes(spec)):
                    begin = time.monotonic()
                    tensors = source.stored(spec, part.device)
                    target.phases.add("convert.make", time.monotonic() - begin)
                    target.write(spec, tensors)
                    del tensors

    count = sum(part.threads for part in memory)
    with ThreadPoolExecutor(count, thread_name_prefix="convert") as pool:
        jobs = [pool.submit(work, part) for part in memory for _ in range(part.threads)]
        try:
            wait(jobs, return_when=FIRST_EXCEPTION)
        finally:
            queue.stop()
    for job in jobs:
        job.result()


class _Queue:
    """Specs for whichever thread comes next, until they are all gone or somebody stops it."""

    def __init__(self, specs: Sequence[WeightSpec]) -> None:
        self._specs = deque(specs)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[WeightSpec]:
        while True:
            with self._lock:
                if not self._specs:
                    return
                spec = self._specs.popleft()
            yield spec

    def stop(self) -> None:
        with self._lock:
            self._specs.clear()


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """A thread's work for a device: without gradients, and on a GPU on a stream of its own."""
    with torch.inference_mode():
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            stream: torch.cuda.Stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                yield
