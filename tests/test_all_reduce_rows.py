"""All-reduces whose rows the ranks share out, against the reference: several "ranks" in one process in Triton's
interpreter, step by step. (That numbers are waited for, and FP8, can only be seen on GPUs.)"""

from __future__ import annotations

import pytest
import torch
from quantized_helpers import DEVICE, assert_same_quantized, strided, ulp
from test_all_reduce import EPS, in_steps, partials
from test_all_reduce_push import spaces_of
from torch import Tensor

from appliance.kernels import all_reduce_push as push
from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.all_reduce import GATHER, PUBLISH, REDUCE
from appliance.kernels.all_reduce_norm import all_reduce_rms_norm_reference
from appliance.kernels.all_reduce_push import PushSpace, launch_push
from appliance.kernels.all_reduce_rows import dealt_rows, launch_shared_rows, shared_rows_fit, whole_rows
from appliance.kernels.deferred_scale import DeferredScale, Product

interpreted = pytest.mark.skipif(not HAS_TRITON or DEVICE == "cuda", reason="only in Triton's interpreter")


def check(
    spaces: list[PushSpace],
    products: list[Tensor] | list[DeferredScale],
    weight: Tensor,
    target: torch.dtype | None,
    scale: Tensor | None = None,
) -> None:
    """Results are whole and the same on every rank; of streams a rank has its own rows, and the others are as before,
    which is rubbish."""
    dtype, size = products[0].dtype, len(products)
    residual = partials(1, *products[0].shape, dtype=dtype, seed=9)[0]
    expected, stream = all_reduce_rms_norm_reference(products, residual.clone(), weight, EPS, target, scale)  # type: ignore[arg-type]
    inputs: list[Product] = [strided(p) if isinstance(p, Tensor) else p for p in products]
    streams = []
    for rank in range(size):
        mine = torch.full_like(residual, torch.nan)
        dealt_rows(mine, rank, size).copy_(dealt_rows(residual, rank, size))
        streams.append(strided(mine))
    results = [torch.full(x.shape, 77, dtype=target or dtype) for x in products]
    scales = [torch.full((len(residual), 1), torch.nan) for _ in products]

    def run(rank: int, step: int) -> None:
        launch_shared_rows(
            inputs[rank], streams[rank], weight, EPS, spaces[rank], results[rank],
            None if target is None else scales[rank], target or torch.int8, scale, steps=step,
        )  # fmt: skip

    in_steps(size, run)
    for rank, (mine, result, factors) in enumerate(zip(streams, results, scales, strict=True)):
        assert torch.equal(dealt_rows(mine, rank, size), dealt_rows(stream, rank, size))
        assert mine.isnan().all(1).sum() == len(mine) - len(dealt_rows(mine, rank, size))
        assert torch.equal(result, results[0])
        if isinstance(expected, Tensor):
            torch.testing.assert_close(result, expected, rtol=ulp(dtype), atol=1e-3)
        else:
            assert torch.equal(factors, scales[0])
            assert_same_quantized((result, factors), expected, 1e-3)


@interpreted
@pytest.mark.parametrize("target", [None, torch.int8])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_calls_one_after_the_other(size: int, target: torch.dtype | None) -> None:
    """Of one and of several groups of rows a slot, the last of which may be short; what a call used is missing again
    two calls later, and the other kernel that uses the memory may come in between."""
    spaces = spaces_of(size, slots=2, region_bytes=1 << 15)
    for turn, (groups, columns) in enumerate([(1, 128), (3, 256), (1, 128), (2, 384), (1, 128), (1, 128)]):
        rows = groups * size - turn // 2 if groups > 1 else size
        weight = torch.randn(columns, generator=torch.Generator().manual_seed(3)).half()
        xs = partials(size, rows, columns, dtype=torch.float16, seed=turn)
        assert shared_rows_fit(xs[0], spaces[0])
        check(spaces, xs, weight, target)
        words = columns // (2 if target is None else 4)
        for space in spaces:
            buffers = space.memory.view(torch.int32).view(push.BUFFERS, space.slots, -1)
            buffer, used = space.state[0].tolist()
            assert used == -(-groups // 2) * size * (columns + 2 * words + 2)
            assert buffer == (turn + 1 + turn // 3) % 3 and (buffers[buffer, 0, : used // 2] != push.MISSING).any()
            for other in {0, 1, 2} - {buffer}:
                assert (buffers[other, 0] == push.MISSING).all(), "what comes in the next calls must be told apart"
        if turn % 3 == 2:
            out = [torch.empty_like(x) for x in xs]
            in_steps(size, lambda r, step, xs=xs, out=out, w=weight: launch_push(  # type: ignore[misc]
                xs[r], torch.zeros_like(xs[r]), w, EPS, spaces[r], out[r], None, steps=step
            ))  # fmt: skip


@interpreted
def test_deferred_scales_and_a_static_scale() -> None:
    """Of int32 sums; only rank 0 has a bias."""
    size, rows, columns = 4, 7, 128
    weight = torch.randn(columns, generator=torch.Generator().manual_seed(3)).half()
    spaces = spaces_of(size, slots=1, region_bytes=1 << 15)
    products = [
        DeferredScale(
            (8 * p).int(), torch.arange(1.0, rows + 1)[:, None] / 4, torch.full((1, columns), 0.25), bias, torch.float16
        )
        for p, bias in zip(partials(size, rows, columns), [torch.ones(columns), None, None, None], strict=True)
    ]
    check(spaces, products, weight, torch.int8)
    check(spaces, products, weight, None)
    xs = partials(size, rows, columns, dtype=torch.float16)
    check(spaces, xs, weight, torch.int8, torch.tensor([0.0625]))


@interpreted
@pytest.mark.parametrize("target", [None, torch.int8])
def test_nothing_that_is_sent_says_that_nothing_has_come(target: torch.dtype | None) -> None:
    """Minus zeros of products and of results, and results of a row of zeros."""
    spaces = spaces_of(2)
    xs = [torch.full((3, 64), -0.0, dtype=torch.float16) for _ in range(2)]
    xs[0][0, :16] = -torch.finfo(torch.float16).tiny
    xs[1][0, 8:40] = 1.0
    weight = torch.ones(64, dtype=torch.float16)
    weight[40:] = -1.0
    results = [torch.empty(3, 64, dtype=target or torch.float16) for _ in xs]
    scales = [torch.empty(3, 1) for _ in xs]
    streams = [torch.full((3, 64), -0.0, dtype=torch.float16) for _ in xs]
    in_steps(2, lambda r, step: launch_shared_rows(
        xs[r], streams[r], weight, EPS, spaces[r], results[r], None if target is None else scales[r],
        target or torch.int8, steps=step,
    ))  # fmt: skip
    assert torch.equal(results[0], results[1]) and (results[0][0] > 0).sum() == 32
    for result in results:
        bits = result if target else result.view(torch.int16)
        assert not (bits == torch.iinfo(bits.dtype).min).any()


@interpreted
def test_the_next_call_does_not_touch_what_a_slow_rank_still_reads() -> None:
    """Rank 0 has everything of the first call and sends the second, before rank 1 has taken the first's results."""
    spaces = spaces_of(2)
    weight = torch.ones(64, dtype=torch.float16)
    first, second = (partials(2, 6, 64, dtype=torch.float16, seed=seed) for seed in (0, 1))
    streams = [[torch.zeros(6, 64, dtype=torch.float16) for _ in range(2)] for _ in range(2)]
    out = [[torch.zeros(6, 64, dtype=torch.float16) for _ in range(2)] for _ in range(2)]

    def run(call: int, rank: int, steps: int) -> None:
        x = (first, second)[call][rank]
        launch_shared_rows(x, streams[call][rank], weight, EPS, spaces[rank], out[call][rank], None, steps=steps)

    for step in (PUBLISH, REDUCE):
        for rank in (0, 1):
            run(0, rank, step)
    run(0, 0, GATHER)
    run(1, 0, PUBLISH)
    run(0, 1, GATHER)
    run(1, 1, PUBLISH | REDUCE)
    run(1, 0, REDUCE | GATHER)
    run(1, 1, GATHER)
    for call, xs in enumerate((first, second)):
        expected, _ = all_reduce_rms_norm_reference(xs, torch.zeros_like(xs[0]), weight, EPS)
        for rank in (0, 1):
            torch.testing.assert_close(out[call][rank], expected, rtol=2e-3, atol=1e-3)
            assert torch.equal(dealt_rows(streams[call][rank], rank, 2), dealt_rows(xs[0] + xs[1], rank, 2))


@interpreted
def test_once_stopped_nothing_is_missing_again() -> None:
    """Programs that wait for ranks that are gone must come to an end, in every call from then on."""
    spaces = spaces_of(2)
    weight = torch.ones(64, dtype=torch.float16)
    spaces[0].stopped.fill_(1)
    for space in spaces:
        space.memory.zero_()
    for _ in range(4):
        check(spaces, partials(2, 3, 64, dtype=torch.float16), weight, torch.int8)
        assert not (spaces[0].memory.view(torch.int32) == push.MISSING).any()


@pytest.mark.parametrize("rows", [4, 5, 7, 8])
def test_the_stream_is_whole_again(rows: int) -> None:
    stream = torch.randn(rows, 3)
    shares = torch.full((4, -(-rows // 4), 3), torch.nan)
    for rank in range(4):
        mine = dealt_rows(stream, rank, 4)
        shares[rank, : len(mine)] = mine
    assert torch.equal(whole_rows(shares, rows), stream)


def test_what_fits() -> None:
    space = spaces_of(4, slots=4, region_bytes=4 * (4 * 1024 + 4))[0]  # a group of rows of 1024 numbers
    x = torch.zeros(17, 1024, dtype=torch.bfloat16)
    assert shared_rows_fit(x[:16], space) and not shared_rows_fit(x, space) and shared_rows_fit(x[:5], space)
    assert not shared_rows_fit(x[:3], space), "a row for each rank"
    assert not shared_rows_fit(x[:4].float()[:, :64], space), "numbers of 16 bits only"
    assert not shared_rows_fit(x[:4, :160], space), "16 bytes of each rank's share in 8 bits"
