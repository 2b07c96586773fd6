"""A model of an engine's shapes with made-up weights and as many layers as are wanted: to find out, before there are
weights, how its products are computed quickest and what is to be compiled. Knows layers and schemes; nothing of where
real weights come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import torch
from torch import nn

from appliance.distributed import GroupCollectives, TensorParallel
from appliance.layers.decoder import Decoder
from appliance.layers.linear import Linear
from appliance.runtime import random_weights
from appliance.runtime.loading import build_model
from appliance.types import ModelConfig


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


def make_up(model: Decoder, device: torch.device) -> None:
    """Give a model on the meta device random weights (`random_weights.fill`), prepared. EngineBuildError for a scheme
    that cannot round a weight alone."""
    random_weights.fill(model, device, 0)
    model.prepare(model.config.max_position_embeddings)


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
