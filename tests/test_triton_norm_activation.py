"""RMS norm and SiLU kernels against their plain torch references: compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantized_helpers import DEVICE, KERNEL_FP8, assert_same_quantized, needs_fp8, randn, strided, ulp

from appliance.kernels import activation, norm
from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.skinny_linear import multiprocessors

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "size"), [(1, 64), (5, 96), (3, 1000), (2, 4096)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_rms_norm(dtype: torch.dtype, n: int, size: int, with_residual: bool) -> None:
    x, weight = strided(randn(n, size, dtype=dtype)), randn(size, dtype=dtype, seed=1)
    residual = randn(n, size, dtype=dtype, seed=2) if with_residual else None
    ours = None if residual is None else strided(residual)
    expected, expected_stream = norm.rms_norm_reference(x, residual, weight, EPS)
    got, stream = norm.rms_norm_triton(x, ours, weight, EPS)
    torch.testing.assert_close(stream, expected_stream, rtol=0 if DEVICE == "cuda" else ulp(dtype), atol=0)
    torch.testing.assert_close(got, expected, rtol=ulp(dtype), atol=1e-5)
    assert stream is (x if ours is None else ours)
    official = F.rms_norm(stream.float(), (size,), weight.float(), EPS)
    torch.testing.assert_close(got.float(), official, rtol=ulp(dtype), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [True, False])
def test_rms_norm_quantize(dtype: torch.dtype, with_residual: bool) -> None:
    needs_fp8()
    x, weight = strided(randn(6, 200, dtype=dtype)), randn(200, dtype=dtype, seed=1)
    x[3] = 0
    x = (4 * x).round() / 4  # so that sums are exact, however they are rounded
    residual = (4 * randn(6, 200, dtype=dtype, seed=2)).round() / 4 if with_residual else None
    if residual is not None:
        residual[3] = 0
    ours = None if residual is None else residual.clone()
    expected, expected_stream = norm.rms_norm_quantize_reference(x, residual, weight, EPS)
    got, stream = norm.rms_norm_quantize_triton(x, ours, weight, EPS, values_dtype=KERNEL_FP8)
    torch.testing.assert_close(stream, expected_stream, rtol=0, atol=0)
    assert_same_quantized(got, expected)
    assert (got[0][3].float() == 0).all() and got[1][3].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 1, 80), (8, 8, 128)])
def test_qk_rms_norm_in_place_on_views(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    fused = randn(5, (heads + 2 * kv_heads) * head_dim, dtype=dtype).unflatten(-1, (-1, head_dim))
    q_weight, k_weight = randn(head_dim, dtype=dtype, seed=1), randn(head_dim, dtype=dtype, seed=2)
    expected = fused.clone()
    norm.qk_rms_norm_reference_(expected[:, :heads], expected[:, heads : heads + kv_heads], q_weight, k_weight, EPS)
    before = fused.clone()
    norm.qk_rms_norm_triton_(fused[:, :heads], fused[:, heads : heads + kv_heads], q_weight, k_weight, EPS)
    torch.testing.assert_close(fused, expected, rtol=ulp(dtype), atol=1e-5)
    assert torch.equal(fused[:, heads + kv_heads :], before[:, heads + kv_heads :])
    assert not torch.equal(fused[:, heads], before[:, heads])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "size"), [(1, 96), (4, 1500)])
def test_silu_mul(dtype: torch.dtype, n: int, size: int) -> None:
    gate_up = strided(randn(n, 2 * size, dtype=dtype))
    got = activation.silu_mul_triton(gate_up)
    gate, up = gate_up.float().chunk(2, dim=-1)
    torch.testing.assert_close(got, (F.silu(gate) * up).to(dtype), rtol=ulp(dtype), atol=1e-5)
    torch.testing.assert_close(activation.silu_mul_reference(gate_up), got, rtol=ulp(dtype), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "crowded"), [(96, False), (5000, False), (5000, True), (14336, True), (20000, False), (30000, True)]
)
def test_silu_mul_quantize(dtype: torch.dtype, size: int, crowded: bool) -> None:
    """crowded: more rows than multiprocessors, which take a row in parts."""
    needs_fp8()
    rows = multiprocessors(torch.device(DEVICE)) + 1 if crowded else 4
    gate_up = strided(randn(rows, 2 * size, dtype=dtype))
    gate_up[1] = 0
    expected = activation.silu_mul_quantize_reference(gate_up)
    assert_same_quantized(activation.silu_mul_quantize_triton(gate_up, values_dtype=KERNEL_FP8), expected)


def test_no_rows() -> None:
    empty = torch.empty(0, 64, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.ones(64, dtype=torch.bfloat16, device=DEVICE)
    assert norm.rms_norm_triton(empty, empty.clone(), weight, EPS)[0].shape == (0, 64)
    assert activation.silu_mul_triton(empty).shape == (0, 32)
    assert activation.silu_mul_quantize_triton(empty)[0].shape == (0, 32)


@pytest.mark.gpu
def test_dispatch_takes_the_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(norm, "rms_norm_triton", lambda *args: calls.append("norm"))
    monkeypatch.setattr(activation, "silu_mul_triton", lambda *args: calls.append("silu"))
    x = torch.ones(1, 64, device="cuda")
    norm.rms_norm(x, None, x[0], EPS)
    activation.silu_mul(x)
    assert calls == ["norm", "silu"]
