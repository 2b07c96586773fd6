"""What is tried of own all-reduces before they are relied on: wrong sums are found, and no rank leaves the others
waiting because its own are wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from appliance.kernels import all_reduce_check, sum_norm_group
from appliance.kernels.all_reduce import Workspace
from appliance.kernels.partial_sum import dealt_rows
from appliance.kernels.sum_norm import Launch, SumSpace, Way
from appliance.kernels.sum_norm_group import SumNorms

SIZE = 2
CPU = torch.device("cpu")


class Kernels:
    """Stand for those of the GPU, between ranks that have the same references; `spoiled` says after how many calls sums
    are wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spoiled: int) -> None:
        self.calls: list[Way | None] = []
        self._spoiled = spoiled
        self._expected: Any = None
        self._keep(monkeypatch, all_reduce_check, "all_reduce_reference")
        self._keep(monkeypatch, sum_norm_group, "all_reduce_rms_norm_reference")
        monkeypatch.setattr(all_reduce_check, "all_reduce_", lambda *_, two_shot: self._count(None) + self._expected)
        monkeypatch.setattr(sum_norm_group, "sum_rms_norm", self._norm)

    def _keep(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        reference = getattr(module, name)

        def kept(*given: Any) -> Any:
            self._expected = reference(*given)
            return self._expected

        monkeypatch.setattr(module, name, kept)

    def _count(self, way: Way | None) -> float:
        self.calls.append(way)
        return 1.0 if len(self.calls) > self._spoiled else 0.0

    def _norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, at: SumSpace, how: Launch) -> Tensor:
        """Of a stream that is dealt out nothing but the rank's own rows is right."""
        result, stream = self._expected
        rows = dealt_rows if how.way is Way.DEALT else lambda whole, *_: whole
        rows(residual, at.rank, at.size).copy_(rows(stream, at.rank, at.size) + self._count(how.way))
        found: Tensor = result
        return found


@pytest.mark.parametrize("spoiled", [0, 3, 100])
def test_every_rank_makes_all_sums_even_if_its_are_wrong(spoiled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels(monkeypatch, spoiled)
    nothing = torch.zeros(4, dtype=torch.int32)
    reason = all_reduce_check.check(Workspace(0, SIZE, nothing.long()[:2], nothing, 1 << 14), CPU)
    assert len(kernels.calls) == 8 and (reason is None) == (spoiled == 100)
    assert reason is None or "gives wrong sums on rank 0" in reason


@pytest.mark.parametrize("spoiled", [0, 3, 100])
def test_every_rank_makes_all_norms_even_if_its_are_wrong(spoiled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few rows both ways, of more one; three calls each, as there are two buffers."""
    kernels = Kernels(monkeypatch, spoiled)
    nothing = torch.zeros(2, dtype=torch.int32)
    space = SumSpace(1, SIZE, nothing.long(), nothing, nothing[:1], 132)
    reason = sum_norm_group.check(SumNorms(space, lambda x: x), CPU, 512)
    assert kernels.calls == [Way.ONE_SHOT, Way.DEALT] * 3 + [Way.DEALT] * 6
    assert (reason is None) == (spoiled == 100)
    assert reason is None or "kernel gives wrong sums on rank 1" in reason
