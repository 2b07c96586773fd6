"""Own all-reduces between GPUs of this machine, a process each; several on one GPU where there are fewer."""

from __future__ import annotations

from pathlib import Path

import all_reduce_ranks
import pytest
import torch
import torch.multiprocessing

pytestmark = pytest.mark.gpu


@pytest.mark.timeout(180)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_on_gpus_add_up(size: int, tmp_path: Path) -> None:
    """One-shot, two-shot and fused, eagerly and in CUDA graphs; the choices of all ranks are the same."""
    if size > 2 * torch.cuda.device_count():
        pytest.skip(f"gpu test: needs {size // 2} GPUs, here are {torch.cuda.device_count()}")
    torch.multiprocessing.spawn(all_reduce_ranks.run, (size, f"file://{tmp_path}/rendezvous"), nprocs=size)
