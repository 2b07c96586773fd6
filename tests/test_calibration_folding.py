"""What calibration algorithms share: scales folded into a block change nothing, and statistics stream."""

from __future__ import annotations

import pytest
import torch
from calibration_blocks import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    folded_block,
    gathered,
    random_block,
    relative,
    run,
    tokens,
)
from torch import Tensor

from appliance.quantization.calibration import awq
from appliance.quantization.calibration.folding import Folding, normalized
from appliance.quantization.calibration.statistics import InputStatistics, gram


def random_scales(kv_heads: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    sizes = {"qkv": HIDDEN, "o": kv_heads * HEAD_DIM, "gate_up": HIDDEN, "down": INTERMEDIATE}
    return {key: torch.rand(size, generator=generator).mul_(4).exp_() for key, size in sizes.items()}


# ---------------------------------------------------------------- folding


@pytest.mark.parametrize("head_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
def test_folded_scales_change_nothing(kv_heads: int, bias: bool, head_norm: bool) -> None:
    block = random_block(kv_heads=kv_heads, bias=bias)
    x = tokens()
    folding = Folding(block, random_scales(kv_heads))
    folded = folded_block(block, folding)
    assert relative(folded.qkv.weight, block.qkv.weight) > 1  # something happened
    assert relative(run(folded, x, head_norm=head_norm), run(block, x, head_norm=head_norm)) < 1e-5
    for key, linear in block.products():
        assert torch.allclose(folding.unfold_rows(key, folding.weight(key)), linear.weight, rtol=1e-5, atol=1e-7)


def test_folding_is_exact_although_norms_stay_in_16_bits() -> None:
    block = random_block(dtype=torch.bfloat16)
    folding = Folding(block, {key: scale for key, scale in random_scales(2).items() if key in ("qkv", "gate_up")})
    assert folding.norms["input_norm"].dtype == torch.bfloat16
    assert relative(run(folded_block(block, folding), tokens()), run(block, tokens())) < 1e-5


def test_a_norm_that_cannot_take_a_scale_keeps_its_own() -> None:
    block = random_block(dtype=torch.float16)
    block.input_norm[0] = 0
    scales = torch.ones(HIDDEN)
    scales[0], scales[1], scales[2] = 3, 1e9, 1e-9  # a zero; below the smallest float16, and above the largest
    folding = Folding(block, {"qkv": scales})
    assert torch.equal(folding.norms["input_norm"][:3], block.input_norm[:3])
    assert torch.equal(folding.inputs["qkv"][:3], torch.ones(3))


def test_folding_writes_to_nothing_it_was_given() -> None:
    block = random_block(bias=True)
    before = random_block(bias=True)
    folding = Folding(block, {})
    folding.weight("o").zero_()
    awq.calibrate(block, gathered(block, tokens()), awq.AwqOptions(group_size=32))
    for key, linear in block.products():
        assert torch.equal(linear.weight, getattr(before, key).weight)
        assert torch.equal(linear.bias, getattr(before, key).bias)
    assert torch.equal(block.input_norm, before.input_norm)


def test_normalized_leaves_dead_channels_alone() -> None:
    scales = normalized(torch.tensor([2.0, 8.0, 1e-9]), torch.tensor([True, True, False]))
    assert torch.allclose(scales, torch.tensor([0.5, 2.0, 1.0]))


def test_grouped_query_heads_share_their_scale() -> None:
    block = random_block(kv_heads=2)
    per_row = torch.arange(2.0 * HEAD_DIM)
    per_input = block.v_to_o_inputs(per_row)
    assert per_input.shape == (HEADS * HEAD_DIM,)
    assert torch.equal(per_input[:HEAD_DIM], per_row[:HEAD_DIM])
    assert torch.equal(
        per_input[HEAD_DIM : 2 * HEAD_DIM], per_row[:HEAD_DIM]
    )  # second head of the first key/value head
    assert torch.equal(per_input[2 * HEAD_DIM : 3 * HEAD_DIM], per_row[HEAD_DIM:])
    assert torch.equal(block.o_inputs_by_v(per_input), per_row.expand(2, -1))


# ---------------------------------------------------------------- statistics


def test_statistics_stream() -> None:
    x = tokens(300)
    statistics = InputStatistics("x", HIDDEN, device=x.device, sample_tokens=64, hessian=True)
    for part in x.split((1, 0, 99, 200)):
        statistics.update(part[None])
    statistics.check()
    assert statistics.count == 300 and statistics.hessian is not None
    assert torch.allclose(statistics.mean_abs, x.abs().mean(0), rtol=1e-5)
    assert torch.equal(statistics.max_abs, x.abs().amax(0))
    assert torch.allclose(statistics.hessian, x.T @ x / 300, rtol=1e-4, atol=1e-5)
    assert statistics.sample.shape == (64, HIDDEN)
    rows = [int((x == token).all(1).nonzero().item()) for token in statistics.sample]
    assert rows == sorted(set(rows)) and rows[0] < 60 and rows[-1] > 240  # of all batches, none twice


def test_sample_is_fair() -> None:
    taken = torch.zeros(40)
    for seed in range(300):
        statistics = InputStatistics("x", 1, device=torch.device("cpu"), sample_tokens=10, seed=seed)
        for part in torch.arange(1.0, 41.0)[:, None].split(13):
            statistics.update(part)
        taken[(statistics.sample[:, 0] - 1).long()] += 1
    assert taken.sum() == 3000 and float(taken.min()) > 45 and float(taken.max()) < 110  # 75 each expected


@pytest.mark.gpu
def test_gram_of_16_bit_numbers_on_a_gpu() -> None:
    x = tokens(512).bfloat16().cuda()
    exact = x.double().T @ x.double()
    assert relative(gram(x).double(), exact) < 1e-6
