"""What a build finds out while its weights are converted, since it needs none of them: kernels are compiled, products
are timed, every kind of step is taken once, by a model with made-up weights and few layers.

Compiling is work for the CPU and goes on beside everything. Timing waits until the steps were taken, and takes turns
with what conversion and checks compute on the GPU (`Job.gpu_turn`). Nothing of this is needed for an engine: what fails
here, or would not fit beside the conversion, is left to the trial (`warmup.py`).
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import msgspec
import torch

from appliance import registry
from appliance.batching.core import EngineCore
from appliance.builder.job import Job, for_gpu
from appliance.builder.made_up import describe_model, first_layers, make_up, parameter_bytes
from appliance.builder.tactics import Tuner, layers_timed
from appliance.builder.timings import Timings
from appliance.builder.warmup import Report, run_steps, trial_device, trial_options
from appliance.engines.manifest import TimedTactic
from appliance.hardware.host import host
from appliance.kernels.compiled import KERNELS
from appliance.kernels.fp8_linear import FP8
from appliance.layers.decoder import Decoder
from appliance.layers.linear import Linear
from appliance.runtime.loading import LoadedModel, PhaseTimer, kv_page_bytes
from appliance.runtime.timing import time_in_graph
from appliance.types import EngineOptions

log = logging.getLogger(__name__)

_STEP_LAYERS = 2  # of the model that takes the steps
_PAGE_BYTES = 2 << 30  # of its KV cache, at most
_PAGES_MULTIPLE = 256  # so that kernels that specialize on sizes see those of a large cache
_SHARE = 0.3  # of the GPU's free memory that made-up weights may take, beside the conversion


@dataclass(frozen=True)
class Found:
    """What is known when the weights are there."""

    tactics: tuple[TimedTactic, ...] | None = None  # None: products were not timed
    seconds: dict[str, float] = field(default_factory=dict)  # of the parts, some of which ran side by side


class Ahead:
    """A thread that prepares. `result` waits for it; `stop` lets it end early where nobody will ask."""

    def __init__(self, work: Callable[[_Stop], Found] | None, report: Report) -> None:
        self._stop = _Stop()
        self._report = report
        self._found = Found()
        self._thread: threading.Thread | None = None
        if work is not None:
            self._thread = threading.Thread(target=self._run, args=(work,), name="ahead", daemon=True)
            self._thread.start()

    def _run(self, work: Callable[[_Stop], Found]) -> None:
        try:
            self._found = work(self._stop)
        except Exception as error:
            log.info("not prepared beside the conversion, the trial does it: %s: %s", type(error).__name__, error)

    def result(self) -> Found:
        if self._thread is not None:
            if self._thread.is_alive():
                self._report("compiling kernels and timing products")
            self._thread.join()
        return self._found

    def stop(self) -> None:
        self._stop.set()


_Stop = threading.Event


def prepare_ahead(job: Job, staging: Path, report: Report, *, rehearse: bool) -> Ahead:
    """Start to prepare, on the GPU that the engine will be tried on. `rehearse`: the GPU has time for made-up weights,
    as it has not while it calibrates; else only what needs no model is compiled. `staging`: where the engine will be;
    its tokenizer is there."""
    device = trial_device(job.request) if for_gpu(job.inputs.backend) else ""
    if isinstance(device, str):
        return Ahead(None, report)
    backend = registry.load("backends", job.inputs.backend)
    options = trial_options(job.request, staging, [device])
    KERNELS.open()
    rehearsal = _Rehearsal(job, backend, options, device)
    return Ahead(rehearsal.run if rehearse else rehearsal.load_attention, report)


class _Rehearsal:
    """One thread takes the steps, one times, and some compile."""

    def __init__(self, job: Job, backend: ModuleType, options: EngineOptions, device: torch.device) -> None:
        self._job, self._backend, self._options, self._device = job, backend, options, device
        self._timer = PhaseTimer()
        self._ranks = job.inputs.tp_size * job.inputs.pp_size
        self._quiet = threading.Event()  # nothing but conversion and checks uses the GPU any more

    def load_attention(self, stop: threading.Event) -> Found:
        """FlashInfer's modules, which take longest to compile if they are nowhere."""
        with self._timer.phase("imports"):
            getattr(self._backend, "preload", lambda: None)()
        start = getattr(self._backend, "compile_ahead", None)
        if start is not None:
            with self._timer.phase("attention"):
                start(self._job.config, self._job.dtype, self._options, self._device, self._job.inputs.tp_size)
        return Found(seconds=self._timer.seconds)

    def run(self, stop: threading.Event) -> Found:
        with ThreadPoolExecutor(3, thread_name_prefix="ahead") as pool, ExitStack() as stack:
            stack.callback(self._quiet.set)  # whatever fails: nobody waits for it
            attention = pool.submit(self.load_attention, stop)
            with _on(self._device):
                with self._timer.phase("made-up weights"):
                    model = self._model()
                if model is None:
                    attention.result()
                    return Found(seconds=self._timer.seconds)
                timing = pool.submit(self._tune, model, stop) if self._job.request.tactics else None
                compiling = pool.submit(self._compile_persistent, model)
                attention.exception()
                if self._ranks == 1 and not stop.is_set():
                    with self._timer.phase("steps"):
                        self._take_steps(first_layers(model, min(_STEP_LAYERS, len(model.layers))))
            self._quiet.set()
            compiling.exception()
            return Found(None if timing is None else timing.result(), self._timer.seconds)

    def _model(self) -> Decoder | None:
        """As many layers as timing goes through; None if there is not enough memory for them."""
        inputs, config = self._job.inputs, self._job.config
        facts = (inputs.scheme, self._job.dtype, inputs.scheme_parameters, inputs.tp_size)
        one = describe_model(config, *facts, 1)
        linears = [module for module in one.modules() if isinstance(module, Linear)]
        wanted = max(layers_timed(linear.out_features * linear.in_features) for linear in linears)
        model = describe_model(config, *facts, min(wanted, config.num_hidden_layers))
        free = torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else host().free_memory
        pages = _PAGE_BYTES if self._ranks == 1 else 0
        if parameter_bytes(model) + pages > _SHARE * free:
            log.info("not rehearsed beside the conversion: too little memory of the GPU is free")
            return None
        make_up(model, self._device)
        _wait(self._device)
        return model

    def _take_steps(self, model: Decoder) -> None:
        """Every kind of step, so that all that they need is compiled."""
        options = msgspec.structs.replace(self._options, num_pages=self._pages(model), persistent_decode=False)
        loaded = LoadedModel(model, model.config, "rehearsal")
        try:
            executor, _ = self._backend.assemble(loaded, options, lambda *_: None, PhaseTimer())
            run_steps(EngineCore(executor), model.config)
            del executor
        except Exception as error:
            log.info("steps are not rehearsed, the trial takes them: %s: %s", type(error).__name__, error)
        gc.collect()
        _wait(self._device)

    def _pages(self, model: Decoder) -> int:
        """A KV cache that holds the longest context, if that is not too much."""
        page_size = self._options.page_size
        page = kv_page_bytes(model, page_size, model.dtype)
        return min(
            -(-model.config.max_position_embeddings // page_size) + 1,
            max(1, _PAGE_BYTES // page // _PAGES_MULTIPLE) * _PAGES_MULTIPLE,
        )

    def _compile_persistent(self, model: Decoder) -> None:
        """The decode kernels of the whole model, which know its number of layers."""
        from appliance.kernels.persistent.kernel import compile_all
        from appliance.runtime.persistent_decode import SIZES, refusal, shape_of

        with self._timer.phase("persistent decode"), _on(self._device):
            page = (1, 2, self._options.page_size, model.num_kv_heads, model.config.head_dim)
            dtype = FP8 if self._options.kv_cache_dtype == "fp8" else model.dtype
            cache = torch.empty(page, dtype=dtype, device=self._device)
            if refusal(model, [cache] * len(model.layers)) is None:
                layers = self._job.config.num_hidden_layers
                shapes = [replace(shape_of(model, cache, rows), layers=layers) for rows in SIZES]
                compile_all(shape for shape in shapes if shape.refused() is None)

    def _tune(self, model: Decoder, stop: threading.Event) -> tuple[TimedTactic, ...]:
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"
        turns = _Turns(self._job, self._device, self._quiet, stop)
        timings = Timings(Path(self._job.request.cache), name)
        with self._timer.phase("tactics"), _on(self._device):
            tuner = Tuner(model.dtype, self._device, timings, timer=turns, clock=turns.clock)
            found = tuner.tune(model)
            _wait(self._device)
        self._timer.seconds["compiling tactics"] = tuner.compile_seconds
        self._timer.seconds["tactics waiting for turns"] = turns.waited
        return tuple(found)


class _Turns:
    """Times while nobody else computes on the GPU. Its clock stands still while it waits, and is at its end once the
    build has stopped."""

    def __init__(self, job: Job, device: torch.device, quiet: threading.Event, stop: threading.Event) -> None:
        self._job, self._device, self._quiet, self._stop = job, device, quiet, stop
        self.waited = 0.0

    def __call__(self, calls: Sequence[Callable[[], object]], launches: int) -> float:
        begin = time.monotonic()
        self._quiet.wait()
        with self._job.gpu_turn(self._device):
            self.waited += time.monotonic() - begin
            return time_in_graph(calls, launches)

    def clock(self) -> float:
        return float("inf") if self._stop.is_set() else time.monotonic() - self.waited


def _on(device: torch.device) -> ExitStack:
    """A thread's work on a stream of its own, so that what others launch is not in what it times."""
    stack = ExitStack()
    if device.type == "cuda":
        stack.enter_context(torch.cuda.device(device))
        stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stack.enter_context(torch.cuda.stream(stream))
    return stack


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
