"""Whether sums by copy engines are relied on: each attempt is agreed on before the next; what refuses is said once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_all_reduce import workspaces

from appliance.distributed import GroupCollectives
from appliance.kernels import copy_engines
from appliance.kernels.all_reduce_group import AllReduce
from appliance.kernels.peer_memory import PeerMemory, agree

SIZE = 2
CPU = torch.device("cpu")


class Group:
    """The other rank refuses at a question; None: never."""

    process_group = None

    def __init__(self, other_refuses_at: int | None = None) -> None:
        self.questions = 0
        self._at = other_refuses_at

    def minimum(self, value: int) -> int:
        self.questions += 1
        return min(value, 1) if self.questions - 1 == self._at else value


def test_agreement_names_the_reason_on_one_rank() -> None:
    assert agree(Group(), 0, SIZE, None) is None
    assert agree(Group(), 0, SIZE, "mine") == "mine"
    assert agree(Group(0), 0, SIZE, None) == ""
    assert agree(Group(0), 0, SIZE, "mine") == "mine", "the first rank's"


def test_without_the_driver_the_library_adds_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"no module {name}")

    monkeypatch.setattr(copy_engines, "cuda_bindings", missing)
    assert copy_engines.connect(Group(), 0, SIZE, CPU) is None
    assert [record.message for record in caplog.records] == [
        "sums of prompts by NCCL: cuda.bindings cannot be used: no module driver"
    ]


@pytest.mark.parametrize("refusing", range(4))
@pytest.mark.parametrize("who", ["says so", "raises", "other rank"])
def test_attempts_end_for_all_ranks_with_the_first_refusal(
    refusing: int, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def attempt(number: int, name: str) -> Any:
        def act(*_: Any) -> str | None:
            made.append(name)
            if number == refusing and who == "raises":
                raise RuntimeError("the driver refuses\nand more")
            return "no" if number == refusing and who == "says so" else None

        return act

    names = ["_alone", "_tell", "_told", "_check"]
    for number, name in enumerate(names):
        monkeypatch.setattr(copy_engines, name, attempt(number, name))
    group = Group(refusing if who == "other rank" else None)
    found: Any = SimpleNamespace(rank=0, size=SIZE)
    reason = copy_engines._refusal(group, found, None, None, CPU)  # type: ignore[arg-type]
    assert reason == {"says so": "no", "raises": "the driver refuses", "other rank": ""}[who]
    assert made == names[: refusing + 1] and group.questions == refusing + 1


def test_what_has_not_arrived_is_seen() -> None:
    memory = torch.zeros(256, dtype=torch.uint8)
    piece, words = PeerMemory(memory, (0, 0), None), memory[128:192].view(torch.int32)
    assert "flags" in (copy_engines._told(piece, SIZE) or "")
    words[:2] = 77  # its own and the other's
    assert "copies" in (copy_engines._told(piece, SIZE) or "")
    words[9] = 77
    assert copy_engines._told(piece, SIZE) is None


class Copies:
    """Takes even numbers of rows."""

    def __init__(self) -> None:
        self.begun: list[torch.Tensor] = []
        self.aborted = 0

    def fits(self, x: torch.Tensor) -> bool:
        return x.shape[0] % 2 == 0

    def begin(self, x: torch.Tensor) -> Any:
        self.begun.append(x)
        return lambda: x + 1

    def abort(self) -> None:
        self.aborted += 1


def test_sums_in_the_background_go_by_copies_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    by_library: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, **_: by_library.append(x))
    group, copies = GroupCollectives(SIZE, CPU), Copies()
    own = AllReduce(group.library(), workspaces(SIZE)[0])
    group.own = own
    even, odd = torch.zeros(4, 8), torch.zeros(3, 8)
    assert group.begin_all_reduce(even)() is even and by_library == [even], "there are no copies"
    own.use_copies(copies)  # type: ignore[arg-type]
    assert torch.equal(group.begin_all_reduce(even)(), even + 1) and copies.begun == [even]
    assert group.begin_all_reduce(odd)() is odd and len(by_library) == 2
    own.use_copies(None)
    own.use_copies(copies)  # type: ignore[arg-type]
    assert own.on_abort == [copies.abort], "told once"
