"""Rotary embedding and cache write: the Triton kernel against the torch path, the torch path against complex numbers.

Without a GPU the kernel runs in Triton's interpreter (conftest sets TRITON_INTERPRET before triton is imported).
"""

from __future__ import annotations

import pytest
import torch

from appliance.kernels.attention import KvScales
from appliance.kernels.fp8_linear import FP8, FP8_MAX
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


SCALES = KvScales(k=0.25, v=3.0)


def fp8_grid(shape, seed):
    """Random numbers that e4m3 holds exactly: they need no rounding, which Triton's interpreter does wrongly."""
    codes = torch.randint(0, 254, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    codes += (codes >= 127).int()  # 127 and 255 are NaN
    return codes.to(torch.uint8).view(FP8).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_cache_holds_scaled_numbers(dtype):
    """Both paths write the bytes of K / scales.k and V / scales.v; what is too large becomes the largest number."""
    n, kv_heads, d = 9, 2, 16
    want_k, want_v = fp8_grid((n, kv_heads, d), 1), fp8_grid((n, kv_heads, d), 2)
    k, v = (want_k * SCALES.k).to(dtype).to(DEVICE), (want_v * SCALES.v).to(dtype).to(DEVICE)
    exact = (v.float().cpu() / SCALES.v) == want_v  # bfloat16 cannot hold three times every number
    k[0, 0, 0], v[0, 0, 0] = 1e4, -1e4
    want_k[0, 0, 0], want_v[0, 0, 0] = FP8_MAX, -FP8_MAX
    unturned = torch.tensor([[1.0] * (d // 2) + [0.0] * (d // 2)], device=DEVICE)
    positions, slots = torch.zeros(n, dtype=torch.int64, device=DEVICE), torch.arange(3, 3 + n, device=DEVICE)
    for write in (rope_and_write_triton, rope_and_write_reference):
        q = torch.ones(n, 4, d, dtype=dtype, device=DEVICE)
        cache = torch.zeros(2, 2, 8, kv_heads, d, dtype=FP8, device=DEVICE)
        write(q, k, v, positions, unturned, cache, slots, SCALES)
        flat = cache.transpose(0, 1).flatten(1, 2).float().cpu()
        assert torch.equal(flat[0, 3 : 3 + n], want_k)
        assert torch.equal(flat[1, 3 : 3 + n][exact], want_v[exact]) and exact.float().mean() > 0.5
        assert flat[1, 3, 0, 0] == -FP8_MAX
        assert not flat[:, :3].any() and not flat[:, 3 + n :].any()


def test_fp8_cache_rounds_the_rotated_key_once_and_keeps_nan():
    """Of the float32 rotation: 1.0625 + 2**-10 is above the middle of 1 and 1.125, its bfloat16 is the middle."""
    q, v = torch.zeros(1, 1, 2, dtype=torch.bfloat16), torch.tensor([[[float("nan"), 0.3]]]).bfloat16()
    k = torch.tensor([[[1.0, 1.0]]]).bfloat16()
    cos_sin = torch.tensor([[1.0, -(0.0625 + 2**-10)]])  # k turns to 1 - sin = 1.0625 + 2**-10, and 1 + sin
    cache = torch.zeros(1, 2, 1, 1, 2, dtype=FP8)
    zero = torch.zeros(1, dtype=torch.int64)
    rope_and_write_reference(q, k, v, zero, cos_sin, cache, zero)
    assert cache[0, 0, 0, 0, 0].float() == 1.125
    assert cache[0, 1, 0, 0].isnan().tolist() == [True, False]


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(8, 8, 64), (8, 2, 128), (8, 1, 128)])
@pytest.mark.parametrize("n", [3, 200])
def test_fp8_bytes_are_those_of_the_reference(heads, kv_heads, d, n):
    """On a GPU the kernel rounds as torch does: equal bytes but where the rotation itself was rounded differently."""
    caches = []
    for write in (rope_and_write_triton, rope_and_write_reference):
        q, k, v, positions, cos_sin, cache, slots = make_inputs(n, heads, kv_heads, d, 16, torch.bfloat16, FP8, 20)
        k[0] *= 1e4
        v[0] *= 1e4
        write(q, k, v, positions, cos_sin, cache, slots, SCALES)
        caches.append(cache)
    ours, want = caches
    assert torch.equal(ours[:, 1].view(torch.uint8), want[:, 1].view(torch.uint8)), "V is not rotated"
    torch.testing.assert_close(ours.float(), want.float(), rtol=0.13, atol=2**-9)  # one step of e4m3
    different = (ours.view(torch.uint8) != want.view(torch.uint8)).float().mean()
    assert different < 1e-3
    assert not ours.isnan().any()
