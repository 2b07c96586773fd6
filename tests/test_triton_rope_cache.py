"""Rotary embedding and cache write: the Triton kernel against the torch path, the torch path against complex numbers.

Without a GPU the kernel runs in Triton's interpreter (conftest sets TRITON_INTERPRET before triton is imported).
"""

from __future__ import annotations

import pytest
import torch

from appliance.kernels.rope_cache import rope_and_write, rope_and_write_reference, rope_and_write_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_inputs(n, heads, kv_heads, d, page_size, dtype, cache_dtype=None, pages=6):
    g = torch.Generator().manual_seed(7)
    qkv = torch.randn(n, (heads + 2 * kv_heads) * d, generator=g).to(dtype).to(DEVICE)
    q, k, v = (x.unflatten(-1, (-1, d)) for x in qkv.split([heads * d, kv_heads * d, kv_heads * d], dim=-1))
    angles = torch.rand(64, d // 2, generator=g) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(DEVICE)
    positions = torch.randint(0, 64, (n,), generator=g).to(DEVICE)
    slots = torch.randperm(pages * page_size, generator=g)[:n].to(DEVICE)
    cache = torch.randn(pages, 2, page_size, kv_heads, d, generator=g).to(cache_dtype or dtype).to(DEVICE)
    return q, k, v, positions, cos_sin, cache, slots


@pytest.mark.parametrize(
    ("n", "heads", "kv_heads", "d", "page_size", "dtype", "cache_dtype"),
    [
        (1, 4, 2, 32, 8, torch.float32, None),
        (5, 6, 3, 64, 16, torch.bfloat16, None),
        (7, 4, 4, 128, 8, torch.float16, None),
        (3, 9, 1, 24, 8, torch.float32, None),  # head_dim / 2 and heads not powers of two
        (66, 2, 1, 16, 16, torch.float32, None),  # enough tokens for the larger programs
        (4, 4, 2, 32, 8, torch.float32, torch.bfloat16),
        (4, 4, 2, 32, 8, torch.bfloat16, torch.float32),
    ],
)
def test_triton_matches_reference(n, heads, kv_heads, d, page_size, dtype, cache_dtype):
    inputs = make_inputs(n, heads, kv_heads, d, page_size, dtype, cache_dtype)
    q, k, v, positions, cos_sin, cache, slots = inputs
    slots[n // 2] = -1
    # Clones of the fused tensor keep its strides out; so views are rebuilt for the second run.
    q2, k2, v2, *_, cache2, _ = make_inputs(n, heads, kv_heads, d, page_size, dtype, cache_dtype)
    expected_k = k.clone()
    got = rope_and_write_triton(q, k, v, positions, cos_sin, cache, slots)
    want = rope_and_write_reference(q2, k2, v2, positions, cos_sin, cache2, slots)
    assert got.data_ptr() == q.data_ptr()
    tolerance = 1e-5 if cache.dtype == dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(cache, cache2, rtol=tolerance, atol=tolerance)
    assert torch.equal(k, expected_k), "k is an input and keeps its values"


def test_unwritten_slots_leave_the_cache_alone():
    q, k, v, positions, cos_sin, cache, slots = make_inputs(4, 2, 1, 16, 8, torch.float32)
    slots.fill_(-1)
    before = cache.clone()
    for function in (rope_and_write_triton, rope_and_write_reference):
        function(q, k, v, positions, cos_sin, cache, slots)
        assert torch.equal(cache, before)


def test_reference_is_rotation_of_complex_pairs():
    q, k, v, positions, cos_sin, cache, slots = make_inputs(5, 3, 2, 16, 8, torch.float32)
    turn = torch.complex(cos_sin[positions, :8], cos_sin[positions, 8:])[:, None]

    def rotated(x):
        z = torch.complex(x[..., :8].contiguous(), x[..., 8:].contiguous()) * turn
        return torch.cat((z.real, z.imag), -1)

    want_q, want_k = rotated(q), rotated(k)
    torch.testing.assert_close(rope_and_write(q, k, v, positions, cos_sin, cache, slots), want_q)
    flat = cache.transpose(0, 1).flatten(1, 2)  # [2, slots, kv_heads, d]
    torch.testing.assert_close(flat[0, slots], want_k)
    assert torch.equal(flat[1, slots], v)


def test_no_tokens():
    q, k, v, positions, cos_sin, cache, slots = make_inputs(0, 2, 1, 16, 8, torch.float32)
    assert rope_and_write_triton(q, k, v, positions, cos_sin, cache, slots).shape == (0, 2, 16)
    assert rope_and_write_reference(q, k, v, positions, cos_sin, cache, slots).shape == (0, 2, 16)
