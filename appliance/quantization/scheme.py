"""What a precision scheme is: how a linear layer's weight is stored in an engine and multiplied at run time.

A scheme is one file here with a `PLUGIN` literal and a class `Scheme` derived from `PrecisionScheme`; its `tolerance`
is the largest relative error ||y - reference|| / ||reference|| of a product with random input. Rounding to half a unit
in the last place of weights, inputs and outputs gives about 2^-24 (fp32), 2^-11 (fp16), 2^-8 (bf16) and 2^-4 (fp8);
random signs make it less. The model and its layers do not know which one is in use. A scheme whose products take
quantized input overrides `rms_norm` and `silu_mul`, the operations that feed those products, so that quantizing costs
no kernel of its own. One whose products are quicker without their scales leaves those to the operation behind a
product, if the layer says that it may (`DeferredScale`): `rms_norm` and `silu_mul` again, the rotary embedding
(`kernels/rope_cache.py`) and the conversion of logits.

A scheme has parameters (`PLUGIN["parameters"]` are those it knows, with their defaults). They decide what is stored,
so they are in the engine's key, and loading makes the scheme from them again. Two have a meaning for every scheme that
lists them:

- `unquantized`: names of linear layers that are stored plain, glob patterns allowed: "lm_head", "layers.0.*".
- `head`: how lm_head is stored: in FP8, in the model's own 16 bits ("bf16"), or in the scheme's own precision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from appliance import registry
from appliance.errors import EngineBuildError, EngineDamagedError
from appliance.kernels import activation, norm
from appliance.kernels.deferred_scale import Product
from appliance.kernels.tactics import Tactics
from appliance.quantization.calibration.block import BlockWeights, QuantizedBlock
from appliance.quantization.calibration.statistics import BlockStatistics
from appliance.quantization.weights import QuantizedWeight

# What flows into a linear layer: [n, in] in the model's dtype, or quantized values [n, in] with float32 scales [n, 1].
Activation = Tensor | tuple[Tensor, Tensor]

HEAD = "lm_head"
_HEADS = {"fp8": "fp8", "bf16": "none"}  # value of the parameter `head` -> plug-in; any other is the scheme itself


class PrecisionScheme(ABC):
    """Stateless but for its parameters; one instance serves all layers of a model that are stored alike."""

    facts: ClassVar[Mapping[str, Any]]  # the plug-in's PLUGIN literal

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        """`parameters` replace the defaults. EngineDamagedError for one that the scheme does not know: the engine that
        names it is of another version. EngineBuildError for a value that is not allowed."""
        defaults: dict[str, Any] = self.facts.get("parameters", {})
        given = dict(parameters or {})
        unknown = given.keys() - defaults.keys()
        if unknown:
            allowed = ", ".join(defaults) or "none"
            raise EngineDamagedError(
                f"scheme {self.facts['name']} has no parameter {min(unknown)!r}; allowed: {allowed}",
                hint="the engine was built by another version; remove it and build anew",
            )
        self.parameters: dict[str, Any] = {**defaults, **given}
        heads = [*_HEADS, *self.facts["precisions"]]
        if self.parameters.get("head", heads[0]) not in heads:
            raise EngineBuildError(f"head is {self.parameters['head']!r}; allowed: {', '.join(heads)}")
        self._others: dict[str, PrecisionScheme] = {}

    def of(self, name: str) -> PrecisionScheme:
        """The scheme of the linear layer with that engine name; the same object for all that are stored alike."""
        if any(fnmatchcase(name, pattern) for pattern in self.parameters.get("unquantized", ())):
            return self._other("none")
        if name == HEAD and self.parameters.get("head") in _HEADS:
            return self._other(_HEADS[self.parameters["head"]])
        return self

    def _other(self, name: str) -> PrecisionScheme:
        if name not in self._others:
            self._others[name] = registry.load("quantization", name).Scheme()
        return self._others[name]

    @abstractmethod
    def tensors(
        self, out_features: int, in_features: int, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Stored tensors of a linear layer: suffix -> (shape, dtype). `dtype` is the model's own."""

    @abstractmethod
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Stored tensors of a weight [out, in] (float, already in the engine's dtype), on the weight's device. Rows
        are independent of each other, so a scheme may be applied to a part of the rows or before ranks split them.
        Rounds to nearest, where the scheme rounds."""

    def store(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Stored tensors of a weight that is quantized already, by calibration or by whoever made the checkpoint.
        EngineBuildError if this scheme cannot hold it."""
        raise EngineBuildError(
            f"scheme {self.facts['name']} does not store {type(weight).__name__}",
            hint="choose the profile of the precision that the checkpoint is quantized to",
        )

    # Whether `calibrate` needs `BlockStatistics(hessian=True)`.
    needs_hessian: ClassVar[bool] = False

    def calibrate(self, block: BlockWeights, statistics: BlockStatistics) -> QuantizedBlock:
        """A decoder block quantized with the inputs of its products in view; its weights go to `store`. For schemes
        whose PLUGIN says "calibrated": True. Raises CheckpointError and EngineBuildError for numbers that are not
        finite."""
        raise NotImplementedError(f"scheme {self.facts['name']} is not calibrated")

    @property
    def input_multiple(self) -> int:
        """Input sizes that are no multiples of it cannot be stored."""
        return 1

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors as loaded on their device -> what `apply` wants there. Called once, after loading."""
        return tensors

    @abstractmethod
    def apply(self, tensors: dict[str, Tensor], x: Activation, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x @ weight.T + bias: [n, out], in `dtype`, the model's own. `tensors` are prepared; if `prepare` padded the
        weight, the result has extra columns, which the layer cuts off. Kernel on CUDA, plain torch elsewhere; never
        synchronizes, so it can be captured in a CUDA graph."""

    def apply_deferred(
        self, tensors: dict[str, Tensor], x: Activation, bias: Tensor | None, dtype: torch.dtype
    ) -> Product:
        """Like `apply`, for layers whose result goes to an operation that takes a `DeferredScale` too. Its values are
        in `dtype`, so that the operation can write over them."""
        return self.apply(tensors, x, bias, dtype)

    def tactics(self, out_features: int, in_features: int, rows: int, device: torch.device) -> Tactics:
        """Ways to compute `apply` on `device` for any number of rows up to `rows`, by a name that says what they do;
        the first is what `apply` does where `kernels.tactics.TABLE` has no choice. Empty: there is one way only.
        `out_features` counts what `prepare` padded. A scheme with several looks its choice up in `apply`; one that
        gives a `DeferredScale` serves `apply` too, which applies the scales then."""
        return {}

    def tactic_input(self, x: Tensor) -> Activation:
        """x [n, in], in the model's dtype, as the tactics take it: quantized, where the products take that."""
        return x

    def rms_norm(
        self,
        x: Product,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        behind: Mapping[str, Tensor] | None = None,
    ) -> tuple[Activation, Tensor]:
        """The input of the next linear layer and the new residual stream; see `kernels.norm.rms_norm`. `behind`:
        prepared tensors of that layer."""
        return norm.rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: Product, behind: Mapping[str, Tensor] | None = None) -> Activation:
        """silu(gate) * up of [n, 2 * size]: the input of the next linear layer; see `kernels.activation.silu_mul`.
        `behind`: prepared tensors of that layer."""
        return activation.silu_mul(gate_up)
