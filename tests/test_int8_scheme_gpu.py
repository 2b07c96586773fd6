"""The INT8 scheme on a GPU: every tactic, deferred sums through a chain of kernels, weights that need padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantized_helpers import randn
from torch import Tensor

from appliance.kernels import norm
from appliance.kernels.deferred_scale import DeferredScale, materialize
from appliance.kernels.int8_linear import int8_linear_reference
from appliance.kernels.tactics import TABLE, row_bucket
from appliance.quantization.int8_smoothquant import Scheme

pytestmark = pytest.mark.gpu
NAME = "int8_smoothquant"


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 512])
@pytest.mark.parametrize("out", [512, 500])  # 500: padded to 512
def test_every_tactic_computes_the_product(rows: int, out: int) -> None:
    scheme, bias = Scheme(), randn(out, dtype=torch.bfloat16, seed=2)
    x = randn(rows, 1024, dtype=torch.bfloat16)
    prepared = scheme.prepare(scheme.quantize(randn(out, 1024, dtype=torch.bfloat16, seed=1)))
    weight, weight_scales = prepared["weight"][:out], prepared["weight_scale"][:, :out]
    want = int8_linear_reference(*scheme.tactic_input(x), weight, weight_scales, bias, torch.float32)
    bucket = row_bucket(rows)
    assert bucket is not None
    tactics = scheme.tactics(512, 1024, bucket, x.device)
    kinds = {name.partition(" ")[0] for name in tactics}
    assert kinds == ({"skinny", "deferred", "tiled"} if rows <= 64 else {"deferred", "tiled"})
    assert next(iter(tactics)).startswith("skinny" if rows <= 64 else "deferred")
    try:
        for name in tactics:
            TABLE.choose(NAME, 512, 1024, bucket, name)
            for apply in (scheme.apply, scheme.apply_deferred):
                got = apply(prepared, x, bias, torch.bfloat16)
                assert isinstance(got, DeferredScale) == (name == "deferred" and apply == scheme.apply_deferred)
                assert got.dtype == torch.bfloat16
                got = materialize(got, torch.float32)[:, :out]
                assert (got - want).norm() / want.norm() < 4e-3, name
    finally:
        TABLE.clear()


def test_a_choice_for_more_rows_serves_fewer() -> None:
    """The library takes no fewer than 17 rows; a table that was timed for 32 rows only is asked for 3."""
    scheme = Scheme()
    x = randn(3, 64, dtype=torch.bfloat16)
    prepared = scheme.prepare(scheme.quantize(randn(48, 64, dtype=torch.bfloat16, seed=1)))
    want = materialize(scheme.apply(prepared, x, None, torch.bfloat16), torch.float32)
    try:
        TABLE.choose(NAME, 48, 64, 32, "deferred")
        got = scheme.apply_deferred(prepared, x, None, torch.bfloat16)
        assert isinstance(got, DeferredScale)
        torch.testing.assert_close(materialize(got, torch.float32), want, rtol=1e-2, atol=1e-2)
    finally:
        TABLE.clear()


@pytest.mark.parametrize("rows", [1, 33, 200])
def test_a_chain_of_kernels_in_a_graph(rows: int) -> None:
    """norm -> product -> silu * up -> product, many times over; replays give the eager bits."""
    scheme, hidden, wide = Scheme(), 512, 1024
    layers = [
        tuple(
            scheme.prepare(scheme.quantize(randn(*shape, dtype=torch.bfloat16, seed=seed) / shape[1] ** 0.5))
            for shape, seed in (((2 * wide, hidden), 2 * i), ((hidden, wide), 2 * i + 1))
        )
        for i in range(6)
    ]
    norm_weight = torch.ones(hidden, dtype=torch.bfloat16, device="cuda")
    start = randn(rows, hidden, dtype=torch.bfloat16)

    def chain() -> Tensor:
        x: Any = start
        residual: Tensor | None = torch.zeros_like(start)
        for gate_up, down in layers:
            normed, residual = scheme.rms_norm(x, residual, norm_weight, 1e-5)
            product = scheme.apply_deferred(gate_up, normed, None, torch.bfloat16)
            x = scheme.apply_deferred(down, scheme.silu_mul(product), None, torch.bfloat16)
        return norm.rms_norm(x, residual, norm_weight, 1e-5)[0]

    eager = chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(20):
        graph.replay()
    assert torch.equal(out, eager) and eager.isfinite().all() and eager.float().std() > 0.5


def test_rows_alone_have_the_bits_that_they_have_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TABLE, "batch_invariant", True)
    scheme, bias = Scheme(), randn(512, dtype=torch.bfloat16, seed=2)
    prepared = scheme.prepare(scheme.quantize(randn(512, 1024, dtype=torch.bfloat16, seed=1)))
    x = randn(300, 1024, dtype=torch.bfloat16)
    together = scheme.apply_deferred(prepared, x, bias, torch.bfloat16)
    assert isinstance(together, Tensor)
    for rows in (1, 3, 17, 64, 65, 299):
        assert torch.equal(scheme.apply_deferred(prepared, x[:rows], bias, torch.bfloat16), together[:rows])
