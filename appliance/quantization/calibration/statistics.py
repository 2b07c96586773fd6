"""What calibration gathers of the inputs of a block's products, streaming over batches of tokens, in float32.

Knows nothing of weights or algorithms. Memory does not grow with the number of tokens: a bounded random sample is kept,
and with `hessian` a matrix of in_features x in_features numbers per product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from appliance.errors import EngineBuildError
from appliance.quantization.calibration.block import PRODUCTS, BlockWeights

# Kept of each product's inputs. AWQ of the built-in model, q and k unclipped, had 0.80 of the KL divergence of rounding
# to nearest with 512, and 0.74 with 2048 or 8192, over two sets of conversations.
SAMPLE_TOKENS = 2048


class InputStatistics:
    """Of the inputs of one product. `update` with each batch, then read."""

    def __init__(
        self,
        name: str,
        in_features: int,
        *,
        device: torch.device,
        sample_tokens: int = SAMPLE_TOKENS,
        hessian: bool = False,
        seed: int = 0,
    ) -> None:
        """`name` is for messages. `seed`: which tokens are sampled depends on it and on the sizes of the batches."""
        self.name = name
        self.count = 0  # tokens seen
        self.mean_abs = torch.zeros(in_features, device=device)  # float32 [in]
        self.max_abs = torch.zeros(in_features, device=device)  # float32 [in]
        # float32 [in, in]: mean over tokens of x x^T, half of the second derivative of the mean squared output error
        self.hessian = torch.zeros(in_features, in_features, device=device) if hessian else None
        self._sample_tokens = sample_tokens
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0)  # of the sampled tokens: those with the largest of one random number per token
        self._sample: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """x [..., in], float, on the device given: every row is one token."""
        x = x.detach().reshape(-1, x.shape[-1])
        new = x.shape[0]
        if not new:
            return
        total = self.count + new
        magnitude = x.abs().float()
        self.mean_abs += (magnitude.mean(0) - self.mean_abs) * (new / total)
        self.max_abs = torch.maximum(self.max_abs, magnitude.amax(0))
        del magnitude
        if self.hessian is not None:
            self.hessian *= self.count / total
            self.hessian += gram(x).div_(total)
        self._take_sample(x)
        self.count = total

    def _take_sample(self, x: Tensor) -> None:
        """Reservoir by random keys (Efraimidis and Spirakis, 2006, with equal weights)."""
        keys = torch.cat((self._keys, torch.rand(x.shape[0], generator=self._generator)))
        chosen = keys.topk(min(self._sample_tokens, keys.shape[0])).indices.sort().values
        old = self._keys.shape[0]
        fresh = x[(chosen[chosen >= old] - old).to(x.device)]
        kept = chosen[chosen < old].to(x.device)
        self._sample = fresh if self._sample is None else torch.cat((self._sample[kept], fresh))
        self._keys = keys[chosen]

    @property
    def sample(self) -> Tensor:
        """float32 [at most sample_tokens, in], in the order in which the tokens came."""
        assert self._sample is not None, "no batch yet"
        return self._sample.float()

    def check(self) -> None:
        """EngineBuildError where no token came, or one with NaN or infinite numbers."""
        if not self.count:
            raise EngineBuildError(f"no calibration tokens reached {self.name}", hint="use a longer calibration text")
        if not bool(torch.isfinite(self.max_abs).all()):
            raise EngineBuildError(
                f"the inputs of {self.name} are NaN or infinite on the calibration text",
                hint="the checkpoint is damaged, or its activations do not fit its dtype; a precision without "
                "calibration builds without this check",
            )


class BlockStatistics:
    """Of all products of a block."""

    def __init__(
        self, block: BlockWeights, *, hessian: bool = False, sample_tokens: int = SAMPLE_TOKENS, seed: int = 0
    ) -> None:
        """`hessian`: what `gptq.calibrate` needs. On the device of the block's weights."""
        self._of = {
            key: InputStatistics(
                f"{block.name}.{PRODUCTS[key]}",
                linear.weight.shape[1],
                device=linear.weight.device,
                sample_tokens=sample_tokens,
                hessian=hessian,
                seed=seed,
            )
            for key, linear in block.products()
        }

    def update(self, key: str, x: Tensor) -> None:
        """x [..., in]: inputs of the product `key` of `PRODUCTS`, in the dtype in which the model has them."""
        self._of[key].update(x)

    def __getitem__(self, key: str) -> InputStatistics:
        return self._of[key]

    def check(self) -> None:
        """EngineBuildError where a product's inputs are missing or not finite."""
        for statistics in self._of.values():
            statistics.check()


def gram(x: Tensor) -> Tensor:
    """x [n, in] -> x^T x, float32 [in, in]. Products of 16-bit numbers are exact in float32, so that the tensor cores
    of a GPU give the same as a product in float32, 10 to 20 times as fast."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x.T, x, out_dtype=torch.float32)
    x = x.float()
    return x.T @ x
