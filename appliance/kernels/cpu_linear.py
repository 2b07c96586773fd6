"""Products of quantized weights on the CPU, by the kernels that torch brings: INT8 by oneDNN (W8A8, exact sums), INT4
by torch's own (W4A16, activations rounded to bfloat16).

They read an eighth to a quarter of the bytes that float32 weights have. Which of them this CPU has is found out by
trying: oneDNN's INT8 products are exact only with instructions for them (VNNI, AMX), and wrong by saturation without.
The plain reference is the product with the dequantized weight in float32: schemes take it unless they are prepared
within `packed`, and where this module cannot serve. Knows nothing of schemes and layers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

_INT4_ROWS = 16  # of a packed INT4 weight, by which its rows must be divisible
_INT4_GROUPS = (256, 128, 64, 32)  # inputs per scale that torch's INT4 product has
_WIDENED_ROWS = 256  # from so many rows of x on, INT4 weights are dequantized in blocks, for products in float32
_ZERO = 128  # what is added to INT8 activations, because oneDNN is quickest with unsigned ones

_packing = False


@contextlib.contextmanager
def packed() -> Iterator[None]:
    """Weights that are prepared meanwhile, in the whole process, are packed for quick products where this CPU has
    those."""
    global _packing
    before, _packing = _packing, True
    try:
        yield
    finally:
        _packing = before


def packing() -> bool:
    """Whether weights are to be packed."""
    return _packing


# ---------------------------------------------------------------- INT8


def pack_int8(weight: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """weight int8 [out, in], scales float32 [out, 1] -> what `int8_linear` takes."""
    return {
        "packed": torch.ops.onednn.qlinear_prepack(weight.contiguous(), None),
        "weight_scale": scales.reshape(-1).float().contiguous(),
        "zero_points": torch.zeros(weight.shape[0], dtype=torch.int64),
    }


def int8_linear(tensors: dict[str, Tensor], values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """(values * scales) @ (weight * weight_scales).T + bias: float32 [n, out]. values int8 [n, in], scales float32
    [n, 1], bias [out] or None; `tensors` as `pack_int8` gives them. The reference is
    `kernels.int8_linear.int8_linear_reference`."""
    weight_scales = tensors["weight_scale"]
    if values.shape[0] == 0:
        return torch.empty((0, weight_scales.shape[0]), dtype=torch.float32)
    unsigned = values.contiguous().view(torch.uint8) ^ _ZERO
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned,
        1.0,
        _ZERO,
        tensors["packed"],
        weight_scales,
        tensors["zero_points"],
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    product.mul_(scales)
    return product if bias is None else product.add_(bias.float())


@functools.cache
def has_int8() -> bool:
    """Whether this CPU and this torch compute INT8 products exactly, the largest ones too."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (48, 320), generator=generator, dtype=torch.int8)
    values = torch.randint(-127, 128, (5, 320), generator=generator, dtype=torch.int8)
    weight[:16], values[0], values[1] = 127, 127, -127
    ones = torch.ones(5, 1)
    try:
        found = [
            int8_linear(pack_int8(weight, torch.ones(48, 1)), x, ones[: len(x)], None) for x in (values, values[:1])
        ]
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):  # not in this build of torch, or other there
        return False
    exact = values.double() @ weight.double().T
    return torch.equal(found[0].double(), exact) and torch.equal(found[1].double(), exact[:1])


# ---------------------------------------------------------------- INT4


def pack_int4(values: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    """values uint8 [out, in], 0..15; scales [out, in // group_size], any float; zeros uint8, likewise: weight =
    (value - zero) * scale -> what `int4_linear` takes. `fits_int4` said that it can be."""
    group_size = values.shape[1] // scales.shape[1]
    repeats = group_size // next(size for size in _INT4_GROUPS if group_size % size == 0)
    # torch's product has weight = (value - 8) * scale + offset.
    offsets = (8 - zeros.float()) * scales.float()
    scale_zero = torch.stack([scales.float(), offsets], -1).repeat_interleave(repeats, 1).transpose(0, 1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int(), 1)
    return {"packed": packed, "scale_zero": scale_zero.to(torch.bfloat16).contiguous()}


def int4_linear(tensors: dict[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """x [n, in], any float, @ weight.T + bias: float32 [n, out]. `tensors` as `pack_int4` gives them. Few rows of x are
    rounded to bfloat16, and so is their product before the bias. The reference is the product with the dequantized
    weight."""
    scale_zero = tensors["scale_zero"]
    rows, out_features = x.shape[0], scale_zero.shape[1]
    if rows == 0:
        return torch.empty((0, out_features), dtype=torch.float32)
    width = _block_width()
    if rows >= _WIDENED_ROWS and width and out_features % width == 0:
        product = _widened(tensors, x.float(), width)
    else:
        group_size = x.shape[1] // scale_zero.shape[0]
        rounded = x.to(torch.bfloat16).contiguous()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(rounded, tensors["packed"], group_size, scale_zero).float()
    return product if bias is None else product.add_(bias.float())


def _widened(tensors: dict[str, Tensor], x: Tensor, width: int) -> Tensor:
    """x float32 [n, in] @ weight.T, `width` rows of the weight at a time dequantized to float32 in the CPU's caches."""
    scale_zero, size = tensors["scale_zero"].float(), x.shape[1]
    blocks = tensors["packed"].view(-1, size, width // 2)
    out = torch.empty((x.shape[0], scale_zero.shape[1]), dtype=torch.float32)
    for block, halves in enumerate(blocks):
        columns = slice(block * width, (block + 1) * width)
        scale, offset = scale_zero[:, columns].unsqueeze(2).unbind(-1)  # each [groups, width, 1]
        scale, offset = scale.transpose(1, 2), offset.transpose(1, 2)
        values = _nibbles(halves).float().unflatten(0, (scale.shape[0], -1))
        weight = torch.addcmul(offset - 8 * scale, values, scale).flatten(0, 1)  # [in, width]
        torch.mm(x, weight, out=out[:, columns])
    return out


def _nibbles(halves: Tensor) -> Tensor:
    """What torch keeps of a block of weight rows, uint8 [in, width / 2] -> values uint8 [in, width]."""
    return torch.cat([halves & 15, halves >> 4], -1)


@functools.cache
def _block_width() -> int:
    """Weight rows that torch packs together, lower half in the low bits, on this CPU; 0: it packs otherwise."""
    values = torch.randint(0, 16, (128, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    for width in (64, 32):
        blocks = _nibbles(packed.view(-1, 32, width // 2))
        if torch.equal(blocks.transpose(1, 2).reshape(128, 32).int(), values):
            return width
    return 0


def fits_int4(out_features: int, in_features: int, groups: int) -> bool:
    """Whether torch's INT4 product takes a weight of that shape with so many groups of inputs, on this CPU."""
    return out_features % _INT4_ROWS == 0 and (in_features // groups) % _INT4_GROUPS[-1] == 0 and _has_int4()


@functools.cache
def _has_int4() -> bool:
    """Whether this torch has INT4 products and they are right."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 16, (32, 64), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (32, 2), generator=generator, dtype=torch.uint8)
    x = torch.randint(-3, 4, (2, 64), generator=generator).float()
    try:
        found = int4_linear(pack_int4(values, torch.ones(32, 2), zeros), x, None)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    exact = x @ (values.float() - zeros.float().repeat_interleave(32, 1)).T
    return torch.allclose(found, exact, rtol=2**-7, atol=1e-3)
