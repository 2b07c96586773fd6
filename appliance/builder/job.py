"""One build's fixed facts: what was asked for, what it is made from, and the plug-ins that know how."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType

import torch

from appliance import registry
from appliance.builder.request import BuildRequest
from appliance.builder.shards import check_shares
from appliance.checkpoint import Checkpoint
from appliance.engines.key import KeyInputs
from appliance.quantization.scheme import PrecisionScheme
from appliance.types import ModelConfig, WeightSpec

LoadPlugin = Callable[[str, str], ModuleType]


@dataclass(frozen=True)
class Job:
    request: BuildRequest
    inputs: KeyInputs
    config: ModelConfig
    checkpoint: Checkpoint
    architecture: ModuleType
    scheme: PrecisionScheme  # of the model; `scheme.of(name)` of a layer
    specs: list[WeightSpec]  # in the order of the weight file
    dtype: torch.dtype  # of what is not quantized
    devices: tuple[torch.device, ...]  # where weights are converted, all at once
    started: float  # time.monotonic()
    turns: dict[int, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))  # by GPU

    @staticmethod
    def start(
        request: BuildRequest, inputs: KeyInputs, config: ModelConfig, checkpoint: Checkpoint, load_plugin: LoadPlugin
    ) -> Job:
        """Load the plug-ins and check every dimension. Raises EngineBuildError."""
        architecture = load_plugin("models", registry.architectures()[config.architecture].name)
        specs = architecture.weight_specs(config)
        return Job(
            request=request,
            inputs=inputs,
            config=config,
            checkpoint=checkpoint,
            architecture=architecture,
            scheme=checked_scheme(inputs, specs, load_plugin),
            specs=specs,
            dtype=getattr(torch, inputs.dtype),
            devices=_devices(request),
            started=time.monotonic(),
        )

    @property
    def device(self) -> torch.device:
        """Where what cannot be divided is computed."""
        return self.devices[0]

    @contextlib.contextmanager
    def gpu_turn(self, device: torch.device) -> Iterator[None]:
        """Compute on a GPU while nobody is timing anything there, and be done at the end. Copies to and from it, which
        take little of its memory's bandwidth, need no turn. Does nothing for the CPU."""
        if device.type != "cuda":
            yield
            return
        with self.turns[device.index or 0]:
            yield
            torch.cuda.current_stream(device).synchronize()


def for_gpu(backend: str) -> bool:
    return registry.plugins("backends")[backend].facts.get("device") == "gpu"


def checked_scheme(inputs: KeyInputs, specs: list[WeightSpec], load_plugin: LoadPlugin) -> PrecisionScheme:
    """The scheme of an engine. Its storage may want input sizes that groups divide, its kernels on a GPU some that are
    multiples of a number, and ranks want to share them: EngineBuildError naming the layer."""
    root: PrecisionScheme = load_plugin("quantization", inputs.scheme).Scheme(inputs.scheme_parameters)
    on_gpu = for_gpu(inputs.backend)
    for spec in specs:
        if spec.kind != "linear":
            continue
        scheme = root.of(spec.name)
        multiple = scheme.input_multiple
        if on_gpu:
            multiple = math.lcm(multiple, int(scheme.facts.get("dimension_multiple", 1)))
        check_shares(spec, inputs.tp_size, multiple, inputs.precision)
    return root


def _devices(request: BuildRequest) -> tuple[torch.device, ...]:
    """The one asked for; else as many GPUs as there are ranks, if there are, or the CPU."""
    if request.device == "auto":
        if not (for_gpu(request.backend) and torch.cuda.is_available()):
            return (torch.device("cpu"),)
        count = min(torch.cuda.device_count(), request.tp_size * request.pp_size)
        return tuple(torch.device("cuda", index) for index in range(count))
    device = torch.device(request.device)
    return (torch.device("cuda", device.index or 0) if device.type == "cuda" else device,)
