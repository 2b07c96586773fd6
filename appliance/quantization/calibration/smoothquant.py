"""SmoothQuant: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models"
(2022, arXiv 2211.10438).

Int8 activations with one scale per token lose what is small beside a channel of outliers. §4: divide each input channel
by max|x|^alpha / max|w|^(1 - alpha) and multiply its weights by that, which moves the difficulty from activations to
weights, where there is a scale per output channel. The paper has one alpha for a model; here each product's own is
searched, by its output error with both sides rounded to int8, and where none helps nothing is moved.

Knows tensors of one block; weights are rounded to nearest, activations at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from appliance.quantization.calibration.block import BlockWeights, ProductError, QuantizedBlock
from appliance.quantization.calibration.folding import Folding, normalized, row_chunks
from appliance.quantization.calibration.output_error import OutputError
from appliance.quantization.calibration.statistics import BlockStatistics, InputStatistics
from appliance.quantization.weights import ChannelWeight, QuantizedWeight, concatenate, round_to_nearest_int8

_SMALLEST = 1e-5  # of a channel's largest activation or weight


@dataclass(frozen=True)
class SmoothQuantOptions:
    alphas: tuple[float, ...] = tuple(step / 10 for step in range(1, 10))  # tried, beside no migration at all


def calibrate(
    block: BlockWeights, statistics: BlockStatistics, options: SmoothQuantOptions | None = None
) -> QuantizedBlock:
    """Search alpha, fold and round all products of a block.

    `ProductError.nearest` is that of int8 without migration. CheckpointError for weights with NaN, EngineBuildError for
    inputs with NaN and a product without inputs.
    """
    options = options or SmoothQuantOptions()
    block.check()
    statistics.check()
    scales: dict[str, Tensor] = {}
    nearest: dict[str, float] = {}
    choices: dict[str, str] = {}
    for key, _ in block.products():
        error = OutputError(block, key, statistics[key].sample)
        nearest[key] = lowest = _simulated_error(error, None)
        choices[key] = "no migration"
        largest_weights = _largest_weights(block, key)
        for alpha in options.alphas:
            candidate = _channel_scales(block, key, statistics[key], largest_weights, alpha)
            found = _simulated_error(error, block.per_input(key, candidate))
            if found < lowest:
                lowest, scales[key], choices[key] = found, candidate, f"alpha {alpha:.2f}"
    folding = Folding(block, scales)
    weights: dict[str, QuantizedWeight] = {}
    errors: dict[str, ProductError] = {}
    for key, _ in block.products():
        error = OutputError(block, key, statistics[key].sample)
        weight = concatenate([round_to_nearest_int8(folding.weight(key, rows)) for rows in row_chunks(error.weight)])
        inputs = folding.inputs.get(key)
        result = error.of(_unfolded(weight, key, folding), round_tokens(error.sample, inputs))
        weights[key], errors[key] = weight, ProductError(nearest[key], result)
    return QuantizedBlock(weights, folding.norms, folding.biases(), errors, choices)


def round_tokens(x: Tensor, inputs: Tensor | None = None) -> Tensor:
    """x float32 [n, in] -> what is left of it after int8 with one scale per token, as the products of the int8 scheme
    take it: divided by `inputs` [in] before that is done and multiplied again behind it."""
    x = x if inputs is None else x / inputs
    rounded = round_to_nearest_int8(x).dequantize()
    return rounded if inputs is None else rounded.mul_(inputs)


def _simulated_error(error: OutputError, inputs: Tensor | None) -> float:
    """With inputs divided and weights multiplied by `inputs` [in], both sides rounded to int8."""

    def rounded(rows: slice) -> Tensor:
        weight = error.weight[rows].float()
        if inputs is None:
            return round_to_nearest_int8(weight).dequantize()
        return round_to_nearest_int8(weight * inputs).dequantize().div_(inputs)

    return error.of(rounded, round_tokens(error.sample, inputs))


def _largest_weights(block: BlockWeights, key: str) -> Tensor:
    """float32 [in]: max|w| over the output channels; for "o" per row of v."""
    weight: Tensor = getattr(block, key).weight
    largest = torch.stack([weight[rows].abs().amax(0) for rows in row_chunks(weight)]).amax(0).float()
    return block.o_inputs_by_v(largest).amax(0) if key == "o" else largest


def _channel_scales(
    block: BlockWeights, key: str, statistics: InputStatistics, largest_weights: Tensor, alpha: float
) -> Tensor:
    """Equation 4, in the form that `Folding` takes."""
    largest = statistics.max_abs
    if key == "o":
        largest = block.o_inputs_by_v(largest).amax(0)
    scales = largest.clamp_min(_SMALLEST).pow(alpha) / largest_weights.clamp_min(_SMALLEST).pow(1 - alpha)
    return normalized(scales, (largest > 0) & (largest_weights > 0))


def _unfolded(weight: QuantizedWeight, key: str, folding: Folding) -> Callable[[slice], Tensor]:
    """Rows of a folded, quantized weight, for the original inputs and outputs."""

    def dequantized(rows: slice) -> Tensor:
        part = ChannelWeight(weight.values[rows], weight.scales[rows])
        return folding.unfold_rows(key, part.dequantize(), rows)

    return dequantized
