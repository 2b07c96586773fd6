"""Which way of adding up serves: choices, defaults, and the library where own kernels cannot. One process plays a rank
whose peers' workspaces hold zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from quantized_helpers import DEVICE
from test_all_reduce import workspaces
from torch import Tensor

from appliance.distributed import GroupCollectives, TensorParallel
from appliance.kernels import all_reduce_tuning, norm
from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.all_reduce_group import (
    LIBRARY,
    ONE_SHOT,
    SEPARATE,
    TWO_SHOT,
    AllReduce,
    connect,
    key,
)
from appliance.kernels.deferred_scale import DeferredScale, materialize
from appliance.kernels.partial_sum import PartialSum
from appliance.kernels.tactics import TABLE
from appliance.layers.linear import RowParallelLinear
from appliance.quantization.unquantized import Scheme

pytestmark = pytest.mark.skipif(not HAS_TRITON or DEVICE == "cuda", reason="only in Triton's interpreter")
HIDDEN = 64


class _Library:
    """A group of two ranks, of which the other has zeros."""

    def __init__(self, smallest: int | None = None) -> None:
        self.calls: list[tuple[int, ...]] = []
        self._smallest = smallest

    def all_reduce(self, x: Tensor) -> Tensor:
        self.calls.append(tuple(x.shape))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack([x, 2 * x])

    def minimum(self, value: int) -> int:
        return value if self._smallest is None else min(value, self._smallest)


@pytest.fixture(autouse=True)
def _table() -> Iterator[None]:
    yield
    TABLE.clear()
    TABLE.batch_invariant = False


def made(slots: int = 4, region_bytes: int = 1 << 14) -> tuple[AllReduce, _Library]:
    group = _Library()
    return AllReduce(group, workspaces(2, slots, region_bytes)[0]), group


def test_what_fits_no_workspace_is_the_librarys() -> None:
    own, group = made()
    x = torch.randn(4, 1024)
    assert torch.equal(own.all_reduce(x.clone()), x) and group.calls == []
    own.all_reduce(torch.zeros(17, 1024))
    assert group.calls == [(17, 1024)]
    own.all_reduce(torch.zeros(8, 128)[:, :64])  # rows apart
    assert group.calls[1:] == [(8, 64)]


def test_batch_invariant_sums_are_never_the_librarys() -> None:
    own, group = made()
    TABLE.batch_invariant = True
    TABLE.choose(key("all_reduce", torch.float32), 1024, 2, 64, LIBRARY)
    x = torch.randn(32, 1024)  # twice what fits; of each four rows the last two are the other rank's to add up
    assert torch.equal(own.all_reduce(x.clone()).view(8, 4, 1024)[:, :2], x.view(8, 4, 1024)[:, :2])
    assert torch.equal(own.all_reduce(x[:3].clone()), x[:3]) and group.calls == []


def test_what_is_no_sum_goes_by_own_kernels_if_it_fits() -> None:
    """The other rank's memory holds zeros; what does not fit is for the library."""
    own, _ = made(region_bytes=1 << 10)
    x = torch.arange(1.0, 65.0).view(2, 4, 8)
    gathered, for_me = own.all_gather(x[0]), own.all_to_all(x)
    assert gathered is not None and torch.equal(gathered, torch.stack([x[0], torch.zeros(4, 8)]))
    assert for_me is not None and torch.equal(for_me, torch.stack([x[0], torch.zeros(4, 8)]))
    assert own.all_gather(torch.zeros(2, 1000)) is None and own.all_to_all(torch.zeros(2, 2, 1000)) is None
    scores, tokens = torch.tensor([[1.0, 2.0], [5.0, 2.0]]), torch.tensor([[3, 9], [3, 9]])
    own, _ = made(region_bytes=1 << 10)  # zeros are a key below those of scores
    found = own.best_tokens(scores, tokens)
    assert found is not None and found.tolist() == [9, 3]
    assert own.best_tokens(torch.zeros(257, 1), torch.zeros(257, 1, dtype=torch.int64)) is None


def test_choices_are_those_of_the_slowest_rank_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank takes twice as long, whatever it is."""
    monkeypatch.setattr(all_reduce_tuning, "ROW_BUCKETS", (1, 8, 512))
    own, group = made()
    microseconds = {"library": 9.0, ONE_SHOT: 5.0, TWO_SHOT: 6.0, SEPARATE: 12.0, "norm one-shot": 8.0}
    order: list[str] = []

    def timer(calls: Sequence[Callable[[], object]], launches: int) -> float:
        way, launched = own._forced, len(group.calls)
        assert way is not None
        calls[0]()
        order.append(way)
        assert (len(group.calls) > launched) == (way == LIBRARY)
        return microseconds[way]

    chosen = own.tune(HIDDEN, torch.float32, timer)
    first = chosen[0]
    assert (first.product, first.rows, first.tactic, first.microseconds) == ("all_reduce", 1, ONE_SHOT, 10.0)
    assert (first.runner_up, first.runner_up_microseconds) == (TWO_SHOT, 12.0)
    assert chosen[1].product == "all_reduce_norm" and chosen[1].tactic == ONE_SHOT
    assert order[:6] == [LIBRARY, ONE_SHOT, TWO_SHOT, SEPARATE, ONE_SHOT, TWO_SHOT]
    assert own.known(HIDDEN, torch.float32) and not own.known(2 * HIDDEN, torch.float32)
    last = chosen[-1]  # fits no workspace, so there are as many kernels as it takes
    assert (last.product, last.rows, last.tactic, last.runner_up) == ("all_reduce", 512, TWO_SHOT, LIBRARY)
    x, launched = torch.ones(512, HIDDEN), len(group.calls)
    own.all_reduce(x)
    assert len(group.calls) == launched and x[0].all()
    own.all_reduce(torch.ones(513, HIDDEN))  # more than was timed
    assert len(group.calls) == launched + 1


@pytest.mark.parametrize("tactic", [ONE_SHOT, TWO_SHOT, SEPARATE])
@pytest.mark.parametrize("deferred", [False, True])
def test_partial_sum_in_front_of_a_norm(tactic: str, deferred: bool) -> None:
    """The norm takes it like any product, by whatever tactic; it comes in one kernel or two."""
    own, _ = made()
    TABLE.choose(key("all_reduce_norm", torch.float32), HIDDEN, 2, 8, tactic)
    TABLE.choose(key("all_reduce", torch.float32), HIDDEN, 2, 8, ONE_SHOT)
    x, residual, weight = torch.randn(5, HIDDEN), torch.randn(5, HIDDEN), torch.randn(HIDDEN)
    product = DeferredScale(x.clone(), torch.full((5, 1), 0.5), torch.full((1, HIDDEN), 2.0), None)
    summand = PartialSum.of(product if deferred else x.clone(), own)
    if tactic == TWO_SHOT:
        x[:, HIDDEN // 2 :] = 0  # the other rank's share, which it does not add up here
    want, want_stream = norm.rms_norm_reference(x, residual.clone(), weight, 1e-5)
    got, stream = norm.rms_norm(summand, residual, weight, 1e-5)
    torch.testing.assert_close(got, want)
    assert torch.equal(stream, want_stream) and stream is residual
    again = PartialSum.of(x.clone(), own)
    values, _ = norm.rms_norm_quantize(again, want_stream - x, weight, 1e-5, torch.int8)
    assert values[0].dtype == torch.int8


def test_partial_sum_is_added_up_when_somebody_wants_numbers() -> None:
    own, group = made()
    x = torch.randn(3, HIDDEN)
    assert torch.equal(PartialSum.of(x.clone(), own).materialize(torch.float32), x)
    first, stream = norm.rms_norm(PartialSum.of(x.clone(), own), None, torch.ones(HIDDEN), 1e-5)
    assert torch.equal(stream, x) and group.calls == [] and first.shape == x.shape


def test_a_refusal_elsewhere_is_one_here(caplog: pytest.LogCaptureFixture) -> None:
    """Three ranks: rank 0 says why, the others follow without a word."""
    for rank, lines in ((0, 1), (1, 0)):
        caplog.clear()
        group = _Library(smallest=0)
        assert connect_without_gpus(group, rank) is None
        assert len(caplog.records) == lines
    assert "made for 2, 4, 8 ranks" in caplog.text or caplog.text == ""


def connect_without_gpus(group: _Library, rank: int) -> AllReduce | None:
    return connect(group, rank, 3, torch.device("cpu"))


def test_row_parallel_layers_leave_the_sum_to_the_norm() -> None:
    """With own kernels, as a layer whose result goes to a norm says; without them, or elsewhere, they add up."""
    own, library = made()
    for defer, with_own in ((True, True), (False, True), (True, False)):
        group = GroupCollectives(2, torch.device("cpu"))
        group.own = own if with_own else None
        tp = TensorParallel(0, 2, group if with_own else library)
        layer = RowParallelLinear(16, HIDDEN, bias=False, scheme=Scheme(), dtype=torch.float32, tp=tp, defer=defer)
        weight = torch.randn(HIDDEN, 16)
        layer.load_state_dict({"weight": weight})
        layer.prepare()
        x = torch.randn(3, 16)
        got = layer(x)
        assert isinstance(got, PartialSum) == (defer and with_own)
        torch.testing.assert_close(materialize(got, torch.float32), x @ weight.T)
        torch.testing.assert_close(materialize(layer.multiply(x), torch.float32), x @ weight.T)
    assert library.calls == [(3, HIDDEN)]
