"""A layer of a finished engine against the checkpoint's: for engines whose products cannot be compared one by one,
because calibration moved scales from one weight to another within the layer.

Knows the shared decoder layer. Its inputs are real ones, embeddings of tokens, since a calibrated layer is near the
original where the model's own activations are, and not for any numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from appliance import registry
from appliance.builder.convert import join
from appliance.builder.job import Job
from appliance.builder.shards import StoredEngine
from appliance.engines.manifest import SelfCheck
from appliance.kernels.deferred_scale import materialize
from appliance.layers.decoder import Decoder, DecoderLayer
from appliance.layers.linear import Linear
from appliance.quantization.scheme import PrecisionScheme
from appliance.runtime.prompt_batch import prompt_context

LARGEST_ERROR = 0.5  # relative; what rounding to 4 bits does to random weights is 0.2
_TOKENS = 32
_EMBEDDING = "embedding.weight"
_FIRST = "layers.0."


@torch.inference_mode()
def check_first_layer(job: Job, stored: StoredEngine) -> list[SelfCheck]:
    """||y - reference|| / ||reference|| of attention and of MLP, each behind its norm, of the first layer. Empty for an
    architecture with layers of its own. Storage is the same in all layers, so what goes wrong with it shows here."""
    table = stored.read(_EMBEDDING)
    ids = torch.arange(_TOKENS) * (job.config.vocab_size // _TOKENS or 1) % job.config.vocab_size
    x = table[ids].to(job.device)
    kind = torch.float32 if job.device.type == "cpu" else job.dtype
    engine = _layer(job, job.scheme, kind, lambda name: stored.read(_FIRST + name, job.device))
    plain = registry.load("quantization", "none").Scheme()
    reference = _layer(job, plain, torch.float32, _of_checkpoint(job))
    if engine is None or reference is None:
        return []
    got, expected = _outputs(job, engine, x.to(kind)), _outputs(job, reference, x.float())
    return [_compare(part, got[part], expected[part]) for part in expected]


def _of_checkpoint(job: Job) -> Callable[[str], Tensor]:
    """Name of a parameter below the layer -> its value in float32."""
    sources: dict[str, tuple[str, ...]] = {}
    for spec in job.specs:
        sources[spec.name if spec.kind == "plain" else f"{spec.name}.weight"] = spec.sources
        sources[f"{spec.name}.bias"] = spec.bias_sources
    return lambda name: join(job.checkpoint, sources[_FIRST + name], job.device, torch.float32)


def _layer(job: Job, scheme: PrecisionScheme, dtype: torch.dtype, read: Callable[[str], Tensor]) -> DecoderLayer | None:
    """The first layer with its weights, its products prepared; None if it is no `DecoderLayer`."""
    with torch.device("meta"):
        model: Decoder = job.architecture.Model(job.config, scheme, dtype)
    layer = model.layers[0]
    if type(layer) is not DecoderLayer:
        return None
    model.rotary.build(_TOKENS, job.device)
    for name, parameter in list(layer.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        value = read(name)
        value = value.to(parameter.dtype) if parameter.dtype.is_floating_point and value.dtype in _PLAIN else value
        layer.get_submodule(owner).register_parameter(attribute, nn.Parameter(value, requires_grad=False))
    for module in layer.modules():
        if isinstance(module, Linear):
            module.prepare()
    return layer


_PLAIN = {torch.float32, torch.float16, torch.bfloat16}  # converted into the dtype that the layer computes in


def _outputs(job: Job, layer: DecoderLayer, x: Tensor) -> dict[str, Tensor]:
    """float32 [tokens, hidden] of attention and of MLP, both of x."""
    context = prompt_context(job.config, [len(x)], x.dtype, job.device)
    attended = layer.attention(layer.input_norm(x.clone(), None)[0], context)
    made = layer.mlp(layer.post_attention_norm(x.clone(), None)[0])
    return {"attention": materialize(attended, x.dtype).float(), "mlp": materialize(made, x.dtype).float()}


def _compare(part: str, got: Tensor, expected: Tensor) -> SelfCheck:
    error = float((got - expected).norm() / expected.norm().clamp_min(1e-30))
    return SelfCheck(
        name=f"{_FIRST}{part} against its checkpoint tensors",
        passed=error <= LARGEST_ERROR,  # False for NaN
        value=error,
        limit=LARGEST_ERROR,
    )
