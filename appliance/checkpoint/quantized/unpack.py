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
    layer: Layer, values: Tensor, scales: Tensor, zeros: Tensor, group_index: Tensor | None, facts: Quantization
) -> GroupedWeight:
    """values uint8 [out, in] in the order of the inputs; scales float16 and zeros uint8 [out, groups], where one group
    only stands for all inputs; group_index int32 [in] or None."""
    groups = layer.in_features // facts.group_size
    one_for_all = scales.shape[1] == 1 and groups > 1
    if one_for_all:
        scales, zeros = (tensor.expand(-1, groups) for tensor in (scales, zeros))
    order = None
    if facts.act_order:
        if one_for_all or group_index is None:
            order = torch.arange(layer.in_features, device=values.device)
        else:
            order = _order(layer, group_index, facts.group_size)
        values = values[:, order]
        order = order.to(torch.int32)
    elif group_index is not None and not one_for_all:
        expected = torch.arange(layer.in_features, dtype=torch.int32, device=group_index.device) // facts.group_size
        if not torch.equal(group_index.to(torch.int32), expected):
            raise layer.wrong("g_idx", "inputs are not grouped in order, but the configuration says that they are")
    return GroupedWeight(values.contiguous(), scales.contiguous(), zeros.contiguous(), order)


def _order(layer: Layer, group_index: Tensor, group_size: int) -> Tensor:
    """int64 [in]: the inputs sorted by their group, in their own order within one."""
    index = group_index.long()
    groups = layer.in_features // group_size
    if bool((index < 0).any()) or bool((index >= groups).any()):
        raise layer.wrong("g_idx", f"names groups outside of 0 to {groups - 1}")
    if bool((torch.bincount(index, minlength=groups) != group_size).any()):
        raise layer.wrong("g_idx", f"its groups are not all of {group_size} inputs")
    return torch.argsort(index, stable=True)
