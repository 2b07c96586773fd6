"""FlashInfer attention against the reference (on a GPU), and its page lists (anywhere)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from appliance.kernels.attention import AttentionMetadata, KvScales, ReferenceAttention
from appliance.kernels.flashinfer import FlashInferAttention, available, page_lists
from appliance.kernels.fp8_linear import FP8
from appliance.kernels.xqa import GROUPS, XqaDecode

# The first plans compile FlashInfer's kernels: four modules (two backends, with and without window), minutes in all.
pytestmark = pytest.mark.timeout(1200)

PAGE, PAGES, KV_HEADS, HEADS, DIM = 16, 400, 2, 8, 128


def test_page_lists():
    table = np.array([[5, 6, 7], [8, -1, -1], [9, 3, -1], [-1, -1, -1]], dtype=np.int32)
    indptr, indices, last = page_lists(table, np.array([33, 16, 17, 0], dtype=np.int32), 16, 6)
    assert indptr.tolist() == [0, 3, 4, 6, 6, 6, 6]
    assert indices.tolist() == [5, 6, 7, 8, 9, 3]
    assert last.tolist() == [1, 16, 1, 1, 1, 1]
    assert indptr.dtype == indices.dtype == last.dtype == np.int32


def test_page_lists_of_padding_only():
    indptr, indices, last = page_lists(np.zeros((0, 4), np.int32), np.zeros(0, np.int32), 16, 2)
    assert indptr.tolist() == [0, 0, 0]
    assert len(indices) == 0
    assert last.tolist() == [1, 1]


def test_available_names_the_reason():
    assert "float32" in available(128, torch.float32)
    assert "head size" in available(80, torch.bfloat16)
    assert "KV cache in torch.bfloat16 or torch.float8_e4m3fn" in available(128, torch.bfloat16, torch.float16)


def make_step(query_lens, seq_lens, num_seqs=None, seed=0):
    """Metadata on the GPU of a step with random pages; num_seqs > len(seq_lens) pads (decode only)."""
    rng = np.random.default_rng(seed)
    n = len(seq_lens)
    num_seqs = num_seqs or n
    lens = np.array(seq_lens, dtype=np.int32)
    starts = np.zeros(n + 1, dtype=np.int32)
    np.cumsum(query_lens, out=starts[1:])
    width = int(-(-lens.max() // PAGE))
    table = rng.permutation(PAGES)[: n * width].reshape(n, width).astype(np.int32)
    padding = num_seqs - n
    padded_starts = np.concatenate([starts, starts[-1] + 1 + np.arange(padding, dtype=np.int32)])
    num_tokens = int(starts[-1]) + padding

    def gpu(array):
        return torch.from_numpy(np.ascontiguousarray(array)).cuda()

    return AttentionMetadata(
        num_seqs=num_seqs,
        num_tokens=num_tokens,
        max_query_len=max(query_lens),
        max_seq_len=int(lens.max()),
        query_start=gpu(padded_starts),
        seq_lens=gpu(np.pad(lens, (0, padding))),
        page_table=gpu(np.pad(table, ((0, padding), (0, 0)))),
        slot_mapping=torch.full((num_tokens,), -1, dtype=torch.int64, device="cuda"),
        query_start_host=starts,
        seq_lens_host=lens,
        page_table_host=table,
    )


@pytest.fixture(scope="module")
def attention():
    if (reason := available()) is not None:
        pytest.skip(reason)
    return FlashInferAttention(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        page_size=PAGE,
        dtype=torch.bfloat16,
        max_num_seqs=8,
        max_model_len=2048,
        device="cuda",
        windows=(None, 40),
        graph_batch_sizes=(4, 8),
    )


def make_tensors(num_tokens, seed=1):
    torch.manual_seed(seed)
    qkv = torch.randn(num_tokens, (HEADS + 2 * KV_HEADS) * DIM, device="cuda", dtype=torch.bfloat16)
    q = qkv[:, : HEADS * DIM].unflatten(-1, (HEADS, DIM))  # strided, as the models pass it
    cache = torch.randn(PAGES, 2, PAGE, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    return q, cache


def check(got, want, rows):
    torch.testing.assert_close(got[:rows], want[:rows], rtol=2e-2, atol=2e-2)
    assert torch.isfinite(got).all()


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    ("query_lens", "seq_lens"),
    [
        ([1, 1, 1], [1, 17, 900]),  # decode
        ([5, 64, 200], [5, 300, 200]),  # prefill, with and without cached tokens
        ([1, 1, 3, 130], [16, 77, 3, 150]),  # mixed
        ([1, 1, 1, 7], [40, 41, 39, 1000]),
    ],
)
def test_matches_reference(attention, query_lens, seq_lens, window):
    meta = make_step(query_lens, seq_lens)
    q, cache = make_tensors(meta.num_tokens)
    attention.plan(meta)
    got = attention.attend(q, cache, meta, DIM**-0.5, window)
    check(got, ReferenceAttention().attend(q, cache, meta, DIM**-0.5, window), meta.num_tokens)


@pytest.mark.gpu
def test_graph_is_replayed_with_new_lengths(attention):
    """Captured once at 4 rows; replays follow lengths, pages and the number of padding rows."""
    q, cache = make_tensors(4)
    first = make_step([1, 1], [3, 30], num_seqs=4)
    attention.plan(first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for window in (None, 40):
            attention.attend(q, cache, first, DIM**-0.5, window)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = {window: attention.attend(q, cache, first, DIM**-0.5, window) for window in (None, 40)}
    for seed, lens in enumerate(([1], [1200, 5], [700, 64, 65], [16, 17, 1500, 1])):
        meta = make_step([1] * len(lens), lens, num_seqs=4, seed=seed)
        attention.plan(meta)
        graph.replay()
        for window, out in outs.items():
            check(out, ReferenceAttention().attend(q, cache, meta, DIM**-0.5, window), len(lens))


@pytest.mark.gpu
def test_unplanned_window_and_wrong_scale_are_refused(attention):
    meta = make_step([1], [4])
    q, cache = make_tensors(1)
    attention.plan(meta)
    with pytest.raises(ValueError, match="window 7"):
        attention.attend(q, cache, meta, DIM**-0.5, 7)
    with pytest.raises(ValueError, match="scale"):
        attention.attend(q, cache, meta, 1.0, None)


FP8_SHAPES = [(8, 8, 64), (8, 2, 64), (8, 1, 64), (8, 8, 128), (8, 2, 128), (8, 1, 128)]  # heads, K/V heads, head size
SCALES = KvScales(k=0.5, v=3.0)


@pytest.fixture(scope="module")
def fp8_attention():
    """Instances by shape, with FP8 caches; compiled modules depend on the head size and on having windows only."""
    made = {}

    def make(heads, kv_heads, d):
        if (reason := available(d, torch.bfloat16, FP8)) is not None:
            pytest.skip(reason)
        if (heads, kv_heads, d) not in made:
            made[heads, kv_heads, d] = FlashInferAttention(
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=d,
                page_size=PAGE,
                dtype=torch.bfloat16,
                kv_dtype=FP8,
                max_num_seqs=8,
                max_model_len=2048,
                device="cuda",
                windows=(None, 40),
                graph_batch_sizes=(4,),
                workspace_bytes=64 << 20,
            )
        return made[heads, kv_heads, d]

    return make


def make_fp8_tensors(num_tokens, heads, kv_heads, d):
    torch.manual_seed(1)
    q = torch.randn(num_tokens, heads, d, device="cuda", dtype=torch.bfloat16)
    return q, torch.randn(PAGES, 2, PAGE, kv_heads, d, device="cuda").to(FP8)


def check_fp8(attention, got, want, decodes):
    """Rows before `decodes` come from XQA where that serves: each head of each is 2.6% off for q in e4m3 and 2.6% for
    the probabilities (root mean squares of rounding to 3 bits), a single row up to twice that. A token too many or few
    of 17 would be 24%."""
    assert torch.isfinite(got).all()
    if attention._xqa is None:
        decodes = 0
    if decodes:
        off = (got[:decodes] - want[:decodes]).float().norm(dim=(1, 2)) / want[:decodes].float().norm(dim=(1, 2))
        assert float(off.max()) < 0.06, off.tolist()
    torch.testing.assert_close(got[decodes:], want[decodes:], rtol=2e-2, atol=5e-2)  # V is three times the usual size


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), FP8_SHAPES)
def test_fp8_cache_matches_reference(fp8_attention, heads, kv_heads, d, window):
    """Decode, short chunks of long sequences (the bytes are read), long chunks (widened on compute capability 9.0)."""
    attention = fp8_attention(heads, kv_heads, d)
    for query_lens, seq_lens in (
        ([1, 1, 1], [1, 17, 900]),
        ([1, 5, 30], [30, 700, 900]),
        ([1, 1, 64, 200], [16, 77, 300, 200]),
    ):
        meta = make_step(query_lens, seq_lens)
        q, cache = make_fp8_tensors(meta.num_tokens, heads, kv_heads, d)
        attention.plan(meta)
        torch.cuda.synchronize()  # in a model, other kernels lie between a plan and the first attention
        got = attention.attend(q, cache, meta, d**-0.5, window, SCALES)
        want = ReferenceAttention().attend(q, cache, meta, d**-0.5, window, SCALES)
        check_fp8(attention, got, want, query_lens.count(1))


@pytest.mark.gpu
def test_fp8_prefill_widens_where_it_pays(fp8_attention):
    attention = fp8_attention(8, 2, 128)
    hopper = torch.cuda.get_device_capability()[0] == 9
    for query_lens, seq_lens, pays in (([1, 200], [5, 300], True), ([1, 20], [5, 300], False), ([1, 1], [5, 9], False)):
        attention.plan(make_step(query_lens, seq_lens))
        assert (attention._planned[None].widened is not None) == (pays and hopper)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "d"), FP8_SHAPES)
def test_fp8_decodes_by_xqa_where_it_serves(fp8_attention, heads, kv_heads, d):
    attention = fp8_attention(heads, kv_heads, d)
    served = torch.cuda.get_device_capability()[0] in (9, 10) and heads // kv_heads in GROUPS
    for query_lens, seq_lens, decodes in (([1, 1], [5, 300], 2), ([1, 20], [5, 300], 1), ([20], [300], 0)):
        attention.plan(make_step(query_lens, seq_lens))
        for planned in attention._planned.values():
            assert planned.num_decodes == decodes
            assert (planned.decode is None) == (decodes == 0)
            assert isinstance(planned.decode, XqaDecode) == (served and decodes > 0)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(8, 2, 64), (8, 1, 64), (8, 2, 128), (8, 1, 128), (8, 8, 128)])
def test_fp8_graph_is_replayed_with_new_lengths(fp8_attention, heads, kv_heads, d, window):
    """Captured once at 4 rows and the widest page table, as the runner does; some replays have padding rows."""
    attention = fp8_attention(heads, kv_heads, d)
    q, cache = make_fp8_tensors(4, heads, kv_heads, d)
    fixed = make_step([1, 1], [3, 30], num_seqs=4)
    fixed.page_table = torch.zeros(4, 2048 // PAGE, dtype=torch.int32, device="cuda")
    fixed.max_seq_len = 2048
    attention.plan(fixed)
    torch.cuda.synchronize()
    attention.attend(q, cache, fixed, d**-0.5, window, SCALES)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.attend(q, cache, fixed, d**-0.5, window, SCALES)
    for seed, lens in enumerate(([1], [1200, 5], [16, 17, 1500, 1], [64, 65, 1], [40, 41], [1599])):
        meta = make_step([1] * len(lens), lens, num_seqs=4, seed=seed)
        fixed.page_table.zero_()
        fixed.page_table[:, : meta.page_table.shape[1]] = meta.page_table
        attention.plan(meta)
        out.fill_(float("nan"))
        graph.replay()
        want = ReferenceAttention().attend(q, cache, meta, d**-0.5, window, SCALES)
        assert torch.isfinite(out).all()
        check_fp8(attention, out[: len(lens)], want[: len(lens)], len(lens))


@pytest.mark.gpu
def test_fp8_module_of_xqa_is_gathered(fp8_attention):
    from appliance.kernels.compiled import _flashinfer_modules

    attention = fp8_attention(8, 2, 128)
    attention.load_modules()
    if attention._xqa is None:
        pytest.skip("XQA does not serve this GPU")
    names = [name for name in _flashinfer_modules() if name.startswith("xqa_") and "head_dim_128" in name]
    assert any("use_sliding_window_False" in name for name in names)
    assert any("use_sliding_window_True" in name for name in names)
