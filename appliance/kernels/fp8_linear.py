"""The library's FP8 (e4m3) products with a scale per row of either side (`kernels/row_quantization.py`): one that
applies the scales, and one that leaves them to the next kernel. Knows nothing of who made the numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.kernels.deferred_scale import DeferredScale
from appliance.kernels.row_quantization import FP8 as FP8
from appliance.kernels.row_quantization import FP8_MAX as FP8_MAX
from appliance.kernels.row_quantization import quantize_rows as quantize_rows
from appliance.kernels.row_quantization import quantize_rows_reference as quantize_rows_reference

_ones: dict[torch.device, Tensor] = {}


def _one(device: torch.device) -> Tensor:
    """The scale 1, float32, kept per device."""
    if device not in _ones:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # A number made now would belong to the graph.
            raise RuntimeError("run a deferred product once on this device before one is captured in a CUDA graph")
        with torch.inference_mode(False):
            _ones[device] = torch.ones((), dtype=torch.float32, device=device)
    return _ones[device]


def fp8_linear_deferred(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None
) -> DeferredScale:
    """(values * scales) @ (weight * weight_scales).T + bias with scales and bias left to whoever takes the result; in
    bfloat16. Arguments as in `fp8_linear`. The product behind it is the library's with one scale per matrix."""
    if values.shape[0] == 0:
        raw = values.new_empty((0, weight.shape[0]), dtype=torch.bfloat16)
    else:
        one = _one(values.device)
        raw = torch._scaled_mm(
            values, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return DeferredScale(raw, scales, weight_scales, bias)


def fp8_linear_deferred_reference(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> DeferredScale:
    """`fp8_linear_deferred` in plain torch, any device, unscaled sums rounded to `dtype`."""
    return DeferredScale(F.linear(values.float(), weight.float()).to(dtype), scales, weight_scales, bias)


def fp8_linear(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(values * scales) @ (weight * weight_scales).T + bias on a GPU with FP8 tensor cores.

    values float8 [n, in], scales float32 [n, 1]; weight float8 [out, in], both row-major, in and out multiples of 16;
    weight_scales float32 [1, out]; bias [out] or None. Returns `dtype` [n, out]; accumulates in float32 and rounds to
    bfloat16, the only output that the row-wise scaled product has on all GPUs.
    """
    if values.shape[0] == 0:
        return values.new_empty((0, weight.shape[0]), dtype=dtype)
    in_product = bias if dtype == torch.bfloat16 else None  # a bias goes into the product in its output's dtype
    # weight.t() is the column-major right side that the product asks for.
    out = torch._scaled_mm(
        values,
        weight.t(),
        scale_a=scales,
        scale_b=weight_scales,
        bias=in_product,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    ).to(dtype)
    return out if bias is None or bias is in_product else out + bias


def fp8_linear_reference(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`fp8_linear` in plain torch, any device, float32 inside."""
    product = F.linear(values.float(), weight.float()) * scales * weight_scales
    return (product if bias is None else product + bias.float()).to(dtype)
