"""What is tried of own all-reduces before they are relied on: wrong numbers are found, and no rank leaves the others
waiting because its own are wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from appliance.kernels import all_reduce_check as check
from appliance.kernels import norm
from appliance.kernels.all_reduce import all_reduce_reference

CPU = torch.device("cpu")
SIZE = 2


class Kernels:
    """Stand for those of the GPU; `spoiled` says after how many calls they give wrong numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spoiled: int) -> None:
        self.calls = 0
        self._spoiled = spoiled
        self._turns: dict[int, int] = {}
        for name in ("all_reduce_", "push_rms_norm", "shared_rows_rms_norm", "shared_rows_rms_norm_quantize"):
            monkeypatch.setattr(check, name, getattr(self, name.rstrip("_")))
        monkeypatch.setattr(check, "dealt_rows", lambda x, rank, size: x[rank::size])

    def _total(self, x: Tensor) -> Tensor:
        """The sum over the ranks, whose numbers follow from the shape and the turn."""
        self.calls += 1
        sums = [
            all_reduce_reference(partials)
            for seed in (0, 1, 2, 3, x.shape[0])
            if torch.equal((partials := check._partials((x.shape[0], x.shape[1]), seed, SIZE))[0], x)
        ]
        return sums[0] + (1.0 if self.calls > self._spoiled else 0.0)

    def all_reduce(self, x: Tensor, space: Any, *, two_shot: bool) -> Tensor:
        return self._total(x)

    def push_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, push: Any
    ) -> tuple[Tensor, Tensor]:
        total = self._total(x)
        return norm.rms_norm_reference(total, None, weight, eps)[0], total

    def shared_rows_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, push: Any
    ) -> tuple[Tensor, Tensor]:
        return self.push_rms_norm(x, residual, weight, eps, push)

    def shared_rows_rms_norm_quantize(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, push: Any, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        got, total = self.push_rms_norm(x, residual, weight, eps, push)
        return (got.float(), torch.ones(len(got), 1)), total


@pytest.mark.parametrize("spoiled", [0, 3, 7, 100])
def test_every_rank_makes_all_calls_even_if_its_sums_are_wrong(monkeypatch: pytest.MonkeyPatch, spoiled: int) -> None:
    kernels = Kernels(monkeypatch, spoiled)
    reason = check.wrong_sums(SimpleNamespace(rank=0, size=SIZE), CPU)  # type: ignore[arg-type]
    assert kernels.calls == 8
    if spoiled == 100:
        assert reason is None
    else:
        assert reason is not None and "gives wrong sums on rank 0" in reason


@pytest.mark.parametrize("spoiled", [0, 1, 2, 11, 100])
def test_likewise_of_pushed_numbers(monkeypatch: pytest.MonkeyPatch, spoiled: int) -> None:
    kernels = Kernels(monkeypatch, spoiled)
    reason = check.wrong_pushed(SimpleNamespace(rank=0, size=SIZE, slots=4), CPU)  # type: ignore[arg-type]
    assert kernels.calls == 12
    if spoiled == 100:
        assert reason is None
    else:
        names = {0: "two-shot push kernel gives wrong sums", 1: "shared rows kernel gives wrong sums"}
        assert reason is not None and names.get(spoiled, "8-bit results" if spoiled in (2, 11) else "") in reason
