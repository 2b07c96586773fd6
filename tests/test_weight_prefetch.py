"""Bringing weights into L2 ahead: which lines, by which programs; that nothing else changes; how sizes are chosen."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import test_all_reduce
import torch
from quantized_helpers import DEVICE, randn
from torch import Tensor

from appliance.kernels import all_reduce_norm, norm, weight_prefetch
from appliance.kernels._triton import HAS_TRITON, tl, triton
from appliance.kernels.dependent_launch import launch_options
from appliance.kernels.tactics import TABLE
from appliance.kernels.weight_prefetch import KEY, Ahead, beginning, chosen, launch, name_of, prefetch_ahead
from appliance.layers.decoder import DecoderLayer
from appliance.layers.linear import ColumnParallelLinear
from appliance.quantization.unquantized import Scheme
from appliance.runtime import ahead_choice

interpreted = pytest.mark.skipif(not HAS_TRITON or DEVICE == "cuda", reason="only in Triton's interpreter")
CPU = torch.device("cpu")
ROWS, ROW_BYTES = 300, 1024


@pytest.fixture(autouse=True)
def empty_table() -> Iterator[None]:
    TABLE.clear()
    yield
    TABLE.clear()


def a_weight() -> Tensor:
    """Whose memory begins with a cache line, as a GPU's does."""
    memory = torch.zeros(ROWS * ROW_BYTES + 128, dtype=torch.uint8)
    start = -memory.data_ptr() % 128
    return memory[start : start + ROWS * ROW_BYTES].view(ROWS, ROW_BYTES)


# ---------------------------------------------------------------- what is brought


@pytest.mark.parametrize(("wanted", "piece"), [(ROWS * 128, 128), (ROWS * 300, 256), (1 << 30, ROW_BYTES)])
def test_the_beginning_of_a_weight(wanted: int, piece: int) -> None:
    ahead = beginning(a_weight(), wanted)
    assert ahead is not None and (ahead.piece, ahead.row_bytes) == (piece, ROW_BYTES)
    assert beginning(a_weight().view(torch.bfloat16), wanted) is not None


def test_nothing_is_brought_of_what_has_no_lines() -> None:
    weight = a_weight()
    assert beginning(weight, 0) is None and beginning(weight, ROWS * 127) is None
    assert beginning(weight[:, :-8], 1 << 20) is None and beginning(weight.t(), 1 << 20) is None
    assert beginning(weight.view(-1)[: ROWS * 1000].view(ROWS, 1000), 1 << 20) is None, "a row begins inside of a line"
    assert beginning(weight[0], 1 << 20) is None and beginning(weight[:0], 1 << 20) is None


def test_the_table_decides_by_rows() -> None:
    weight = a_weight()
    assert chosen(weight, 40, 30, 8) is None
    TABLE.choose(KEY, 40, 30, 8, name_of(1))
    TABLE.choose(KEY, 40, 30, 64, name_of(0))
    assert chosen(weight, 40, 30, 5) == Ahead(weight, ROW_BYTES)
    assert (
        chosen(weight, 40, 30, 9) is None and chosen(weight, 40, 30, 65) is None and chosen(weight, 30, 40, 8) is None
    )


def test_a_layer_says_what_its_product_reads() -> None:
    layer = ColumnParallelLinear(ROW_BYTES // 4, ROWS, bias=False, scheme=Scheme(), dtype=torch.float32)
    layer.weight = torch.nn.Parameter(a_weight().view(torch.float32), requires_grad=False)
    assert layer.ahead(8) is None
    TABLE.choose(KEY, ROWS, ROW_BYTES // 4, 8, name_of(4))
    assert layer.ahead(8) is None, "it has no weight yet that products read"
    layer.prepare()
    ahead = layer.ahead(8)
    assert ahead is not None and ahead.weight is layer.prepared["weight"] and ahead.piece == ROW_BYTES
    assert layer.ahead(9) is None


# ---------------------------------------------------------------- by whom


def on_hopper(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[int]:
    """Kernels of `module` are launched as if they could bring something; who would, does nothing but be counted."""
    brought: list[int] = []

    def launched(ahead: Ahead | None, grid: tuple[int, ...], device: torch.device) -> Any:
        grid, arguments = launch(ahead, grid, device)
        return grid, arguments | {"PDL": False}

    monkeypatch.setattr(weight_prefetch, "launch_options", lambda device: {"PDL": True})
    monkeypatch.setattr(module, "launch", launched)
    monkeypatch.setattr(module, "prefetch_ahead", lambda *arguments: brought.append(1))
    return brought


def test_programs_are_added_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = Ahead(a_weight(), 256)
    assert launch(ahead, (5,), CPU) == ((5,), launch(None, (5,), CPU)[1]), "nothing here can bring lines into L2"
    assert launch(None, (5,), CPU)[1].items() >= launch_options(CPU).items()
    monkeypatch.setattr(weight_prefetch, "launch_options", lambda device: {"PDL": True})
    grid, arguments = launch(ahead, (5, 3), CPU)
    assert grid == (5 + 43, 3) and arguments["AHEAD"] and arguments["ahead_behind"] == 5
    assert (arguments["ahead_rows"], arguments["ahead_row_bytes"], arguments["ahead_piece"]) == (ROWS, ROW_BYTES, 256)
    assert launch(ahead, (0, 3), CPU)[0] == (0, 3) and not launch(ahead, (0, 3), CPU)[1]["AHEAD"]


@triton.jit
def _bring_kernel(ahead_ptr, rows, row_bytes, piece, behind):
    if tl.program_id(0) >= behind:
        prefetch_ahead(ahead_ptr, rows, row_bytes, piece, behind)


@interpreted
@pytest.mark.parametrize("grid", [(7,), (3, 2), (3, 2, 2)])
@pytest.mark.parametrize("piece", [128, 384, ROW_BYTES])
def test_every_line_is_loaded_once(monkeypatch: pytest.MonkeyPatch, grid: tuple[int, ...], piece: int) -> None:
    weight, loaded = a_weight(), []

    def assembly(text: str, constraints: str, args: list[Any], **options: Any) -> Any:
        if "ld.global.L2::128B" in text:
            at, there = (argument.handle.data for argument in args)
            loaded.extend(at[there != 0].tolist())
        return args[-1].to(tl.int32)

    monkeypatch.setattr(tl, "inline_asm_elementwise", assembly)
    _bring_kernel[grid](weight, ROWS, ROW_BYTES, piece, 1)
    lines = np.arange(ROWS)[:, None] * ROW_BYTES + np.arange(0, piece, 128)[None]
    assert sorted(loaded) == (weight.data_ptr() + lines).ravel().tolist()


@interpreted
def test_norms_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    x, residual, weight = (randn(*shape, dtype=torch.float32) for shape in ((5, 96), (5, 96), (96,)))
    expected = norm.rms_norm_triton(x, residual.clone(), weight, 1e-5)
    brought = on_hopper(monkeypatch, norm)
    got = norm.rms_norm_triton(x, residual.clone(), weight, 1e-5, Ahead(a_weight(), 256))
    assert len(brought) == 128 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@interpreted
@pytest.mark.parametrize("two_shot", [False, True])
def test_sums_over_ranks_stay_what_they_are(monkeypatch: pytest.MonkeyPatch, two_shot: bool) -> None:
    """Of more rows than slots: programs that bring something have none."""
    brought = on_hopper(monkeypatch, all_reduce_norm)
    fused = all_reduce_norm.launch_fused
    ahead = Ahead(a_weight(), 256)
    monkeypatch.setattr(test_all_reduce, "launch_fused", lambda *args, **named: fused(*args, ahead=ahead, **named))
    xs = test_all_reduce.partials(2, 6, 64)
    test_all_reduce.check_fused(xs, torch.ones(64), two_shot, None)
    assert len(brought) == 128 * 6, "two ranks, three steps"


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 200])
def test_the_same_bits_on_a_gpu(rows: int) -> None:
    x, residual, weight = (randn(rows, 8192, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    behind = torch.zeros(14336, 8192, dtype=torch.uint8, device="cuda")
    results = []
    for wanted in (0, 24 << 20, 1 << 30):
        ahead = beginning(behind, wanted)
        (values, scales), stream = norm.rms_norm_quantize_triton(x, residual.clone(), weight[0], 1e-5, ahead=ahead)
        results.append(
            (values.view(torch.uint8), scales, stream, *norm.rms_norm_triton(x, None, weight[0], 1e-5, ahead))
        )
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))


# ---------------------------------------------------------------- how much


def a_layer() -> DecoderLayer:
    """Products whose weights are of 40, 10 and 4 MiB."""

    def product(out_features: int, mebibytes: int) -> SimpleNamespace:
        weight = torch.empty(out_features, (mebibytes << 20) // out_features, dtype=torch.uint8)
        scheme = SimpleNamespace(weight_read=lambda tensors: tensors["weight"])
        return SimpleNamespace(out_features=out_features, in_features=64, scheme=scheme, prepared={"weight": weight})

    mlp = SimpleNamespace(gate_up=product(1024, 40))
    return cast(
        DecoderLayer, SimpleNamespace(mlp=mlp, attention=SimpleNamespace(qkv=product(512, 10), o=product(256, 4)))
    )


def size_of(out_features: int, rows: int) -> int:
    name = TABLE.chosen(KEY, out_features, 64, rows)
    assert name is not None
    return int(name.split()[0])


def test_sizes_are_chosen_that_pay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int, int]] = []

    def timer(rows: int) -> float:
        gate_up, qkv = size_of(1024, rows), size_of(512, rows)
        o = size_of(256, rows) if rows == 8 else 0
        asked.append((rows, gate_up, qkv, o))
        if rows > 8:
            return 1000.0 + gate_up - 0.1 * qkv - 60 * (gate_up == 24 and asked.count(asked[-1]) == 1)
        return 1000.0 - 2 * min(gate_up, 16) + (gate_up > 16) - (5 if gate_up == 16 else 50) * (qkv == 16) + 5 * (o > 0)

    found = ahead_choice.choose(a_layer(), [8, 64, 128], timer, lambda rows: rows == 8)
    assert [(c.product, c.rows, c.tactic) for c in found] == [
        ("gate_up", 8, "16 MiB"),
        ("qkv", 8, "16 MiB"),
        ("o", 8, "0 MiB"),
        ("gate_up", 64, "0 MiB"),
        ("qkv", 64, "0 MiB"),
    ]  # and no more rows: nothing paid with 64, once it was looked at twice
    assert all(c.scheme == KEY and TABLE.chosen(KEY, c.out_features, 64, c.rows) == c.tactic for c in found)
    assert (found[0].microseconds, found[0].runner_up, found[0].runner_up_microseconds) == (968.0, "24 MiB", 969.0)
    assert {gate_up for _, gate_up, _, _ in asked} == {0, 8, 16, 24, 32}
    assert {qkv for _, _, qkv, _ in asked} == {0, 8, 16}, "16 is more than the whole"
    assert {o for *_, o in asked} == {0, 8}
    layer = a_layer()
    monkeypatch.setattr(ahead_choice, "launch_options", lambda device: {"PDL": True})
    monkeypatch.setattr(ahead_choice, "ENABLED", True)
    assert not ahead_choice.pays_to_time(layer, CPU), "it was just chosen"
    TABLE.clear()
    assert ahead_choice.pays_to_time(layer, CPU)
    TABLE.choose(KEY, layer.attention.qkv.out_features, 64, 8, name_of(0))
    assert not ahead_choice.pays_to_time(layer, CPU)


def test_rows_that_are_timed() -> None:
    assert ahead_choice.rows_to_time(1024) == [8, 32, 64, 128] == ahead_choice.rows_to_time(128)
    assert ahead_choice.rows_to_time(100) == [8, 32, 64, 100] and ahead_choice.rows_to_time(4) == [4]
