"""A model of an engine's shapes with made-up weights and as many layers as are wanted: to find out, before there are
weights, how its products are computed quickest and what is to be compiled. Knows layers and schemes; nothing of where
real weights come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from appliance.builder.convert import quantize
from appliance.distributed import GroupCollectives, TensorParallel
from appliance.layers.decoder import Decoder
from appliance.layers.linear import Linear
from appliance.quantization.scheme import PrecisionScheme
from appliance.runtime.loading import build_model
from appliance.types import ModelConfig

_STD = 0.02  # of the weights: activations keep their usual size


def describe_model(
    config: ModelConfig, scheme: str, dtype: torch.dtype, parameters: Mapping[str, Any], tp_size: int, layers: int
) -> Decoder:
    """The first of `tp_size` ranks' share of `layers` layers and of what surrounds them, on the meta device; of several
    ranks to time products with, not to run."""
    share = TensorParallel(0, tp_size)
    if tp_size > 1:  # products leave their scales to whoever adds up, as they do where own kernels do that
        absent = GroupCollectives(tp_size, torch.device("meta"))
        absent.own = object()
        share = TensorParallel(0, tp_size, absent)
    return build_model(msgspec.structs.replace(config, num_hidden_layers=layers), scheme, dtype, parameters, share)


def parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@torch.no_grad()
def make_up(model: Decoder, device: torch.device) -> None:
    """Give a model on the meta device random weights, stored as its schemes store them and prepared; norms are ones.
    Layers of one shape have the same numbers in memory of their own. EngineBuildError for a scheme that cannot round a
    weight alone."""
    model.load(_tensors(model, device), device)
    model.prepare(model.config.max_position_embeddings)


def _tensors(model: Decoder, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator(device).manual_seed(0)
    quantized: dict[tuple[int, int, PrecisionScheme], Mapping[str, Tensor]] = {}
    given: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, Linear):
            continue
        key = (module.out_features, module.in_features, module.scheme)
        if key not in quantized:
            quantized[key] = quantize(module.scheme, _normal(key[:2], model.dtype, generator))
        for suffix, tensor in quantized[key].items():
            given.add(f"{name}.{suffix}")
            yield f"{name}.{suffix}", tensor.clone()
    for name, parameter in list(model.named_parameters()):
        if name in given:
            continue
        if parameter.dim() > 1:
            yield name, _normal(tuple(parameter.shape), parameter.dtype, generator)
        else:
            make = torch.zeros if name.endswith(".bias") else torch.ones
            yield name, make(parameter.shape, dtype=parameter.dtype, device=device)


def _normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=generator.device, generator=generator) * _STD


def first_layers(model: Decoder, layers: int) -> Decoder:
    """The same weights with fewer layers: a model of its own for whoever runs it while another looks at the whole."""
    config = msgspec.structs.replace(model.config, num_hidden_layers=layers)
    with torch.device("meta"):
        few: Decoder = type(model)(config, next(_linear(model)).scheme, model.dtype, model.tp)
    few.rotary, few.embedding, few.norm, few.lm_head = model.rotary, model.embedding, model.norm, model.lm_head
    few.layers = nn.ModuleList(model.layers[i] for i in range(layers))
    return few


def _linear(model: Decoder) -> Iterator[Linear]:
    return (module for module in model.modules() if isinstance(module, Linear))
