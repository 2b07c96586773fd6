"""FP8 (e4m3) products with a scale per row of either side: quantization kernels and the library's products, one that
applies the scales and one that leaves them to the next kernel.

A row r of a matrix is stored as round(r / scale) with scale = max|r| / 448, in float32; 448 is the largest e4m3 number
(Micikevicius et al., "FP8 Formats for Deep Learning", 2022). The same serves weights (a row is an output channel) and
activations (a row is a token, scaled on the fly).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.deferred_scale import DeferredScale
from appliance.kernels.dependent_launch import launch_options

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST_AMAX = 1e-12  # a row of zeros gets a scale above zero, and zeros as values


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, size], rows may be strided -> (float8_e4m3fn [n, size], float32 [n, 1]) with x ≈ values * scales."""
    return quantize_rows_triton(x) if x.is_cuda else quantize_rows_reference(x)


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` in plain torch, any device."""
    x = x.float()
    scales = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_AMAX) * (1.0 / FP8_MAX)
    return (x / scales).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scales


def row_block(size: int) -> tuple[int, int]:
    """(BLOCK, num_warps) for kernels with one program per row: the whole row in registers up to 16384 numbers."""
    block = min(triton.next_power_of_2(size), 16384)
    return block, min(max(block // 512, 1), 16)


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    out_ptr,
    scales_ptr,
    x_stride,
    size,
    FP8_MAX: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one row; held in registers (WHOLE_ROW), or read twice, the second time from the L2 cache."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + column, mask=column < size, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), axis=0)
    if not WHOLE_ROW:
        for start in range(BLOCK, size, BLOCK):
            at = start + column
            part = tl.load(x_ptr + row * x_stride + at, mask=at < size, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(part), axis=0))
    scale = tl.maximum(largest, SMALLEST_AMAX) / FP8_MAX
    tl.store(scales_ptr + row, scale)
    y = tl.clamp(x / scale, -FP8_MAX, FP8_MAX)
    tl.store(out_ptr + row * size + column, y.to(out_ptr.dtype.element_ty), mask=column < size)
    if not WHOLE_ROW:
        for start in range(BLOCK, size, BLOCK):
            at = start + column
            part = tl.load(x_ptr + row * x_stride + at, mask=at < size, other=0.0).to(tl.float32)
            y = tl.clamp(part / scale, -FP8_MAX, FP8_MAX)
            tl.store(out_ptr + row * size + at, y.to(out_ptr.dtype.element_ty), mask=at < size)


def quantize_rows_triton(x: Tensor, values_dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    """`quantize_rows` as one kernel. With float32 as `values_dtype` values are scaled and not rounded, which tests ask
    for where there is no GPU: Triton's interpreter rounds to FP8 wrongly."""
    assert x.stride(-1) == 1
    n, size = x.shape
    values = torch.empty((n, size), dtype=values_dtype, device=x.device)
    scales = torch.empty((n, 1), dtype=torch.float32, device=x.device)
    block, num_warps = row_block(size)
    _quantize_rows_kernel[(n,)](
        x,
        values,
        scales,
        x.stride(0),
        size,
        FP8_MAX=FP8_MAX,
        SMALLEST_AMAX=SMALLEST_AMAX,
        BLOCK=block,
        WHOLE_ROW=size <= block,
        num_warps=num_warps,
        **launch_options(x.device),
    )
    return values, scales


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
