"""The tensor-parallel group: shares, no-ops at size 1, and two real ranks over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import distributed

from appliance.distributed import GroupCollectives, TensorParallel
from appliance.errors import HardwareError
from appliance.layers.linear import ColumnParallelLinear, RowParallelLinear
from appliance.quantization.unquantized import Scheme


def test_one_rank_has_everything() -> None:
    tp, x = TensorParallel(), torch.ones(2, 3)
    assert tp.share(12, "heads") == 12
    assert tp.all_reduce(x) is x and tp.all_gather(x) is x and (x == 1).all()


def test_uneven_shares_are_refused() -> None:
    assert TensorParallel(1, 4).share(12, "heads") == 3
    with pytest.raises(HardwareError, match="10 key/value heads cannot be split evenly over 4 ranks"):
        TensorParallel(1, 4).share(10, "key/value heads")


def test_few_heads_are_copied() -> None:
    assert [TensorParallel(0, size).share_or_copy(4, "heads") for size in (1, 2, 4, 8)] == [4, 2, 1, 1]
    with pytest.raises(HardwareError, match="4 heads can neither be split evenly over 6 ranks nor copied"):
        TensorParallel(0, 6).share_or_copy(4, "heads")
    assert TensorParallel(1, 4).padded_share(10) == 3


def _rank(rank: int, address: str, out: str) -> None:
    """Column-parallel then row-parallel product of one rank, with the row layer's bias."""
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.set_num_threads(1)
    tp = TensorParallel(rank, 2, GroupCollectives(2, torch.device("cpu")))
    up, down, bias = (t.float() for t in _weights())
    column = ColumnParallelLinear(6, 4, bias=False, scheme=Scheme(), dtype=torch.float32)
    column.load_state_dict({"weight": up[4 * rank : 4 * rank + 4]})
    row = RowParallelLinear(4, 6, bias=True, scheme=Scheme(), dtype=torch.float32, tp=tp)
    row.load_state_dict({"weight": down[:, 4 * rank : 4 * rank + 4], "bias": bias})
    column.prepare()
    row.prepare()
    x = torch.arange(12.0).view(2, 6)
    hidden = column(x)
    torch.save({"gathered": tp.all_gather(hidden), "reduced": row(hidden)}, f"{out}/{rank}.pt")
    distributed.destroy_process_group()


def _weights() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(-4, 5, shape, generator=generator) for shape in ((8, 6), (6, 8), (6,)))  # type: ignore[return-value]


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (f"file://{tmp_path}/rendezvous", str(tmp_path)), nprocs=2)
    up, down, bias = (t.float() for t in _weights())
    hidden = torch.arange(12.0).view(2, 6) @ up.T
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(got["gathered"], hidden)
        assert torch.equal(got["reduced"], hidden @ down.T + bias)
