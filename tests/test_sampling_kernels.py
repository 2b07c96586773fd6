"""The arithmetic of sampling: noise, draw, filters, penalties; the Triton kernels against torch, torch against plain
Python and Hugging Face's logits processors.

Without a GPU the kernels run in Triton's interpreter (conftest sets TRITON_INTERPRET before triton is imported).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_reference import reference_noise
from transformers import generation as hf

from appliance.kernels import filtered_draw, sampling
from appliance.kernels.deferred_scale import DeferredScale, materialize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 60


def random_logits(rows, vocab=VOCAB, seed=0, spread=3.0):
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread).to(DEVICE)


def seeds_of(values):
    words = [[(v & 0xFFFFFFFF), (v >> 32) & 0xFFFFFFFF] for v in values]
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32)).to(DEVICE)


# ---------------------------------------------------------------- noise and draw


def test_noise_matches_python_integers():
    positions = torch.tensor([0, 7, 131_071], device=DEVICE)
    values = [0, 2**63 + 12345, 2**64 - 1]
    tokens = torch.tensor([0, 1, 2, 1000, 128_255], device=DEVICE)
    got = sampling.exponential_noise(seeds_of(values), positions, tokens)
    want = [[reference_noise(s, p, t) for t in tokens.tolist()] for s, p in zip(values, positions.tolist())]
    torch.testing.assert_close(got.cpu(), torch.tensor(want), rtol=1e-5, atol=0)


def test_noise_is_exponential_and_uncorrelated():
    tokens = torch.arange(50_000, device=DEVICE)
    noise = sampling.exponential_noise(seeds_of([1, 1, 2, 1 << 32]), torch.tensor([5, 6, 5, 5], device=DEVICE), tokens)
    noise = noise.double().cpu()
    assert torch.all(noise > 0)
    edges = -torch.log1p(-torch.arange(0, 1, 0.02, dtype=torch.float64))
    for row in noise:
        counts = torch.bincount(torch.bucketize(row, edges[1:]), minlength=50).double()
        assert ((counts - 1000) ** 2 / 1000).sum() < 100  # chi-square, 49 degrees of freedom: p about 2e-5
    correlation = torch.corrcoef(noise) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 0.02
    neighbours = torch.corrcoef(torch.stack((noise[0, 1:], noise[0, :-1])))[0, 1]
    assert abs(neighbours) < 0.02


@pytest.mark.parametrize("over", ["positions", "seeds"])
def test_draw_follows_the_distribution(over):
    """Chi-square of 20,000 draws over consecutive positions of one seed, and over consecutive seeds."""
    n, vocab = 20_000, 12
    logits = random_logits(1, vocab, seed=8, spread=1.0).expand(n, vocab)
    counter = torch.arange(n, device=DEVICE)
    positions = counter if over == "positions" else torch.zeros_like(counter)
    seeds = seeds_of([99] * n if over == "positions" else range(n))
    temperature = torch.full((n,), 0.7, device=DEVICE)
    draws = sampling.draw_reference(logits, temperature, seeds, positions, None)
    counts = torch.bincount(draws, minlength=vocab).double().cpu()
    expected = (logits[0].double().cpu() / 0.7).softmax(0) * n
    assert ((counts - expected) ** 2 / expected).sum() < 38  # 11 degrees of freedom: p about 1e-4


@pytest.mark.parametrize("vocab", [40, 2048, 5000])
@pytest.mark.parametrize("filtered", [False, True])
def test_triton_draw_matches_reference(vocab, filtered):
    m = 6
    logits = random_logits(m, vocab, seed=vocab)
    logits[4] = float("-inf")
    logits[5, 3] = float("nan")
    table = torch.rand(m, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE) + 0.3
    temperature = table[:, 1]  # strided, as the sampler passes it
    temperature[2] = 0.0
    seeds, positions = seeds_of([i * 0x123456789ABCDEF for i in range(m)]), torch.arange(m, device=DEVICE) * 1000
    thresholds = (
        sampling.scale_logits(logits, temperature).nan_to_num(nan=-99).topk(4).values[:, -1] if filtered else None
    )
    got = sampling.draw_triton(logits, temperature, seeds, positions, thresholds)
    assert torch.equal(got, sampling.draw_reference(logits, temperature, seeds, positions, thresholds))
    assert got[2] == logits[2].argmax()
    assert got[4] == 0


@pytest.mark.parametrize("vocab", [1, 40, 2048, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax(vocab, dtype):
    logits = random_logits(7, vocab, seed=vocab).to(dtype)
    wide = torch.full((7, vocab + 8), 99.0, dtype=dtype, device=DEVICE)
    wide[:, :vocab] = logits
    best = logits.float().argmax(1)
    assert torch.equal(sampling.argmax_triton(wide[:, :vocab]), best)
    assert torch.equal(sampling.argmax_reference(logits), best)
    assert sampling.argmax_triton(logits[:0]).shape == (0,)


@pytest.mark.parametrize("argmax", [sampling.argmax_triton, sampling.argmax_reference])
def test_argmax_of_equals_and_of_what_is_no_number(argmax):
    logits = torch.zeros(5, 5000, device=DEVICE)
    logits[0, [2500, 2501, 4999]] = 1.0
    logits[1] = float("-inf")
    logits[2] = float("nan")
    logits[3, 100], logits[3, 4000] = float("nan"), 2.0
    logits[4, [3000, 4500]] = float("inf")
    assert argmax(logits).tolist() == [2500, 0, 0, 4000, 3000]
    # The same as a greedy row beside random ones.
    zero = torch.zeros(5, device=DEVICE)
    assert sampling.draw_triton(logits, zero, seeds_of(range(5)), zero.long(), None).tolist() == [
        2500,
        0,
        0,
        4000,
        3000,
    ]


@pytest.mark.parametrize("with_bias", [True, False])
def test_argmax_applies_deferred_scales(with_bias):
    values = random_logits(6, 5000, seed=1, spread=1e5).bfloat16()
    row_scales, column_scales = random_logits(6, 1, seed=2).abs(), random_logits(1, 5000, seed=3).abs()
    bias = random_logits(1, 5000, seed=4, spread=1e5)[0] if with_bias else None
    values[4, 7] = float("nan")
    product = DeferredScale(values, row_scales, column_scales, bias)
    want = materialize(product, torch.float32).nan_to_num(nan=float("-inf")).argmax(1)
    assert not torch.equal(want, values.nan_to_num(nan=float("-inf")).argmax(1)), "scales must matter"
    assert torch.equal(sampling.argmax_triton(product), want)
    assert torch.equal(sampling.argmax_reference(product), want)
    assert torch.equal(sampling.argmax_triton(product.first_rows(2)), want[:2])


@pytest.mark.parametrize("filtered", [False, True])
def test_draw_applies_deferred_scales(filtered):
    values = random_logits(6, 5000, seed=1, spread=1e3).bfloat16()
    product = DeferredScale(
        values, random_logits(6, 1, seed=2).abs() * 1e-3, random_logits(1, 5000, seed=3).abs(), None
    )
    logits = materialize(product, torch.float32)
    temperature = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.7], device=DEVICE)
    seeds, positions = seeds_of(range(6)), torch.arange(6, device=DEVICE)
    thresholds = sampling.scale_logits(logits, temperature).topk(40).values[:, -1] if filtered else None
    want = sampling.draw_reference(logits, temperature, seeds, positions, thresholds)
    assert torch.equal(sampling.draw_triton(product, temperature, seeds, positions, thresholds), want)
    assert torch.equal(sampling.draw_reference(product, temperature, seeds, positions, thresholds), want)


def test_triton_draw_takes_the_lowest_of_equals_across_blocks():
    logits = torch.zeros(1, 5000, device=DEVICE)
    logits[0, [2500, 2501, 4999]] = 1.0
    zero = torch.zeros(1, device=DEVICE)
    assert sampling.draw_triton(logits, zero, seeds_of([1]), zero.long(), None).tolist() == [2500]


@pytest.mark.parametrize(("vocab", "spread"), [(50, 1.0), (50, 6.0), (9000, 2.0)])
def test_drawing_by_rejection_matches_the_sorted_filters(vocab, spread):
    rows = [  # top_k, top_p, min_p, temperature
        (0, 1.0, 0.0, 1.0),
        (3, 1.0, 0.0, 0.8),
        (0, 0.4, 0.0, 1.0),
        (0, 0.0, 0.0, 1.0),
        (0, 1.0, 0.3, 1.5),
        (8, 0.6, 0.0, 1.0),
        (8, 0.6, 0.2, 0.7),
        (100_000, 0.5, 0.0, 1.0),
        (1, 0.5, 0.0, 2.0),
        (5, 0.5, 0.0, 0.0),
        (2, 0.9, 0.0, 1.0),
    ]
    trials = 3 if vocab < 100 else 1
    m = len(rows) * trials
    logits = random_logits(m, vocab, seed=int(spread), spread=spread)
    logits[7] = float("-inf")
    logits[2] = logits[2].round()  # many equal logits
    logits[5 + len(rows) * (trials - 1)] = logits[5].round()
    top_k, top_p, min_p, temperature = torch.tensor(rows * trials, dtype=torch.float64, device=DEVICE).unbind(1)
    args = seeds_of(range(m)), torch.arange(m, device=DEVICE), top_k.int(), top_p.float(), min_p.float()
    got = filtered_draw.draw_filtered_triton(logits, temperature.float(), *args)
    scaled = sampling.scale_logits(logits, temperature.float())
    thresholds = sampling.filter_thresholds(scaled, *args[2:])
    want = sampling.draw_reference(logits, temperature.float(), *args[:2], thresholds)
    assert got.tolist() == want.tolist()
    unfiltered = sampling.draw_reference(logits, temperature.float(), *args[:2], None)
    assert not torch.equal(want, unfiltered), "the filters must have had something to do"


# ---------------------------------------------------------------- Hugging Face


def allowed(scaled, top_k=0, top_p=1.0, min_p=0.0, num_sorted=0):
    m = len(scaled)
    full = [torch.full((m,), x, device=DEVICE) for x in (top_k, top_p, min_p)]
    return scaled >= sampling.filter_thresholds(scaled, *full, num_sorted)[:, None]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"top_k": 5}, hf.TopKLogitsWarper(5)),
        ({"top_k": 5, "num_sorted": 9}, hf.TopKLogitsWarper(5)),
        ({"top_p": 0.73}, hf.TopPLogitsWarper(0.73)),
        ({"top_p": 0.01}, hf.TopPLogitsWarper(0.01)),
        ({"min_p": 0.05}, hf.MinPLogitsWarper(0.05)),
        ({"min_p": 0.05, "num_sorted": 1}, hf.MinPLogitsWarper(0.05)),
    ],
)
def test_filters_match_hugging_face(ours, theirs):
    scaled = random_logits(40, seed=21)
    assert torch.equal(allowed(scaled, **ours), torch.isfinite(theirs(None, scaled.clone())))


def test_equal_logits_at_the_threshold_all_stay():
    scaled = torch.tensor([[1.0, 5.0, 3.0, 3.0, 3.0]], device=DEVICE)
    assert allowed(scaled, top_k=2).tolist() == [[False, True, True, True, True]]


def test_repetition_penalty_matches_hugging_face():
    logits, tokens = random_logits(5, seed=4), torch.randint(0, VOCAB, (5, 12), device=DEVICE)
    full = [torch.full((5,), x, device=DEVICE) for x in (4, 12, 1.4, 0.0, 0.0)]
    got = sampling.apply_penalties(logits, tokens, *full)
    torch.testing.assert_close(got, hf.RepetitionPenaltyLogitsProcessor(1.4)(tokens, logits.clone()))
