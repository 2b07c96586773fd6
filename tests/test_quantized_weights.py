"""Quantized weights as numbers, and how 4-bit ones are packed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import CheckpointError
from appliance.kernels import int4_layout
from appliance.quantization.weights import (
    ChannelWeight,
    Fp8Weight,
    GroupedWeight,
    check,
    concatenate,
    group_scales,
    quantize_groups,
    round_to_nearest,
    round_to_nearest_fp8,
    round_to_nearest_int8,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_packed_word_gives_pairs_in_order() -> None:
    values = torch.arange(8, dtype=torch.uint8).add(3).view(1, 8)
    word = int(int4_layout.pack(values)) & 0xFFFFFFFF
    pairs = [(word >> 4 * j) & 0x000F000F for j in range(4)]
    assert [(pair & 15, pair >> 16) for pair in pairs] == [(3, 4), (5, 6), (7, 8), (9, 10)]


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_packing_is_lossless(rows: int, words: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, (rows, 8 * words), generator=generator, dtype=torch.uint8)
    packed = int4_layout.pack(values)
    assert packed.dtype == torch.int32 and packed.shape == (rows, words)
    assert torch.equal(int4_layout.unpack(packed), values)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 128])
def test_int4_rounds_to_the_nearest_value(group_size: int, symmetric: bool) -> None:
    weight = random(24, 256)
    quantized = round_to_nearest(weight, group_size, symmetric=symmetric)
    assert quantized.scales.shape == quantized.zeros.shape == (24, 256 // group_size)
    assert quantized.group_size == group_size and quantized.scales.dtype == torch.float16
    error = (quantized.dequantize() - weight).abs().unflatten(1, (-1, group_size))
    # Half a step, and at the ends of the grid what rounding the zero point moves them by.
    assert bool((error <= quantized.scales.float().unsqueeze(-1) * 1.01).all())
    assert float((quantized.dequantize() - weight).norm() / weight.norm()) < 0.15
    if symmetric:
        assert bool((quantized.zeros == 8).all())


def test_a_larger_group_is_less_exact() -> None:
    weight = random(64, 512)
    errors = [float((round_to_nearest(weight, size).dequantize() - weight).norm()) for size in (32, 128, 512)]
    assert errors == sorted(errors)


def test_values_belong_to_the_rounded_scale() -> None:
    # 1 / 15 is no float16: values found with it unrounded would be off where a group has many steps to its end.
    weight = torch.linspace(0, 1, 32).view(1, 32)
    quantized = round_to_nearest(weight, 32)
    best = (weight / quantized.scales.float()).round().clamp(0, 15)
    assert torch.equal(quantized.values.float(), best)


def test_zero_constant_and_one_sided_groups() -> None:
    weight = torch.cat([torch.zeros(1, 32), torch.full((1, 32), 0.3), torch.full((1, 32), -2.0)], 1)
    quantized = round_to_nearest(weight, 32)
    check(quantized, "layer")
    torch.testing.assert_close(quantized.dequantize(), weight, rtol=1e-3, atol=1e-7)


def test_clipped_ranges_end_at_the_grid() -> None:
    weight = random(4, 64)
    scales, zeros = group_scales(torch.full((4, 1), -1.0), torch.full((4, 1), 1.0))
    quantized = quantize_groups(weight, scales, zeros)
    assert float(quantized.dequantize().abs().max()) < 1.1


def test_act_order_restores_the_channels() -> None:
    weight = random(8, 64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    permuted = round_to_nearest(weight[:, order], 32)
    quantized = GroupedWeight(permuted.values, permuted.scales, permuted.zeros, order.int())
    check(quantized, "layer")
    assert float((quantized.dequantize() - weight).norm() / weight.norm()) < 0.15
    assert torch.equal(quantized.dequantize()[:, order], permuted.dequantize())


def test_int8_and_fp8_round_per_channel() -> None:
    weight = random(16, 96) * torch.logspace(-3, 3, 16).view(16, 1)
    for quantized, limit in ((round_to_nearest_int8(weight), 0.01), (round_to_nearest_fp8(weight), 0.04)):
        check(quantized, "layer")
        error = (quantized.dequantize() - weight).norm(dim=1) / weight.norm(dim=1)
        assert float(error.max()) < limit, type(quantized)


def test_concatenated_rows() -> None:
    parts = [round_to_nearest(random(8, 64, seed=seed), 32) for seed in (0, 1)]
    assert torch.equal(concatenate(parts).dequantize(), torch.cat([part.dequantize() for part in parts]))
    scaled = [
        Fp8Weight(part.values, part.scales, torch.tensor([scale]))
        for part, scale in zip([round_to_nearest_fp8(random(4, 8))] * 2, (0.5, 2.0), strict=True)
    ]
    whole = concatenate(scaled)
    assert isinstance(whole, Fp8Weight) and whole.input_scale is not None
    assert whole.shape == (8, 8) and whole.input_scale.tolist() == [2.0]


def broken_weights() -> list[tuple[object, str]]:
    good = round_to_nearest(random(4, 64), 32)
    eight = round_to_nearest_int8(random(4, 64))
    floats = round_to_nearest_fp8(random(4, 64))

    def scales(value: float) -> torch.Tensor:
        changed = good.scales.clone()
        changed[1, 1] = value
        return changed

    return [
        (GroupedWeight(good.values, scales(float("nan")), good.zeros), "NaN"),
        (GroupedWeight(good.values, scales(float("inf")), good.zeros), "infinite"),
        (GroupedWeight(good.values, scales(0.0), good.zeros), "zero or negative"),
        (GroupedWeight(good.values, good.scales[:2], good.zeros), "do not go with"),
        (GroupedWeight(good.values, good.scales, good.zeros[:, :1]), "zero points"),
        (GroupedWeight(good.values, good.scales, good.zeros, torch.zeros(64, dtype=torch.int32)), "order"),
        (ChannelWeight(eight.values, -eight.scales), "zero or negative"),
        (Fp8Weight(floats.values, floats.scales, torch.tensor([float("nan")])), "input"),
        (Fp8Weight((floats.values.float() * float("nan")).to(floats.values.dtype), floats.scales), "value is NaN"),
    ]


@pytest.mark.parametrize(("weight", "expected"), broken_weights())
def test_what_cannot_be_a_weight_is_named(weight: GroupedWeight, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected) as caught:
        check(weight, "layers.0.mlp.down")
    assert "layers.0.mlp.down" in caught.value.message
