"""From an engine directory to a model on a device, and the sizes of what surrounds it. Shared by all torch backends."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from appliance import registry
from appliance.distributed import PipelineStage, TensorParallel
from appliance.engines.manifest import EngineManifest, TimedTactic, read_manifest
from appliance.errors import HardwareError, SettingsError
from appliance.kernels.fp8_linear import FP8
from appliance.kernels.tactics import TABLE
from appliance.layers.decoder import Decoder
from appliance.runtime.model_runner import RunnerLimits
from appliance.runtime.ranks import Alone, Member
from appliance.runtime.weights import load_weights
from appliance.types import EngineInfo, EngineOptions, ModelConfig

log = logging.getLogger(__name__)

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# Of the KV cache, by the name that settings, profiles and `EngineInfo` use.
KV_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": FP8}


@dataclass
class PhaseTimer:
    """Seconds per start-up phase, in the order in which they first ran."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


ProgressFn = Callable[[str, str, float], None]  # (phase, detail, percent)


def kv_dtype_name(dtype: torch.dtype) -> str:
    """ "bf16" for torch.bfloat16: the key of KV_DTYPES."""
    return next(name for name, known in KV_DTYPES.items() if known == dtype)


def kv_page_bytes(model: Decoder, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over this rank's layers: K and V of `page_size` tokens."""
    return len(model.own_layers) * 2 * page_size * model.num_kv_heads * model.config.head_dim * dtype.itemsize


def allocate_kv_cache(
    model: Decoder, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """One cache tensor per layer, [num_pages, 2, page_size, num_kv_heads, head_dim], with no pages for layers of other
    stages. Zeroed: attention may read (and mask) entries that nothing has written, and 0 x NaN is not 0."""
    shape = (2, page_size, model.num_kv_heads, model.config.head_dim)
    pages = [num_pages if i in model.own_layers else 0 for i in range(model.config.num_hidden_layers)]
    return [_zeros((count, *shape), dtype, device) for count in pages]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros; on the CPU with pages that the system zeroes when first touched, where torch would write each now:
    seconds per GB of start."""
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def choose_max_model_len(options: EngineOptions, config: ModelConfig, num_pages: int) -> int:
    """The context limit in tokens: what was asked for, else the model's own limit or what the pages can hold.

    SettingsError if more was asked for than the model was made for, HardwareError if more than fits.
    """
    fits = num_pages * options.page_size
    if not options.max_model_len:
        return min(config.max_position_embeddings, fits)
    if options.max_model_len > config.max_position_embeddings:
        raise SettingsError(
            f"max_model_len is {options.max_model_len}, but the model was made for at most "
            f"{config.max_position_embeddings} tokens",
            hint=f"set --max-model-len to {config.max_position_embeddings} or less",
        )
    if options.max_model_len > fits:
        raise HardwareError(
            f"max_model_len is {options.max_model_len}, but free memory holds a KV cache of only {fits} tokens",
            hint=f"set --max-model-len to {fits} or less, or free GPU memory",
        )
    return options.max_model_len


def build_model(
    config: ModelConfig,
    scheme_name: str,
    dtype: torch.dtype,
    parameters: Mapping[str, Any] | None = None,
    tp: TensorParallel | None = None,
    stage: PipelineStage | None = None,
) -> Decoder:
    """The architecture's model, or a rank's share of it, on the meta device: shapes and dtypes, no memory.
    `parameters`: of the scheme, as the engine's key has them. EngineDamagedError for some that the scheme does not
    know, HardwareError if ranks cannot share the model."""
    module = registry.load("models", registry.architectures()[config.architecture].name)
    scheme = registry.load("quantization", scheme_name).Scheme(parameters)
    with torch.device("meta"):
        model: Decoder = module.Model(config, scheme, dtype, tp, stage)
    return model


@dataclass
class LoadedModel:
    """A model, or a rank's share of it, whose weights are on their device. Made before `Decoder.prepare`, which takes
    parameters away."""

    model: Decoder
    config: ModelConfig
    engine_key: str
    member: Member = field(default_factory=Alone)  # this rank among the others
    # How ranks add up and which decode steps our own attention serves, if that was timed at this load.
    reductions: tuple[TimedTactic, ...] = ()
    weight_bytes: int = field(init=False)  # on the device

    def __post_init__(self) -> None:
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())


def use_tactics(manifest: EngineManifest) -> None:
    """Let products be computed the way that was quickest when the engine was built. On a GPU, before the first one."""
    TABLE.clear()
    for tactic in manifest.tactics:
        TABLE.choose(tactic.scheme, tactic.out_features, tactic.in_features, tactic.rows, tactic.tactic)
    if manifest.tactics:
        log.info("tactics: %d choices, timed on %s", len(manifest.tactics), manifest.build.gpu)


def load_engine(
    options: EngineOptions,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: ProgressFn,
    member: Member | None = None,
) -> LoadedModel:
    """Load a rank's share of an engine; the ranks are yet to join. `dtype` overrides the engine's own for what is
    not quantized (the CPU computes in float32). `member` None: the engine is one of one rank. EngineDamagedError if a
    file does not match its digest or the model."""
    member = member or Alone()
    path = Path(options.engine_dir)
    manifest = read_manifest(path)
    parameters = manifest.key_inputs.scheme_parameters
    sizes = f"rank {member.rank} of {member.size}, engine of {manifest.tp_size} × {manifest.pp_size}"
    assert member.size == manifest.tp_size * manifest.pp_size, sizes
    place = member.place(device, manifest.pp_size)

    def on_read(done: int, total: int) -> None:
        member.gets_on()
        progress("load", "weights", 100 * done / max(total, 1))

    model = build_model(manifest.model, manifest.scheme, dtype or DTYPES[manifest.dtype], parameters, *place)
    load_weights(
        model,
        path / manifest.rank_files[member.rank],
        device,
        progress=on_read,
    )
    return LoadedModel(model, manifest.model, manifest.key, member)


def runner_limits(options: EngineOptions, max_model_len: int, config: ModelConfig) -> RunnerLimits:
    """The sizes that options and the memory found give."""
    return RunnerLimits(
        max_num_seqs=options.max_num_seqs,
        max_model_len=max_model_len,
        max_num_batched_tokens=options.max_num_batched_tokens,
        page_size=options.page_size,
        vocab_size=config.vocab_size,
    )


def engine_info(
    loaded: LoadedModel,
    limits: RunnerLimits,
    *,
    num_pages: int,
    page_bytes: int,
    kv_dtype: torch.dtype,
    attention: str,
    device_name: str,
    timer: PhaseTimer,
) -> EngineInfo:
    """What a backend says of an engine that it has assembled."""
    return EngineInfo(
        engine_key=loaded.engine_key,
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        num_pages=num_pages,
        page_size=limits.page_size,
        kv_cache_dtype=kv_dtype_name(kv_dtype),
        attention=attention,
        device_name=device_name,
        weight_bytes=loaded.weight_bytes,
        kv_cache_bytes=num_pages * page_bytes,
        startup_seconds=timer.seconds,
    )
