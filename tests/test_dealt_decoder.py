"""A model whose residual stream is dealt out among ranks gives the same numbers: nobody uses rows that a rank lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import make_checkpoint
from tensor_parallel_pool import Job, run_job
from test_tensor_parallel import ARCHITECTURES
from thread_ranks import Meeting
from torch import Tensor

from appliance.distributed import TensorParallel
from appliance.kernels.deferred_scale import Product, materialize
from appliance.kernels.norm import rms_norm_quantize_reference, rms_norm_reference
from appliance.kernels.partial_sum import DealtStream, dealt_rows, whole_rows


class Dealing:
    """Does what `sum_norm.py` does, in plain torch; rows of other ranks are rubbish."""

    def __init__(self, tp: TensorParallel) -> None:
        self._collectives, self._rank, self._size = tp.collectives, tp.rank, tp.size
        self.norms = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        assert self._collectives is not None
        return self._collectives.all_reduce(x)

    def fuses(self, x: Product) -> bool:
        return True

    def rms_norm(self, x: Product, residual: Tensor, weight: Tensor, eps: float) -> Any:
        total, own, stream = self._added(x, residual)
        result, own[:] = rms_norm_reference(total, own, weight, eps)
        return self._whole(result, len(stream)), stream

    def rms_norm_quantize(
        self, x: Product, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, scale: Tensor | None
    ) -> Any:
        total, own, stream = self._added(x, residual)
        (values, scales), own[:] = rms_norm_quantize_reference(total, own, weight, eps, dtype, scale)
        whole = self._whole(values.float(), len(stream)).to(dtype), self._whole(scales, len(stream))
        return whole, stream

    def _added(self, x: Product, residual: Tensor) -> tuple[Tensor, Tensor, DealtStream]:
        """The sum of this rank's rows, their stream, to be written over, and what stands for the stream."""
        self.norms += 1
        rows = residual.rows if isinstance(residual, DealtStream) else residual
        own = dealt_rows(rows, self._rank, self._size).clone()
        rows.fill_(float("nan"))
        mine = dealt_rows(rows, self._rank, self._size)
        mine.copy_(own)
        total = self.all_reduce(materialize(x, x.dtype))
        stream = DealtStream.of(rows, self._rank, self._size, self._gather)
        return dealt_rows(total, self._rank, self._size), mine, stream

    def _gather(self, x: Tensor) -> Tensor:
        assert self._collectives is not None
        return self._collectives.all_gather(x)

    def _whole(self, own: Tensor, rows: int) -> Tensor:
        share = own.new_zeros(-(-rows // self._size), own.shape[1])
        share[: len(own)] = own
        return whole_rows(self._gather(share), rows)


@pytest.mark.parametrize(("scheme", "limit"), [("none", 1e-5), ("fp8", 0.16)])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_dealt_stream_changes_no_number(architecture: str, scheme: str, limit: float, tmp_path: Path) -> None:
    """Ten prompt tokens, then two, over three norms a rank or more, the final one and its few rows among them."""
    make_checkpoint(tmp_path / "m", ARCHITECTURES[architecture])
    job = Job(tmp_path / "m", 2, scheme, {})
    alone = run_job(job, TensorParallel())
    reducers: list[Dealing] = []

    def act(tp: TensorParallel) -> Tensor:
        reducers.append(Dealing(tp))
        tp.collectives.own = reducers[-1]  # type: ignore[union-attr]
        return run_job(job, tp)

    found = Meeting(2).run(act)
    layers = ARCHITECTURES[architecture].num_hidden_layers
    assert [reducer.norms for reducer in reducers] == [2 * 2 * layers] * 2
    assert torch.equal(found[0], found[1])
    assert float((found[0] - alone).norm() / alone.norm()) <= limit
