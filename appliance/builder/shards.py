"""Which part of every stored tensor each rank gets, and the way back: whole tensors from the ranks' files.

Cuts tensors as they are stored, so it serves every source and every scheme alike: what a scheme stores for a layer is
rows of output channels, whose second dimension, if it has more than one entry, belongs to the inputs in equal parts
(weights, packed or not, and scales of groups). A tensor of one dimension belongs to the inputs as a whole (an order of
them) or to the layer (a scale of its input). Ranks thus hold the numbers that one rank would, and a scale per output
channel stays the whole channel's. A pipeline stage's ranks have the specs of its layers, the first the embedding, the
last the head. Knows specs and shapes; knows no number format and no architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.checkpoint import Checkpoint, TensorPlan
from appliance.distributed import TensorParallel
from appliance.errors import EngineBuildError, EngineDamagedError
from appliance.quantization.scheme import PrecisionScheme
from appliance.runtime.weights import read_tensors
from appliance.types import ModelConfig, WeightSpec

Range = tuple[int, int]


def joined_shape(spec: WeightSpec) -> tuple[int, ...]:
    """Shape of a spec's sources on top of each other."""
    return (sum(shape[0] for shape in spec.shapes), *spec.shapes[0][1:])


def check_shares(spec: WeightSpec, size: int, multiple: int, precision: str) -> None:
    """EngineBuildError if `size` ranks cannot share a linear spec. `multiple`: of what the layer's scheme and kernels
    want input sizes to be multiples; `precision` is for the message."""
    inputs = spec.shapes[0][1]
    if spec.shard == "row":
        if inputs % size or inputs // size % multiple:
            share = f"{inputs}, which {size} ranks cannot share" if inputs % size else f"{inputs // size}"
            share += "" if inputs % size or size == 1 else f" on each of {size} ranks"
            raise EngineBuildError(
                f"{precision} needs input sizes that are multiples of {multiple}; {spec.name} has {share}",
                hint="choose another tensor-parallel size, or a profile of another precision",
            )
    elif inputs % multiple:
        raise EngineBuildError(
            f"{precision} needs input sizes that are multiples of {multiple}; {spec.name} has {inputs}",
            hint="choose a profile of another precision, for example bf16",
        )
    if spec.shard == "column":
        for count in spec.heads or [shape[0] for shape in spec.shapes]:
            if count % size and (not spec.heads or size % count):
                unit = "heads" if spec.heads else "outputs"
                raise EngineBuildError(
                    f"{spec.name} has {count} {unit}, which {size} ranks cannot share",
                    hint="choose another tensor-parallel size",
                )


def rows_of(spec: WeightSpec, rank: int, size: int) -> list[Range]:
    """Rows [begin, end) of the joined weight that a rank has, in its order. Of a vocabulary the last ranks may have
    fewer than `rows_per_rank`, or none."""
    total = joined_shape(spec)[0]
    if spec.shard == "vocabulary":
        share = TensorParallel(rank, size).padded_share(total)
        return [(min(rank * share, total), min((rank + 1) * share, total))]
    if spec.shard != "column":
        return [(0, total)]
    ranges, start = [], 0
    for i, shape in enumerate(spec.shapes):
        count = spec.heads[i] if spec.heads else shape[0]
        unit = shape[0] // count
        share = max(1, count // size)
        first = rank * count // size  # a rank of several that share a head: that head
        ranges.append((start + first * unit, start + (first + share) * unit))
        start += shape[0]
    return ranges


def columns_of(spec: WeightSpec, rank: int, size: int) -> Range:
    """Inputs [begin, end) of the joined weight that a rank has."""
    inputs = joined_shape(spec)[1]
    share = inputs // size if spec.shard == "row" else inputs
    return (rank * share, (rank + 1) * share) if spec.shard == "row" else (0, inputs)


def rank_shape(spec: WeightSpec, size: int) -> tuple[int, ...]:
    """Shape of a rank's part of the joined weight; the same on all ranks."""
    whole = joined_shape(spec)
    if spec.shard == "vocabulary":
        return (TensorParallel(0, size).padded_share(whole[0]), *whole[1:])
    if spec.shard == "none":
        return whole
    begin, end = columns_of(spec, 0, size)
    return (sum(stop - start for start, stop in rows_of(spec, 0, size)), end - begin)


def plan_tensors(
    specs: Iterable[WeightSpec], scheme: PrecisionScheme, dtype: torch.dtype, size: int = 1
) -> list[TensorPlan]:
    """Every tensor of one rank's weight file, in the order in which `convert` writes them; the same for all `size`
    ranks. `scheme`: of the model."""
    plan: list[TensorPlan] = []

    def add(name: str, shape: tuple[int, ...], stored: torch.dtype) -> None:
        plan.append(TensorPlan(name, str(stored).removeprefix("torch."), tuple(shape)))

    for spec in specs:
        shape = rank_shape(spec, size)
        if spec.kind == "plain":
            add(spec.name, shape, dtype)
            continue
        for suffix, (stored_shape, stored_dtype) in scheme.of(spec.name).tensors(shape[0], shape[1], dtype).items():
            add(f"{spec.name}.{suffix}", stored_shape, stored_dtype)
        if spec.bias_sources:
            add(f"{spec.name}.bias", shape[:1], dtype)
    return plan


def stage_of(name: str, config: ModelConfig, stages: int) -> int:
    """The pipeline stage that has the engine's tensor, or spec, of this name."""
    part, _, rest = name.partition(".")
    if part == "embedding":
        return 0
    if part != "layers":
        return stages - 1
    layer = int(rest.partition(".")[0])
    return next(stage for stage in range(stages) if layer in config.layers_of_stage(stage, stages))


def plan_ranks(
    specs: Sequence[WeightSpec],
    scheme: PrecisionScheme,
    dtype: torch.dtype,
    config: ModelConfig,
    tp_size: int,
    pp_size: int,
) -> list[list[TensorPlan]]:
    """`plan_tensors` of every rank's weight file, by rank."""
    stages: list[list[WeightSpec]] = [[] for _ in range(pp_size)]
    for spec in specs:
        stages[stage_of(spec.name, config, pp_size)].append(spec)
    return [plan for stage in stages for plan in [plan_tensors(stage, scheme, dtype, tp_size)] * tp_size]


def shard(spec: WeightSpec, tensors: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """A rank's part of a spec's stored tensors, by engine name; views of them where nothing is joined or padded."""
    if size == 1 or spec.shard == "none":
        return dict(tensors)
    bias = f"{spec.name}.bias"
    return {
        name: _rank_rows(spec, tensor, rank, size)
        if name == bias or spec.shard != "row"
        else _rank_columns(spec, tensor, rank, size)
        for name, tensor in tensors.items()
    }


def _rank_rows(spec: WeightSpec, tensor: Tensor, rank: int, size: int) -> Tensor:
    """A tensor whose first dimension is that of the joined weight; another is every rank's."""
    if tensor.shape[0] != joined_shape(spec)[0] or _belongs_to_inputs(spec, tensor):
        return tensor
    parts = [tensor[begin:end] for begin, end in rows_of(spec, rank, size)]
    whole = parts[0] if len(parts) == 1 else torch.cat([_bytes(part) for part in parts]).view(tensor.dtype)
    missing = rank_shape(spec, size)[0] - whole.shape[0]
    if not missing:
        return whole
    padded = F.pad(_bytes(whole.contiguous()), (0, 0) * (whole.dim() - 1) + (0, missing))
    return padded.view(tensor.dtype)


def _rank_columns(spec: WeightSpec, tensor: Tensor, rank: int, size: int) -> Tensor:
    """A tensor whose last-but-rows dimension is that of the inputs, or a part of it; another is every rank's."""
    dim = 1 if tensor.dim() > 1 else 0
    length = tensor.shape[dim]
    if length == 1:  # a scale of the whole channel, or of the input
        return tensor
    assert length % size == 0, f"{spec.name}: {size} ranks cannot share {list(tensor.shape)}"
    return tensor.narrow(dim, rank * (length // size), length // size)


def _belongs_to_inputs(spec: WeightSpec, tensor: Tensor) -> bool:
    """An order of the inputs, which integers of one dimension are."""
    return tensor.dim() == 1 and not tensor.is_floating_point()


def _bytes(tensor: Tensor) -> Tensor:
    """FP8 numbers as bytes: torch cannot join or pad them on every device."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


class StoredEngine:
    """The weight files of an engine as if one rank held it: whole tensors by their names in an engine of one rank.

    A context manager, like the checkpoint that each file is. What several ranks have a copy of is taken from the
    first."""

    def __init__(
        self, files: Sequence[Path], specs: Sequence[WeightSpec], scheme: PrecisionScheme, dtype: torch.dtype
    ) -> None:
        """`files`: by rank."""
        self._ranks = [Checkpoint(file) for file in files]
        self._spec_of: dict[str, WeightSpec] = {}
        self._whole: dict[str, TensorPlan] = {}
        for spec in specs:
            for tensor in plan_tensors([spec], scheme, dtype):
                self._spec_of[tensor.name] = spec
                self._whole[tensor.name] = tensor

    @property
    def names(self) -> list[str]:
        return list(self._whole)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """A whole tensor, a copy on `device`."""
        return self.read_all([name], device)[name]

    def read_all(self, names: Iterable[str], device: torch.device | str) -> dict[str, Tensor]:
        """Several at once, which is faster."""
        names = list(names)
        if len(self._ranks) == 1:
            return read_tensors([self._ranks[0].info(name) for name in names], device)
        held = [read_tensors([rank.tensors[n] for n in names if n in rank.tensors], device) for rank in self._ranks]
        return {name: self._join(name, [part.pop(name) for part in held if name in part]) for name in names}

    def _join(self, name: str, parts: list[Tensor]) -> Tensor:
        """`parts`: by rank, of the ranks that have one, those of a stage."""
        spec, whole = self._spec_of[name], self._whole[name]
        size = len(parts)
        if not parts:
            raise EngineDamagedError(f"no rank of the engine has {name}", hint="the engine is built anew")
        if parts[0].shape == whole.shape:
            return parts[0]  # every rank's
        if spec.shard == "row":
            dim = 1 if parts[0].dim() > 1 else 0
            return torch.cat([_bytes(part) for part in parts], dim).view(parts[0].dtype)
        if spec.shard == "vocabulary":
            return torch.cat([_bytes(part) for part in parts])[: whole.shape[0]].view(parts[0].dtype)
        joined = parts[0].new_empty(whole.shape)
        for rank in reversed(range(size)):
            start = 0
            for begin, end in rows_of(spec, rank, size):
                _bytes(joined)[begin:end] = _bytes(parts[rank])[start : start + end - begin]
                start += end - begin
        return joined

    def close(self) -> None:
        for rank in self._ranks:
            rank.close()

    def __enter__(self) -> StoredEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
