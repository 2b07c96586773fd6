"""The weight-streaming product for few rows against its reference: compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import pytest
import torch
from quantized_helpers import DEVICE, needs_fp8, randn

from appliance.kernels import skinny_linear as skinny
from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.fp8_linear import FP8, quantize_rows_reference
from appliance.kernels.skinny_linear import Config

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")

LLAMA_8B = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "lm_head": (128256, 4096),
}
SMS = 132
# The interpreter multiplies the bit patterns of bfloat16 matrices (triton 3.6 to 3.9): there, float16 stands in.
BF16 = torch.bfloat16 if DEVICE == "cuda" else torch.float16


def among_nan(x: torch.Tensor) -> torch.Tensor:
    """The same values as rows of a wider tensor of what no sum may meet."""
    gap = torch.full((x.shape[0], 16), float("nan"), device=x.device).to(x.dtype)
    return torch.cat([x, gap], 1)[:, : x.shape[1]]


def operands(
    m: int, n: int, k: int, dtype: torch.dtype, *, bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.dtype, torch.Tensor | None, torch.Tensor | None]:
    """Arguments of `skinny_linear`: x as rows of a wider tensor; with FP8 rows of very different scales."""
    x, weight = randn(m, k, dtype=torch.float32), randn(n, k, dtype=torch.float32, seed=1)
    out_dtype = torch.bfloat16 if dtype == FP8 else dtype
    offset = randn(n, dtype=out_dtype, seed=2) if bias else None
    if dtype != FP8:
        return among_nan(x.to(dtype)), weight.to(dtype), offset, out_dtype, None, None
    x[-1] *= 100
    weight[n // 2] *= 0.01
    values, scales = quantize_rows_reference(x)
    weight_values, weight_scales = quantize_rows_reference(weight)
    return among_nan(values), weight_values, offset, out_dtype, scales, weight_scales.view(1, -1)


def check(arguments: tuple, config: Config | None) -> None:
    got = skinny.skinny_linear(*arguments, config=config)
    expected = skinny.skinny_linear_reference(*arguments)
    assert got.dtype == arguments[3] and got.shape == expected.shape
    # One rounding of the result, and float32 sums in another order. Each row against its own size: scales differ.
    error = (got.float() - expected.float()).abs()
    assert (error <= 1.6e-2 * expected.float().abs() + 2e-3 * expected.float().abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", [FP8, torch.float16, *([BF16] if DEVICE == "cuda" else [])])
@pytest.mark.parametrize("weight_first", [True, False])
@pytest.mark.parametrize("split", [1, 2, 3])
def test_splits_and_remainders(dtype: torch.dtype, weight_first: bool, split: int) -> None:
    """90 weight rows in tiles of 32; k of 5 tiles and a bit, so that shares differ and the last tile is cut."""
    needs_fp8()
    k_bytes = 64
    k = (k_bytes // dtype.itemsize) * 5 + 16
    check(operands(5, 90, k, dtype, bias=True), Config(32, k_bytes, split, 4, 3, weight_first))


@pytest.mark.parametrize("m", [1, 2, 15, 16, 17, 33, 64])
@pytest.mark.parametrize("dtype", [FP8, BF16])
def test_rows(m: int, dtype: torch.dtype) -> None:
    needs_fp8()
    check(operands(m, 80, 256, dtype), Config(64, 128, 2, 4, 3, True))


@pytest.mark.parametrize(("n", "k"), [(1, 16), (16, 64), (130, 272), (257, 48)])
def test_default_config_takes_any_shape(n: int, k: int) -> None:
    needs_fp8()
    check(operands(3, n, k, FP8, bias=True), None)


def test_integers_are_summed_exactly_whatever_the_config() -> None:
    """Small whole numbers have exact sums: every config must give them, each number of k counted once."""
    x = torch.randint(-4, 5, (4, 320), generator=torch.Generator().manual_seed(0)).to(DEVICE, BF16)
    weight = torch.randint(-4, 5, (70, 320), generator=torch.Generator().manual_seed(1)).to(DEVICE, BF16)
    expected = (x.double() @ weight.double().T).float()
    for split in (1, 2, 4, 5):
        for block_n in (16, 64):
            config = Config(block_n, 128, split, 4, 3, False)
            assert torch.equal(skinny.skinny_linear(x, weight, None, torch.float32, config=config), expected)


def test_counters_are_zero_after_every_launch_and_the_ring_comes_round() -> None:
    arguments = operands(2, 200, 256, BF16)
    config = Config(16, 64, 4, 4, 3, False)
    first = skinny.skinny_linear(*arguments, config=config)
    counters = skinny._counters[first.device]
    for start in (0, counters.SIZE - 3):  # 13 tiles do not fit behind the second
        counters._next = [start, start]
        assert torch.equal(skinny.skinny_linear(*arguments, config=config), first)
    assert counters._next[0] == 16
    assert all((ring == 0).all() for ring in counters._rings)


@pytest.mark.parametrize("name", LLAMA_8B)
@pytest.mark.parametrize("m", [1, 8, 16, 32, 64])
@pytest.mark.parametrize("element_size", [1, 2])
def test_choices_fill_the_gpu_and_fit_its_memory(name: str, m: int, element_size: int) -> None:
    n, k = LLAMA_8B[name]
    guess = skinny.default_config(n, k, m, SMS, element_size)
    assert -(-n // guess.block_n) * guess.split >= SMS
    config = skinny.choose(n, k, m, SMS, element_size)  # measured ones may leave multiprocessors idle
    listed = skinny.candidates(n, k, m, SMS, element_size)
    assert listed[0] == config and len(listed) == len(set(listed)) >= 8
    for other in listed:
        assert other.shared_bytes(m) <= 227 * 1024
        assert other.split == 1 or other.split * 2 <= -(-k * element_size // other.k_bytes)


def test_a_tuned_config_serves_up_to_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for_8, for_64 = Config(16, 512, 1, 2, 5, False), Config(128, 128, 2, 4, 4, True)
    monkeypatch.setattr(skinny, "TUNED", {(SMS, 1, 4096, 4096, 8): for_8, (SMS, 1, 4096, 4096, 64): for_64})
    assert [skinny.choose(4096, 4096, m, SMS) for m in (1, 8, 9, 64)] == [for_8, for_8, for_64, for_64]
    default = skinny.default_config(4096, 4096, 8, 100)
    assert skinny.choose(4096, 4096, 8, 100) == default  # measured on another GPU
    assert skinny.choose(4096, 4096, 8, SMS, 2) == skinny.default_config(4096, 4096, 8, SMS, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16])
def test_every_candidate_on_real_shapes(m: int, dtype: torch.dtype) -> None:
    needs_fp8()
    arguments = operands(m, 4096, 4096, dtype, bias=True)
    for config in skinny.candidates(4096, 4096, m, skinny.multiprocessors(arguments[0].device), dtype.itemsize):
        check(arguments, config)


@pytest.mark.gpu
def test_graph_replays_give_the_same_bits() -> None:
    needs_fp8()
    arguments = operands(8, 4096, 4096, FP8)
    config = Config(64, 128, 8, 4, 5, True)
    eager = skinny.skinny_linear(*arguments, config=config)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = skinny.skinny_linear(*arguments, config=config)
    for _ in range(50):
        out.zero_()
        graph.replay()
        assert torch.equal(out, eager)


@pytest.mark.gpu
def test_two_streams_do_not_disturb_each_other() -> None:
    needs_fp8()
    config = Config(64, 128, 8, 4, 5, True)
    works = [operands(m, 4096, 4096, FP8) for m in (3, 16)]
    expected = [skinny.skinny_linear(*work, config=config) for work in works]
    streams = [torch.cuda.Stream() for _ in works]
    torch.cuda.synchronize()
    got: list[list[torch.Tensor]] = [[], []]
    for _ in range(100):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(skinny.skinny_linear(*works[i], config=config))
    torch.cuda.synchronize()
    for outs, right in zip(got, expected):
        assert all(torch.equal(out, right) for out in outs)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 65])
def test_the_fp8_scheme_gives_the_product_on_either_side_of_the_threshold(rows: int) -> None:
    needs_fp8()
    from appliance.quantization.fp8 import Scheme

    scheme = Scheme()
    x, weight = randn(rows, 256, dtype=torch.bfloat16), randn(50, 256, dtype=torch.bfloat16, seed=1)
    bias = randn(50, dtype=torch.bfloat16, seed=2)
    got = scheme.apply(scheme.prepare(scheme.quantize(weight)), x, bias, torch.bfloat16)[:, :50]
    expected = x.float() @ weight.float().T + bias.float()
    assert (got.float() - expected).norm() < 0.05 * expected.norm()
