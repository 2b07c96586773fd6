"""Optimizer of the training run: Muon for the matrices of the layers, AdamW for the embedding and the norms.

Muon (Jordan et al. 2024): momentum whose update is brought to the nearest orthogonal matrix by a quintic Newton-Schulz
iteration. Matrices of one shape are stacked, so that a step is a few batched products instead of thousands of kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(stack: Tensor, iterations: int = 5) -> Tensor:
    """Approximate U V^T of each matrix in a stack [n, rows, columns]; all but tiny singular values become 0.7..1.2."""
    a, b, c = _COEFFICIENTS
    x = stack.to(torch.bfloat16) if stack.is_cuda else stack
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon:
    """Momentum 0.95 (Nesterov), decoupled weight decay; update scaled by sqrt(max(1, rows / columns))."""

    def __init__(self, parameters: list[nn.Parameter], weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            shapes.setdefault(parameter.shape, []).append(parameter)
        self._groups = [(group, torch.zeros_like(torch.stack(list(group)))) for group in shapes.values()]
        self._weight_decay, self._momentum = weight_decay, momentum

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the gradients at a learning rate. Every parameter must have one."""
        for parameters, momentum in self._groups:
            gradients = torch.stack([p.grad for p in parameters if p.grad is not None])
            momentum.lerp_(gradients, 1 - self._momentum)
            update = orthogonalize(gradients.lerp(momentum, self._momentum)).float()
            scale = max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            torch._foreach_mul_(parameters, 1 - lr * self._weight_decay)
            torch._foreach_add_(parameters, list((update * (-lr * scale)).unbind(0)))


class Optimizer:
    """Both parts under one relative learning rate. `step(1.0)` is the peak, `step(0.0)` changes nothing."""

    def __init__(
        self, network: nn.Module, *, matrix_lr: float, adam_lr: float, weight_decay: float, max_norm: float = 1.0
    ) -> None:
        matrices = [p for n, p in network.named_parameters() if p.dim() == 2 and "embed" not in n]
        others = [p for n, p in network.named_parameters() if p.dim() != 2 or "embed" in n]
        self._parameters = list(network.parameters())
        self._muon = Muon(matrices, weight_decay)
        self._adam = torch.optim.AdamW(
            others, lr=adam_lr, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0, fused=others[0].is_cuda
        )
        self._matrix_lr, self._adam_lr, self._max_norm = matrix_lr, adam_lr, max_norm

    def step(self, relative: float) -> Tensor:
        """Clip, update and clear the gradients; returns their norm before clipping (a tensor, not waited for)."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        self._muon.step(self._matrix_lr * relative)
        for group in self._adam.param_groups:
            group["lr"] = self._adam_lr * relative
        self._adam.step()
        for parameter in self._parameters:
            parameter.grad = None
        return norm
