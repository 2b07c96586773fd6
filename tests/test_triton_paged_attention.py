"""Triton paged attention against the plain torch reference.

Without a GPU the kernels run in Triton's interpreter (conftest sets TRITON_INTERPRET before triton is imported).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from appliance.kernels.attention import UNIT_SCALES, AttentionMetadata, KvScales, ReferenceAttention
from appliance.kernels.fp8_linear import FP8
from appliance.kernels.paged_attention import TritonAttention, _shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies the bit patterns of bfloat16 matrices (triton 3.9), so without a GPU float16 stands in.
BF16 = torch.bfloat16 if DEVICE == "cuda" else torch.float16


def make_step(query_lens, seq_lens, page_size, num_pages, padding=0, spare_tokens=0):
    """Metadata of a step with shuffled pages; entries past a sequence's pages are far out of range on purpose."""
    rng = np.random.default_rng(3)
    n = len(seq_lens)
    lens = np.array(seq_lens, dtype=np.int32)
    starts = np.zeros(n + 1, dtype=np.int32)
    np.cumsum(query_lens, out=starts[1:])
    pages = -(-lens // page_size)
    table = np.full((n, int(pages.max()) + 2), 1_000_000_000, dtype=np.int32)
    ids = rng.permutation(num_pages)
    for i, offset in enumerate(np.cumsum(pages) - pages):
        table[i, : pages[i]] = ids[offset : offset + pages[i]]
    assert pages.sum() <= num_pages
    num_tokens = int(starts[-1]) + padding + spare_tokens
    padded_starts = np.concatenate([starts, starts[-1] + 1 + np.arange(padding, dtype=np.int32)])
    padded_table = np.pad(table, ((0, padding), (0, 0)), constant_values=1_000_000_000)

    def dev(array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)

    return AttentionMetadata(
        num_seqs=n + padding,
        num_tokens=num_tokens,
        max_query_len=max(query_lens),
        max_seq_len=int(lens.max()),
        query_start=dev(padded_starts),
        seq_lens=dev(np.pad(lens, (0, padding))),
        page_table=dev(padded_table),
        slot_mapping=torch.full((num_tokens,), -1, dtype=torch.int64, device=DEVICE),
        query_start_host=starts,
        seq_lens_host=lens,
        page_table_host=table,
    )


def make_tensors(num_tokens, heads, kv_heads, d, page_size, num_pages, dtype, kv_dtype=None):
    g = torch.Generator().manual_seed(5)
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * d, generator=g).to(dtype).to(DEVICE)
    q = qkv[:, : heads * d].unflatten(-1, (heads, d))  # strided, as the models pass it
    cache = torch.randn(num_pages, 2, page_size, kv_heads, d, generator=g).to(kv_dtype or dtype).to(DEVICE)
    return q, cache


def compare(
    meta, heads, kv_heads, d, page_size, num_pages, dtype, window, num_sms=4, kv_dtype=None, scales=UNIT_SCALES
):
    q, cache = make_tensors(meta.num_tokens, heads, kv_heads, d, page_size, num_pages, dtype, kv_dtype)
    attention = TritonAttention(num_sms=num_sms)
    attention.plan(meta)
    got = attention.attend(q, cache, meta, d**-0.5, window, scales)
    want = ReferenceAttention().attend(q, cache, meta, d**-0.5, window, scales)
    real = int(meta.query_start_host[-1])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert got.dtype == dtype
    torch.testing.assert_close(got[:real], want[:real], rtol=tolerance, atol=tolerance)
    assert torch.isfinite(got).all()
    return got


@pytest.mark.parametrize("window", [None, 20, 1])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "page_size", "dtype"),
    [
        (4, 2, 32, 8, torch.float32),
        (6, 2, 64, 16, BF16),  # group of 3
        (2, 2, 128, 32, torch.float16),
        (5, 1, 24, 8, torch.float32),  # head size not a power of two
    ],
)
def test_decode(heads, kv_heads, d, page_size, dtype, window):
    meta = make_step([1] * 5, [1, 8, 33, 64, 131], page_size, 40, padding=2)
    got = compare(meta, heads, kv_heads, d, page_size, 40, dtype, window)
    assert not got[5:].any(), "padding rows give zeros"


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_decode_with_splits(dtype, window):
    """Few rows on many multiprocessors: the long row is split, the short ones use fewer splits or one."""
    meta = make_step([1] * 3, [700, 5, 129], 16, 60)
    q, cache = make_tensors(3, 4, 1, 32, 16, 60, dtype)
    assert TritonAttention(num_sms=64).num_splits(3, _shape(q, cache), meta.page_table.shape[1]) >= 8
    compare(meta, 4, 1, 32, 16, 60, dtype, window, num_sms=64)


def test_splits_do_not_depend_on_lengths():
    """The launch grid of a decode step must be the same for every content of the device tensors (CUDA graphs)."""
    attention = TritonAttention(num_sms=132)
    q, cache = make_tensors(1, 32, 8, 32, 16, 4, BF16)
    shape = _shape(q, cache)
    assert attention.num_splits(1, shape, 4096) == 64
    assert attention.num_splits(64, shape, 4096) == 2
    assert attention.num_splits(256, shape, 4096) == 1
    assert attention.num_splits(1, shape, 8) == 1, "no more splits than the longest sequence can use"


@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "page_size", "dtype"),
    [
        (4, 2, 32, 8, torch.float32),
        (6, 2, 64, 16, BF16),
        (2, 2, 32, 64, torch.float16),
    ],
)
def test_prefill_and_mixed(heads, kv_heads, d, page_size, dtype, window):
    meta = make_step([1, 1, 2, 37, 70], [9, 70, 2, 101, 70], page_size, 60, spare_tokens=3)
    got = compare(meta, heads, kv_heads, d, page_size, 60, dtype, window)
    assert not got[-3:].any(), "rows past the last sequence give zeros"


def test_single_tokens_behind_longer_rows():
    """The step plan puts single tokens first, but correctness does not depend on it."""
    meta = make_step([5, 1, 9], [5, 30, 20], 8, 20)
    compare(meta, 4, 2, 32, 8, 20, torch.float32, None)


def test_prefill_in_the_middle_of_a_long_sequence():
    meta = make_step([17], [400], 16, 30)
    compare(meta, 2, 1, 32, 16, 30, torch.float32, None)
    compare(meta, 2, 1, 32, 16, 30, torch.float32, 100)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_batch_invariant(dtype, window):
    """A token's result: decoded alone, decoded beside others, in a chunk of its prompt, in the whole of it. The same
    bits, and those of the reference within its tolerance."""
    d, page_size, length = 32, 16, 150
    attention = TritonAttention(num_sms=4, batch_invariant=True)

    def attend(query_lens, seq_lens, padding=0):
        """Of the last sequence, whose pages are 0, 1, 2, …; its queries are the last of a fixed tensor."""
        meta = make_step(query_lens, seq_lens, page_size, 60, padding=padding)
        pages = -(-seq_lens[-1] // page_size)
        meta.page_table[len(query_lens) - 1, :pages] = torch.arange(pages, dtype=torch.int32, device=DEVICE)
        q, cache = make_tensors(length, 6, 2, d, page_size, 60, dtype)
        own = q[seq_lens[-1] - query_lens[-1] : seq_lens[-1]]
        others = torch.ones(meta.num_tokens - len(own), *q.shape[1:], dtype=dtype, device=DEVICE)
        before, after = others[: len(others) - padding], others[len(others) - padding :]
        attention.plan(meta)
        got = attention.attend(torch.cat([before, own, after]), cache, meta, d**-0.5, window)
        return got[len(before) : len(before) + len(own)], meta, torch.cat([before, own, after]), cache

    whole, meta, q, cache = attend([length], [length])
    want = ReferenceAttention().attend(q, cache, meta, d**-0.5, window)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(whole, want, rtol=tolerance, atol=tolerance)
    for query_lens, seq_lens, padding in (
        ([1], [length], 0),
        ([1, 1, 1], [5, 90, length], 2),
        ([37], [length], 0),
        ([1, 20, 61], [3, 80, length], 0),
        ([70], [100], 0),
    ):
        part, *_ = attend(query_lens, seq_lens, padding)
        end = seq_lens[-1]
        assert torch.equal(part, whole[end - query_lens[-1] : end]), (query_lens, seq_lens)


def test_plan_of_the_next_step_replaces_the_tiles():
    attention = TritonAttention(num_sms=4)
    for query_lens, seq_lens in (([3, 20], [3, 25]), ([40], [40])):
        meta = make_step(query_lens, seq_lens, 8, 20)
        q, cache = make_tensors(meta.num_tokens, 4, 2, 32, 8, 20, torch.float32)
        attention.plan(meta)
        for _ in range(2):  # two layers
            got = attention.attend(q, cache, meta, 0.2, None)
            torch.testing.assert_close(
                got, ReferenceAttention().attend(q, cache, meta, 0.2, None), rtol=1e-5, atol=1e-5
            )


SCALES = KvScales(k=0.5, v=3.0)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "dtype"),
    [
        (2, 2, 64, torch.float32),
        (8, 2, 64, BF16),
        (8, 1, 128, BF16),
        (5, 1, 24, torch.float32),
    ],
)
def test_fp8_cache(heads, kv_heads, d, dtype, window):
    """Decodes with one split and several, and prefill, of a cache of bytes with a scale for K and one for V."""
    for query_lens, seq_lens, num_sms in (([1] * 3, [1, 33, 131], 4), ([1] * 2, [5, 420], 64), ([1, 21], [40, 60], 4)):
        meta = make_step(query_lens, seq_lens, 16, 60)
        compare(meta, heads, kv_heads, d, 16, 60, dtype, window, num_sms, FP8, SCALES)


def test_reference_of_an_fp8_cache_is_that_of_its_numbers():
    """The scales give K and V back: attention over bytes * scales in float32, and different scales differ."""
    meta = make_step([1, 7], [40, 30], 8, 20)
    q, cache = make_tensors(8, 4, 2, 32, 8, 20, torch.float32, FP8)
    wide = cache.float()
    wide[:, 0] *= SCALES.k
    wide[:, 1] *= SCALES.v
    attend = ReferenceAttention().attend
    want = attend(q, wide, meta, 0.2, None)
    torch.testing.assert_close(attend(q, cache, meta, 0.2, None, SCALES), want, rtol=1e-5, atol=1e-5)
    for other in (KvScales(1.0, SCALES.v), KvScales(SCALES.k, 1.0)):
        assert not torch.allclose(attend(q, cache, meta, 0.2, None, other), want, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1)])
@pytest.mark.parametrize("d", [64, 128])
def test_fp8_cache_on_the_gpu(d, heads, kv_heads, window):
    for query_lens, seq_lens in (([1] * 4, [1, 700, 5, 129]), ([1, 1, 2, 37, 300], [9, 70, 2, 101, 800])):
        meta = make_step(query_lens, seq_lens, 16, 120)
        compare(meta, heads, kv_heads, d, 16, 120, torch.bfloat16, window, 132, FP8, SCALES)


def test_misfit_tensors_are_refused():
    meta = make_step([1], [4], 8, 4)
    q, cache = make_tensors(1, 4, 2, 32, 8, 4, torch.float32)
    with pytest.raises(ValueError, match="does not fit"):
        TritonAttention(num_sms=4).attend(q[:, :3], cache, meta, 1.0, None)
    with pytest.raises(ValueError, match="contiguous"):
        TritonAttention(num_sms=4).attend(q, cache.transpose(-1, -2), meta, 1.0, None)


@pytest.mark.gpu
def test_decode_graph_is_replayed_with_new_lengths():
    meta = make_step([1] * 4, [700, 5, 129, 64], 16, 80)
    q, cache = make_tensors(4, 8, 2, 128, 16, 80, BF16)
    attention = TritonAttention()
    attention.plan(meta)
    attention.attend(q, cache, meta, 0.1, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.attend(q, cache, meta, 0.1, None)
    for lens in ([1, 2, 3, 0], [600, 5, 100, 64]):
        meta.seq_lens.copy_(torch.tensor(lens))
        meta.seq_lens_host = np.array(lens, dtype=np.int32)
        graph.replay()
        live = [i for i, length in enumerate(lens) if length]
        want = ReferenceAttention().attend(q, cache, meta, 0.1, None)
        torch.testing.assert_close(out[live], want[live], rtol=2e-2, atol=2e-2)
        assert torch.isfinite(out).all()
