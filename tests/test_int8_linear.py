"""int8 products against their exact reference: compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import pytest
import torch
from quantized_helpers import DEVICE, randn
from torch import Tensor

from appliance.kernels import int8_linear as int8
from appliance.kernels import skinny_linear as skinny
from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.deferred_scale import materialize
from appliance.kernels.int8_linear import TileConfig
from appliance.kernels.row_quantization import quantize_rows_reference
from appliance.kernels.skinny_linear import Config

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")


def whole(*shape: int, seed: int) -> Tensor:
    """All int8 numbers but -128, which nobody stores."""
    numbers = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return numbers.to(DEVICE)


def in_wider_rows(values: Tensor) -> Tensor:
    """The same numbers as rows of a wider tensor, beside numbers that must not count."""
    return torch.cat([values, torch.full((len(values), 16), 77, dtype=torch.int8, device=DEVICE)], 1)[
        :, : values.shape[1]
    ]


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """values, scales, weight, weight_scales, bias."""
    values, scales = quantize_rows_reference(randn(m, k, dtype=torch.float32), torch.int8)
    weight, weight_scales = quantize_rows_reference(randn(n, k, dtype=torch.float32, seed=1), torch.int8)
    return in_wider_rows(values), scales, weight, weight_scales.view(1, -1), randn(n, dtype=dtype, seed=2)


def test_reference_sums_are_those_of_integers() -> None:
    values, weight = whole(3, 500, seed=0), whole(7, 500, seed=1)
    values[0], weight[0] = 127, -127  # the largest sum
    expected = values.cpu().long() @ weight.cpu().long().T
    assert expected[0, 0] == -127 * 127 * 500
    assert torch.equal(int8.int8_sums_reference(values, weight).cpu().long(), expected)


@pytest.mark.parametrize("m", [0, 1, 7, 16, 17, 40])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (528, 272)])
def test_library_sums_are_exact(m: int, n: int, k: int) -> None:
    values, weight = whole(m, k, seed=m), whole(n, k, seed=1)
    got = int8.int8_sums(values, weight)
    assert got.dtype == torch.int32 and torch.equal(got, int8.int8_sums_reference(values, weight))


@needs_triton
@pytest.mark.parametrize("weight_first", [True, False])
@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize("m", [1, 16, 33, 64])
def test_skinny_sums_are_exact(m: int, split: int, weight_first: bool) -> None:
    """90 weight rows in tiles of 32; k of 5 tiles and a bit, so that shares differ and the last tile is cut."""
    values, weight = in_wider_rows(whole(m, 336, seed=m)), whole(90, 336, seed=1)
    values[0], weight[3] = 127, 127
    config = Config(32, 64, split, 4, 3, weight_first)
    got = skinny.skinny_linear(values, weight, None, torch.int32, config=config)
    assert got.dtype == torch.int32 and torch.equal(got, int8.int8_sums_reference(values, weight))


@needs_triton
@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (1, 16, 64, None),
        (70, 90, 336, TileConfig(64, 64, 64, 4, 3)),
        (70, 130, 256, TileConfig(64, 32, 128, 4, 3)),
        (300, 40, 128, TileConfig(32, 16, 64, 4, 3)),  # more tiles of rows than a group
        (200, 48, 80, None),
    ],
)
def test_tiled_sums_are_exact(m: int, n: int, k: int, config: TileConfig | None) -> None:
    values, weight = in_wider_rows(whole(m, k, seed=2)), whole(n, k, seed=3)
    got = int8.int8_linear_triton(values, None, weight, None, None, torch.int32, config)
    assert torch.equal(got, int8.int8_sums_reference(values, weight))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_scaled_products(dtype: torch.dtype, with_bias: bool) -> None:
    values, scales, weight, weight_scales, bias = operands(20, 72, 272, dtype)
    offset = bias if with_bias else None
    expected = int8.int8_linear_reference(values, scales, weight, weight_scales, offset, dtype)
    found = {
        "deferred": materialize(
            int8.int8_linear_deferred(values.contiguous(), scales, weight, weight_scales, offset, dtype), dtype
        ),
        "skinny": skinny.skinny_linear(
            values, weight, offset, dtype, scales, weight_scales, Config(32, 64, 2, 4, 3, True)
        ),
        "tiled": int8.int8_linear_triton(values, scales, weight, weight_scales, offset, dtype),
    }
    for name, got in found.items():
        assert got.dtype == dtype and got.shape == (20, 72), name
        # Sums are the same; a product of scales and the bias may be rounded as one operation or as two.
        torch.testing.assert_close(got, expected, rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=1e-5, msg=name)


def test_reference_is_the_product_of_what_was_quantized() -> None:
    values, scales, weight, weight_scales, bias = operands(4, 48, 64, torch.float32)
    expected = (values.double() * scales.double()) @ (weight.double() * weight_scales.double().T).T + bias.double()
    got = int8.int8_linear_reference(values, scales, weight, weight_scales, bias, torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def test_tiles_fit_the_gpu_and_the_rows() -> None:
    assert all(tile.block_m == 64 for tile in int8.tiles_for(64, 227 * 1024))
    assert len(int8.tiles_for(8192, 227 * 1024)) == len(int8.TILES) == len({tile.name for tile in int8.TILES})
    assert all(tile.shared_bytes <= 227 * 1024 for tile in int8.TILES)
    small = int8.tiles_for(8192, 99 * 1024)
    assert small and all(tile.shared_bytes <= 99 * 1024 for tile in small)
    assert {int8.default_tile(1), int8.default_tile(8192)} <= set(small)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 64, 65, 300])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336)])
def test_every_config_gives_exact_sums_on_real_shapes(m: int, n: int, k: int) -> None:
    values, weight = whole(m, k, seed=0), whole(n, k, seed=1)
    expected = int8.int8_sums_reference(values, weight)
    assert torch.equal(int8.int8_sums(values, weight), expected)
    for tile in int8.tiles_for(m, skinny.shared_memory(values.device)):
        got = int8.int8_linear_triton(values, None, weight, None, None, torch.int32, tile)
        assert torch.equal(got, expected), tile
    if m <= skinny.MAX_ROWS:
        for config in skinny.likely(n, k, m, skinny.multiprocessors(values.device)):
            assert torch.equal(skinny.skinny_linear(values, weight, None, torch.int32, config=config), expected), config


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["skinny", "tiled", "deferred"])
def test_products_in_a_cuda_graph(method: str) -> None:
    values, scales, weight, weight_scales, bias = operands(24, 4096, 4096, torch.bfloat16)
    values = values.contiguous()
    arguments = values, scales, weight, weight_scales, bias, torch.bfloat16

    def run() -> Tensor:
        if method == "skinny":
            return skinny.skinny_linear(values, weight, bias, torch.bfloat16, scales, weight_scales)
        if method == "tiled":
            return int8.int8_linear_triton(*arguments)
        return materialize(int8.int8_linear_deferred(*arguments), torch.bfloat16)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    values.copy_(whole(24, 4096, seed=9))
    graph.replay()
    assert torch.equal(out, run())
    torch.testing.assert_close(out, int8.int8_linear_reference(*arguments), rtol=1.6e-2, atol=1e-3)
