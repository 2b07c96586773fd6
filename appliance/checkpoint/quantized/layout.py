"""What a published layout of quantized checkpoints is: facts from its configuration, the tensors of a layer, and how
they become a `QuantizedWeight`.

A layout is one file here with a class derived from `Layout`. Torch is imported only where tensors are read, so that a
checkpoint can be judged without it. Knows nothing of engines, schemes or kernels, but for the group sizes that these
take.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.errors import CheckpointError
from appliance.types import Quantization

if TYPE_CHECKING:
    from torch import Tensor

    from appliance.quantization.weights import QuantizedWeight

GROUP_SIZES = (32, 64, 128)  # that the products of the int4 schemes take
FLOATS = ("float16", "bfloat16", "float32")
USE_ORIGINAL = "use the original, unquantized checkpoint: the appliance quantizes it itself"

Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Expected:
    """A tensor of a quantized layer as the header of its file must describe it."""

    suffix: str
    shapes: tuple[tuple[int, ...], ...]  # any of these
    dtypes: tuple[str, ...]  # any of these, torch's names
    optional: bool = False


class Layer:
    """The tensors of one quantized module of a checkpoint, read on demand."""

    def __init__(
        self, name: str, shape: tuple[int, int], read: Callable[[str], Tensor], present: frozenset[str]
    ) -> None:
        self.name = name  # "model.layers.0.mlp.down_proj"
        self.out_features, self.in_features = shape
        self._read = read
        self.present = present  # suffixes

    def __getitem__(self, suffix: str) -> Tensor:
        """[…], as stored; on the CPU a view of the file. Raises CheckpointError if there is none."""
        return self._read(f"{self.name}.{suffix}")

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.present

    def wrong(self, suffix: str, problem: str) -> CheckpointError:
        """The error about one of its tensors."""
        return CheckpointError(
            f"tensor {self.name}.{suffix}: {problem}", hint=f"download the checkpoint again, or {USE_ORIGINAL}"
        )


class Layout(ABC):
    """One way to write a quantized checkpoint. Stateless."""

    method: str  # "quant_method" of the configuration
    marks: tuple[str, ...]  # a module with a tensor of one of these suffixes is quantized
    scales: tuple[str, ...]  # suffixes of the tensors that must be finite and above zero

    @abstractmethod
    def facts(self, config: Raw, where: Path) -> Quantization:
        """What the configuration says; `unquantized` is left to the caller. CheckpointError for what cannot be read
        here, with what can."""

    @abstractmethod
    def ignores(self, config: Raw, module: str) -> bool:
        """Whether the configuration leaves a linear layer of that name as it is."""

    @abstractmethod
    def expected(self, out_features: int, in_features: int, facts: Quantization) -> list[Expected]:
        """The tensors of a layer [out_features, in_features]."""

    @abstractmethod
    def read(self, layer: Layer, facts: Quantization) -> QuantizedWeight:
        """A layer's weight. CheckpointError for values that no layer has."""


def unsupported(where: Path, what: str, allowed: str) -> CheckpointError:
    return CheckpointError(f"{where}: the checkpoint is quantized with {what}, allowed: {allowed}", hint=USE_ORIGINAL)


def stored_group_size(size: object, where: Path) -> int:
    """The group size with which an engine stores int4 weights in groups of `size`: the same; 128 for one scale per
    output channel (-1 or None), which is then repeated. Raises CheckpointError."""
    if size in (None, -1):
        return max(GROUP_SIZES)
    if not isinstance(size, int) or isinstance(size, bool) or size not in GROUP_SIZES:
        allowed = f"{', '.join(map(str, GROUP_SIZES))} or -1 (one scale per output channel)"
        raise unsupported(where, f"group_size {size!r}", allowed)
    return size


def names_part_of(patterns: object, module: str) -> bool:
    """Whether a list of names or parts of names, as AutoAWQ, GPTQ and transformers write it, means a module."""
    return any(str(pattern) in module for pattern in patterns) if isinstance(patterns, list | tuple) else False
