"""All-reduces whose numbers are their own flags, against the reference and the kernels that publish: several "ranks" in
one process in Triton's interpreter, step by step. (That numbers are waited for can only be seen on GPUs.)"""

from __future__ import annotations

import pytest
import torch
from quantized_helpers import DEVICE, assert_same_quantized, kernel_dtype, strided, ulp
from test_all_reduce import EPS, in_steps, partials
from torch import Tensor

from appliance.kernels import all_reduce_push as push
from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.all_reduce import GATHER, PUBLISH, REDUCE
from appliance.kernels.all_reduce_norm import all_reduce_rms_norm_reference
from appliance.kernels.all_reduce_push import PushSpace, launch_push
from appliance.kernels.deferred_scale import DeferredScale, Product
from appliance.kernels.row_quantization import FP8

interpreted = pytest.mark.skipif(not HAS_TRITON or DEVICE == "cuda", reason="only in Triton's interpreter")


def spaces_of(size: int, slots: int = 4, region_bytes: int = 1 << 14) -> list[PushSpace]:
    memory = torch.empty(size, push.push_bytes(slots, region_bytes), dtype=torch.uint8)
    memory.view(torch.int32).fill_(push.MISSING)
    addresses = torch.tensor([memory[rank].data_ptr() for rank in range(size)])
    stopped = torch.zeros(1, dtype=torch.int32)
    return [
        PushSpace(rank, size, addresses, torch.zeros(slots, 2, dtype=torch.int32), stopped, region_bytes, memory[rank])
        for rank in range(size)
    ]


def check(
    spaces: list[PushSpace],
    products: list[Tensor] | list[DeferredScale],
    weight: Tensor,
    target: torch.dtype | None,
    scale: Tensor | None = None,
) -> None:
    dtype = products[0].dtype
    residual = partials(1, *products[0].shape, dtype=dtype, seed=9)[0]
    expected, stream = all_reduce_rms_norm_reference(products, residual.clone(), weight, EPS, target, scale)  # type: ignore[arg-type]
    inputs: list[Product] = [strided(p) if isinstance(p, Tensor) else p for p in products]
    streams = [strided(residual) for _ in products]
    results = [torch.empty(x.shape, dtype=dtype if target is None else kernel_dtype(target)) for x in products]
    scales = [torch.empty(len(residual), 1) for _ in products]

    def run(rank: int, step: int) -> None:
        launch_push(
            inputs[rank], streams[rank], weight, EPS, spaces[rank], results[rank],
            None if target is None else scales[rank], target or FP8, scale, steps=step,
        )  # fmt: skip

    in_steps(len(products), run)
    for mine, result, factors in zip(streams, results, scales, strict=True):
        assert torch.equal(mine, stream) and torch.equal(result, results[0])
        if isinstance(expected, Tensor):
            torch.testing.assert_close(result, expected, rtol=ulp(dtype), atol=1e-3)
        else:
            assert_same_quantized((result, factors), expected, 1e-3)


@interpreted
@pytest.mark.parametrize("target", [None, FP8, torch.int8])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_calls_one_after_the_other(size: int, target: torch.dtype | None) -> None:
    """Of one and of several rows a slot; what a call used is missing again two calls later."""
    spaces = spaces_of(size)
    for turn, (rows, columns) in enumerate([(1, 128), (9, 192), (3, 64), (1, 64), (1, 64)]):
        weight = torch.randn(columns, generator=torch.Generator().manual_seed(3)).half()
        check(spaces, partials(size, rows, columns, dtype=torch.float16, seed=turn), weight, target)
        for space in spaces:
            buffers = space.memory.view(torch.int32).view(push.BUFFERS, space.slots, -1)
            buffer, used = space.state[0].tolist()
            assert buffer == (turn + 1) % 3 and used == -(-rows // 4) * columns * 2
            assert (buffers[buffer, 0, : used // 2] != push.MISSING).any()
            for other in {0, 1, 2} - {buffer}:
                assert (buffers[other, 0] == push.MISSING).all(), "what comes in the next calls must be told apart"


@interpreted
def test_deferred_scales_static_scale_and_bfloat16() -> None:
    size, rows, columns = 4, 5, 64
    weight = torch.randn(columns, generator=torch.Generator().manual_seed(3)).bfloat16()
    spaces = spaces_of(size)
    products = [
        DeferredScale(
            (8 * p).int(), torch.full((rows, 1), 0.5), torch.full((1, columns), 0.25), bias, result_dtype=torch.bfloat16
        )
        for p, bias in zip(partials(size, rows, columns), [torch.ones(columns), None, None, None], strict=True)
    ]
    check(spaces, products, weight, torch.int8)
    xs = partials(size, rows, columns, dtype=torch.bfloat16)
    check(spaces, xs, weight, FP8, torch.tensor([0.0625]))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_minus_zero_is_sent_as_zero(dtype: torch.dtype) -> None:
    """Also one that only rounding makes, or that a sum of several is."""
    spaces = spaces_of(2)
    xs = [torch.full((1, 32), -0.0, dtype=dtype) for _ in range(2)]
    xs[0][0, :16] = -torch.finfo(dtype).tiny
    xs[1][0, 8:20] = torch.finfo(dtype).tiny
    check(spaces, xs, torch.ones(32, dtype=dtype), None)
    for space in spaces:
        used = space.memory.view(torch.int16).view(push.BUFFERS, space.slots, -1)[1, 0, : int(space.state[0, 1])]
        assert not (used == -32768).any()


@interpreted
def test_the_next_call_does_not_touch_what_a_slow_rank_still_reads() -> None:
    """Rank 0 has everything of the first call and sends the second, and of that everything but what rank 1 sends."""
    spaces = spaces_of(2)
    weight = torch.ones(64, dtype=torch.float16)
    first, second = (partials(2, 6, 64, dtype=torch.float16, seed=seed) for seed in (0, 1))
    out = [[torch.zeros(6, 64, dtype=torch.float16) for _ in range(2)] for _ in range(2)]

    def run(call: int, rank: int, steps: int) -> None:
        x = (first, second)[call][rank]
        launch_push(x, out[call][rank], weight, EPS, spaces[rank], x.clone(), None, steps=steps)

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
        assert all(torch.equal(stream, xs[0] + xs[1]) for stream in out[call])


@interpreted
def test_once_stopped_nothing_is_missing_again() -> None:
    """Programs that wait for ranks that are gone must come to an end, in every call from then on."""
    spaces = spaces_of(2)
    weight = torch.ones(64, dtype=torch.float16)
    spaces[0].stopped.fill_(1)
    for space in spaces:
        space.memory.zero_()
    for _ in range(4):
        check(spaces, partials(2, 3, 64, dtype=torch.float16), weight, None)
        assert not (spaces[0].memory.view(torch.int32) == push.MISSING).any()


def test_what_fits() -> None:
    space = spaces_of(4, slots=4, region_bytes=8192)[0]
    two_rows, three_rows = torch.zeros(5, 1024, dtype=torch.bfloat16), torch.zeros(9, 1024, dtype=torch.bfloat16)
    assert space.fits(two_rows) and not space.fits(three_rows) and not space.fits(two_rows[:0])
    assert not space.fits(two_rows.float()[:, :64]), "numbers of 16 bits only"
    assert not space.fits(torch.zeros(1, 516, dtype=torch.bfloat16))
