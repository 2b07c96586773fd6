"""What is tried of own all-reduces before they are relied on: wrong sums are found, and no rank leaves the others
waiting because its own are wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from appliance.kernels import all_reduce_group as group

SIZE = 2


class Kernels:
    """Stand for those of the GPU, between ranks that all have the numbers of rank 0's generator; `spoiled` says after
    how many calls sums are wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spoiled: int) -> None:
        self.calls = 0
        self._spoiled = spoiled
        self._sums: list[Tensor] = []
        reference, norm_reference = group.all_reduce_reference, group.all_reduce_rms_norm_reference

        def expected(partials: list[Tensor]) -> Tensor:
            self._sums = [reference(partials)]
            return self._sums[0]

        def expected_stream(*given: Any) -> Any:
            results, stream = norm_reference(*given)
            self._sums = [stream]
            return results, stream

        monkeypatch.setattr(group, "all_reduce_reference", expected)
        monkeypatch.setattr(group, "all_reduce_rms_norm_reference", expected_stream)
        monkeypatch.setattr(group, "all_reduce_", lambda *_, two_shot: self._sum())
        monkeypatch.setattr(group, "push_rms_norm", lambda *_: (None, self._sum()))

    def _sum(self) -> Tensor:
        self.calls += 1
        return self._sums[0] + (1.0 if self.calls > self._spoiled else 0.0)


@pytest.mark.parametrize(("check", "calls"), [(group._check, 8), (group._check_push, 4)])
@pytest.mark.parametrize("spoiled", [0, 3, 100])
def test_every_rank_makes_all_calls_even_if_its_sums_are_wrong(
    check: Any, calls: int, spoiled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = Kernels(monkeypatch, spoiled)
    found: Any = SimpleNamespace(workspace=SimpleNamespace(rank=0, size=SIZE, slots=4), push=object())
    reason = check(found, torch.device("cpu"))
    assert kernels.calls == calls
    assert (reason is None) == (spoiled == 100)
    assert reason is None or "gives wrong sums on rank 0" in reason
