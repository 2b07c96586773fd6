"""The weights of a checkpoint that others quantized, per entry of an engine: checked against the headers of its files,
then read as they are.

Opening and `check` need no torch. Which layers are quantized is decided by `Quantization.unquantized`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

from appliance.checkpoint.quantized import LAYOUTS, is_unquantized
from appliance.checkpoint.quantized.layout import USE_ORIGINAL, Expected, Layer, Layout
from appliance.checkpoint.reader import Checkpoint
from appliance.errors import CheckpointError
from appliance.types import Quantization, WeightSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from appliance.quantization.weights import QuantizedWeight

# Where an attention's scales for an FP8 KV cache stand: ModelOpt's names and older ones, then those of its attention.
_KV_NAMES = {"k": ("k_proj.k_scale", "k_scale"), "v": ("v_proj.v_scale", "v_scale")}
_WEIGHT = ".weight"


class QuantizedTensors:
    """A checkpoint's quantized linear layers, by engine entry (`WeightSpec`). `checkpoint` stays the caller's."""

    def __init__(self, checkpoint: Checkpoint, facts: Quantization) -> None:
        self.checkpoint = checkpoint
        self.facts = facts
        self._layout: Layout = LAYOUTS[facts.method]

    def holds(self, spec: WeightSpec) -> bool:
        """Whether an entry's weight is quantized; every other one is read as from any checkpoint."""
        return spec.kind == "linear" and not is_unquantized(self.facts, spec.name)

    # ------------------------------------------------------------ checks

    def check(self, specs: Iterable[WeightSpec]) -> None:
        """Every tensor of every entry is there, of its shape and dtype. CheckpointError for the first that is not, and
        for a group size that does not divide."""
        for spec in specs:
            if not self.holds(spec):
                self.checkpoint.check([spec])
                continue
            for name, shape in zip(spec.bias_sources, spec.shapes):
                self.checkpoint.check_tensor(name, shape[:1], spec)
            for source, shape in zip(spec.sources, spec.shapes):
                self._check_layer(source.removesuffix(_WEIGHT), shape, spec)

    def _check_layer(self, module: str, shape: tuple[int, ...], spec: WeightSpec) -> None:
        out_features, in_features = shape
        if self.facts.group_size and in_features % self.facts.group_size:
            raise CheckpointError(
                f"{module} has {in_features} inputs, which groups of {self.facts.group_size} do not divide",
                hint=USE_ORIGINAL,
            )
        for expected in self._layout.expected(out_features, in_features, self.facts):
            self._check_tensor(module, expected, spec)

    def _check_tensor(self, module: str, expected: Expected, spec: WeightSpec) -> None:
        name = f"{module}.{expected.suffix}"
        if expected.optional and name not in self.checkpoint.tensors:
            return
        info = self.checkpoint.info(name)
        if info.shape not in expected.shapes:
            allowed = " or ".join(str(list(shape)) for shape in expected.shapes)
            raise CheckpointError(
                f"tensor {name} in {info.file.name} has shape {list(info.shape)}, expected {allowed} for {spec.name}",
                hint="config.json and the weights are not of the same model, or its quantization_config is wrong",
            )
        if info.dtype not in expected.dtypes:
            raise CheckpointError(
                f"tensor {name} in {info.file.name} has dtype {info.dtype}, allowed: {', '.join(expected.dtypes)}",
                hint=f"the quantization_config in config.json does not say what the file holds; {USE_ORIGINAL}",
            )

    def check_scales(self, specs: Iterable[WeightSpec]) -> None:
        """Every scale is finite and above zero; after `check`. Reads the scales only, some hundredth of the weights, so
        that a damaged checkpoint shows before the work begins. Raises CheckpointError naming the tensor."""
        for spec in filter(self.holds, specs):
            for layer in self._layers(spec):
                for suffix in self._layout.scales:
                    if suffix in layer:
                        _check_scale(layer, suffix)

    # ------------------------------------------------------------ reading

    def read(self, spec: WeightSpec, device: torch.device | str = "cpu") -> QuantizedWeight:
        """An entry's weight, its sources on top of each other, on `device`. CheckpointError for values that no layer
        has and for parts whose inputs are grouped differently."""
        import torch

        from appliance.quantization.weights import GroupedWeight, check, concatenate

        layers = self._layers(spec, device)
        parts = [self._layout.read(layer, self.facts) for layer in layers]
        for layer, part in zip(layers, parts):
            check(part, layer.name)
        orders = [part.order for part in parts if isinstance(part, GroupedWeight) and part.order is not None]
        if any(not torch.equal(order, orders[0]) for order in orders):
            raise CheckpointError(
                f"{' and '.join(layer.name for layer in layers)}, which are one product here, group their inputs in "
                "different orders (g_idx), allowed: one order for all of them",
                hint=f"use a checkpoint quantized without act-order (desc_act: false), or {USE_ORIGINAL}",
            )
        return concatenate(parts)

    def tensor_names(self, spec: WeightSpec) -> list[str]:
        """The checkpoint's tensors that `read` reads, biases left out."""
        return [f"{layer.name}.{suffix}" for layer in self._layers(spec) for suffix in sorted(layer.present)]

    def kv_scales(self, num_layers: int) -> tuple[tuple[float, float], ...] | None:
        """(K, V) scales of an FP8 KV cache per layer: number = byte * scale. None if the checkpoint brings none, also
        where its configuration speaks of such a cache. CheckpointError for some that are missing or no scale."""
        suffixes = tuple(f".self_attn.{suffix}" for names in _KV_NAMES.values() for suffix in names)
        present = any(name.endswith(suffixes) for name in self.checkpoint.tensors)
        if self.facts.kv_cache is None or not present:
            return None
        return tuple((self._kv_scale(i, "k"), self._kv_scale(i, "v")) for i in range(num_layers))

    def _kv_scale(self, index: int, which: str) -> float:
        names = [f"model.layers.{index}.self_attn.{name}" for name in _KV_NAMES[which]]
        present = [name for name in names if name in self.checkpoint.tensors]
        if not present:
            raise CheckpointError(
                f"the checkpoint has scales of an FP8 KV cache, but neither {' nor '.join(names)}",
                hint="download the checkpoint again, or take its KV cache's quantization out of its configuration",
            )
        tensor = self.checkpoint.read(present[0]).float()
        value = float(tensor.reshape(-1)[0]) if tensor.numel() == 1 else float("nan")
        if not 0 < value < float("inf"):
            raise CheckpointError(
                f"tensor {present[0]} is no scale: {tensor.tolist()}, allowed: one finite number above zero",
                hint=f"download the checkpoint again, or {USE_ORIGINAL}",
            )
        return value

    # ------------------------------------------------------------ layers

    @cached_property
    def _suffixes(self) -> dict[str, frozenset[str]]:
        """Tensors by module."""
        found: dict[str, set[str]] = {}
        for name in self.checkpoint.tensors:
            module, _, suffix = name.rpartition(".")
            found.setdefault(module, set()).add(suffix)
        return {module: frozenset(suffixes) for module, suffixes in found.items()}

    def _layers(self, spec: WeightSpec, device: torch.device | str = "cpu") -> list[Layer]:
        def read(name: str) -> Tensor:
            return self.checkpoint.read(name).to(device)

        layers = []
        for source, (out_features, in_features) in zip(spec.sources, spec.shapes):
            module = source.removesuffix(_WEIGHT)
            present = self._suffixes.get(module, frozenset()) - {"bias"}
            layers.append(Layer(module, (out_features, in_features), read, present))
        return layers


def _check_scale(layer: Layer, suffix: str) -> None:
    scales = layer[suffix]
    low, high = (float(bound) for bound in scales.aminmax())  # NaN if any is
    if not (low > 0 and high < float("inf")):
        wrong = "NaN" if low != low else f"{low:g}" if low <= 0 else "infinite"
        raise layer.wrong(suffix, f"a scale is {wrong}, allowed: finite numbers above zero")
