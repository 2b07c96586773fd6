"""Sums over ranks with a norm behind them by clusters of blocks: how rows are cut up, which kernels compile, and
residual streams that are dealt out. What the kernel computes is compared on GPUs, by all_reduce_ranks.py."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nvrtc import compile_cubin, machine_code, spilled_bytes, unavailable
from torch import Tensor

from appliance.kernels import norm, sum_norm, sum_norm_group
from appliance.kernels.all_reduce import Workspace
from appliance.kernels.all_reduce_group import LIBRARY, ONE_SHOT, SEPARATE, TWO_SHOT, AllReduce, key
from appliance.kernels.deferred_scale import DeferredScale
from appliance.kernels.norm import rms_norm_reference
from appliance.kernels.partial_sum import DealtStream, PartialSum, dealt_rows, whole_rows, whole_stream
from appliance.kernels.row_quantization import FP8
from appliance.kernels.sum_norm import (
    Launch,
    SumSpace,
    Way,
    cuts,
    grid,
    macros,
    pieces_of,
    rows_at_once,
    source,
    sum_rms_norm,
)
from appliance.kernels.sum_norm_group import SumNorms
from appliance.kernels.tactics import TABLE

needs_nvrtc = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
HIDDEN = 512


def space(rank: int = 0, size: int = 4) -> SumSpace:
    nothing = torch.zeros(2, dtype=torch.int32)
    return SumSpace(rank, size, torch.zeros(size, dtype=torch.int64), nothing, nothing[:1].clone(), 132)


# ---------------------------------------------------------------- cutting up


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize("hidden", [512, 2048, 4096, 5120, 8192, 16384])
@pytest.mark.parametrize("rows", [1, 8, 64, 100, 256, 1024])
def test_all_blocks_of_a_launch_run_at_once(way: Way, hidden: int, rows: int) -> None:
    for ranks in (2, 4, 8):
        if not cuts(hidden, ranks):
            continue
        for pieces in (None, *cuts(hidden, ranks)):
            blocks, cut = grid(rows, hidden, ranks, way, 132, pieces)
            threads = hidden // 8 // cut
            assert cut in cuts(hidden, ranks) and pieces in (None, cut)
            assert threads % 32 == 0 and threads * cut * 8 == hidden
            assert 0 < blocks <= 132 * min((512 if ranks > 4 else 1024) // threads, 8) and blocks % cut == 0
            units = rows if way is Way.ONE_SHOT else -(-rows // ranks)
            assert blocks // cut <= units  # no cluster without a row


def test_few_rows_are_cut_into_more_pieces() -> None:
    assert [grid(rows, 8192, 4, Way.DEALT, 132) for rows in (64, 128, 256, 1024)] == [
        (128, 8),
        (128, 4),
        (128, 2),
        (264, 2),
    ]
    assert cuts(5120, 4) == [4, 2, 1] and cuts(16384, 4) == [8, 4, 2] and cuts(4100, 4) == []
    assert [pieces_of(rows, 5120, 4) for rows in (1, 65, 129)] == [4, 4, 2] and pieces_of(300, 16384, 8) == 4


def test_what_the_kernel_takes() -> None:
    def fits(rows: int, way: Way, hidden: int = 8192, dtype: torch.dtype = torch.bfloat16) -> bool:
        return space().fits(torch.empty(rows, hidden, dtype=dtype, device="meta"), way)

    assert fits(1024, Way.DEALT) and fits(100_000, Way.DEALT) and fits(256, Way.ONE_SHOT)
    assert not fits(257, Way.ONE_SHOT) and not fits(0, Way.DEALT) and not fits(4, Way.DEALT, 8200)
    assert not fits(4, Way.DEALT, dtype=torch.float16)
    scales = torch.ones(4, 1), torch.ones(1, 8200)
    for values, bias, first, taken in (
        (torch.bfloat16, None, 0, True),
        (torch.int32, torch.bfloat16, 0, True),
        (torch.int32, torch.float32, 0, False),
        (torch.float16, None, 0, False),
        (torch.bfloat16, None, 1, False),  # 16 bytes are loaded at a time
    ):
        added = None if bias is None else torch.zeros(8192, dtype=bias)
        columns = scales[1][:, first : first + 8192]
        product = DeferredScale(torch.zeros(4, 8192, dtype=values), scales[0], columns, added, torch.bfloat16)
        assert space().fits(product, Way.DEALT) is taken


def test_more_rows_go_in_rounds_that_begin_with_the_first_ranks_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a rank's rows are the same, of however many rounds."""
    launched: list[tuple[slice, tuple[int, ...]]] = []
    monkeypatch.setattr(
        sum_norm, "_launch", lambda x, rows, residual, *_: launched.append((rows, tuple(residual.shape)))
    )
    x = torch.zeros(2100, 8192, dtype=torch.bfloat16)
    sum_rms_norm(x, x, x[0], 1e-5, space(), Launch(Way.DEALT))
    assert launched == [
        (slice(0, 1024), (1024, 8192)),
        (slice(1024, 2048), (1024, 8192)),
        (slice(2048, 2100), (52, 8192)),
    ]
    for ranks in (2, 4, 8):
        for hidden in (512, 5120, 16384):
            assert rows_at_once(hidden, ranks) % ranks == 0 < rows_at_once(hidden, ranks)


# ---------------------------------------------------------------- compiling


@needs_nvrtc
@pytest.mark.parametrize("way", Way)
def test_kernels_for_hopper_compile_and_spill_next_to_nothing(way: Way) -> None:
    for ranks, hidden, integers, result in (
        (4, 8192, False, FP8),
        (4, 8192, False, None),
        (2, 4096, True, torch.int8),
        (8, 5120, False, None),
    ):
        for pieces in cuts(hidden, ranks):
            constants = macros(way, ranks, hidden, pieces, integers, result)
            code = compile_cubin(source(), "sm_90a", constants)
            assert (spilled_bytes(code) or 0) <= 32, constants
            instructions = machine_code(code)
            if instructions:
                assert "ACQBULK" in instructions and "PREEXIT" in instructions  # waits for the kernel in front


# ---------------------------------------------------------------- streams that are dealt out


@pytest.mark.parametrize(("rows", "size"), [(1, 2), (3, 4), (8, 4), (13, 4), (16, 8)])
def test_own_rows_make_a_whole_stream(rows: int, size: int) -> None:
    stream = torch.randn(rows, 6)
    most = -(-rows // size)
    shares = torch.full((size, most, 6), float("nan"))
    for rank in range(size):
        own = dealt_rows(stream, rank, size)
        shares[rank, : len(own)] = own
    assert torch.equal(whole_rows(shares, rows), stream)


def dealt(stream: Tensor, rank: int, size: int, calls: list[int]) -> DealtStream:
    """What a rank has of `stream`, and rubbish elsewhere."""
    memory = torch.full_like(stream, float("nan"))
    dealt_rows(memory, rank, size).copy_(dealt_rows(stream, rank, size))

    def gather(x: Tensor) -> Tensor:
        calls.append(len(x))
        shares = [torch.zeros_like(x) for _ in range(size)]
        for other, share in enumerate(shares):
            own = dealt_rows(stream, other, size)
            share[: len(own)] = own
        assert torch.equal(x, shares[rank])
        return torch.stack(shares)

    return DealtStream.of(memory, rank, size, gather)


@torch.inference_mode()
def test_whoever_calculates_with_a_dealt_stream_gets_all_of_it() -> None:
    stream, calls = torch.randn(5, 4), []  # type: ignore[var-annotated]
    part = dealt(stream, 1, 2, calls)
    assert (part.shape, part.dtype, part.device) == (stream.shape, stream.dtype, stream.device) and not calls
    x = torch.randn(5, 4)
    found: list[Tensor] = [x + part, part + x, torch.cat([part, x])[:5] + x, whole_stream(part) + x]
    assert all(torch.equal(got, x + stream) and type(got) is Tensor for got in found) and calls == [3] * 4
    assert type(part.rows) is Tensor and part.rows.isnan().any() and whole_stream(stream) is stream
    with pytest.raises(TypeError, match="dealt out is asked for its address"):
        part.data_ptr()


# ---------------------------------------------------------------- tactics


class _Library:
    """Ranks whose numbers are all zeros but this one's."""

    process_group = None

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack([x, *[torch.zeros_like(x)] * 3])

    def minimum(self, value: int) -> int:
        return value


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, type]]:
    """In place of the GPU's: the reference, for this rank's rows if they are dealt. Which way each call went, and with
    what kind of stream."""
    calls: list[tuple[str, type]] = []

    def run(x: Tensor, residual: Tensor, weight: Tensor, eps: float, at: SumSpace, how: Launch) -> Tensor:
        calls.append((how.way.name, type(residual)))
        result, stream = rms_norm_reference(x, residual.clone(), weight, eps)
        kept = slice(at.rank, None, at.size) if how.way is Way.DEALT else slice(None)
        residual[kept] = stream[kept]
        return result

    monkeypatch.setattr(sum_norm_group, "sum_rms_norm", run)
    return calls


def reducer() -> AllReduce:
    workspace = Workspace(0, 4, torch.zeros(4, dtype=torch.int64), torch.zeros(8, dtype=torch.int32), 1 << 16)
    own = AllReduce(_Library(), workspace)
    own.use_sums(SumNorms(space(), _Library().all_gather))
    return own


@torch.inference_mode()
def test_a_stream_stays_dealt_out_from_norm_to_norm_and_is_whole_elsewhere(kernel: list[tuple[str, type]]) -> None:
    TABLE.clear()
    own, weight = reducer(), torch.ones(HIDDEN, dtype=torch.bfloat16)
    x = torch.randn(6, HIDDEN).bfloat16()
    norms: Callable[[Tensor], tuple[Tensor, Tensor]] = lambda at: norm.rms_norm(PartialSum.of(x, own), at, weight, 1e-5)  # noqa: E731
    choose: Callable[[str], None] = lambda way: TABLE.choose(key("all_reduce_norm", x.dtype), HIDDEN, 4, 8, way)  # noqa: E731
    TABLE.choose(key("all_reduce", x.dtype), HIDDEN, 4, 8, LIBRARY)
    try:
        choose("cluster dealt")
        first = torch.zeros_like(x)
        _, stream = norms(first)
        _, again = norms(stream)
        assert isinstance(stream, DealtStream) and again is stream and kernel == [("DEALT", Tensor)] * 2
        assert torch.equal(first[::4], 2 * x[::4]) and not first[1].any()
        choose("cluster one-shot")
        _, whole = norms(again)
        assert type(whole) is Tensor and kernel[-1] == ("ONE_SHOT", Tensor)
        assert torch.equal(whole[::4], 3 * x[::4])
        choose("cluster dealt")
        _, stream = norms(whole)
        choose(SEPARATE)
        _, whole = norms(stream)
        assert type(whole) is Tensor and torch.equal(whole[::4], 5 * x[::4]) and len(kernel) == 4
        TABLE.batch_invariant = True
        choose("cluster dealt")
        assert own._norm_tactic(x, whole) == SEPARATE
    finally:
        TABLE.batch_invariant = False
        TABLE.clear()


def test_which_ways_are_tried_and_which_serves_untimed() -> None:
    """Clusters where they take rows; else, as for other dtypes, the kernels that read their peers' memory."""
    own = reducer()

    def ways(rows: int, dtype: torch.dtype = torch.bfloat16) -> list[str]:
        return own.norm_ways(torch.empty(rows, HIDDEN, dtype=dtype, device="meta"))

    def untimed(rows: int) -> str:
        x = torch.empty(rows, HIDDEN, dtype=torch.bfloat16, device="meta")
        return own._norm_tactic(x, x)

    assert ways(16) == [SEPARATE, "cluster one-shot", "cluster dealt"] and ways(100_000) == [SEPARATE, "cluster dealt"]
    assert ways(8, torch.float32) == [SEPARATE, ONE_SHOT, TWO_SHOT]
    assert [untimed(rows) for rows in (16, 17, 100_000)] == ["cluster one-shot", "cluster dealt", "cluster dealt"]
    own.use_sums(None)
    assert ways(16) == [SEPARATE, ONE_SHOT, TWO_SHOT] and ways(100_000) == [SEPARATE]
    assert [untimed(rows) for rows in (8, 9)] == [ONE_SHOT, SEPARATE], "of more rows than there are slots"


def test_the_first_abort_lets_blocks_that_wait_go_on() -> None:
    own = reducer()
    assert [release.__name__ for release in own.on_abort] == ["stop"]


def test_whether_norms_come_in_one_kernel_with_sums() -> None:
    own, x = reducer(), torch.empty(100_000, HIDDEN, device="meta")
    assert own.fuses(x.bfloat16()) and not own.fuses(x) and not own.fuses(x.half())
    TABLE.batch_invariant = True
    try:
        assert not own.fuses(x.bfloat16())
    finally:
        TABLE.batch_invariant = False
    own.use_sums(None)
    assert not own.fuses(x.bfloat16())


# ---------------------------------------------------------------- engines


def test_all_kernels_that_rows_may_need_are_loaded_and_noted_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[Any, ...]] = []
    monkeypatch.setattr(sum_norm, "kernel_for", lambda *given: loaded.append(given))
    sum_norm.prepare(8192, 4, [None, FP8], False, torch.device("cuda", 0))
    served = {(Way.ONE_SHOT, pieces_of(rows, 8192, 4)) for rows in range(1, sum_norm.MOST_ONE_SHOT + 1)}
    served |= {(Way.DEALT, pieces_of(rows, 8192, 4)) for rows in range(1, 1025)}
    assert {(way, pieces) for way, _, _, pieces, *_ in loaded} == served
    assert len(loaded) == len(set(loaded)) == 2 * len(served)


def test_with_one_kernel_all_that_are_loaded_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that was tried with short prompts has those for long ones too: a start compiles nothing."""
    noted: list[str] = []
    launched: list[tuple[Any, ...]] = []

    def kernel(name: str) -> Any:
        return SimpleNamespace(note=lambda: noted.append(name), launch=lambda *given: launched.append(given))

    monkeypatch.setattr(sum_norm, "_loaded", [kernel("this"), kernel("other")])
    monkeypatch.setattr(sum_norm, "kernel_for", lambda *_: sum_norm._loaded[0])
    x = torch.zeros(9, HIDDEN, dtype=torch.bfloat16)
    sum_rms_norm(x, torch.zeros_like(x), x[0], 1e-5, space(), Launch(Way.DEALT))
    assert noted == ["this", "other"] and len(launched) == 1
    assert launched[0][0] == 6, "three groups of rows for four ranks, in two pieces"
