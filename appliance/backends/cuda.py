"""The CUDA backend: the same model and runner as everywhere, with Triton kernels, paged attention from FlashInfer or
our own, and decode steps replayed from CUDA graphs.

Sizes the KV cache from the memory that is really free after a step of the largest size has run.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec
import torch

from appliance.distributed import GroupCollectives
from appliance.engines.manifest import TimedTactic, read_manifest
from appliance.errors import HardwareError, SettingsError
from appliance.kernels import all_reduce_group
from appliance.kernels.attention import FP8_CACHE_CAPABILITY, Attention, ReferenceAttention
from appliance.kernels.compiled import KERNELS, triton_key
from appliance.kernels.fp8_linear import FP8
from appliance.kernels.sum_norm_group import Norms
from appliance.kernels.tactics import TABLE, TimedChoice
from appliance.layers.decoder import Decoder, DecoderLayer
from appliance.runtime.cuda_graphs import decode_buckets
from appliance.runtime.executor import LocalExecutor, make_executor
from appliance.runtime.kv_scales import set_kv_scales
from appliance.runtime.loading import (
    DTYPES,
    KV_DTYPES,
    LoadedModel,
    PhaseTimer,
    ProgressFn,
    allocate_kv_cache,
    choose_max_model_len,
    engine_info,
    kv_dtype_name,
    kv_page_bytes,
    load_engine,
    runner_limits,
    use_tactics,
)
from appliance.runtime.model_runner import ModelRunner, RunnerLimits
from appliance.runtime.ranks import Member, lead
from appliance.runtime.timing import time_in_graph
from appliance.settings import gpus_shared, share_gpu
from appliance.sizes import counted
from appliance.types import EngineInfo, EngineOptions, ModelConfig

if TYPE_CHECKING:
    from appliance.kernels.flashinfer import FlashInferAttention

PLUGIN = {
    "name": "cuda",
    "device": "gpu",
    "version": "1",
    "precisions": ["fp32", "fp16", "bf16", "fp8", "int8", "int4"],
    "kv_cache": ["bf16", "fp16", "fp32", "fp8"],
    "kv_cache_capability": {"fp8": [8, 9]},
    "attention": ["auto", "flashinfer", "triton", "reference"],
    "batch_invariant": True,
    "min_compute_capability": [7, 5],
    "max_tp": 8,
    "max_pp": 8,
}

log = logging.getLogger(__name__)

_LOADING_KERNELS = "loading kernels; those compiled for the first time take a minute or two"
_GRAPH_RESERVE = 1 << 30  # bytes left for CUDA graphs and late allocations of libraries


def _device(options: EngineOptions, member: Member) -> torch.device:
    """This rank's, made current."""
    if not torch.cuda.is_available():
        raise HardwareError("no CUDA device is usable by torch", hint="run `appliance doctor`")
    names = options.devices or tuple(map(str, range(member.size)))
    if len(names) != member.size:
        raise SettingsError(f"this engine runs on {counted(member.size, 'GPU')}; given: {', '.join(names)}")
    if len(set(names)) < len(names):
        share_gpu(member.rank)
        log.warning("ranks share a GPU (%s): for tests only, they wait for each other's time slices", ", ".join(names))
    name = names[member.rank]
    index = int(name) if name.isdigit() else _index_of_uuid(name)
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _index_of_uuid(uuid: str) -> int:
    """Torch's index of the GPU with this UUID; a MIG slice is the only device that its process sees."""
    if uuid.startswith("MIG-"):
        return 0
    wanted = uuid.removeprefix("GPU-")
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == wanted:
            return index
    raise HardwareError(f"GPU {uuid} is not visible to this process", hint="check CUDA_VISIBLE_DEVICES")


def preload() -> None:
    """Import what serving will need and what takes seconds, before it is known what will be served; in a process that
    is ours alone. Creates no CUDA context."""
    from appliance.kernels import flashinfer

    digest = threading.Thread(target=triton_key, name="triton-key", daemon=True)  # reads some 300 MB
    digest.start()
    flashinfer.import_lean()
    digest.join()


def load(options: EngineOptions, progress: ProgressFn, timer: PhaseTimer, member: Member | None = None) -> LoadedModel:
    """Create the CUDA context, let products and kernels be those of the engine, and copy a rank's share of its weights
    up; beside that, load the attention kernels, which are megabytes of code. `member` None: rank 0, which starts the
    others if there are any."""
    member = member or lead(options)
    with timer.phase("cuda_context"):
        device = _device(options, member)
        torch.zeros(1, device=device)
    manifest = read_manifest(Path(options.engine_dir))
    KERNELS.open(Path(options.engine_dir), manifest.kernels)
    use_tactics(manifest)
    wanted = (manifest.model, DTYPES[manifest.dtype], options, device, manifest.tp_size)
    kernels = threading.Thread(target=_load_kernels, args=wanted, name="kernels", daemon=True)
    kernels.start()
    with timer.phase("load_weights"):
        loaded = load_engine(options, device, None, progress, member)
        torch.cuda.synchronize()
    with timer.phase("kernels"):
        if kernels.is_alive():
            progress("warmup", _LOADING_KERNELS, 0.0)
        kernels.join()
    with timer.phase("other_ranks"):
        member.join(device)
        if loaded.model.tp.size > 1:
            _connect(loaded, device)
    with timer.phase("decode_attention"):
        _tune_attention(loaded, options, device)
    return loaded


def _connect(loaded: LoadedModel, device: torch.device) -> None:
    """Let the ranks add up by own kernels where their GPUs read each other's memory, by whichever the engine says is
    the fastest; if it says nothing, that is timed."""
    model, config, group = loaded.model, loaded.config, loaded.model.tp.collectives
    assert isinstance(group, GroupCollectives)
    own = all_reduce_group.connect(group.library(), model.tp.rank, model.tp.size, device)
    if own is None:
        return
    group.own = own
    norms = _norms(model)
    own.connect_norms(norms)
    if not own.known(config.hidden_size, model.dtype):
        choices = own.tune(norms.hidden, norms.dtype, time_in_graph, norms.quantized)
        _keep(loaded, choices)


def _keep(loaded: LoadedModel, choices: Iterable[TimedChoice]) -> None:
    """Let the engine have what was timed."""
    loaded.reductions += tuple(TimedTactic(**dataclasses.asdict(choice)) for choice in choices)


def _norms(model: Decoder) -> Norms:
    """Those behind sums, by what products take; layers that are not quantized are few beside others that are."""
    row = torch.zeros(1, model.config.hidden_size, dtype=model.dtype, device=model.device)
    layers = [cast(DecoderLayer, model.layers[index]) for index in model.own_layers]
    given = [scheme.tactic_input(row) for scheme in {layer.mlp.gate_up.scheme for layer in layers}]
    quantized = next((x[0].dtype for x in given if not isinstance(x, torch.Tensor)), None)
    return Norms(model.config.hidden_size, model.dtype, quantized)


def _tune_attention(loaded: LoadedModel, options: EngineOptions, device: torch.device) -> None:
    """Find out which decode steps our own attention is quicker for, if the engine does not say. Where that cannot be
    done, the library's serves."""
    from appliance.kernels import flashinfer
    from appliance.kernels.decode_attention import decode, tuning

    config, dtype = loaded.config, loaded.model.dtype
    kv_dtype = _kv_dtype(options, dtype)
    if options.attention not in ("auto", "flashinfer") or options.batch_invariant:
        return
    if flashinfer.available(config.head_dim, dtype, kv_dtype) is not None:
        return
    heads, kv_heads = _heads(config, loaded.model.tp.size)
    shape = decode.attention_shape(heads, kv_heads, config.head_dim, options.page_size, dtype, kv_dtype)
    if tuning.known(shape):
        return
    most = decode.TIMED_ROWS[-1]
    own = decode.decode_attention_for(shape, windows=(None,), max_rows=most, device=device)
    if own is None:
        return
    try:
        other = flashinfer.FlashInferAttention(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=config.head_dim,
            page_size=options.page_size,
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_num_seqs=most,
            max_model_len=max(tuning.CONTEXTS),
            device=device,
            graph_batch_sizes=decode.TIMED_ROWS,
        )
        choices = tuning.tune(own, other, time_in_graph, device)
    except Exception as error:  # no compiler, no memory
        log.warning("decode attention: not timed, the library's serves: %s", str(error).partition("\n")[0])
        return
    _keep(loaded, choices)
    del own, other
    torch.cuda.empty_cache()


def _heads(config: ModelConfig, tp_size: int) -> tuple[int, int]:
    """Query and key/value heads of a rank."""
    return config.num_attention_heads // tp_size, max(1, config.num_key_value_heads // tp_size)


def _load_kernels(
    config: ModelConfig, dtype: torch.dtype, options: EngineOptions, device: torch.device, tp_size: int
) -> None:
    try:
        compile_ahead(config, dtype, options, device, tp_size)
    except Exception as error:  # met again, and told, when attention is made
        log.debug("attention kernels: %s", error)


def assemble(
    loaded: LoadedModel, options: EngineOptions, progress: ProgressFn, timer: PhaseTimer
) -> tuple[LocalExecutor, EngineInfo]:
    """Everything around loaded weights: attention, KV cache sized to the memory left, runner, CUDA graphs."""
    device = torch.device("cuda", torch.cuda.current_device())
    config, model = loaded.config, loaded.model
    TABLE.batch_invariant = options.batch_invariant
    dtype = _kv_dtype(options, model.dtype)
    page_bytes = kv_page_bytes(model, options.page_size, dtype)
    model.prepare(options.max_model_len or config.max_position_embeddings)
    if dtype == FP8:
        with timer.phase("kv_scales"):
            set_kv_scales(model, options.engine_dir)

    pages = options.num_pages or _profile_pages(loaded, options, page_bytes, dtype, device, progress, timer)
    num_pages = model.stage.minimum(model.tp.minimum(pages))
    max_model_len = choose_max_model_len(options, config, num_pages)
    limits = runner_limits(options, max_model_len, config)
    with timer.phase("kernels"):
        progress("warmup", _LOADING_KERNELS, 0.0)
        attention = _attention(loaded, options, limits, device)
    with timer.phase("kv_cache"):
        kv_caches = allocate_kv_cache(model, num_pages, options.page_size, dtype, device)
    runner = ModelRunner(model, kv_caches, attention, limits, device)
    if options.cuda_graphs and options.persistent_decode and not options.batch_invariant:
        with timer.phase("persistent_decode"):
            reason = runner.enable_persistent()
        if reason is not None:
            log.info("no persistent decode kernel: %s", reason)
    if options.cuda_graphs:
        with timer.phase("cuda_graphs"):
            runner.capture_graphs(
                lambda done, total: progress("warmup", f"CUDA graph {done} of {total}", 100 * done / total)
            )
            torch.cuda.synchronize()
    log.info("kernels: %s", KERNELS.summary())
    if TABLE.unknown:
        log.warning("tactics of the engine that this version does not have: %s", ", ".join(sorted(TABLE.unknown)))
    info = engine_info(
        loaded,
        limits,
        num_pages=num_pages,
        page_bytes=page_bytes,
        kv_dtype=dtype,
        attention=attention.name,
        device_name=torch.cuda.get_device_name(device),
        timer=timer,
    )
    return make_executor(runner, limits, num_pages, loaded.member), info


def _kv_dtype(options: EngineOptions, model_dtype: torch.dtype) -> torch.dtype:
    """SettingsError for one that the attention kernels cannot read, HardwareError for FP8 on a GPU without it."""
    dtype = model_dtype if options.kv_cache_dtype == "auto" else KV_DTYPES[options.kv_cache_dtype]
    if dtype not in (model_dtype, FP8):
        raise SettingsError(
            f"kv_cache_dtype {options.kv_cache_dtype} is not supported with a model in {kv_dtype_name(model_dtype)}",
            hint="set --kv-cache-dtype to auto or fp8",
        )
    if dtype == FP8 and torch.cuda.get_device_capability() < FP8_CACHE_CAPABILITY:
        needed = ".".join(map(str, FP8_CACHE_CAPABILITY))
        raise HardwareError(f"an FP8 KV cache needs compute capability {needed}", hint="set --kv-cache-dtype to auto")
    return dtype


def _profile_pages(
    loaded: LoadedModel,
    options: EngineOptions,
    page_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
    progress: ProgressFn,
    timer: PhaseTimer,
) -> int:
    """Run a step of the largest size on a small KV cache, then give the KV cache what is left of the memory share.

    HardwareError if less than the cache of one full step is left.
    """
    config = loaded.config
    longest = options.max_model_len or config.max_position_embeddings
    tokens = min(options.max_num_batched_tokens, longest)
    pages = -(-tokens // options.page_size) + 1
    limits = runner_limits(options, longest, config)
    with timer.phase("kernels"):
        progress("warmup", _LOADING_KERNELS, 0.0)
        attention = _attention(loaded, options, limits, device)
    with timer.phase("profile_memory"):
        caches = allocate_kv_cache(loaded.model, pages, options.page_size, dtype, device)
        torch.cuda.reset_peak_memory_stats(device)
        runner = ModelRunner(loaded.model, caches, attention, limits, device)
        runner.profile()
        peak = torch.cuda.max_memory_allocated(device) - pages * page_bytes  # weights, activations, tables
        del runner, caches, attention
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        # Memory of this process that torch does not see: context, library workspaces, compiled kernels.
        ours = torch.cuda.memory_reserved(device)
    budget = int((free + ours) * options.memory_fraction) - peak - _GRAPH_RESERVE
    if gpus_shared():
        budget //= 4 * loaded.member.size  # the others look at the same free memory
    if budget < pages * page_bytes:
        raise HardwareError(
            f"after weights and activations {max(budget, 0) / 1e9:.1f} GB of {total / 1e9:.1f} GB are left for the "
            f"KV cache; one step of {tokens} tokens needs {pages * page_bytes / 1e9:.1f} GB",
            hint="free GPU memory, or lower --max-num-batched-tokens or --max-model-len",
        )
    return budget // page_bytes


def compile_ahead(
    config: ModelConfig, dtype: torch.dtype, options: EngineOptions, device: torch.device, tp_size: int = 1
) -> None:
    """Load, and where they are nowhere compile, the kernels that take longest and need no weights: FlashInfer's. Builds
    and starts do it beside other work. `dtype`: of the model. Raises whatever the library raises where it cannot."""
    from appliance.kernels import flashinfer

    torch.cuda.set_device(device)
    kv_dtype = _kv_dtype(options, dtype)
    if options.attention not in ("auto", "flashinfer") or flashinfer.available(config.head_dim, dtype, kv_dtype):
        return
    KERNELS.attach_flashinfer()
    limits = runner_limits(msgspec.structs.replace(options, max_num_seqs=2), config.max_position_embeddings, config)
    _flashinfer_attention(config, dtype, kv_dtype, tp_size, limits, device, cuda_graphs=False).load_modules()


def _flashinfer_attention(
    config: ModelConfig,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    tp_size: int,
    limits: RunnerLimits,
    device: torch.device,
    cuda_graphs: bool,
) -> FlashInferAttention:
    from appliance.kernels import flashinfer

    heads, kv_heads = _heads(config, tp_size)
    return flashinfer.FlashInferAttention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=config.head_dim,
        page_size=limits.page_size,
        dtype=dtype,
        kv_dtype=kv_dtype,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=limits.max_model_len,
        device=device,
        windows=[config.window_of(layer) for layer in range(config.num_hidden_layers)],
        graph_batch_sizes=decode_buckets(limits.max_num_seqs) if cuda_graphs else (),
    )


def _attention(loaded: LoadedModel, options: EngineOptions, limits: RunnerLimits, device: torch.device) -> Attention:
    """The implementation asked for; "auto" is FlashInfer where it can serve this model, else Triton."""
    from appliance.kernels import flashinfer, paged_attention

    config, model = loaded.config, loaded.model
    if options.attention not in ("auto", "flashinfer", "triton", "reference"):
        raise SettingsError(f"attention {options.attention!r} is unknown; allowed: auto, flashinfer, triton, reference")
    if options.attention == "reference":
        if options.cuda_graphs:
            raise SettingsError("attention reference cannot run in CUDA graphs", hint="turn CUDA graphs off")
        return ReferenceAttention()
    if options.batch_invariant:
        return paged_attention.TritonAttention(batch_invariant=True)
    kv_dtype = _kv_dtype(options, model.dtype)
    reason = flashinfer.available(config.head_dim, model.dtype, kv_dtype)
    if options.attention == "flashinfer" and reason:
        raise SettingsError(f"attention flashinfer cannot be used: {reason}", hint="set attention to triton or auto")
    if options.attention == "triton" or reason:
        return paged_attention.TritonAttention()
    KERNELS.attach_flashinfer()
    attention = _flashinfer_attention(config, model.dtype, kv_dtype, model.tp.size, limits, device, options.cuda_graphs)
    try:
        attention.load_modules()
    except Exception as error:  # no compiler, a read-only cache, a failed build: Triton serves as well
        if options.attention == "flashinfer":
            raise HardwareError(
                f"FlashInfer's kernels can be neither loaded nor compiled: {error}",
                hint="install nvcc, or set attention to triton or auto",
            ) from error
        log.warning("attention: Triton, as FlashInfer's kernels can be neither loaded nor compiled: %s", error)
        return paged_attention.TritonAttention()
    return attention
