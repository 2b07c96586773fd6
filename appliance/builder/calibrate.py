"""Calibration: a plain checkpoint's tensors, quantized with the inputs of its products in view, block by block.

For each decoder block: read its weights, run the calibration tokens through it with the appliance's own layers while
statistics of the inputs of its four products are gathered, let the scheme's algorithm quantize it, store the result,
and run the quantized block (its weights dequantized) to get the inputs of the next. So a block is calibrated for the
inputs that the quantized blocks in front of it give, which is the field's usual choice (GPTQ, section 4 of Frantar et
al., 2022). Weights in memory are those of the block at hand and of the next one, which is read meanwhile.

Knows models only through `calibration_blocks.py`, and algorithms only through `PrecisionScheme.calibrate`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from appliance.builder.calibration_blocks import (
    EMBEDDING,
    BlockRunner,
    Tensors,
    block_index,
    block_weights,
    blocks_of,
    compute_dtype,
    read_block,
)
from appliance.builder.calibration_data import CalibrationTokens
from appliance.builder.calibration_store import BlockReport, CalibrationStore
from appliance.builder.convert import join, source_bytes
from appliance.builder.job import Job
from appliance.builder.shards import joined_shape, plan_tensors
from appliance.engines.disk import gib, tree_bytes
from appliance.engines.key import engine_key
from appliance.engines.manifest import CalibrationSummary, SelfCheck
from appliance.engines.meter import ByteMeter, ProgressFn
from appliance.errors import EngineBuildError, SettingsError
from appliance.hardware.host import host
from appliance.quantization.blocks import quantize
from appliance.quantization.calibration.block import NORMS, PRODUCTS, QuantizedBlock
from appliance.quantization.calibration.statistics import BlockStatistics
from appliance.types import WeightSpec

log = logging.getLogger(__name__)

_LARGEST_ERROR = 0.5  # of a product's norm; beyond it the weights stand for something else
_EMBEDDED_AT_ONCE = 1 << 14  # tokens
_ROOM = 8  # blocks of weights that must fit beside the hidden states on a GPU, else those stay in host memory


class CalibratedTensors:
    """A source of an engine's tensors (`convert.StoredTensors`)."""

    exact = False

    def __init__(
        self, job: Job, tokens: CalibrationTokens, directory: Path, progress: ProgressFn | None = None
    ) -> None:
        """`directory`: where finished blocks are kept until the engine is there; what is there of the same engine is
        checked, which `progress` is told of, and gone on with. Raises CheckpointError for a tensor that is missing or
        of another shape, EngineBuildError for a model or parameters that cannot be calibrated, SettingsError for more
        text than there is memory for."""
        job.checkpoint.check(job.specs)
        self._job = job
        self._tokens = tokens
        self._blocks = blocks_of(job.specs, job.config)
        _require_one_scheme(job, self._blocks)
        shape = (tokens.num_tokens, job.config.hidden_size)
        dtype = compute_dtype(job.dtype, job.device)
        _require_memory(shape, dtype, job, self._blocks[0])
        self._store = CalibrationStore(directory, engine_key(job.inputs), shape, dtype, progress)
        self._resumed = self._store.done
        plan = plan_tensors([spec for block in self._blocks for spec in block], job.scheme, job.dtype)
        # Bytes that are yet to be written beside the engine: finished blocks, and hidden states twice for a moment.
        scratch = sum(tensor.nbytes for tensor in plan) + 2 * shape[0] * shape[1] * dtype.itemsize
        self.scratch_bytes = max(0, scratch - tree_bytes(directory))

    def work(self, spec: WeightSpec) -> int:
        """Bytes of the checkpoint behind a spec that is yet to be calibrated; all else costs next to no time, and
        would make the first blocks look quick."""
        index = block_index(spec.name)
        return source_bytes(self._job.checkpoint, spec) if index is not None and index >= self._resumed else 0

    def tensors(self, meter: ByteMeter) -> Generator[tuple[WeightSpec, Tensors], None, None]:
        reads = ThreadPoolExecutor(1, thread_name_prefix="read")
        try:
            with self._store:
                work = _Work(self._job, self._tokens, self._blocks, self._store, reads, meter)
                at, stored = -1, Tensors()
                for spec in self._job.specs:
                    index = block_index(spec.name)
                    if index is None:
                        yield spec, self._outside(spec)
                        continue
                    if index != at:
                        at, stored = index, self._store.tensors(index) if index < self._resumed else work.block(index)
                    plan = plan_tensors([spec], self._job.scheme, self._job.dtype)
                    yield spec, {tensor.name: stored[tensor.name] for tensor in plan}
                self._store.wait()
                work.finish()
        finally:
            reads.shutdown(cancel_futures=True)

    def _outside(self, spec: WeightSpec) -> Tensors:
        """Embedding, last norm and head: as without calibration."""
        job = self._job
        weight = join(job.checkpoint, spec.sources, job.device, job.dtype)
        if spec.kind == "plain":
            return {spec.name: weight}
        stored = quantize(job.scheme.of(spec.name), weight)
        tensors = {f"{spec.name}.{suffix}": tensor for suffix, tensor in stored.items()}
        if spec.bias_sources:
            tensors[f"{spec.name}.bias"] = join(job.checkpoint, spec.bias_sources, job.device, job.dtype)
        return tensors

    def reference(self, spec: WeightSpec, device: torch.device) -> Tensor | None:
        """Of products outside of the blocks; within, scales have moved from norms and products to others."""
        if block_index(spec.name) is not None:
            return None
        return join(self._job.checkpoint, spec.sources, device, torch.float32)

    def checks(self) -> tuple[SelfCheck, ...]:
        """For each of the four products, the block where its error over the calibration text is largest."""
        found = []
        for key, name in PRODUCTS.items():
            worst = max(self._store.reports, key=lambda report: (math.isnan(report.result[key]), report.result[key]))
            found.append(
                SelfCheck(
                    name=f"{worst.name}.{name} over the calibration text, of all blocks",
                    passed=worst.result[key] <= _LARGEST_ERROR,  # False for NaN
                    value=worst.result[key],
                    limit=_LARGEST_ERROR,
                )
            )
        return tuple(found)

    def summary(self) -> CalibrationSummary:
        """For engine.json, once all tensors were given."""
        reports, source = self._store.reports, self._tokens.source
        return CalibrationSummary(
            data=source.name,
            digest=source.digest,
            samples=len(self._tokens.rows),
            tokens=self._tokens.num_tokens,
            seconds=round(sum(report.seconds for report in reports), 3),
            resumed_blocks=self._resumed,
            nearest_error={key: _mean([report.nearest[key] for report in reports]) for key in PRODUCTS},
            error={key: _mean([report.result[key] for report in reports]) for key in PRODUCTS},
            choices={report.name: "; ".join(f"{k}: {v}" for k, v in report.choices.items()) for report in reports},
        )


class _Work:
    """The blocks one after the other, and the hidden states that go from one to the next."""

    def __init__(
        self,
        job: Job,
        tokens: CalibrationTokens,
        blocks: Sequence[list[WeightSpec]],
        store: CalibrationStore,
        reads: ThreadPoolExecutor,
        meter: ByteMeter,
    ) -> None:
        self._job, self._tokens, self._blocks = job, tokens, blocks
        self._store, self._reads, self._meter = store, reads, meter
        self._ahead: dict[int, Future[Tensors]] = {}  # the next block's weights, in host memory
        self._runner: BlockRunner | None = None
        self._hidden = torch.empty(0)  # [tokens, hidden], in the dtype that the runner computes in
        self._steps = StepTimer(job.device)

    def block(self, index: int) -> Tensors:
        """The stored tensors of block `index`, by their names in the engine, in host memory. Called for each block in
        turn; those before it are in the store."""
        job, started, name = self._job, time.monotonic(), f"layers.{index}"
        self._say(index, "reading its weights")
        tensors = {key: tensor.to(job.device) for key, tensor in self._read(index).items()}
        if self._runner is None:
            self._runner = self._begin(index)
        runner = self._runner
        weights = block_weights(name, tensors, job.config)
        statistics = BlockStatistics(weights, hessian=job.scheme.needs_hessian)
        self._say(index, "measuring the inputs of its products")
        runner.observe(runner.block(index, tensors), self._hidden, statistics)
        self._say(index, f"quantizing with {job.scheme.facts['name']}")
        found = job.scheme.calibrate(weights, statistics)
        others = {key: tensor for key, tensor in tensors.items() if _is_other(key)}
        del weights, tensors, statistics  # the quantized block takes the place of the original
        stored = {f"{name}.{key}": tensor.cpu() for key, tensor in (others | _stored(job, found)).items()}
        self._say(index, "keeping the block before it")
        self._store.wait()  # the hidden states may still be written
        self._say(index, "running it quantized")
        runner.advance(runner.block(index, others | _take_dequantized(found, runner.dtype)), self._hidden)
        self._steps.end()
        report = _report(name, time.monotonic() - started, found)
        log.info("calibration: block %d of %d, %s", index + 1, len(self._blocks), describe(report))
        self._store.save(stored, self._hidden, report)
        return stored

    def finish(self) -> None:
        """After the last block: what took how long."""
        if self._steps.seconds:
            log.info("calibration: %s", self._steps)

    def _read(self, index: int) -> Tensors:
        """This block's weights, in host memory; the next one's are read from now on."""
        ahead = self._ahead.pop(index, None)
        tensors = (
            read_block(self._job.checkpoint, self._blocks[index], self._job.dtype) if ahead is None else ahead.result()
        )
        if index + 1 < len(self._blocks):
            self._ahead[index + 1] = self._reads.submit(
                read_block, self._job.checkpoint, self._blocks[index + 1], self._job.dtype
            )
        return tensors

    def _begin(self, index: int) -> BlockRunner:
        """The runner, and the hidden states in front of block `index`."""
        job = self._job
        rows = self._tokens.rows
        runner = BlockRunner(job.architecture, job.config, [len(row) for row in rows], job.dtype, job.device)
        shape = (self._tokens.num_tokens, job.config.hidden_size)
        device = _home(shape, runner.dtype, job, self._blocks[index])
        self._hidden = torch.empty(shape, dtype=runner.dtype, device=device)
        if index == 0:
            self._embed()
        else:
            self._store.load_hidden(self._hidden)
        log.info(
            "calibration: %d prompts of %s, %d tokens, on %s in %s%s",
            len(rows),
            self._tokens.source.name,
            self._tokens.num_tokens,
            job.device,
            str(runner.dtype).removeprefix("torch."),
            f"; goes on at block {index + 1} of {len(self._blocks)}" if index else "",
        )
        return runner

    def _embed(self) -> None:
        """Only the rows that occur are read of the checkpoint."""
        (spec,) = [spec for spec in self._job.specs if spec.name == EMBEDDING]
        (source,) = spec.sources
        table = self._job.checkpoint.read(source)
        ids = torch.tensor([token for row in self._tokens.rows for token in row])
        for at in range(0, len(ids), _EMBEDDED_AT_ONCE):
            part = table[ids[at : at + _EMBEDDED_AT_ONCE]]
            self._hidden[at : at + len(part)] = part.to(self._job.dtype)
        self._job.checkpoint.release(source)

    def _say(self, index: int, what: str) -> None:
        self._steps.begin(what.partition(" ")[0])
        self._meter.advance(0, f"calibrating block {index + 1} of {len(self._blocks)}: {what}")


def _require_one_scheme(job: Job, blocks: Sequence[list[WeightSpec]]) -> None:
    for spec in (spec for block in blocks for spec in block if spec.kind == "linear"):
        if job.scheme.of(spec.name) is not job.scheme:
            raise EngineBuildError(
                f"{spec.name} is to stay unquantized, but calibration quantizes all products of a block",
                hint="leave it out of the scheme's parameters, or build with --calibration-data none",
            )


def _require_memory(shape: tuple[int, int], dtype: torch.dtype, job: Job, block: Sequence[WeightSpec]) -> None:
    hidden = shape[0] * shape[1] * dtype.itemsize
    weights = 2 * sum(math.prod(joined_shape(spec)) for spec in block) * dtype.itemsize
    free = host().free_memory
    if _home(shape, dtype, job, block).type == "cpu" and hidden + weights > free:
        raise SettingsError(
            f"calibrating with {shape[0]} tokens needs {gib(hidden)} of memory for their hidden states and "
            f"{gib(weights)} for two blocks of weights; {gib(free)} are free",
            hint="lower --calibration-samples or --calibration-length",
        )


def _is_other(name: str) -> bool:
    """Whether a block's tensor is none that calibration gives back: norms of heads."""
    module, _, kind = name.rpartition(".")
    return name not in NORMS.values() and not (module in PRODUCTS.values() and kind in ("weight", "bias"))


def _stored(job: Job, found: QuantizedBlock) -> Tensors:
    """By name below the block."""
    tensors = {NORMS[key]: norm for key, norm in found.norms.items()}
    for key, weight in found.weights.items():
        tensors |= {f"{PRODUCTS[key]}.{suffix}": tensor for suffix, tensor in job.scheme.store(weight).items()}
    return tensors | {f"{PRODUCTS[key]}.bias": bias for key, bias in found.biases.items()}


def _take_dequantized(found: QuantizedBlock, dtype: torch.dtype) -> Tensors:
    """The block as the original had it, by name below the block. Empties `found.weights` on the way, so that there is
    not a further block in memory."""
    tensors = {NORMS[key]: norm for key, norm in found.norms.items()}
    tensors |= {f"{PRODUCTS[key]}.bias": bias for key, bias in found.biases.items()}
    for key in PRODUCTS:
        tensors[f"{PRODUCTS[key]}.weight"] = found.weights.pop(key).dequantize().to(dtype)
    return tensors


def _home(shape: tuple[int, int], dtype: torch.dtype, job: Job, block: Sequence[WeightSpec]) -> torch.device:
    """Where the hidden states of all tokens live: on the GPU where there is room for them."""
    if job.device.type != "cuda":
        return torch.device("cpu")
    needed = shape[0] * shape[1] * dtype.itemsize + _ROOM * sum(source_bytes(job.checkpoint, spec) for spec in block)
    free = torch.cuda.mem_get_info(job.device)[0]
    return job.device if free > needed else torch.device("cpu")


def _report(name: str, seconds: float, found: QuantizedBlock) -> BlockReport:
    return BlockReport(
        name=name,
        seconds=round(seconds, 3),
        nearest={key: error.nearest for key, error in found.errors.items()},
        result={key: error.result for key, error in found.errors.items()},
        choices=dict(found.choices),
    )


def describe(report: BlockReport) -> str:
    """One line: errors of the products rounded to nearest -> as stored, and what was chosen."""
    parts = [
        f"{key} {report.nearest[key]:.2%} -> {report.result[key]:.2%} ({report.choices.get(key, '-')})"
        for key in PRODUCTS
    ]
    return f"{report.name}, in {report.seconds:.1f} s; errors, nearest -> calibrated: {', '.join(parts)}"


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6) if values else 0.0


class StepTimer:
    """Seconds of steps by name, each of which ends when the next begins. Waits for the GPU at every end."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._name, self._since = "", 0.0

    def begin(self, name: str) -> None:
        self.end()
        self._name, self._since = name, time.monotonic()

    def end(self) -> None:
        if self._name:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            taken = time.monotonic() - self._since
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + taken
            self._name = ""

    def __str__(self) -> str:
        parts = [f"{name} {seconds:.1f}" for name, seconds in self.seconds.items()]
        return f"{sum(self.seconds.values()):.1f} s: {', '.join(parts)}"
