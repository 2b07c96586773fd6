"""What ranks hand each other besides sums, against the references: several "ranks" as several workspaces of one process
in Triton's interpreter, step by step."""

from __future__ import annotations

import pytest
import torch
from quantized_helpers import DEVICE
from test_all_reduce import partials, workspaces

from appliance.kernels import exchange as ex
from appliance.kernels import sharded_draw as sd
from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.all_reduce import GATHER, PUBLISH, REDUCE, all_reduce_, all_reduce_reference
from appliance.kernels.sampling import argmax_reference, draw_triton, score_blocks

interpreted = pytest.mark.skipif(not HAS_TRITON or DEVICE == "cuda", reason="only in Triton's interpreter")
INFINITY = float("inf")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_all_gather_and_all_to_all(size: int, dtype: torch.dtype) -> None:
    """Of one number, of less than a tile and of several tiles a slot; an all-reduce in between uses the same slots."""
    spaces = workspaces(size, region_bytes=1 << 17)
    for turn, shape in enumerate([(1, 1), (3, 500), (1, 3000), (5, 7)]):
        parts = [x.to(dtype) for x in partials(size, size, *shape, seed=turn)]
        for x, space in zip(parts, spaces, strict=True):
            ex.exchange(x, space, to_each=True, steps=PUBLISH)
        got = [ex.exchange(x, space, to_each=True, steps=GATHER) for x, space in zip(parts, spaces, strict=True)]
        for mine, want in zip(got, ex.all_to_all_reference(parts), strict=True):
            assert torch.equal(mine, want)
        sums = partials(size, 2, 300, seed=turn)
        total = all_reduce_reference(sums)
        for step in (PUBLISH, REDUCE, GATHER):
            for x, space in zip(sums, spaces, strict=True):
                all_reduce_(x, space, two_shot=bool(turn % 2), steps=step)
        assert all(torch.equal(x, total) for x in sums)
        first = [x[0] for x in parts]
        for x, space in zip(first, spaces, strict=True):
            ex.exchange(x, space, to_each=False, steps=PUBLISH)
        for x, space in zip(first, spaces, strict=True):
            assert torch.equal(ex.exchange(x, space, to_each=False, steps=GATHER), ex.all_gather_reference(first))


@interpreted
@pytest.mark.parametrize("size", [2, 4, 8])
def test_best_tokens(size: int) -> None:
    """Rows with more than one best score, within a rank and across ranks, and with none; fewer and more than slots."""
    generator = torch.Generator().manual_seed(size)
    for rows in (2, 4, 11):
        scores = [torch.randint(-3, 3, (rows, 5), generator=generator).float() for _ in range(size)]
        for score in scores:
            score[-1] = -INFINITY
            score[score == 0] *= -1  # -0
        ids = torch.arange(size * 5).view(size, 5) * 7
        tokens = [row.expand(rows, 5).contiguous() for row in ids]
        spaces = workspaces(size)
        given = list(zip(scores, tokens, spaces, strict=True))
        for score, token, space in given:
            sd.best_tokens(score, token, space, steps=PUBLISH)
        want = torch.cat(tokens, 1).gather(1, torch.cat(scores, 1).argmax(1, keepdim=True))[:, 0]
        assert torch.equal(sd.best_tokens_reference(scores, tokens), want) and want[-1] == 0
        for score, token, space in given:
            assert torch.equal(sd.best_tokens(score, token, space, steps=GATHER), want)


def test_keys_are_in_the_order_of_scores() -> None:
    scores = torch.tensor([-INFINITY, -3e38, -1.5, -1e-40, 0.0, 1e-40, 2.0, 3e38, INFINITY])[:, None]
    keys = sd.best_token_keys(scores, torch.zeros(9, 1, dtype=torch.int64))
    assert torch.equal(keys.sort().values, keys) and keys.unique().numel() == 9
    zeros = sd.best_token_keys(torch.tensor([[0.0], [-0.0]]), torch.tensor([[5], [4]]))
    assert zeros[1] > zeros[0] and sd.best_token_of_keys(zeros[:, None]).tolist() == [4]
    high = torch.tensor([[2**31 - 2]])
    assert sd.best_token_of_keys(sd.best_token_keys(torch.ones(1, 1), high)[None]).tolist() == [2**31 - 2]


@interpreted
def test_best_of_blocks_of_shares() -> None:
    """Scores as the draw's kernel gives them, of shares that are padded, or wholly padding."""
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1))
    logits[1] = float("nan")
    logits[2, [700, 2600, 4999]] = 9.0
    share, spaces = 1700, workspaces(4)
    shares = [torch.nn.functional.pad(logits[:, r * share : (r + 1) * share], (0, share), value=50.0) for r in range(4)]
    blocks = [
        score_blocks(x[:, :share], None, None, None, None, r * share, max(0, min(share, 5000 - r * share)))
        for r, x in enumerate(shares)
    ]
    for (scores, tokens), space in zip(blocks, spaces, strict=True):
        sd.best_tokens(scores, tokens, space, steps=PUBLISH)
    want = argmax_reference(logits)
    assert want.tolist()[1:] == [0, 700]
    for (scores, tokens), space in zip(blocks, spaces, strict=True):
        assert torch.equal(sd.best_tokens(scores, tokens, space, steps=GATHER), want)


@interpreted
def test_draws_of_shares() -> None:
    """Noise is that of the tokens, wherever their logits are: greedy rows and random ones side by side."""
    rows, vocab, share = 6, 4500, 1125
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(2))
    temperature = torch.tensor([0.0, 0.5, 1.0, 1.0, 2.0, 9.0])
    seeds = torch.arange(2 * rows, dtype=torch.int32).view(rows, 2)
    positions, spaces = torch.arange(rows) + 40, workspaces(4)
    given = temperature, seeds, positions
    want = draw_triton(logits, *given, None)
    assert want.unique().numel() > 3
    for space in spaces:
        first = space.rank * share
        blocks = score_blocks(logits[:, first : first + share], *given, None, first)
        sd.best_tokens(*blocks, space, steps=PUBLISH)
    for space in spaces:
        first = space.rank * share
        blocks = score_blocks(logits[:, first : first + share], *given, None, first)
        assert torch.equal(sd.best_tokens(*blocks, space, steps=GATHER), want)


def test_what_fits() -> None:
    space = workspaces(4, slots=4, region_bytes=4096)[0]
    assert ex.exchange_fits(2048, space) and not ex.exchange_fits(2049, space) and not ex.exchange_fits(0, space)
    assert sd.best_tokens_fit(4 * 128, space) and not sd.best_tokens_fit(4 * 128 + 1, space)
    assert not sd.best_tokens_fit(0, space)
