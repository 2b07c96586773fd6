"""XQA: which shapes it serves, and what the kernel is told. Numbers on a GPU: test_flashinfer_gpu.py."""

from __future__ import annotations

import logging
import math
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from appliance.kernels import xqa
from appliance.kernels.attention import AttentionMetadata, KvScales, ReferenceAttention
from appliance.kernels.fp8_linear import FP8

PAGE, HEADS, KV_HEADS, DIM = 16, 8, 2, 64
SERVED = {
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "page_size": 16,
    "dtype": torch.bfloat16,
    "kv_dtype": FP8,
}


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)])
@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 4}, {"num_kv_heads": 2}, {"head_dim": 64}])
def test_served(capability, changes):
    assert xqa.unsupported(capability=capability, **SERVED | changes) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_dtype": torch.bfloat16}, "bfloat16"),
        ({"dtype": torch.float32}, "float32"),
        ({"capability": (8, 9)}, "8.9"),
        ({"capability": (12, 0)}, "12.0"),
        ({"head_dim": 256}, "256"),
        ({"num_kv_heads": 32}, "32 to 32"),
        ({"num_heads": 28, "num_kv_heads": 4}, "28 to 4"),
        ({"page_size": 8}, "8"),
    ],
)
def test_refused_with_the_reason(changes, reason):
    assert reason in xqa.unsupported(**{"capability": (9, 0)} | SERVED | changes)


@pytest.fixture
def library(monkeypatch):
    """In FlashInfer's place: its kernel's definition in plain torch, and the modules that were asked for."""
    package, decode, modules = ModuleType("flashinfer"), ModuleType("flashinfer.decode"), ModuleType("flashinfer.xqa")
    asked = []

    def kernel(q, cache, workspace, table, lens, max_len, *, bmm1_scale, bmm2_scale, window_left, out):
        assert q.is_contiguous() and table.is_contiguous() and out.is_contiguous()
        assert lens.dtype == torch.uint32 and table.dtype == torch.int32 and not workspace.any()
        assert max_len == table.shape[1] * PAGE
        for row, length in enumerate(lens.tolist()):
            pages = cache[table[row, : math.ceil(length / PAGE)].long()].float().transpose(0, 1).flatten(1, 2)
            first = 0 if window_left < 0 else max(0, length - 1 - window_left)
            k, v = pages[:, first:length].repeat_interleave(HEADS // KV_HEADS, dim=2)
            scores = torch.einsum("hd,thd->ht", q[row].float(), k) * bmm1_scale
            out[row] = torch.einsum("ht,thd->hd", scores.softmax(-1), v) * bmm2_scale

    decode.xqa_batch_decode_with_kv_cache = kernel
    modules.get_xqa_module = lambda *key: asked.append(key)
    package.xqa, package.decode = modules, decode
    for module in (package, decode, modules):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def make():
    return xqa.XqaDecode(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        page_size=PAGE,
        dtype=torch.bfloat16,
        max_rows=6,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("window", [None, 1, 20])
def test_scales_windows_and_padding(library, window):
    torch.manual_seed(0)
    kernel, lens = make(), [1, 17, 40]
    cache = torch.randn(12, 2, PAGE, KV_HEADS, DIM).to(FP8)
    table = torch.tensor([[5, 0, 0], [1, 2, 0], [7, 9, 4], [0, 0, 0]], dtype=torch.int32)
    q = torch.randn(4, HEADS + 4, DIM).bfloat16()[:, :HEADS]  # strided
    meta = AttentionMetadata(
        num_seqs=4,
        num_tokens=4,
        max_query_len=1,
        max_seq_len=48,
        query_start=torch.arange(5, dtype=torch.int32),
        seq_lens=torch.tensor([*lens, 0], dtype=torch.int32),
        page_table=table,
        slot_mapping=torch.full((4,), -1),
        query_start_host=np.arange(4, dtype=np.int32),
        seq_lens_host=np.array(lens, np.int32),
        page_table_host=table[:3].numpy(),
    )
    kernel.plan(torch.tensor([48] * 6, dtype=torch.int32))  # of a larger step before
    kernel.plan(meta.seq_lens)
    scales, out = KvScales(k=0.5, v=3.0), torch.full((4, HEADS, DIM), math.nan, dtype=torch.bfloat16)
    kernel.attend(q, cache, table, 0.2, window, scales, out)
    want = ReferenceAttention().attend(q, cache, meta, 0.2, window, scales)
    torch.testing.assert_close(out[:3], want[:3], rtol=2e-2, atol=1e-2)
    assert torch.isfinite(out).all()
    assert meta.seq_lens.tolist() == [1, 17, 40, 0]  # others read them


def test_addresses_stay(library):
    kernel = make()
    before = kernel._unsigned_lens.data_ptr()
    kernel.plan(torch.tensor([3, 0, 7], dtype=torch.int32))
    assert kernel._unsigned_lens.data_ptr() == before
    assert kernel._lens[:3].tolist() == [3, 1, 7]


@pytest.mark.parametrize(("windows", "sliding"), [((None,), [False]), ((None, 40, 8), [False, True]), ((40,), [True])])
def test_modules_of_all_windows_are_loaded(library, windows, sliding):
    make().load(windows)
    assert library == [(torch.bfloat16, FP8, PAGE, DIM, HEADS // KV_HEADS, s, torch.bfloat16, 1) for s in sliding]


def test_choice_is_logged(library, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    shape = SERVED | {"max_rows": 2, "device": torch.device("cpu")}
    with caplog.at_level(logging.INFO, "appliance.kernels.xqa"):
        assert xqa.xqa_for(**shape) is not None
        assert xqa.xqa_for(**shape | {"kv_dtype": torch.bfloat16}) is None
        assert not caplog.records
        assert xqa.xqa_for(**shape | {"head_dim": 256}) is None
    assert "FA2, as XQA needs a head size of 64 or 128" in caplog.text


def test_a_library_without_it(library, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "flashinfer.xqa", None)
    with caplog.at_level(logging.INFO, "appliance.kernels.xqa"):
        assert xqa.xqa_for(**SERVED, max_rows=2, device=torch.device("cpu")) is None
    assert "no XQA" in caplog.text
