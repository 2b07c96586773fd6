"""The tensor-parallel group: which share of the model a rank holds and how the ranks add their partial results.

Knows ranks, not models: layers ask it for their share of a dimension. At size 1 every operation is a no-op. With more
ranks the collectives run over torch.distributed's default process group, which whoever starts the ranks has set up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from appliance.errors import HardwareError


@dataclass(frozen=True)
class TensorParallel:
    """One rank's place in the group."""

    rank: int = 0
    size: int = 1

    def share(self, total: int, what: str) -> int:
        """This rank's part of a dimension. HardwareError if it does not divide evenly; `what` names it there."""
        if total % self.size:
            raise HardwareError(
                f"{total} {what} cannot be split evenly over {self.size} GPUs",
                hint=f"choose a tensor-parallel size that divides {total}",
            )
        return total // self.size

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place; returns x."""
        if self.size > 1:
            torch.distributed.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Each rank's x [..., k] side by side in rank order: [..., k * size]."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=-1)
