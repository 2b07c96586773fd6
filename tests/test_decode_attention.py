"""The decode attention kernel: its plan; run as C++ on the CPU, thread by thread; compiled for the GPUs it is made for;
and on one of them."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from decode_attention_cases import Step
from nvrtc import compile_cubin, machine_code, spilled_bytes, unavailable

from appliance.kernels.decode_attention.kernel import DecodeAttentionShape, arguments, kernel_source
from appliance.kernels.decode_attention.plan import STRIP, Cutting, make_plan
from appliance.kernels.fp8_linear import FP8

HERE = Path(__file__).parent
BF16, F16 = torch.bfloat16, torch.float16


# ---------------------------------------------------------------- plan


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("seed", range(30))
def test_every_token_is_in_one_item(seed: int, window: int | None) -> None:
    rng = random.Random(seed)
    rows = rng.choice([1, 3, 8, 100])
    cutting = Cutting(rng.choice([8, 132, 528]), rng.choice([1, 2, 8]), rng.choice([16, 128, 256]))
    lens = np.array([rng.choice([0, 1, 15, 16, 17, 150, 5000]) for _ in range(rng.randint(1, rows))])
    plan = make_plan(lens, rows, window, cutting)
    assert plan.shape == (cutting.capacity(rows), 8) and plan.dtype == np.int32
    used = plan[plan[:, 0] >= 0]
    assert (plan[len(used) :, 0] == -1).all()  # behind all others
    assert (plan[len(used) :, 1:3] == 0).all()  # and without tokens
    places = []
    for row in range(rows):
        length = int(lens[row]) if row < len(lens) else 0
        items = used[used[:, 0] == row]
        items = items[np.argsort(items[:, 5])]
        assert (items[:, 7] == items[0, 7]).all()
        places += [int(items[0, 7]) + i for i in range(len(items))]
        first = max(length - window, 0) if window else 0
        assert items[:, 5].tolist() == list(range(len(items))) and (items[:, 6] == len(items)).all()
        assert (items[:, 3] == length).all() and (items[:, 4] == first).all()
        assert items[0, 1] == first // STRIP * STRIP and items[-1, 2] == length
        assert (items[1:, 1] == items[:-1, 2]).all() and (items[:, 1] % STRIP == 0).all()
        assert (items[:, 2] > items[:, 1]).all() or (length == 0 and len(items) == 1)
    assert sorted(places) == list(range(len(used)))


def test_equal_sequences_that_fill_the_gpu_are_not_cut() -> None:
    cutting = Cutting(528, 8, 128)
    assert (make_plan(np.full(66, 1040), 66, None, cutting)[:66, 6] == 1).all()
    assert (make_plan(np.full(80, 1040), 80, None, cutting)[:80, 6] == 1).all()


def test_a_long_sequence_is_spread_over_the_gpu() -> None:
    plan = make_plan(np.array([32768]), 1, None, Cutting(528, 8, 128))
    assert plan[0, 6] * 8 > 500 and (plan[:, 2] - plan[:, 1]).max() <= 512
    beside = make_plan(np.array([32768] + [100] * 63), 64, None, Cutting(528, 8, 128))
    assert beside[0, 6] > 15 and (beside[beside[:, 0] > 0, 6] == 1).all()
    assert (beside[:, 2] - beside[:, 1] > 100).sum() == beside[0, 6] and (beside[:16, 0] == 0).all()  # come first


def test_first_runs_of_alike_sequences_are_where_the_kernel_looks() -> None:
    plan = make_plan(np.array([1040, 1000, 1030]), 4, None, Cutting(64, 2, 128))
    assert plan[:4, 0].tolist() == [0, 1, 2, 3] and (plan[:4, 5] == 0).all() and plan[0, 6] > 1


# ---------------------------------------------------------------- on the CPU


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: the kernel is not run")


def emulate(step: Step, cutting: Cutting, library: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, cache) of the kernel as C++."""
    shape, items = step.shape, cutting.capacity(step.rows)
    blocks = items * shape.kv_heads
    source = library.with_suffix(".cpp")
    source.write_text(f'#include "decode_attention_emulation.h"\n{kernel_source(emulated=True)}')
    sizes = {"THREADS": shape.warps * 32, "GRID": blocks, "SHARED_BYTES": shape.shared_bytes}
    defines = [f"-D{name}={value}" for name, value in (shape.macros() | sizes).items()]
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-w", f"-I{HERE}", *defines]
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
    cache = step.cache.clone()
    out = torch.full((step.rows, shape.heads, shape.head_dim), float("nan"), dtype=shape.dtype)
    buffers, inputs = step.buffers(cutting), step.inputs(cache, out)
    given = (ctypes.c_int64 * 23)(*arguments(inputs, buffers))
    pointers = (ctypes.c_void_p * 7)(ctypes.addressof(given))
    assert ctypes.CDLL(str(library)).emulate(pointers, 1) == 0, "the kernel does not end"
    assert not buffers.arrived.any()
    return out, cache


SHAPE = DecodeAttentionShape(heads=8, kv_heads=2, head_dim=64, page_size=16, dtype=BF16, kv_dtype=BF16, warps=4)
WHOLE = Cutting(4, 2, 4096)
CUT = Cutting(24, 2, 32)
# (shape, lengths, rows, window, biased, unwritten, cutting)
CASES = {
    "short": (SHAPE, [1, 2, 16, 17, 150], 6, None, False, (2,), WHOLE),
    "lengths of zero": (SHAPE, [0, 3, 0], 4, None, False, (), WHOLE),
    "cut": (SHAPE, [200, 33], 3, None, False, (), CUT),
    "window": (SHAPE, [90, 40, 20, 41], 4, 40, False, (), WHOLE),
    "window, cut": (SHAPE, [300, 5], 2, 130, False, (), CUT),
    "deferred": (replace(SHAPE, deferred=True), [70, 5], 2, None, True, (), WHOLE),
    "deferred, whole numbers": (replace(SHAPE, deferred=True, int32=True), [70, 5], 2, None, False, (), WHOLE),
    "normed": (replace(SHAPE, normed=True, heads=6), [70, 5], 2, None, False, (0,), WHOLE),
    "normed, whole numbers, size 128": (
        replace(SHAPE, normed=True, deferred=True, int32=True, head_dim=128, heads=2),
        [70, 5],
        2,
        None,
        True,
        (),
        WHOLE,
    ),
    "size 128": (replace(SHAPE, head_dim=128), [70, 128], 2, None, False, (), WHOLE),
    "16 heads": (replace(SHAPE, heads=16, kv_heads=1), [150, 1], 2, None, False, (), Cutting(3, 1, 64)),
    "13 heads": (replace(SHAPE, heads=13, kv_heads=1), [150, 16], 2, None, False, (), WHOLE),
    "one head": (replace(SHAPE, heads=2, kv_heads=2, warps=8), [150, 16], 2, None, False, (), WHOLE),
    "float16": (replace(SHAPE, dtype=F16, kv_dtype=F16), [150, 16], 2, None, False, (), WHOLE),
    "fp8": (replace(SHAPE, kv_dtype=FP8), [150, 16, 1], 3, None, False, (), WHOLE),
    "fp8, float16, size 128": (replace(SHAPE, kv_dtype=FP8, dtype=F16, head_dim=128), [150, 17], 2, 80, False, (), CUT),
    "pages of 32": (replace(SHAPE, page_size=32, heads=4), [150, 64, 65, 32], 4, None, False, (), CUT),
    "many strips": (replace(SHAPE, heads=2, warps=4), [2200], 1, None, False, (), WHOLE),
}


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_every_thread_does_its_part(name: str, tmp_path: Path) -> None:
    shape, lens, rows, window, bias, unwritten, cutting = CASES[name]
    step = Step(shape, lens, rows, window, bias, unwritten)
    cutting = replace(cutting, kv_heads=shape.kv_heads)
    step.check(*emulate(step, cutting, tmp_path / "kernel.so"))


# ---------------------------------------------------------------- for GPUs


needs_nvrtc = pytest.mark.skipif(unavailable() is not None, reason=f"not compiled: {unavailable()}")
BIG = DecodeAttentionShape(heads=32, kv_heads=8, head_dim=128, page_size=16, dtype=BF16, kv_dtype=BF16, warps=4)
COMPILED = {
    "8B, 4 warps": (BIG, "sm_90"),
    "8B, 8 warps": (replace(BIG, warps=8), "sm_90"),
    "8B, 16 warps": (replace(BIG, warps=16, deferred=True), "sm_90"),
    "8B, fp8": (replace(BIG, kv_dtype=FP8), "sm_90"),
    "eight heads": (replace(BIG, heads=16, kv_heads=2, deferred=True, int32=True), "sm_90"),
    "sixteen heads": (replace(BIG, heads=16, kv_heads=1), "sm_90"),
    "normed": (replace(BIG, normed=True, warps=16), "sm_90"),
    "sm_100": (replace(BIG, deferred=True), "sm_100"),
    "sm_80": (replace(BIG, deferred=True), "sm_80"),
    "sm_89, fp8, size 64": (replace(BIG, kv_dtype=FP8, head_dim=64, dtype=F16), "sm_89"),
}


@needs_nvrtc
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_spilling(name: str) -> None:
    shape, arch = COMPILED[name]
    assert shape.refused((int(arch[3:]) // 10, int(arch[3:]) % 10)) is None
    cubin = compile_cubin(kernel_source(), arch, shape.macros())
    spilled = spilled_bytes(cubin)
    assert spilled is None or spilled <= 32  # a few numbers, before the tokens' loop or behind it
    code = machine_code(cubin)
    waits = code.find("ACQBULK")
    if not code or arch in ("sm_80", "sm_89"):
        return
    # All of the first strip is on its way when the kernel waits for the one in front.
    cache_loads = [line for line in code[:waits].splitlines() if "LDG.E.NA" in line]
    assert waits > 0 and len(cache_loads) == 32 * shape.kv_dtype.itemsize // 4


# ---------------------------------------------------------------- on a GPU


def run_on_gpu(step: Step, cutting: Cutting) -> tuple[torch.Tensor, torch.Tensor]:
    from appliance.kernels.decode_attention.kernel import DecodeAttentionKernel

    kernel = DecodeAttentionKernel(step.shape, torch.device("cuda", torch.cuda.current_device()))
    cache = step.cache.cuda()
    out = torch.full(
        (step.rows, step.shape.heads, step.shape.head_dim), float("nan"), dtype=step.shape.dtype, device="cuda"
    )
    buffers, inputs = step.buffers(cutting), step.inputs(cache, out)
    torch.cuda.synchronize()
    kernel.launch(inputs, buffers, cutting.capacity(step.rows))
    torch.cuda.synchronize()
    assert not buffers.arrived.any()
    return out, cache


GPU_CASES = {
    "8B": (BIG, [1, 150, 16, 1040, 3000], 8, None, Cutting(528, 8, 128)),
    "8B, not cut": (BIG, [1, 150, 16, 1040], 4, None, Cutting(528, 8, 1 << 20)),
    "8 warps": (replace(BIG, warps=8, heads=16, kv_heads=2), [150] * 64, 64, None, Cutting(264, 2, 256)),
    "16 warps": (replace(BIG, warps=16, heads=16, kv_heads=2), [150, 900] * 32, 72, None, Cutting(132, 2, 256)),
    "16 heads": (replace(BIG, heads=16, kv_heads=1), [70, 2000], 2, None, Cutting(396, 1, 64)),
    "window": (replace(BIG, heads=12, kv_heads=4), [70, 2000, 513, 4], 6, 512, Cutting(528, 4, 128)),
    "deferred": (replace(BIG, deferred=True), [70, 2000], 2, None, Cutting(528, 8, 128)),
    "normed": (replace(BIG, deferred=True, normed=True), [70, 2000], 2, None, Cutting(528, 8, 128)),
    "normed, size 64": (
        replace(BIG, normed=True, heads=6, kv_heads=2, head_dim=64),
        [70, 9],
        2,
        None,
        Cutting(528, 2, 64),
    ),
    "whole numbers": (replace(BIG, deferred=True, int32=True), [70, 2000], 2, None, Cutting(528, 8, 128)),
    "fp8": (replace(BIG, kv_dtype=FP8), [70, 2000, 16], 3, None, Cutting(528, 8, 128)),
    "fp8, float16, size 64": (
        replace(BIG, kv_dtype=FP8, head_dim=64, dtype=F16),
        [70, 2000],
        2,
        None,
        Cutting(528, 8, 128),
    ),
    "float16": (replace(BIG, dtype=F16, kv_dtype=F16, page_size=64), [70, 2000], 3, None, Cutting(528, 8, 128)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_agrees_with_plain_torch(name: str) -> None:
    shape, lens, rows, window, cutting = GPU_CASES[name]
    if (reason := shape.refused(torch.cuda.get_device_capability())) is not None:
        pytest.skip(reason)
    step = Step(shape, lens, rows, window, bias=True, unwritten=(0,), device="cuda")
    step.check(*run_on_gpu(step, cutting))
