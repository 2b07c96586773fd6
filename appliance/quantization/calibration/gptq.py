"""GPTQ: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022,
arXiv 2210.17323).

Columns of a weight are rounded one after the other, and the error of each is made up for by the columns that are still
to come, as the Hessian of the output error (the mean of x x^T) says. Blocks are the quantization groups; errors reach
the columns behind a block in one product per block (§3.3, step 2), the columns of a block go through
`kernels/gptq_block.py`.

The paper takes the Cholesky factor U of the damped Hessian's inverse, H^-1 = U^T U. Here H = R R^T with R upper
triangular, which is the Cholesky factor of H with rows and columns reversed. Then U = R^-1, whose diagonal blocks are
the inverses of R's, and no other part of it is needed: with E the errors, original less rounded, of all columns before
block B, the block's weights with everything made up for are W_B + E R_B U_BB. One factorization, no inverse of the
matrix, and half of the memory (that GPTQ needs no inverse is also in Chee et al., 2023, arXiv 2307.13304, §4.3).

Knows tensors of one block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from appliance.errors import EngineBuildError
from appliance.kernels.gptq_block import gptq_block
from appliance.quantization.calibration.block import (
    PRODUCTS,
    BlockWeights,
    ProductError,
    QuantizedBlock,
    require_groups,
)
from appliance.quantization.calibration.folding import row_chunks
from appliance.quantization.calibration.output_error import OutputError
from appliance.quantization.calibration.statistics import BlockStatistics, InputStatistics
from appliance.quantization.weights import GroupedWeight, QuantizedWeight, group_scales, round_to_nearest

ActOrder = Literal["off", "static", "on"]
_LARGEST_DAMPING = 1.0


@dataclass(frozen=True)
class GptqOptions:
    """`act_order`: the order of the columns. "off": as they are. "on": by descending activation, with groups of
    neighbours in that order, which the engine has to store and the inputs to follow (`GroupedWeight.order`). "static":
    by descending activation, in groups of neighbouring columns whose scales come from the original weight, so that
    nothing is left of it at run time."""

    group_size: int = 128
    damping: float = 0.01  # of the Hessian's mean diagonal, added to the diagonal
    act_order: ActOrder = "static"
    scale_steps: int = 10  # shrunken ranges tried for each group's scale; 0: the full range
    smallest_scale: float = 0.7  # share of a group's range


def calibrate(block: BlockWeights, statistics: BlockStatistics, options: GptqOptions | None = None) -> QuantizedBlock:
    """Quantize all products of a block; norms and biases come back as they are. `statistics` with Hessians.

    No product's error on the sample is larger than with rounding to nearest. CheckpointError for weights with NaN,
    EngineBuildError for inputs with NaN, a product without inputs, a group size that does not divide, and a Hessian
    that no damping makes positive definite.
    """
    options = options or GptqOptions()
    block.check()
    statistics.check()
    require_groups(block, options.group_size)
    weights: dict[str, QuantizedWeight] = {}
    errors: dict[str, ProductError] = {}
    choices: dict[str, str] = {}
    for key, _ in block.products():
        weights[key], errors[key], choices[key] = calibrate_product(block, key, statistics[key], options)
    norms = {"input_norm": block.input_norm, "post_attention_norm": block.post_attention_norm}
    biases = {key: linear.bias for key, linear in block.products() if linear.bias is not None}
    return QuantizedBlock(weights, norms, biases, errors, choices)


def calibrate_product(
    block: BlockWeights, key: str, statistics: InputStatistics, options: GptqOptions
) -> tuple[QuantizedWeight, ProductError, str]:
    """One product of a block, for callers that gather the inputs of the next with this one quantized. Raises what
    `calibrate` does for Hessians; checks nothing else."""
    assert statistics.hessian is not None, "GPTQ needs BlockStatistics(hessian=True)"
    error = OutputError(block, key, statistics.sample)
    size = options.group_size
    nearest = error.of(lambda rows: round_to_nearest(error.weight[rows], size).dequantize())
    weight, damping = quantize(error.weight, statistics.hessian, options, f"{block.name}.{PRODUCTS[key]}")
    result = error.of(_rows_of(weight))
    if result <= nearest:
        return weight, ProductError(nearest, result), f"damping {damping:g}"
    plain = round_to_nearest(error.weight, size)
    if weight.order is not None:  # engines store one for every product, or for none
        plain = GroupedWeight(plain.values, plain.scales, plain.zeros, torch.arange(plain.shape[1]).to(weight.order))
    return plain, ProductError(nearest, nearest), "rounded to nearest, which is better here"


def quantize(
    weight: Tensor, hessian: Tensor, options: GptqOptions, name: str = "weight"
) -> tuple[GroupedWeight, float]:
    """(quantized weight, damping that it took). weight [out, in], float; hessian float32 [in, in]. Input channels that
    were always zero are rounded to nearest on their own: nothing is known of them. EngineBuildError, with `name`, where
    the Hessian cannot be factorized."""
    order = _column_order(hessian, options)
    factor, damping = _factorize(hessian, order, options, name)
    parts = [_quantize_rows(weight[rows].float(), factor, order, options) for rows in row_chunks(weight)]
    values, scales, zeros = (torch.cat([part[i] for part in parts]) for i in range(3))
    stored = order.to(torch.int32) if options.act_order == "on" and order is not None else None
    return GroupedWeight(values, scales, zeros, stored), damping


# ---------------------------------------------------------------- Hessian


def _column_order(hessian: Tensor, options: GptqOptions) -> Tensor | None:
    """int64 [in]: input channels by descending mean square, the first of equals first."""
    if options.act_order == "off":
        return None
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


@dataclass(frozen=True)
class _Factor:
    """H = R R^T, R upper triangular; blocks of `size` columns."""

    reversed_lower: Tensor  # float32 [in, in]: R with rows and columns reversed
    inverses: Tensor  # float32 [blocks, size, size]: U_BB, the inverses of R's diagonal blocks
    size: int

    def feedback(self, start: int) -> Tensor:
        """float32 [start, size]: what errors of the columns before `start` ask of the block that begins there."""
        end = self.reversed_lower.shape[0] - start
        above = self.reversed_lower[end:, end - self.size : end].flip(0, 1)
        return above @ self.inverses[start // self.size]


def _factorize(hessian: Tensor, order: Tensor | None, options: GptqOptions, name: str) -> tuple[_Factor, float]:
    """With the least damping, from the given one on in steps of ten, that makes the Hessian positive definite."""
    diagonal = hessian.diagonal()
    alive = diagonal > 0
    mean = diagonal.sum() / alive.sum() if bool(alive.any()) else diagonal.new_tensor(1.0)
    columns = torch.arange(hessian.shape[0], device=hessian.device) if order is None else order
    columns = columns.flip(0)
    damping = options.damping
    while damping <= _LARGEST_DAMPING:
        damped = hessian[columns][:, columns]
        damped.diagonal().add_(torch.where(alive, damping * mean, mean)[columns])
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped
        if not int(info):
            return _Factor(lower, _diagonal_inverses(lower, options.group_size), options.group_size), damping
        damping *= 10
    raise EngineBuildError(
        f"{name}: the Hessian of its inputs is not positive definite, even with {_LARGEST_DAMPING:g} of its mean "
        "diagonal added",
        hint="use a longer calibration text, or the scheme int4_awq",
    )


def _diagonal_inverses(reversed_lower: Tensor, size: int) -> Tensor:
    blocks = reversed_lower.shape[0] // size
    diagonal = torch.stack([reversed_lower[i : i + size, i : i + size] for i in range(0, blocks * size, size)])
    upper = diagonal.flip(0, 1, 2)
    return torch.linalg.solve_triangular(upper, torch.eye(size, device=upper.device).expand_as(upper), upper=True)


# ---------------------------------------------------------------- rounding


def _quantize_rows(
    weight: Tensor, factor: _Factor, order: Tensor | None, options: GptqOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(values uint8 [rows, in], scales float16 and zeros uint8 [rows, groups]) as `GroupedWeight` has them. weight
    float32 [rows, in]."""
    size = options.group_size
    static = _static_scales(weight, factor, order, options) if options.act_order == "static" else None
    groups = None if static is None or order is None else order // size
    ordered = weight if order is None else weight[:, order]
    values = torch.empty_like(ordered, dtype=torch.uint8)
    errors = torch.empty_like(ordered)  # original less rounded
    found: list[tuple[Tensor, Tensor]] = []
    for block, start in enumerate(range(0, ordered.shape[1], size)):
        here = slice(start, start + size)
        inverse = factor.inverses[block]
        pivots = inverse.diagonal()
        original = ordered[:, here]
        adjusted = torch.addmm(original, errors[:, :start], factor.feedback(start)) if start else original
        if static is not None and groups is not None:
            scales, zeros = (tensor[:, groups[here]].float() for tensor in static)
        else:
            found.append(_scales(adjusted, pivots, options))
            scales, zeros = (tensor[:, None].float() for tensor in found[-1])
        normalized = (inverse / pivots[:, None]).contiguous()
        values[:, here], errors[:, here] = gptq_block(adjusted, original, normalized, scales, zeros)
    if static is None or order is None:
        all_scales, all_zeros = (torch.stack([pair[i] for pair in found], dim=1) for i in range(2))
        return values, all_scales, all_zeros
    restored = torch.empty_like(values)
    restored[:, order] = values
    return restored, *static


def _static_scales(
    weight: Tensor, factor: _Factor, order: Tensor | None, options: GptqOptions
) -> tuple[Tensor, Tensor]:
    """(scales, zeros) [rows, groups] of a weight's own groups, before anything is rounded."""
    pivots = factor.inverses.diagonal(dim1=1, dim2=2).flatten()
    if order is not None:
        pivots = torch.empty_like(pivots).index_copy_(0, order, pivots)
    return _scales(weight.unflatten(1, (-1, options.group_size)), pivots.view(-1, options.group_size), options)


def _scales(groups: Tensor, pivots: Tensor, options: GptqOptions) -> tuple[Tensor, Tensor]:
    """(scales float16, zeros uint8) [...] of groups [..., size]: of the shares of each group's range that are tried the
    one with the least sum of (rounding error / pivot)^2, which is what rounding a column costs (the paper's equation
    2, pivot^2 being the inverse Hessian's diagonal number at the column's turn); the full range on ties."""
    low, high = groups.amin(-1), groups.amax(-1)
    scales, zeros = group_scales(low, high)
    if not options.scale_steps:
        return scales, zeros
    weights = pivots.square().reciprocal()
    lowest = _cost(groups, scales, zeros, weights)
    for step in range(1, options.scale_steps + 1):
        share = 1 - (1 - options.smallest_scale) * step / options.scale_steps
        other_scales, other_zeros = group_scales(low * share, high * share)
        cost = _cost(groups, other_scales, other_zeros, weights)
        better = cost < lowest
        lowest = torch.where(better, cost, lowest)
        scales = torch.where(better, other_scales, scales)
        zeros = torch.where(better, other_zeros, zeros)
    return scales, zeros


def _cost(groups: Tensor, scales: Tensor, zeros: Tensor, weights: Tensor) -> Tensor:
    scale, zero = scales.float().unsqueeze(-1), zeros.float().unsqueeze(-1)
    difference = (groups / scale).round_().add_(zero).clamp_(0, 15).sub_(zero).mul_(scale).sub_(groups)
    return difference.square_().mul_(weights).sum(-1)


def _rows_of(weight: GroupedWeight) -> Callable[[slice], Tensor]:
    def dequantized(rows: slice) -> Tensor:
        part = GroupedWeight(weight.values[rows], weight.scales[rows], weight.zeros[rows], weight.order)
        return part.dequantize()

    return dequantized
