"""All-reduce kernels against their references: several "ranks" as several workspaces of one process in Triton's
interpreter, step by step; on machines with several GPUs, one process each (`all_reduce_ranks.py`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from quantized_helpers import DEVICE, assert_same_quantized, kernel_dtype, strided, ulp
from torch import Tensor

from appliance.kernels import all_reduce
from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.all_reduce import GATHER, PUBLISH, REDUCE, Workspace, all_reduce_, all_reduce_reference
from appliance.kernels.all_reduce_norm import all_reduce_rms_norm_reference, launch_fused
from appliance.kernels.deferred_scale import DeferredScale, Product
from appliance.kernels.row_quantization import FP8

interpreted = pytest.mark.skipif(not HAS_TRITON or DEVICE == "cuda", reason="only in Triton's interpreter")
EPS = 1e-5


def workspaces(size: int, slots: int = 4, region_bytes: int = 1 << 16) -> list[Workspace]:
    """One for each rank, all in this process."""
    memory = torch.zeros(size, all_reduce.workspace_bytes(slots, region_bytes), dtype=torch.uint8)
    addresses = torch.tensor([memory[rank].data_ptr() for rank in range(size)])
    return [
        Workspace(rank, size, addresses, torch.zeros(slots, dtype=torch.int32), region_bytes, memory)
        for rank in range(size)
    ]


def partials(size: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Numbers of each rank, whose sums are exact, since the interpreter truncates to bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return [(4 * torch.randn(*shape, generator=generator)).round().div(4).to(dtype) for _ in range(size)]


def in_steps(size: int, run: Callable[[int, int], object]) -> None:
    """`run(rank, step)` for all ranks, one step after the other: what the waits are for on GPUs."""
    for step in (PUBLISH, REDUCE, GATHER):
        for rank in range(size):
            run(rank, step)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("two_shot", [False, True])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_all_reduce(size: int, two_shot: bool, dtype: torch.dtype) -> None:
    """Messages of less than a tile and of several tiles a slot, one after the other on the same workspaces."""
    spaces = workspaces(size)
    for turn, shape in enumerate([(1, 8), (3, 1000), (5, 5003), (1, 8)]):
        xs = partials(size, *shape, dtype=dtype, seed=turn)
        expected = all_reduce_reference(xs)
        in_steps(size, lambda r, step, xs=xs: all_reduce_(xs[r], spaces[r], two_shot=two_shot, steps=step))  # type: ignore[misc]
        for x in xs:
            assert torch.equal(x, expected)
    assert spaces[0].epochs.tolist() == spaces[-1].epochs.tolist() and spaces[0].epochs[0] == 4


@interpreted
def test_numbers_are_added_in_the_order_of_ranks() -> None:
    """In float32, on every rank: (2^24 + 1) + 1 loses both ones, 1 + 1 + 2^24 none."""
    for two_shot in (False, True):
        for numbers in ((2.0**24, 1.0, 1.0, 0.0), (1.0, 1.0, 2.0**24, 0.0)):
            xs = [torch.full((2, 40), number) for number in numbers]
            spaces = workspaces(4)
            for step in (PUBLISH, REDUCE, GATHER):
                for x, space in zip(xs, spaces, strict=True):
                    all_reduce_(x, space, two_shot=two_shot, steps=step)
            assert all((x == (2.0**24 if numbers[0] > 1 else 2.0**24 + 2)).all() for x in xs)


@interpreted
def test_the_next_all_reduce_does_not_touch_what_a_slow_rank_still_reads() -> None:
    """Rank 0 is told by rank 1 of epoch 1 and goes on to publish epoch 2, whatever its shape, before rank 1 reads."""
    spaces = workspaces(2)
    first, second = partials(2, 3, 4000), partials(2, 7, 700, seed=1)
    expected = all_reduce_reference(first)
    for rank in (0, 1):
        all_reduce_(first[rank], spaces[rank], two_shot=False, steps=PUBLISH)
    all_reduce_(first[0], spaces[0], two_shot=False, steps=REDUCE | GATHER)
    all_reduce_(second[0], spaces[0], two_shot=False, steps=PUBLISH)
    all_reduce_(first[1], spaces[1], two_shot=False, steps=REDUCE | GATHER)
    assert torch.equal(first[0], expected) and torch.equal(first[1], expected)


@interpreted
@pytest.mark.parametrize("target", [None, FP8, torch.int8])
@pytest.mark.parametrize("two_shot", [False, True])
@pytest.mark.parametrize(("size", "columns", "rows"), [(2, 96, 1), (4, 160, 9), (8, 128, 3)])
def test_fused_with_norm(size: int, columns: int, rows: int, two_shot: bool, target: torch.dtype | None) -> None:
    weight = torch.randn(columns, generator=torch.Generator().manual_seed(3))
    check_fused(partials(size, rows, columns), weight, two_shot, target)


@interpreted
@pytest.mark.parametrize("two_shot", [False, True])
def test_fused_applies_deferred_scales(two_shot: bool) -> None:
    """Of int32 sums; only rank 0 has a bias."""
    size, rows, columns = 4, 5, 64
    weight = torch.randn(columns, generator=torch.Generator().manual_seed(3))
    products = [
        DeferredScale(
            (8 * p).int(), torch.full((rows, 1), 0.5), torch.full((1, columns), 0.25), None, result_dtype=torch.float32
        )
        for p in partials(size, rows, columns)
    ]
    products[0] = DeferredScale(
        products[0].values, products[0].row_scales, products[0].column_scales, torch.ones(columns), torch.float32
    )
    check_fused(products, weight, two_shot, torch.int8)


@interpreted
def test_fused_static_scale_and_bfloat16() -> None:
    weight = torch.randn(64, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    xs = partials(2, 6, 64, dtype=torch.bfloat16)
    check_fused(xs, weight, True, FP8, torch.tensor([0.0625]))
    check_fused(xs, weight, False, None)


def check_fused(
    products: list[Tensor] | list[DeferredScale],
    weight: Tensor,
    two_shot: bool,
    target: torch.dtype | None,
    scale: Tensor | None = None,
) -> None:
    """Every rank against the reference; inputs are rows of wider tensors."""
    size, dtype = len(products), products[0].dtype
    residual = partials(1, *products[0].shape, dtype=dtype, seed=9)[0]
    expected, expected_stream = all_reduce_rms_norm_reference(
        products,
        residual.clone(),
        weight,
        EPS,
        target,
        scale,  # type: ignore[arg-type]
    )
    inputs: list[Product] = [strided(p) if isinstance(p, Tensor) else p for p in products]
    streams = [strided(residual) for _ in products]
    spaces = workspaces(size)
    results = [torch.empty(x.shape, dtype=dtype if target is None else kernel_dtype(target)) for x in products]
    scales = [torch.empty(len(residual), 1) for _ in products]

    def run(rank: int, step: int) -> None:
        launch_fused(
            inputs[rank], streams[rank], weight, EPS, spaces[rank], results[rank],
            None if target is None else scales[rank], target or FP8, scale, two_shot=two_shot, steps=step,
        )  # fmt: skip

    in_steps(size, run)
    for stream, result, factors in zip(streams, results, scales, strict=True):
        assert torch.equal(stream, expected_stream) and torch.equal(result, results[0])
        if isinstance(expected, Tensor):
            torch.testing.assert_close(result, expected, rtol=ulp(dtype), atol=1e-5)
        else:
            assert_same_quantized((result, factors), expected, 1e-5 if dtype == torch.float32 else 1e-4)


def test_what_fits() -> None:
    space = workspaces(4, slots=4, region_bytes=4096)[0]
    assert space.capacity == 4 * 4096
    assert (
        space.fits(torch.zeros(4, 1024)) and not space.fits(torch.zeros(5, 1024)) and not space.fits(torch.zeros(0, 8))
    )
    assert space.fits_fused(torch.zeros(8, 512)) and not space.fits_fused(torch.zeros(9, 512))  # 2 rows a slot, then 3
    assert not space.fits_fused(torch.zeros(1, 516, dtype=torch.bfloat16))  # a rank's share begins anywhere
