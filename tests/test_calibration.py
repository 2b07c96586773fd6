"""Calibration of a block: each algorithm is clearly better than rounding to nearest, and none fails on odd input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calibration_blocks import (
    HIDDEN,
    INTERMEDIATE,
    dequantized_block,
    gathered,
    random_block,
    relative,
    run,
    tokens,
)
from torch import Tensor

from appliance import registry
from appliance.errors import CheckpointError, EngineBuildError
from appliance.quantization.calibration import awq, gptq, smoothquant
from appliance.quantization.calibration import folding as folding_module
from appliance.quantization.calibration.block import PRODUCTS, BlockWeights, LinearWeights, QuantizedBlock
from appliance.quantization.calibration.folding import row_chunks
from appliance.quantization.calibration.output_error import OutputError
from appliance.quantization.calibration.statistics import BlockStatistics, InputStatistics
from appliance.quantization.weights import (
    GroupedWeight,
    check,
    group_scales,
    round_to_nearest,
    round_to_nearest_int8,
)

GROUP = 32
AWQ = awq.AwqOptions(group_size=GROUP)
GPTQ = gptq.GptqOptions(group_size=GROUP)


def rounded_block(block: BlockWeights, group_size: int) -> BlockWeights:
    return replace(
        block,
        **{
            key: LinearWeights(round_to_nearest(linear.weight, group_size).dequantize(), linear.bias)
            for key, linear in block.products()
        },
    )


# ---------------------------------------------------------------- algorithms


def result_of(algorithm: str, block: BlockWeights, x: Tensor) -> QuantizedBlock:
    return calibrated(algorithm, block, gathered(block, x, hessian=algorithm.startswith("gptq")))


def calibrated(algorithm: str, block: BlockWeights, statistics: BlockStatistics) -> QuantizedBlock:
    if algorithm == "awq":
        return awq.calibrate(block, statistics, AWQ)
    if algorithm == "smoothquant":
        return smoothquant.calibrate(block, statistics)
    return gptq.calibrate(block, statistics, replace(GPTQ, act_order=algorithm.removeprefix("gptq-")))


ALGORITHMS = ["awq", "gptq-off", "gptq-static", "gptq-on", "smoothquant"]
# Largest share of the error of rounding to nearest that is left, per product, on tokens that calibration has not seen.
LEFT = {"awq": 0.7, "gptq-off": 0.6, "gptq-static": 0.55, "gptq-on": 0.6, "smoothquant": 0.7}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_better_than_rounding_to_nearest(algorithm: str) -> None:
    block = random_block(bias=True)
    quantized = result_of(algorithm, block, tokens(1024))
    unseen = gathered(block, tokens(256, seed=2))
    folded = {"awq", "smoothquant"} & {algorithm}
    for key, linear in block.products():
        check(quantized.weights[key], key)
        found = quantized.errors[key]
        assert 0 < found.result < LEFT[algorithm] * found.nearest, (key, found)
        if not folded:
            error = OutputError(block, key, unseen[key].sample)
            weight = quantized.weights[key].dequantize()
            nearest = error.of(lambda rows, w=linear.weight: round_to_nearest(w, GROUP).dequantize()[rows])
            assert error.of(lambda rows, w=weight: w[rows]) < LEFT[algorithm] * nearest


def test_smoothquant_on_unseen_tokens() -> None:
    """With activations rounded as the int8 products do, against int8 without migration."""
    block = random_block()
    quantized = result_of("smoothquant", block, tokens(1024))
    unseen = gathered(block, tokens(256, seed=2))
    for key, linear in block.products():
        error = OutputError(block, key, unseen[key].sample)
        plain = round_to_nearest_int8(linear.weight).dequantize()
        nearest = error.of(lambda rows, w=plain: w[rows], smoothquant.round_tokens(error.sample))
        inputs, rows_by = original_form(block, quantized, key)
        result = error.of(lambda rows, w=rows_by: w[rows], smoothquant.round_tokens(error.sample, inputs))
        assert result < LEFT["smoothquant"] * nearest, key


def original_form(block: BlockWeights, quantized: QuantizedBlock, key: str) -> tuple[Tensor, Tensor]:
    """(what the inputs are divided by, the quantized weight for the original inputs and outputs), both worked out from
    the folded norms and from the rows of the weight in front."""
    weight = quantized.weights[key].dequantize()
    least = {k: quantized.weights[k].dequantize() for k in ("qkv", "gate_up")}
    norm = {"qkv": "input_norm", "gate_up": "post_attention_norm"}
    inputs = {k: getattr(block, name) / quantized.norms[name] for k, name in norm.items()}
    # rows of v and up, where the scale of the input channels is known, show by how much they were divided
    divided = {
        k: (getattr(block, k).weight.norm(dim=1) / (least[k] / inputs[k]).norm(dim=1)) for k in ("qkv", "gate_up")
    }
    if key in norm:
        return inputs[key], weight / inputs[key] * divided[key][:, None]
    scales = divided["qkv"][block.v_rows] if key == "o" else divided["gate_up"][block.up_rows]
    scales = block.per_input(key, scales)
    return scales, weight / scales


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_whole_block(algorithm: str) -> None:
    """What an engine would compute: folded norms, biases and weights fit together."""
    block = random_block(bias=True)
    quantized = result_of(algorithm, block, tokens(512))
    x = tokens(128, seed=3)
    plain = rounded_block(block, GROUP)
    limit = 0.75 * relative(run(plain, x), run(block, x)) if algorithm != "smoothquant" else 0.1
    assert relative(run(dequantized_block(block, quantized), x), run(block, x)) < limit


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_results_on_every_run(algorithm: str) -> None:
    first, second = (result_of(algorithm, random_block(bias=True), tokens(256)) for _ in range(2))
    assert first.errors == second.errors and first.choices == second.choices
    for key in PRODUCTS:
        assert torch.equal(first.weights[key].values, second.weights[key].values)
        assert torch.equal(first.weights[key].scales, second.weights[key].scales)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rows_in_parts_give_the_same(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = result_of(algorithm, random_block(bias=True), tokens(256))
    monkeypatch.setattr(folding_module, "_CHUNK", 50 * HIDDEN)
    assert len(list(row_chunks(random_block().qkv.weight))) > 4
    parts = result_of(algorithm, random_block(bias=True), tokens(256))
    for key in PRODUCTS:
        a, b = whole.weights[key], parts.weights[key]
        # sums in another order may turn a tie
        assert float((a.values != b.values).float().mean()) < 0.01
        assert parts.errors[key].result == pytest.approx(whole.errors[key].result, rel=0.02)


def test_rows_are_clipped_where_that_lowers_their_error() -> None:
    """Those of q and k among them; all others stay as they are without clipping."""
    block = random_block()
    statistics = gathered(block, tokens(512))
    clipped = awq.calibrate(block, statistics, AWQ)
    without = awq.calibrate(block, statistics, replace(AWQ, clip=False))
    a, b = clipped.weights["qkv"], without.weights["qkv"]
    changed = (a.scales != b.scales).any(1)
    assert changed[: block.v_rows.start].any() and changed[block.v_rows].any() and not changed.all()
    assert torch.equal(a.values[~changed], b.values[~changed])
    assert clipped.errors["qkv"].result < without.errors["qkv"].result
    scales = (clipped.norms["input_norm"].float() / block.input_norm.float()).nan_to_num(1.0)
    x = statistics["qkv"].sample * scales
    folded = block.qkv.weight.float() / scales
    rows = changed & (torch.arange(len(changed)) < block.v_rows.start)  # v's rows also have o's scales
    errors = [((weight.dequantize() - folded) @ x.T).square().sum(1)[rows] for weight in (a, b)]
    assert (errors[0] < errors[1]).all()


def test_clipping_by_grams_is_clipping_by_outputs() -> None:
    """The quadratic form of a group is the squared error of its output."""
    x, difference = tokens(64), torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(0))
    grams = awq.group_grams(x, GROUP)
    found = awq._group_errors(difference.unflatten(1, (-1, GROUP)), grams)
    for group in range(HIDDEN // GROUP):
        at = slice(group * GROUP, (group + 1) * GROUP)
        expected = (x[:, at] @ difference[:, at].T).square().sum(0)
        assert torch.allclose(found[:, group, 0], expected, rtol=1e-4)


# ---------------------------------------------------------------- GPTQ


def paper_gptq(weight: Tensor, hessian: Tensor, size: int, damping: float, order: Tensor | None) -> Tensor:
    """Algorithm 1 of the paper, column by column in float64, with the factor of the whole inverse: the dequantized
    weight, columns as given. Groups' scales from what the weights are when the group is reached."""
    columns = torch.arange(weight.shape[1]) if order is None else order
    weight, hessian = weight.double()[:, columns], hessian.double()[columns][:, columns]
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    result = torch.empty_like(weight)
    for column in range(weight.shape[1]):
        if column % size == 0:
            group = weight[:, column : column + size]
            scales, zeros = (part.double() for part in group_scales(group.amin(1), group.amax(1)))
        now = weight[:, column]
        result[:, column] = (((now / scales).round() + zeros).clamp(0, 15) - zeros) * scales
        error = (now - result[:, column]) / upper[column, column]
        weight[:, column:] -= error[:, None] * upper[column, column:]
    restored = torch.empty_like(result)
    restored[:, columns] = result
    return restored


@pytest.mark.parametrize("act_order", ["off", "on"])
def test_gptq_is_the_papers_algorithm(act_order: gptq.ActOrder) -> None:
    block = random_block()
    hessian = gathered(block, tokens(512), hessian=True)["gate_up"].hessian
    assert hessian is not None
    options = gptq.GptqOptions(group_size=GROUP, act_order=act_order, scale_steps=0)
    weight, damping = gptq.quantize(block.gate_up.weight, hessian, options)
    order = None if act_order == "off" else torch.argsort(hessian.diagonal(), descending=True, stable=True)
    expected = paper_gptq(block.gate_up.weight, hessian, GROUP, 0.01, order)
    same_rows = (weight.dequantize() - expected).abs().amax(1) < 1e-4
    assert damping == 0.01
    assert float(same_rows.float().mean()) > 0.97  # a tie that falls the other way changes the rest of its row


def test_act_order_is_a_permutation_and_gives_the_weight_back() -> None:
    block = random_block()
    statistics = gathered(block, tokens(512), hessian=True)
    for act_order in ("on", "static", "off"):
        quantized = gptq.calibrate(block, statistics, replace(GPTQ, act_order=act_order))
        for key, linear in block.products():
            weight = quantized.weights[key]
            assert isinstance(weight, GroupedWeight)
            assert (weight.order is None) == (act_order != "on")
            check(weight, key)
            assert relative(weight.dequantize(), linear.weight) < 0.3
            diagonal = statistics[key].hessian.diagonal()
            if weight.order is not None:
                assert weight.order.dtype == torch.int32
                assert torch.equal(diagonal[weight.order.long()], diagonal.sort(descending=True).values)


def test_static_groups_are_those_of_the_original_columns() -> None:
    """Without search, their scales are those of rounding to nearest."""
    block = random_block()
    statistics = gathered(block, tokens(512), hessian=True)
    weight = gptq.calibrate(block, statistics, replace(GPTQ, scale_steps=0)).weights["down"]
    nearest = round_to_nearest(block.down.weight, GROUP)
    assert torch.equal(weight.scales, nearest.scales)
    assert not torch.equal(weight.values, nearest.values)


def test_a_search_of_scales_pays() -> None:
    block = random_block()
    statistics = gathered(block, tokens(1024), hessian=True)
    with_search = gptq.calibrate(block, statistics, GPTQ)
    without = gptq.calibrate(block, statistics, replace(GPTQ, scale_steps=0))
    ratios = [with_search.errors[key].result / without.errors[key].result for key in PRODUCTS]
    assert sum(ratios) / len(ratios) < 0.98


def test_dead_channels_are_rounded_to_nearest() -> None:
    block = random_block()
    statistics = InputStatistics("x", INTERMEDIATE, device=torch.device("cpu"), hessian=True)
    x = torch.randn(256, INTERMEDIATE, generator=torch.Generator().manual_seed(4))
    dead = torch.arange(0, INTERMEDIATE, 9)
    x[:, dead] = 0
    statistics.update(x)
    assert statistics.hessian is not None
    for act_order in ("off", "static", "on"):
        options = replace(GPTQ, act_order=act_order, scale_steps=0)
        weight, _ = gptq.quantize(block.down.weight, statistics.hessian, options)
        step = weight.scales.float().max()
        assert float((weight.dequantize() - block.down.weight)[:, dead].abs().max()) <= 0.51 * float(step)


def test_a_hessian_of_few_tokens_still_works() -> None:
    """Three tokens: singular but for the damping."""
    block = random_block()
    quantized = gptq.calibrate(block, gathered(block, tokens(3), hessian=True), GPTQ)
    for key, linear in block.products():
        assert quantized.errors[key].result <= quantized.errors[key].nearest
        assert relative(quantized.weights[key].dequantize(), linear.weight) < 1


def test_damping_grows_until_the_hessian_can_be_factorized() -> None:
    block = random_block()
    hessian = torch.ones(HIDDEN, HIDDEN) - 0.05 * torch.eye(HIDDEN)  # eigenvalues of -0.05: no rounding noise
    weight, damping = gptq.quantize(block.qkv.weight, hessian, GPTQ)
    assert damping == pytest.approx(0.1)
    check(weight, "qkv")
    with pytest.raises(EngineBuildError, match=r"layers\.7\.attention\.qkv: the Hessian"):
        gptq.quantize(block.qkv.weight, hessian - 3 * torch.eye(HIDDEN) + 3, GPTQ, "layers.7.attention.qkv")


# ---------------------------------------------------------------- degenerate input


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_degenerate_weights_and_inputs(algorithm: str) -> None:
    """All-zero products, rows of one number, input channels that are always zero or carry no weight."""
    block = random_block()
    block.o.weight.zero_()
    block.down.weight[5] = 0.25
    block.gate_up.weight[:, 9] = 0
    block.input_norm[11] = 0  # channel 11 of qkv is dead
    block.qkv.weight[block.v_rows.start + 2] = 0  # a dead channel of o
    quantized = result_of(algorithm, block, tokens(256))
    for key, _ in block.products():
        check(quantized.weights[key], key)
        assert quantized.errors[key].result <= quantized.errors[key].nearest * 1.001
        assert torch.isfinite(quantized.weights[key].dequantize()).all()
    assert quantized.errors["o"].result == 0 and not quantized.weights["o"].dequantize().any()
    assert all(torch.isfinite(norm).all() for norm in quantized.norms.values())
    assert relative(quantized.weights["down"].dequantize()[5], torch.full((INTERMEDIATE,), 0.25)) < 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_inputs_that_are_all_zero(algorithm: str) -> None:
    block = random_block()
    quantized = result_of(algorithm, block, torch.zeros(16, HIDDEN))
    for key, linear in block.products():
        check(quantized.weights[key], key)
        assert relative(quantized.weights[key].dequantize(), linear.weight) < 0.3
        assert quantized.errors[key].result == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_never_worse_where_nothing_helps(algorithm: str) -> None:
    """Channels alike, independent of each other, and few tokens."""
    generator = torch.Generator().manual_seed(8)
    block = random_block()
    block = replace(
        block,
        **{
            key: LinearWeights(torch.randn(linear.weight.shape, generator=generator) * 0.05)
            for key, linear in block.products()
        },
        input_norm=torch.ones(HIDDEN),
        post_attention_norm=torch.ones(HIDDEN),
    )
    x = torch.randn(64, HIDDEN, generator=generator)
    quantized = result_of(algorithm, block, x)
    for key in PRODUCTS:
        assert quantized.errors[key].result <= quantized.errors[key].nearest * 1.001


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nan_is_a_clear_error(algorithm: str) -> None:
    block = random_block(bias=True)
    block.down.weight[3, 4] = torch.nan
    with pytest.raises(CheckpointError, match=r"layers\.7\.mlp\.down\.weight holds NaN"):
        result_of(algorithm, block, tokens(16))
    block = random_block(bias=True)
    assert block.o.bias is not None
    block.o.bias[0] = torch.inf
    with pytest.raises(CheckpointError, match=r"layers\.7\.attention\.o\.bias"):
        result_of(algorithm, block, tokens(16))
    x = tokens(16)
    x[3, 3] = torch.nan
    with pytest.raises(EngineBuildError, match=r"inputs of layers\.7\.attention\.qkv are NaN or infinite"):
        result_of(algorithm, random_block(), x)


def test_missing_inputs_and_wrong_groups_are_clear_errors() -> None:
    block = random_block()
    with pytest.raises(EngineBuildError, match=r"no calibration tokens reached layers\.7\.attention\.qkv"):
        awq.calibrate(block, BlockStatistics(block), AWQ)
    with pytest.raises(EngineBuildError, match=r"group size of 128 does not divide the 192 .* layers\.7\.mlp\.down"):
        awq.calibrate(block, gathered(block, tokens(16)))


def test_the_package_is_no_plugin() -> None:
    names = registry.plugins("quantization")
    assert not {"awq", "gptq", "smoothquant", "calibration"} & set(names)
    assert not [plugin for plugin in names.values() if "calibration" in plugin.module]


# ---------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_on_a_gpu_as_on_the_cpu(algorithm: str) -> None:
    """Inputs in bfloat16, whose Hessians come from the tensor cores there; roundings may fall the other way."""
    results = []
    for device in ("cpu", "cuda"):
        block = on_device(random_block(bias=True), device)
        statistics = BlockStatistics(block, hessian=True)
        for key, inputs in recorded_inputs().items():
            for part in inputs.bfloat16().to(device).chunk(2):
                statistics.update(key, part)
        results.append(calibrated(algorithm, block, statistics))
    for key in PRODUCTS:
        if algorithm.startswith("gptq"):  # a search may find another of two scales that are as good
            cpu, gpu = (result.weights[key].dequantize().cpu() for result in results)
            assert relative(gpu, cpu) < 0.1
        assert results[1].errors[key].nearest == pytest.approx(results[0].errors[key].nearest, rel=1e-2)
        assert results[1].errors[key].result == pytest.approx(results[0].errors[key].result, rel=5e-2)
    assert all(norm.is_cuda for norm in results[1].norms.values())


def on_device(block: BlockWeights, device: str) -> BlockWeights:
    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    linears = {key: LinearWeights(linear.weight.to(device), moved(linear.bias)) for key, linear in block.products()}
    norms = {name: getattr(block, name).to(device) for name in ("input_norm", "post_attention_norm")}
    return replace(block, **linears, **norms)


def recorded_inputs() -> dict[str, Tensor]:
    """Inputs of the four products of the usual block, float32, on the CPU."""
    block = random_block(bias=True)
    statistics = BlockStatistics(block, sample_tokens=512)
    run(block, tokens(512), statistics)
    return {key: statistics[key].sample for key in PRODUCTS}
