"""The persistent decode kernel against the layers it stands for: the same step over the same cache."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import persistent_ranks
import pytest
import torch
import torch.multiprocessing
from nvrtc import compile_cubin, spilled_bytes, unavailable
from persistent_models import SHAPES, Step, check, error, random_model

from appliance.kernels.fp8_linear import FP8
from appliance.kernels.persistent.kernel import DecodeShape, kernel_source
from appliance.runtime.cuda_graphs import capture
from appliance.runtime.persistent_decode import refusal, scale_tiles


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("scheme", ["fp8", "none"])
def test_agrees_with_the_layers(name: str, scheme: str) -> None:
    model = random_model(scheme, **SHAPES[name])
    for rows, lengths in ((1, [300]), (4, [1, 33, 1000])):
        check(Step(model, lengths), rows)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("head", ["fp8", "bf16"])
def test_int4_agrees_with_the_layers(name: str, head: str) -> None:
    model = random_model("int4_awq", {"head": head}, **SHAPES[name])
    for rows, lengths in ((1, [300]), (2, [64, 65]), (4, [1, 33, 1000])):
        check(Step(model, lengths), rows)


@pytest.mark.gpu
def test_an_unquantized_head_beside_fp8_layers() -> None:
    model = random_model("fp8", {"unquantized": ["lm_head"]})
    for rows, lengths in ((1, [300]), (4, [1, 33, 1000])):
        check(Step(model, lengths), rows)


@pytest.mark.gpu
def test_int4_weights_that_the_kernel_does_not_take() -> None:
    for parameters, words in (({"group_size": 64}, "groups of 128"), ({"act_order": True}, "groups of 128")):
        model = random_model("int4_awq", parameters)
        reason = refusal(model, Step(model, [5]).caches)
        assert reason is not None and words in reason


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[1], [16, 17], [4000], [5, 700, 31, 32, 33, 1, 8000, 64]], ids=str)
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
def test_lengths_and_cache_formats(lengths: list[int], kv_dtype: torch.dtype) -> None:
    model = random_model("fp8", **SHAPES["wide-heads"])
    check(Step(model, lengths, kv_dtype), 8 if len(lengths) > 2 else len(lengths))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["fp8", "int4_awq"])
def test_repeats_bit_for_bit_and_from_a_graph(scheme: str) -> None:
    model = random_model(scheme, **SHAPES["large"])
    step = Step(model, [2000, 3, 77])
    decode = step.persistent(4)
    with torch.inference_mode():
        inputs = step.inputs(4)
        first = decode.logits(inputs).clone()
        graph, logits = capture(lambda: decode.logits(inputs))
        for _ in range(20):
            logits.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(logits[:3], first[:3])


@pytest.mark.gpu
def test_rows_do_not_depend_on_each_other() -> None:
    model = random_model("fp8", **SHAPES["wide-heads"])
    alone = Step(model, [200])
    with torch.inference_mode():
        expected = alone.persistent(1).logits(alone.inputs(1))[0].clone()
        beside = Step(model, [200, 500, 3, 40])
        for mine, theirs in zip(beside.caches, alone.caches, strict=True):
            mine[1 : theirs.shape[0]] = theirs[1:]
        actual = beside.persistent(4).logits(beside.inputs(4))[0]
    assert error(actual, expected) < 0.02  # attention is cut otherwise, so sums round otherwise


@pytest.mark.gpu
@pytest.mark.timeout(280)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_with_the_layers(size: int, tmp_path: Path) -> None:
    """A process per rank; on a machine with fewer GPUs they share them, and take turns."""
    if size > 2 * torch.cuda.device_count():
        pytest.skip(f"gpu test: needs {size // 2} GPUs, here are {torch.cuda.device_count()}")
    torch.multiprocessing.spawn(persistent_ranks.run, (size, f"file://{tmp_path}/rendezvous"), nprocs=size)


def shape(**changes: Any) -> DecodeShape:
    llama = DecodeShape(
        rows=1,
        weights="fp8",
        head="fp8",
        kv_fp8=False,
        layers=32,
        hidden=4096,
        ffn=14336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab=128256,
        page_size=16,
        eps=1e-5,
        blocks=132,
    )
    return dataclasses.replace(llama, **changes)


def test_shapes_that_fit() -> None:
    for rows in (1, 2, 4, 8, 16):
        assert shape(rows=rows).refused() is None
        assert shape(rows=rows, weights="bf16", head="bf16").refused() is None
        assert shape(rows=rows, head="bf16").refused() is None
        assert shape(rows=rows).slots >= 3
    for rows in (1, 2, 4):
        assert shape(rows=rows, weights="int4").refused() is None
        assert shape(rows=rows, weights="int4", head="bf16").slots >= 4
    assert shape(layers=64, hidden=5120, ffn=27648, heads=40).refused() is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": 17}, "1 to 16"),
        ({"head_dim": 256}, "heads of size 256"),
        ({"hidden": 4000}, "multiples of 64"),
        ({"ffn": 14320}, "multiples of 64"),
        ({"hidden": 16384}, "up to 8192"),
        ({"rows": 6}, "powers of two"),
        ({"layers": 1200}, "too little shared memory"),
        ({"weights": "int4", "rows": 8}, "1 to 4 with int4"),
        ({"weights": "int4", "hidden": 4032}, "multiples of 128"),
        ({"weights": "int4", "head": "int4"}, "head in int4"),
        ({"weights": "int4", "head": "bf16", "hidden": 16384}, "up to 8192"),
    ],
)
def test_shapes_that_do_not_fit_say_why(changes: dict[str, object], words: str) -> None:
    refused = shape(**changes).refused()
    assert refused is not None and words in refused


LLAMA_70B = {"layers": 80, "hidden": 8192, "ffn": 28672, "heads": 64}


def share(ranks: int, **changes: Any) -> DecodeShape:
    """Of a rank."""
    whole = shape(**changes)
    return dataclasses.replace(
        whole,
        ffn=whole.ffn // ranks,
        heads=whole.heads // ranks,
        kv_heads=max(1, whole.kv_heads // ranks),
        vocab=-(-whole.vocab // ranks),
        ranks=ranks,
    )


def test_shares_of_large_models_fit() -> None:
    for ranks, rows, weights in itertools.product((1, 2, 4, 8), (1, 2, 4), ("fp8", "bf16", "int4")):
        head = "fp8" if weights == "int4" else weights
        for model in ({}, LLAMA_70B):
            assert share(ranks, rows=rows, weights=weights, head=head, **model).refused() is None


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize(("weights", "rows"), [("fp8", 1), ("fp8", 4), ("bf16", 2), ("int4", 1)])
def test_kernels_compile_and_spill_little(weights: str, rows: int, ranks: int) -> None:
    head = "bf16" if weights == "bf16" else "fp8"
    wanted = share(ranks, weights=weights, head=head, rows=rows, **LLAMA_70B)
    code = compile_cubin(kernel_source(), "sm_90a", wanted.macros())
    assert code[:4] == b"\x7fELF" and b"decode_step" in code
    spilled = spilled_bytes(code)
    assert spilled is None or spilled <= 320


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("out", [64, 48, 40])
def test_scales_stand_in_the_order_of_tiles(halves: bool, out: int) -> None:
    groups = 3
    scale_zero = torch.arange(1, out * groups * 2 + 1).view(out, groups, 2).to(torch.float16)
    tiles = scale_tiles(scale_zero, halves=halves)
    assert tiles.is_contiguous()
    assert tiles.shape == (-(-out // 16), groups, 8, 2, 2)
    seen = 0
    for tile, group, row, half in itertools.product(*(range(size) for size in tiles.shape[:4])):
        # As decode.cu finds a weight row: gate and up rows of the same index share a tile.
        of_half = tile * 8 + row if halves else tile * 16 + half * 8 + row
        end = out // 2 if halves else out
        weight_row = of_half + half * end if halves else of_half
        expected = scale_zero[weight_row, group] if of_half < end else torch.zeros(2)
        assert torch.equal(tiles[tile, group, row, half].float(), expected.float())
        seen += int(of_half < end)
    assert seen == out * groups
