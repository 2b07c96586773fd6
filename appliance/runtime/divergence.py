"""How far a model's predictions are from a reference's: Kullback-Leibler divergence, top-1 agreement, perplexities.

Definitions, over all positions that are given: `kl_divergence` is the mean of KL(p || q) in nats, p the reference's
next-token distribution over the whole vocabulary and q the other's; `top1_agreement` the share of positions at which
both have the same most likely token; `perplexity` exp of the mean negative log-likelihood of the tokens that follow in
the text. Knows logits only, not where they come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_AT_ONCE = 1 << 23  # logits widened at a time


@dataclass
class Divergence:
    """Sums over positions; `add` as many as there are."""

    positions: int = 0
    kl_sum: float = 0.0  # nats
    agreeing: int = 0
    reference_nll: float = 0.0  # nats
    nll: float = 0.0

    def add(self, reference: Tensor, logits: Tensor, next_ids: Tensor) -> None:
        """Logits [n, vocab] of the reference and of the model measured, float32, and the token that follows each
        position, int64 [n]. All on one device."""
        rows = max(1, _AT_ONCE // reference.shape[1])
        totals = torch.zeros(4, dtype=torch.float64, device=reference.device)
        for p, q, following in zip(reference.split(rows), logits.split(rows), next_ids.split(rows), strict=True):
            totals += _sums(p, q, following)
        kl, agreeing, reference_nll, nll = totals.tolist()
        self.positions += len(next_ids)
        self.kl_sum += kl
        self.agreeing += round(agreeing) if math.isfinite(agreeing) else 0
        self.reference_nll += reference_nll
        self.nll += nll

    @property
    def kl_divergence(self) -> float:
        """Infinite where the model measured gives numbers that are not finite."""
        mean = self.kl_sum / max(self.positions, 1)
        return max(mean, 0.0) if math.isfinite(mean) else math.inf  # rounding may leave a little less than 0

    @property
    def top1_agreement(self) -> float:
        return self.agreeing / max(self.positions, 1)

    @property
    def reference_perplexity(self) -> float:
        return _exp(self.reference_nll / max(self.positions, 1))

    @property
    def perplexity(self) -> float:
        return _exp(self.nll / max(self.positions, 1))


def _sums(reference: Tensor, logits: Tensor, next_ids: Tensor) -> Tensor:
    """[KL, agreeing, negative log-likelihood of the reference, of the other], float64."""
    # In float64: where a model is sure, what differs is far behind the point of 0.99999.
    log_p, log_q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    targets = next_ids[:, None]
    sums = [
        (log_p.exp() * (log_p - log_q)).sum(),
        (reference.argmax(-1) == logits.argmax(-1)).sum(),
        -log_p.gather(1, targets).sum(),
        -log_q.gather(1, targets).sum(),
    ]
    return torch.stack([value.double() for value in sums])


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf  # NaN compares false: infinite, too


def kl_reference(reference: Tensor, logits: Tensor) -> float:
    """The mean KL divergence by torch.distributions, all at once: what `Divergence` is compared with."""
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (reference, logits))
    return float(torch.distributions.kl_divergence(p, q).mean())
