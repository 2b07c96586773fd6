"""The CPU backend: plain torch in float32, the reference that every other backend is compared with.

Weights keep their engine's values (bf16, fp8, …) but products run in float32, which is also faster on CPUs without
half-precision matrix units; those of INT8 and INT4 weights by kernels for them, where the CPU has such
(`kernels/cpu_linear.py`). A KV cache of fewer bits is rounded as the GPU rounds it, and read back into float32.
"""

from __future__ import annotations

import psutil
import torch

from appliance.errors import HardwareError, SettingsError
from appliance.hardware.host import host
from appliance.kernels import cpu_linear
from appliance.kernels.attention import ReferenceAttention
from appliance.kernels.fp8_linear import FP8
from appliance.runtime.executor import LocalExecutor, make_executor
from appliance.runtime.kv_scales import set_kv_scales
from appliance.runtime.loading import (
    KV_DTYPES,
    LoadedModel,
    PhaseTimer,
    ProgressFn,
    allocate_kv_cache,
    choose_max_model_len,
    engine_info,
    kv_page_bytes,
    load_engine,
    runner_limits,
)
from appliance.runtime.model_runner import ModelRunner
from appliance.runtime.ranks import Member, lead
from appliance.sizes import counted
from appliance.types import EngineInfo, EngineOptions

PLUGIN = {
    "name": "cpu",
    "device": "cpu",
    "version": "1",
    "precisions": ["fp32", "fp16", "bf16", "fp8", "int8", "int4"],
    "packed": ["int4"],  # multiplied as stored; other weights are widened to float32 (INT8 where the CPU has no VNNI)
    "kv_cache": ["fp32", "bf16", "fp16", "fp8"],
    "attention": ["auto", "reference"],
    "max_tp": 4,
    "max_pp": 4,
}

_DEVICE = torch.device("cpu")
_MEMORY_SHARE = 0.25  # of free memory, for the KV cache when the page count is not given


def load(options: EngineOptions, progress: ProgressFn, timer: PhaseTimer, member: Member | None = None) -> LoadedModel:
    """Load a rank's share of the engine's weights into memory, as float32 where they are not quantized. `member` None:
    rank 0, which starts the others if there are any."""
    member = member or lead(options)
    cores = min(psutil.cpu_count(logical=False) or 1, host().cpu_cores)
    torch.set_num_threads(max(1, cores // (options.replicas * member.size)))
    with timer.phase("load_weights"):
        loaded = load_engine(options, _DEVICE, torch.float32, progress, member)
    with timer.phase("other_ranks"):
        member.join(_DEVICE)
    return loaded


def assemble(
    loaded: LoadedModel, options: EngineOptions, progress: ProgressFn, timer: PhaseTimer
) -> tuple[LocalExecutor, EngineInfo]:
    """Everything around loaded weights: KV cache, runner, executor."""
    if options.attention not in ("auto", "reference"):
        raise SettingsError(
            f"attention {options.attention!r} is not supported by the cpu backend; allowed: auto, reference"
        )
    if options.batch_invariant:
        raise SettingsError("--batch-invariant is not supported by the cpu backend")
    config, model = loaded.config, loaded.model
    kv_dtype = KV_DTYPES["fp32" if options.kv_cache_dtype == "auto" else options.kv_cache_dtype]
    page_bytes = kv_page_bytes(model, options.page_size, kv_dtype)
    pages = options.num_pages or _pages_that_fit(
        options, config.max_position_embeddings, page_bytes * loaded.member.size
    )
    num_pages = model.stage.minimum(model.tp.minimum(pages))
    max_model_len = choose_max_model_len(options, config, num_pages)
    limits = runner_limits(options, max_model_len, config)
    with timer.phase("kv_cache"):
        with cpu_linear.packed():
            model.prepare(max_model_len)
        if kv_dtype == FP8:
            set_kv_scales(model, options.engine_dir)
        kv_caches = allocate_kv_cache(model, num_pages, options.page_size, kv_dtype, _DEVICE)
    runner = ModelRunner(model, kv_caches, ReferenceAttention(), limits, _DEVICE)
    info = engine_info(
        loaded,
        limits,
        num_pages=num_pages,
        page_bytes=page_bytes,
        kv_dtype=kv_dtype,
        attention="reference",
        device_name=f"CPU, {counted(torch.get_num_threads(), 'thread')}" + _of_ranks(loaded.member),
        timer=timer,
    )
    return make_executor(runner, limits, num_pages, loaded.member), info


def _of_ranks(member: Member) -> str:
    return f" for each of {member.size} ranks" if member.size > 1 else ""


def _pages_that_fit(options: EngineOptions, model_limit: int, page_bytes: int) -> int:
    """Pages for every slot at full length, or what a share of free memory holds. HardwareError if that is too few.
    `page_bytes`: of all ranks, which share the machine."""
    longest = options.max_model_len or model_limit
    wanted = options.max_num_seqs * -(-longest // options.page_size)
    budget = int(psutil.virtual_memory().available * _MEMORY_SHARE / options.replicas)
    pages = min(wanted, budget // page_bytes)
    if pages < 2:
        raise HardwareError(
            f"{budget / 1e9:.2f} GB of memory for the KV cache hold no two pages of {page_bytes / 1e6:.1f} MB",
            hint="free memory or choose a smaller model",
        )
    return pages
