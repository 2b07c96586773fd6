"""What to build, as the control plane asks for it. Torch-free: keys are known before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import field

from appliance import checkpoint
from appliance.engines.key import KeyInputs, engine_key, make_key_inputs, scheme_of
from appliance.engines.meter import ProgressFn
from appliance.engines.published import scheme_of_published
from appliance.errors import EngineBuildError
from appliance.types import KvCacheDtype, Precision, Struct


class BuildRequest(Struct, frozen=True):
    checkpoint: str  # local directory
    cache: str  # cache directory, root of the engine store
    precision: Precision
    backend: str  # plug-in name: "cpu", "cuda"
    tp_size: int = 1
    pp_size: int = 1
    compute_capability: tuple[int, int] | None = None  # of the GPU that will serve; None for the CPU
    device: str = "auto"  # where to convert: "cpu", "cuda", "cuda:1"; auto: a GPU for a GPU backend, else the CPU
    checkpoint_digest: str = ""  # if known already (`checkpoint.digest`); empty: computed
    # What the engine is likely to be loaded with: the kernels of such a start are compiled into it. Not part of its
    # key, since it can be loaded in any way.
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    kv_cache_dtype: KvCacheDtype = "auto"
    attention: str = "auto"
    tactics: bool = True  # time the ways to compute each product on this GPU
    # Of schemes that are calibrated: a file or directory of text, "none" to round to nearest, "" for what ships; see
    # builder/calibration_data.py.
    calibration_data: str = ""
    calibration_samples: int = 128
    calibration_length: int = 512  # tokens of a sample
    max_kl: float | None = None  # largest KL divergence to the checkpoint's predictions, nats per token; None: no limit
    scheme: str | None = None  # name of the quantization plug-in; None: the first that serves the precision
    # Those of its parameters that are not as it has them by itself.
    scheme_parameters: dict[str, Any] = field(default_factory=dict)


def key_inputs_of(request: BuildRequest, progress: ProgressFn | None = None) -> KeyInputs:
    """The key inputs of the engine that a request asks for; hashes the checkpoint unless its digest is given or
    remembered. Raises EngineBuildError for a request that cannot be built, CheckpointError."""
    config = checkpoint.read_model_config(Path(request.checkpoint))
    if not 1 <= request.pp_size <= config.num_hidden_layers:
        raise EngineBuildError(
            f"pp_size={request.pp_size} cannot be built: every stage needs one of {config.num_hidden_layers} layers",
            hint=f"choose a pipeline-parallel size from 1 to {config.num_hidden_layers}",
        )
    digest = request.checkpoint_digest
    if not digest:
        digest = checkpoint.digest(Path(request.checkpoint), cache=Path(request.cache), progress=progress).value
    scheme, parameters = request.scheme, request.scheme_parameters
    published = config.quantization
    if published is not None:  # what it is decides how it is stored
        scheme, parameters = scheme_of_published(published, request.precision)
    return make_key_inputs(
        digest,
        request.precision,
        request.backend,
        tp_size=request.tp_size,
        pp_size=request.pp_size,
        compute_capability=request.compute_capability,
        calibration=calibration_of(request),
        scheme=scheme,
        scheme_parameters=parameters,
    )


def is_calibrated(request: BuildRequest) -> bool:
    """Whether the engine's weights are quantized with activations in view. Raises EngineBuildError, CheckpointError."""
    if request.calibration_data == "none" or not scheme_of(request.precision, request.scheme).facts.get("calibrated"):
        return False
    return checkpoint.read_model_config(Path(request.checkpoint)).quantization is None


def calibration_of(request: BuildRequest) -> dict[str, Any]:
    """What the engine's key says of its calibration. Raises SettingsError for text that cannot be read."""
    if not is_calibrated(request):
        return {}
    from appliance.builder.calibration_data import key_parameters

    data, where = request.calibration_data, Path(request.checkpoint)
    return key_parameters(data, where, request.calibration_samples, request.calibration_length)


def key_of(request: BuildRequest, progress: ProgressFn | None = None) -> str:
    """`engine_key` of `key_inputs_of`."""
    return engine_key(key_inputs_of(request, progress))
