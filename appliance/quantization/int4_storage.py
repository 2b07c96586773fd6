"""What the INT4 schemes share: 4-bit weights with a scale and a zero point per group of inputs, packed as kernels read
them (`kernels/int4_layout.py`), and products with activations in 16 bits (W4A16).

How the 4-bit values were found (rounded to nearest, by AWQ, by GPTQ, by somebody else) does not show here. Parameters:

- `group_size`: inputs that share a scale; 0 means all inputs of a layer.
- `act_order`: an `order` is stored; position j of a row multiplies input channel order[j].
- `head`, `unquantized`: see `quantization/scheme.py`.

On the CPU weights are dequantized once after loading, to float32, or packed for torch's product
(`kernels/cpu_linear.py`). On a GPU they stay packed, and the ways to multiply them (`kernels/int4_linear.py`) are
tactics.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.errors import EngineBuildError
from appliance.kernels import cpu_linear
from appliance.kernels.int4_layout import PER_WORD, pack, unpack
from appliance.kernels.int4_linear import Way, int4_linear, ways
from appliance.kernels.tactics import TABLE, Tactics
from appliance.quantization.scheme import Activation, PrecisionScheme
from appliance.quantization.weights import GroupedWeight, QuantizedWeight, round_to_nearest


def to_stored(weight: GroupedWeight) -> dict[str, Tensor]:
    """weight int32 [out, in // 8], scale_zero float16 [out, in // group_size, 2]; order int32 [in] if there is one."""
    tensors = {
        "weight": pack(weight.values),
        "scale_zero": torch.stack([weight.scales, weight.zeros.to(torch.float16)], -1),
    }
    return tensors if weight.order is None else tensors | {"order": weight.order.to(torch.int32)}


def from_stored(tensors: dict[str, Tensor]) -> GroupedWeight:
    """The inverse of `to_stored`."""
    scales, zeros = tensors["scale_zero"].unbind(-1)
    return GroupedWeight(unpack(tensors["weight"]), scales.contiguous(), zeros.to(torch.uint8), tensors.get("order"))


class Int4Scheme(PrecisionScheme):
    """Base of the INT4 plug-ins."""

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(parameters)
        if self.group_size < 0:
            raise EngineBuildError(f"group_size is {self.group_size}; allowed: 0 for all inputs of a layer, or more")

    @property
    def group_size(self) -> int:
        """Inputs per scale; 0: all of a layer."""
        return int(self.parameters["group_size"])

    @property
    def input_multiple(self) -> int:
        return math.lcm(PER_WORD, self.group_size or 1)

    def groups(self, in_features: int) -> int:
        """Scales of an output channel. EngineBuildError if the input size is no multiple of `input_multiple`."""
        if in_features % self.input_multiple:
            raise EngineBuildError(
                f"INT4 in groups of {self.group_size} needs input sizes that are multiples of {self.input_multiple}, "
                f"and a layer has {in_features}",
                hint="choose a profile of another precision, for example bf16",
            )
        return in_features // self.group_size if self.group_size else 1

    def tensors(
        self, out_features: int, in_features: int, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": ((out_features, in_features // PER_WORD), torch.int32),
            "scale_zero": ((out_features, self.groups(in_features), 2), torch.float16),
        }
        if self.parameters["act_order"]:
            stored["order"] = ((in_features,), torch.int32)
        return stored

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        groups = self.groups(weight.shape[1])
        return self.store(round_to_nearest(weight, weight.shape[1] // groups))

    def store(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        if not isinstance(weight, GroupedWeight):
            return super().store(weight)
        out_features, in_features = weight.shape
        ordered = bool(self.parameters["act_order"])
        if weight.scales.shape != (out_features, self.groups(in_features)) or (weight.order is not None) > ordered:
            raise EngineBuildError(
                f"an INT4 weight in groups of {weight.group_size}, {'with' if weight.order is not None else 'without'} "
                f"an order, does not fit an engine of group_size {self.group_size}, act_order {ordered}",
                hint="the parameters of the scheme must be those of the weights",
            )
        tensors = to_stored(weight)
        if ordered and weight.order is None:  # a layer without one among others
            tensors["order"] = torch.arange(in_features, dtype=torch.int32, device=weight.values.device)
        return tensors

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if tensors["weight"].is_cuda:
            return tensors
        weight = from_stored(tensors)
        (n, k), groups = weight.shape, weight.scales.shape[1]
        if not cpu_linear.packing() or not cpu_linear.fits_int4(n, k, groups):
            return {"weight": weight.dequantize()}
        packed = cpu_linear.pack_int4(weight.values, weight.scales, weight.zeros)
        return packed if weight.order is None else packed | {"order": weight.order}

    def apply(self, tensors: dict[str, Tensor], x: Activation, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        assert isinstance(x, Tensor), "this scheme takes activations in the model's dtype"
        if "packed" in tensors:
            x = x[:, tensors["order"]] if "order" in tensors else x
            return cpu_linear.int4_linear(tensors, x, bias).to(dtype)
        weight = tensors["weight"]
        if not weight.is_cuda:
            return F.linear(x.float(), weight, None if bias is None else bias.float()).to(dtype)
        (n, words), rows = weight.shape, x.shape[0]
        k = words * PER_WORD
        tactic = TABLE.find(self._table_name(k), n, k, rows, lambda bucket: self.tactics(n, k, bucket, weight.device))
        product: Tensor = (tactic or _product)(tensors, x, bias, dtype)
        return product

    def tactics(self, out_features: int, in_features: int, rows: int, device: torch.device) -> Tactics:
        if device.type != "cuda":
            return {}
        group = in_features // self.groups(in_features)
        found = ways(out_features, in_features, group, rows, device)
        return {name: functools.partial(_product, way=way) for name, way in found.items()}

    def _table_name(self, in_features: int) -> str:
        """The same for both plug-ins, whose products are the same."""
        order = " ordered" if self.parameters["act_order"] else ""
        return f"int4 g{in_features // self.groups(in_features)}{order}"


def _product(
    tensors: dict[str, Tensor], x: Tensor, bias: Tensor | None, dtype: torch.dtype, way: Way | None = None
) -> Tensor:
    """A tactic: one of the ways to multiply packed weights; without one, the default for as many rows."""
    return int4_linear(x.to(dtype), tensors["weight"], tensors["scale_zero"], bias, tensors.get("order"), way)
