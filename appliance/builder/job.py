"""One build's fixed facts: what was asked for, what it is made from, and the plug-ins that know how."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
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
    device: torch.device  # where weights are converted
    started: float  # time.monotonic()

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
            device=_device(request),
            started=time.monotonic(),
        )


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


def _device(request: BuildRequest) -> torch.device:
    if request.device != "auto":
        return torch.device(request.device)
    return torch.device("cuda" if for_gpu(request.backend) and torch.cuda.is_available() else "cpu")
