"""AWQ: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2023,
arXiv 2306.00978).

Few input channels carry large activations, and rounding errors of their weights hurt most. §3.2: scale those weights
up before rounding to nearest, by mean|x|^ratio per input channel, and the activations down; the ratio of each product
is searched. Then (the paper's code) the largest weights of each group are clipped where that lowers the error.

Knows tensors of one block; the result is rounded to nearest in the scaled and clipped form, so kernels see nothing new.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from appliance.quantization.calibration.block import BlockWeights, ProductError, QuantizedBlock, require_groups
from appliance.quantization.calibration.folding import Folding, normalized, row_chunks
from appliance.quantization.calibration.output_error import OutputError
from appliance.quantization.calibration.statistics import BlockStatistics, InputStatistics
from appliance.quantization.weights import GroupedWeight, QuantizedWeight, concatenate, round_to_nearest

_SMALLEST = 1e-4  # of mean|x| of a channel that is not always zero, before the exponent


@dataclass(frozen=True)
class AwqOptions:
    group_size: int = 128
    num_ratios: int = 20  # exponents 0, 1/n, 2/n … tried; 0 is rounding to nearest
    clip: bool = True
    clip_steps: int = 10  # shrunken ranges tried
    smallest_clip: float = 0.5  # share of a group's range


def calibrate(block: BlockWeights, statistics: BlockStatistics, options: AwqOptions | None = None) -> QuantizedBlock:
    """Search, fold, clip and round all products of a block.

    No product's error on the sample is larger than with rounding to nearest. CheckpointError for weights with NaN,
    EngineBuildError for inputs with NaN, a product without inputs, and a group size that does not divide.
    """
    options = options or AwqOptions()
    block.check()
    statistics.check()
    require_groups(block, options.group_size)
    scales: dict[str, Tensor] = {}
    ratios: dict[str, float] = {}
    nearest: dict[str, float] = {}
    for key, _ in block.products():
        error = OutputError(block, key, statistics[key].sample)
        ratios[key], nearest[key] = _search(block, key, error, statistics[key], options)
        if ratios[key]:
            scales[key] = _channel_scales(block, key, statistics[key], ratios[key])
    folding = Folding(block, scales)
    weights: dict[str, QuantizedWeight] = {}
    errors: dict[str, ProductError] = {}
    choices: dict[str, str] = {}
    for key, _ in block.products():
        error = OutputError(block, key, statistics[key].sample)
        weights[key], result, share = _round(block, key, folding, error, options)
        errors[key] = ProductError(nearest[key], result)
        choices[key] = f"ratio {ratios[key]:.2f}, {share:.0%} of rows clipped"
    return QuantizedBlock(weights, folding.norms, folding.biases(), errors, choices)


# ---------------------------------------------------------------- scales


def _search(
    block: BlockWeights, key: str, error: OutputError, statistics: InputStatistics, options: AwqOptions
) -> tuple[float, float]:
    """(best exponent, error of rounding to nearest)."""
    best, nearest, lowest = 0.0, 0.0, float("inf")
    for step in range(options.num_ratios):
        ratio = step / options.num_ratios
        inputs = block.per_input(key, _channel_scales(block, key, statistics, ratio))

        def rounded(rows: slice, inputs: Tensor = inputs) -> Tensor:
            return round_to_nearest(error.weight[rows] * inputs, options.group_size).dequantize().div_(inputs)

        found = error.of(rounded)
        if not step:
            nearest = found
        if found < lowest:
            best, lowest = ratio, found
    return best, nearest


def _channel_scales(block: BlockWeights, key: str, statistics: InputStatistics, ratio: float) -> Tensor:
    """mean|x|^ratio, float32, in the form that `Folding` takes."""
    mean = statistics.mean_abs
    if key == "o":
        mean = block.o_inputs_by_v(mean).mean(0)
    return normalized(mean.clamp_min(_SMALLEST).pow(ratio), mean > 0)


# ---------------------------------------------------------------- clipping and rounding


def _round(
    block: BlockWeights, key: str, folding: Folding, error: OutputError, options: AwqOptions
) -> tuple[QuantizedWeight, float, float]:
    """(quantized weight, its error, share of the rows that are clipped). A row is clipped where that lowers its own
    error on the sample, as `_clipped` looks at one group at a time; and the product only where it gains as a whole.

    The authors' code leaves q and k unclipped, since what counts of them is their product. With that check of each row,
    clipping them gains as well: the built-in model then has 0.63 of the KL divergence of rounding to nearest, and
    without it 0.74."""
    sample = error.sample / folding.inputs[key] if key in folding.inputs else error.sample
    grams = group_grams(sample, options.group_size)
    plain: list[GroupedWeight] = []
    clipped: list[GroupedWeight] = []
    taken = 0
    for rows in row_chunks(error.weight):
        weight = folding.weight(key, rows)
        plain.append(round_to_nearest(weight, options.group_size))
        if options.clip:
            candidate = round_to_nearest(_clipped(weight, grams, options), options.group_size)
            better = _row_errors(sample, candidate, weight) < _row_errors(sample, plain[-1], weight)
            clipped.append(_with_rows(plain[-1], candidate, better))
            taken += int(better.sum())
        else:
            clipped.append(plain[-1])
    quantized = concatenate(plain)
    result = error.of(_unfolded(quantized, key, folding))
    if not taken:
        return quantized, result, 0.0
    candidate_whole = concatenate(clipped)
    clipped_result = error.of(_unfolded(candidate_whole, key, folding))
    if clipped_result >= result:
        return quantized, result, 0.0
    return candidate_whole, clipped_result, taken / error.weight.shape[0]


def _clipped(weight: Tensor, grams: Tensor, options: AwqOptions) -> Tensor:
    """weight [rows, in], each group clamped to the share of its largest magnitude that gives the least output error of
    the group after rounding; the full range on ties."""
    grouped = weight.unflatten(1, (-1, options.group_size))
    largest = grouped.abs().amax(-1, keepdim=True)
    best = torch.ones_like(largest)
    lowest = torch.full_like(largest, float("inf"))
    for step in range(options.clip_steps + 1):
        share = 1 - (1 - options.smallest_clip) * step / options.clip_steps
        limit = largest * share
        candidate = torch.minimum(torch.maximum(grouped, -limit), limit)
        difference = round_to_nearest(candidate.flatten(1), options.group_size).dequantize().sub_(weight)
        found = _group_errors(difference.view_as(grouped), grams)
        better = found < lowest
        lowest = torch.where(better, found, lowest)
        best = best.masked_fill_(better, share)
    limit = largest * best
    return torch.minimum(torch.maximum(grouped, -limit), limit).flatten(1)


def group_grams(sample: Tensor, group_size: int) -> Tensor:
    """sample [n, in] -> float32 [groups, group_size, group_size]: x^T x of each group's channels. With them the output
    error of a group is a quadratic form of the weight's, whatever the number of tokens."""
    grouped = sample.unflatten(1, (-1, group_size)).transpose(0, 1)  # [groups, n, size]
    return grouped.transpose(1, 2) @ grouped


def _group_errors(difference: Tensor, grams: Tensor) -> Tensor:
    """difference [rows, groups, size] -> [rows, groups, 1]: sum over tokens of the squared output error."""
    by_group = difference.transpose(0, 1)  # [groups, rows, size]
    return (by_group @ grams).mul_(by_group).sum(-1, keepdim=True).transpose(0, 1)


def _row_errors(sample: Tensor, quantized: GroupedWeight, weight: Tensor) -> Tensor:
    """[rows]: sum over tokens of the squared output error."""
    return (quantized.dequantize().sub_(weight) @ sample.T).square_().sum(1)


def _rows(weight: GroupedWeight, rows: slice) -> GroupedWeight:
    return GroupedWeight(weight.values[rows], weight.scales[rows], weight.zeros[rows])


def _with_rows(weight: GroupedWeight, other: GroupedWeight, where: Tensor) -> GroupedWeight:
    """A copy of `weight` in which the rows for which `where` (bool [rows]) is set come from `other`."""
    names = ("values", "scales", "zeros")
    return GroupedWeight(*(torch.where(where[:, None], getattr(other, n), getattr(weight, n)) for n in names))


def _unfolded(weight: QuantizedWeight, key: str, folding: Folding) -> Callable[[slice], Tensor]:
    """Rows of a folded, quantized weight, for the original inputs and outputs."""
    assert isinstance(weight, GroupedWeight)
    return lambda rows: folding.unfold_rows(key, _rows(weight, rows).dequantize(), rows)
