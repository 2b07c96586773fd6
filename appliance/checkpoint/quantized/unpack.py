"""Numbers out of the words of int4 checkpoints, and the checks that several layouts share. Imports torch."""

from __future__ import annotations

import torch
from torch import Tensor

from appliance.checkpoint.quantized.layout import Layer
from appliance.quantization.weights import GroupedWeight
from appliance.types import Quantization

_SMALLEST_SCALE = 2.0**-24  # the smallest float16 above zero
_LARGEST_SCALE = 65504.0


def nibbles(words: Tensor) -> Tensor:
    """int32 [..., n] -> uint8 [..., n, 8]: bits 0 to 3, 4 to 7, … of each word. (Files are little-endian.)"""
    octets = words.contiguous().view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), dim=-1).view(*words.shape, 8)


def float16_scales(layer: Layer, suffix: str, scales: Tensor) -> Tensor:
    """Scales as an engine stores them; float32 and bfloat16 are rounded, those below float16's range become its
    smallest number. CheckpointError for one above it."""
    if scales.dtype == torch.float16:
        return scales
    wide = scales.float()
    if bool((wide > _LARGEST_SCALE).any()):
        raise layer.wrong(suffix, f"a scale is {float(wide.max()):.3g}, allowed: up to {_LARGEST_SCALE:g}")
    return wide.clamp_min(_SMALLEST_SCALE).to(torch.float16)


def grouped_weight(
    layer: Layer, values: Tensor, scales: Tensor, zeros: Tensor, index: str | None, facts: Quantization
) -> GroupedWeight:
    """values uint8 [out, in] in the order of the inputs; scales float16 and zeros uint8 [out, groups], where one group
    only stands for all inputs; `index`: suffix of the tensor, int [in], that names the group of each input, if any."""
    groups = layer.in_features // facts.group_size
    if scales.shape[1] == 1 and groups > 1:
        scales, zeros, index = scales.expand(-1, groups), zeros.expand(-1, groups), None
    order = None
    if facts.act_order:
        order = torch.arange(layer.in_features, device=values.device)
        if index is not None:
            order = _order(layer, index, facts.group_size)
        values, order = values[:, order], order.to(torch.int32)
    elif index is not None:
        named = layer[index].long()
        in_order = torch.arange(layer.in_features, device=named.device) // facts.group_size
        if bool(named.any()) and not torch.equal(named, in_order):  # some wrote zeros where nothing was reordered
            raise layer.wrong(index, "inputs are not grouped in order, but the configuration says that they are")
    return GroupedWeight(values.contiguous(), scales.contiguous(), zeros.contiguous(), order)


def _order(layer: Layer, index: str, group_size: int) -> Tensor:
    """int64 [in]: the inputs sorted by their group, in their own order within one."""
    named = layer[index].long()
    groups = layer.in_features // group_size
    if bool((named < 0).any()) or bool((named >= groups).any()):
        raise layer.wrong(index, f"names groups outside of 0 to {groups - 1}")
    if bool((torch.bincount(named, minlength=groups) != group_size).any()):
        raise layer.wrong(index, f"its groups are not all of {group_size} inputs")
    return torch.argsort(named, stable=True)
