"""Quantized weights as numbers, independent of any kernel's layout: what calibration and importers of others'
checkpoints produce, what schemes store (`PrecisionScheme.store`), and what every product is compared with.

Knows how to round to nearest, how to give the floats back, and what makes such a weight invalid; nothing of
calibration, files, packing or kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from appliance.errors import CheckpointError
from appliance.kernels.fp8_linear import quantize_rows_reference

INT4_MAX = 15  # values are 0..15
INT8_MAX = 127  # values are -127..127
_SMALLEST_SCALE = 2.0**-24  # the smallest float16 above zero
_LARGEST_SCALE = 65504.0  # the largest float16
_SMALLEST_AMAX = 1e-12  # a channel of zeros gets a scale above zero, and zeros as values


@dataclass(frozen=True)
class GroupedWeight:
    """4-bit integers, a scale and a zero point per group of consecutive columns of `values`:
    weight = (value - zero) * scale."""

    values: Tensor  # uint8 [out, in], 0..15
    scales: Tensor  # float16 [out, in // group_size], > 0, finite
    zeros: Tensor  # uint8 [out, in // group_size], 0..15 (symmetric checkpoints: 8)
    order: Tensor | None = None  # int32 [in]: act-order; column j of `values` multiplies input channel order[j]

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.values.shape

    @property
    def group_size(self) -> int:
        return self.values.shape[1] // self.scales.shape[1]

    def dequantize(self) -> Tensor:
        """float32 [out, in], columns in the order of the input channels."""
        grouped = self.values.unflatten(1, (-1, self.group_size)).float()
        weight = ((grouped - self.zeros.float().unsqueeze(-1)) * self.scales.float().unsqueeze(-1)).flatten(1)
        if self.order is None:
            return weight
        restored = torch.empty_like(weight)
        restored[:, self.order.long()] = weight
        return restored


@dataclass(frozen=True)
class ChannelWeight:
    """8-bit integers, symmetric, a scale per output channel: weight = value * scale."""

    values: Tensor  # int8 [out, in], -128..127
    scales: Tensor  # float32 [out, 1], > 0, finite

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.values.shape

    def dequantize(self) -> Tensor:
        """float32 [out, in]."""
        return self.values.float() * self.scales


@dataclass(frozen=True)
class Fp8Weight:
    """FP8 numbers with a scale per output channel: weight = value * scale."""

    values: Tensor  # float8_e4m3fn [out, in]
    scales: Tensor  # float32 [out, 1], > 0, finite; a scale per tensor is repeated
    input_scale: Tensor | None = None  # float32 [1]: static scale of the activations, per tensor

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.values.shape

    def dequantize(self) -> Tensor:
        """float32 [out, in]."""
        return self.values.float() * self.scales


QuantizedWeight = GroupedWeight | ChannelWeight | Fp8Weight


# ---------------------------------------------------------------- rounding to nearest


def group_scales(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(scales float16, zeros uint8) that spread 0..15 over [min(low, 0), max(high, 0)], any shape: asymmetric, zero
    itself exactly representable. The zero points belong to the rounded scales. Where the range is empty the scale is
    the smallest positive one."""
    low, high = low.float().clamp_max(0), high.float().clamp_min(0)
    scales = ((high - low) / INT4_MAX).clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float16)
    zeros = (-low / scales.float()).round_().clamp_(0, INT4_MAX)
    return scales, zeros.to(torch.uint8)


def symmetric_scales(largest: Tensor) -> tuple[Tensor, Tensor]:
    """(scales float16, zeros uint8, all 8) for numbers of at most `largest` magnitude, any shape."""
    scales = (largest.float() / 7.5).clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float16)
    return scales, torch.full_like(scales, 8, dtype=torch.uint8)


def quantize_groups(weight: Tensor, scales: Tensor, zeros: Tensor) -> GroupedWeight:
    """weight [out, in] rounded to the nearest value of each group's grid; scales and zeros [out, in // group_size].
    Values outside of the grid get its end."""
    grouped = weight.float().unflatten(1, (scales.shape[1], -1))
    values = (grouped / scales.float().unsqueeze(-1)).round_().add_(zeros.float().unsqueeze(-1)).clamp_(0, INT4_MAX)
    return GroupedWeight(values.to(torch.uint8).flatten(1), scales, zeros)


def round_to_nearest(weight: Tensor, group_size: int, *, symmetric: bool = False) -> GroupedWeight:
    """weight [out, in], float -> int4, asymmetric unless told otherwise; `group_size` divides in."""
    assert weight.shape[1] % group_size == 0, (weight.shape, group_size)
    grouped = weight.float().unflatten(1, (-1, group_size))
    if symmetric:
        return quantize_groups(weight, *symmetric_scales(grouped.abs().amax(-1)))
    return quantize_groups(weight, *group_scales(grouped.amin(-1), grouped.amax(-1)))


def round_to_nearest_int8(weight: Tensor) -> ChannelWeight:
    """weight [out, in], float -> int8 with a scale per row, its largest magnitude / 127."""
    weight = weight.float()
    scales = weight.abs().amax(-1, keepdim=True).clamp_min(_SMALLEST_AMAX) / INT8_MAX
    values = (weight / scales).round_().clamp_(-INT8_MAX, INT8_MAX)
    return ChannelWeight(values.to(torch.int8), scales)


def round_to_nearest_fp8(weight: Tensor) -> Fp8Weight:
    """weight [out, in], float -> e4m3 with a scale per row, its largest magnitude / 448."""
    return Fp8Weight(*quantize_rows_reference(weight))


# ---------------------------------------------------------------- rows, and what is invalid


def concatenate(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights with the same inputs on top of each other, as q, k and v are fused. All are of one kind and, if grouped,
    of one group size and order. Static input scales: the largest, as the layers share their input."""
    first = parts[0]
    values, scales = torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts])
    if isinstance(first, GroupedWeight):
        zeros = torch.cat([part.zeros for part in parts if isinstance(part, GroupedWeight)])
        return GroupedWeight(values, scales, zeros, first.order)
    if isinstance(first, ChannelWeight):
        return ChannelWeight(values, scales)
    inputs = [part.input_scale for part in parts if isinstance(part, Fp8Weight) and part.input_scale is not None]
    return Fp8Weight(values, scales, torch.stack(inputs).amax(0) if inputs else None)


def check(weight: QuantizedWeight, name: str) -> None:
    """CheckpointError, naming `name` (of the layer), for what cannot be a weight: a scale that is not finite or not
    above zero, a group size that does not divide, an order that is not one, tensors that do not fit each other."""
    problem = _problem(weight)
    if problem:
        raise CheckpointError(
            f"quantized weight {name!r}: {problem}", hint="the checkpoint is damaged or was not quantized properly"
        )


def _problem(weight: QuantizedWeight) -> str:
    out_features, in_features = weight.values.shape
    groups = weight.scales.shape[1]
    if weight.scales.shape[0] != out_features or not groups or in_features % groups:
        return f"{list(weight.scales.shape)} scales do not go with {list(weight.values.shape)} values"
    scales = weight.scales.float()
    if not bool(torch.isfinite(scales).all()):
        return "a scale is NaN or infinite"
    if bool((scales <= 0).any()):
        return "a scale is zero or negative"
    if isinstance(weight, GroupedWeight):
        if weight.zeros.shape != weight.scales.shape:
            return f"{list(weight.zeros.shape)} zero points do not go with {list(weight.scales.shape)} scales"
        if weight.order is not None and not _is_order(weight.order, in_features):
            return "its activation order does not name every input channel once"
    if isinstance(weight, Fp8Weight):
        if weight.values.isnan().any():
            return "a value is NaN"
        scale = weight.input_scale
        if scale is not None and not bool((torch.isfinite(scale) & (scale > 0)).all()):
            return "the scale of its input is not a finite number above zero"
    return ""


def _is_order(order: Tensor, size: int) -> bool:
    return order.shape == (size,) and torch.equal(order.sort().values.long(), torch.arange(size, device=order.device))
