"""Runs a finished engine once, with the code that will serve it, on the GPU that it is for, before it is published.

Times the ways to compute each product, then takes every kind of step that a server takes, and puts the kernels that
these needed into the engine, so that a start compiles nothing. An engine is right without any of this, so what goes
wrong here is a note in its manifest and not a failed build. Knows engines and requests; knows no kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

from appliance import registry
from appliance.batching.core import EngineCore
from appliance.builder.request import BuildRequest
from appliance.builder.tactics import Tuner
from appliance.builder.timings import Timings
from appliance.engines import disk
from appliance.engines.manifest import TimedTactic
from appliance.kernels.compiled import DIRECTORY, KERNELS
from appliance.kernels.tactics import TABLE
from appliance.meeting import leave
from appliance.runtime.loading import LoadedModel, PhaseTimer
from appliance.runtime.ranks import Alone, Member, lead
from appliance.settings import gpus_shared
from appliance.types import EngineOptions, EngineRequest, ModelConfig, SamplingParams

log = logging.getLogger(__name__)

Report = Callable[[str], None]  # what is being done

# Prompt lengths of the steps: one token, less and more than a page, and sizes that kernels specialize on (divisible by
# 16 or not).
_LENGTHS = (1, 5, 16, 33, 250)


@dataclass(frozen=True)
class WarmedUp:
    """What a warm-up adds to the manifest."""

    gpu: str = ""
    kernels: dict[str, str] = field(default_factory=dict)
    tactics: tuple[TimedTactic, ...] = ()
    note: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # of its parts


def warm_up(
    engine_dir: Path, request: BuildRequest, report: Report, tactics: tuple[TimedTactic, ...] | None = None
) -> WarmedUp:
    """Time tactics and fill engine_dir/kernels; the engine's weights and a manifest must be there already. `tactics`:
    those that were timed before, which the manifest has.

    Raises OSError where the disk is full; anything else that fails is a note."""
    if not _for_gpu(request):
        return WarmedUp()
    devices = _devices(request)
    if isinstance(devices, str):
        return WarmedUp(note=f"kernels are compiled at the first start: {devices}")
    backend = registry.load("backends", request.backend)
    try:
        return _warm_up(engine_dir, request, backend, devices, report, tactics)
    except Exception as error:
        if disk.is_full(error):
            raise
        log.warning("the engine is built, but its kernels could not be tried", exc_info=True)
        disk.remove_tree(engine_dir / DIRECTORY)
        return WarmedUp(note=f"kernels are compiled at the first start: {type(error).__name__}: {error}"[:300])
    finally:
        TABLE.clear()
        leave()


def _for_gpu(request: BuildRequest) -> bool:
    return registry.plugins("backends")[request.backend].facts.get("device") == "gpu"


def trial_options(request: BuildRequest, engine_dir: Path, devices: Sequence[torch.device]) -> EngineOptions:
    return EngineOptions(
        engine_dir=str(engine_dir),
        backend=request.backend,
        devices=tuple(str(device.index) for device in devices),
        max_num_seqs=request.max_num_seqs,
        max_num_batched_tokens=request.max_num_batched_tokens,
        kv_cache_dtype=request.kv_cache_dtype,
        attention=request.attention,
    )


def trial_device(request: BuildRequest) -> torch.device | str:
    """The GPU to try the engine on; why there is none."""
    if request.device == "cpu":
        return "it was built on the CPU"
    if not torch.cuda.is_available():
        return "it was built on a machine without a GPU"
    wanted = request.compute_capability
    indices = range(torch.cuda.device_count())
    if request.device != "auto":
        indices = range(torch.device(request.device).index or 0, (torch.device(request.device).index or 0) + 1)
    for index in indices:
        if wanted is None or torch.cuda.get_device_capability(index) == tuple(wanted):
            return torch.device("cuda", index)
    return f"no GPU here has compute capability {'.'.join(map(str, wanted or ()))}"


def _devices(request: BuildRequest) -> list[torch.device] | str:
    """A GPU for each rank, the one to try an engine of one rank on first; why there are not as many."""
    first = trial_device(request)
    if isinstance(first, str):
        return first
    size = request.tp_size * request.pp_size
    if size == 1:
        return [first]
    capability = torch.cuda.get_device_capability(first)
    alike = [
        torch.device("cuda", index)
        for index in range(torch.cuda.device_count())
        if torch.cuda.get_device_capability(index) == capability and index != first.index
    ]
    found = [first, *alike][:size]
    if gpus_shared():
        found = [found[i % len(found)] for i in range(size)]
    if len(found) < size:
        return f"the engine is for {size} GPUs, and here are {len(found)} of that compute capability"
    return found


def _warm_up(
    engine_dir: Path,
    request: BuildRequest,
    backend: ModuleType,
    devices: Sequence[torch.device],
    report: Report,
    tactics: tuple[TimedTactic, ...] | None,
) -> WarmedUp:
    """Of several ranks, products are timed on the first, while the others wait for it."""
    options = trial_options(request, engine_dir, devices)
    device, timer = devices[0], PhaseTimer()
    member: Member = lead(options) if request.tp_size * request.pp_size > 1 else Alone()
    try:
        return _try(engine_dir, request, backend, options, member, device, timer, report, tactics)
    finally:
        member.close()


def _try(
    engine_dir: Path,
    request: BuildRequest,
    backend: ModuleType,
    options: EngineOptions,
    member: Member,
    device: torch.device,
    timer: PhaseTimer,
    report: Report,
    timed: tuple[TimedTactic, ...] | None,
) -> WarmedUp:

    def progress(phase: str, detail: str, percent: float) -> None:
        report(f"trying the engine: {detail}")

    loaded: LoadedModel = backend.load(options, progress, timer, member)
    loaded.model.prepare(loaded.config.max_position_embeddings)
    gpu = torch.cuda.get_device_name(device)
    tactics: list[TimedTactic] = [*loaded.reductions, *(timed or ())]
    if request.tactics and timed is None:
        with timer.phase("tactics"):
            tuner = Tuner(loaded.model.dtype, device, Timings(Path(request.cache), gpu))
            tactics += tuner.tune(loaded.model, report)
        timer.seconds["compiling tactics"] = tuner.compile_seconds
        log.info("tactics: %d timed in %.1f s", tuner.measured, timer.seconds["tactics"])
    KERNELS.forget_launched()
    executor, _ = backend.assemble(loaded, options, progress, timer)
    with timer.phase("other_graphs"):
        while executor.prepare_more():
            pass
    with timer.phase("steps"):
        run_steps(EngineCore(executor), loaded.config)
    with timer.phase("gather_kernels"):
        kernels = KERNELS.gather(engine_dir / DIRECTORY)
    log.info("engine tried with kernels: %s", KERNELS.summary())
    return WarmedUp(gpu, kernels, tuple(tactics), seconds=timer.seconds)


def run_steps(core: EngineCore, config: ModelConfig) -> None:
    """Every kind of step: prompts of several lengths, alone and together, each stage of sampling, prompts scored."""
    for batch in _batches(config):
        for request in batch:
            core.add_request(request)
        while core.has_work:
            core.step()


def _batches(config: ModelConfig) -> Iterator[list[EngineRequest]]:
    greedy = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    sampled = SamplingParams(temperature=0.8, max_tokens=3, ignore_eos=True)
    kinds = [
        greedy,
        sampled,
        SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.05, max_tokens=3, ignore_eos=True),
        SamplingParams(
            temperature=0.8, repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1, max_tokens=3
        ),
        SamplingParams(temperature=0.0, logit_bias={0: -1.0}, min_tokens=2, max_tokens=3),
        SamplingParams(temperature=0.0, logprobs=5, max_tokens=3, ignore_eos=True),
        SamplingParams(temperature=0.0, prompt_logprobs=2, max_tokens=2, ignore_eos=True),
    ]
    longest = max(1, config.max_position_embeddings - 4)
    numbers = iter(range(1_000_000))

    def make(length: int, params: SamplingParams) -> EngineRequest:
        number = next(numbers)
        length = min(length, longest)
        tokens = [(number * 7919 + i * 31) % config.vocab_size for i in range(length)]
        return EngineRequest(f"warm-up-{number}", tokens, params, eos_token_ids=(0,))

    for params in kinds:
        yield [make(33, params)]
    for length in _LENGTHS:
        yield [make(length, greedy)]
    yield [make(length, params) for length in _LENGTHS for params in (greedy, sampled)]
    yield [make(_LENGTHS[i % len(_LENGTHS)], params) for i, params in enumerate(kinds)]
