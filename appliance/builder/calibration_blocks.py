"""A checkpoint's decoder, one block at a time: calibration runs prompts through the appliance's own layers and never
holds more than two blocks of weights, however many the model has.

Knows the model's interface and how specs map onto it; knows no algorithm and nothing of what is stored.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from appliance.builder.convert import join
from appliance.checkpoint import Checkpoint
from appliance.errors import EngineBuildError
from appliance.kernels.deferred_scale import materialize
from appliance.kernels.dense_attention import DenseAttention
from appliance.layers.attention import ForwardContext
from appliance.layers.decoder import Decoder
from appliance.layers.linear import Linear
from appliance.quantization.calibration.block import NORMS, PRODUCTS, BlockWeights, LinearWeights
from appliance.quantization.calibration.statistics import BlockStatistics
from appliance.quantization.unquantized import Scheme as Unquantized
from appliance.runtime.prompt_batch import prompt_context
from appliance.types import ModelConfig, WeightSpec

_TOKENS_AT_ONCE = 4096  # of a pass, padding counted; what lies between the layers of so many is a fraction of a block

EMBEDDING = "embedding.weight"  # engine name of what gives the first block its input
Tensors = dict[str, Tensor]  # by name below the block: "attention.qkv.weight"


def blocks_of(specs: Sequence[WeightSpec], config: ModelConfig) -> list[list[WeightSpec]]:
    """The specs of each decoder block, in order. EngineBuildError for an architecture whose blocks are not made of the
    four products and two norms that calibration knows."""
    blocks: list[list[WeightSpec]] = [[] for _ in range(config.num_hidden_layers)]
    for spec in specs:
        if (index := block_index(spec.name)) is not None:
            blocks[index].append(spec)
    for index, block in enumerate(blocks):
        linear = {below(spec.name) for spec in block if spec.kind == "linear"}
        plain = {below(spec.name) for spec in block if spec.kind == "plain"}
        if linear != set(PRODUCTS.values()) or not set(NORMS.values()) <= plain:
            found = ", ".join(sorted(linear))
            raise EngineBuildError(
                f"{config.architecture} cannot be calibrated: layers.{index} has the products {found}",
                hint="choose a precision without calibration: fp8 or bf16",
            )
    return blocks


def block_index(name: str) -> int | None:
    """3 of "layers.3.mlp.down"; None for what is outside of the blocks."""
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "layers" else None


def below(name: str) -> str:
    """ "mlp.down" of "layers.3.mlp.down"."""
    return name.split(".", 2)[2]


def read_block(checkpoint: Checkpoint, block: Sequence[WeightSpec], dtype: torch.dtype) -> Tensors:
    """All weights of a block as the engine has them unquantized: fused, in `dtype`, in host memory."""
    tensors: Tensors = {}
    cpu = torch.device("cpu")
    for spec in block:
        name = below(spec.name)
        tensors[name if spec.kind == "plain" else f"{name}.weight"] = join(checkpoint, spec.sources, cpu, dtype)
        if spec.bias_sources:
            tensors[f"{name}.bias"] = join(checkpoint, spec.bias_sources, cpu, dtype)
        for source in (*spec.sources, *spec.bias_sources):
            checkpoint.release(source)
    return tensors


def block_weights(name: str, tensors: Tensors, config: ModelConfig) -> BlockWeights:
    """The same as the algorithms take it."""

    def linear(key: str) -> LinearWeights:
        return LinearWeights(tensors[f"{PRODUCTS[key]}.weight"], tensors.get(f"{PRODUCTS[key]}.bias"))

    return BlockWeights(
        name=name,
        input_norm=tensors[NORMS["input_norm"]],
        qkv=linear("qkv"),
        o=linear("o"),
        post_attention_norm=tensors[NORMS["post_attention_norm"]],
        gate_up=linear("gate_up"),
        down=linear("down"),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
    )


class BlockRunner:
    """Runs single blocks of a model over prompts of the given lengths (the longest first) on `device`."""

    def __init__(
        self,
        architecture: ModuleType,
        config: ModelConfig,
        lengths: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`dtype`: of the engine, in which the layers compute; see `compute_dtype` for CPUs."""
        self.config = config
        self.device = device
        self.dtype = compute_dtype(dtype, device)
        scheme = Unquantized()
        with torch.device("meta"):
            self._model: Decoder = architecture.Model(config, scheme, self.dtype)
        self._model.rotary.build(max(lengths), device)
        self._shared = {id(self._model.rotary): self._model.rotary, id(scheme): scheme}
        self._batches = _batches(lengths)

    def block(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Block `index` with these weights, moved to where and to what this computes in."""
        block = copy.deepcopy(self._model.layers[index], dict(self._shared))  # on the meta device: nothing is copied
        for name, tensor in tensors.items():
            owner, _, attribute = name.rpartition(".")
            value = nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False)
            block.get_submodule(owner).register_parameter(attribute, value)
        for module in block.modules():
            if isinstance(module, Linear):
                module.prepare()
        return block

    def observe(self, block: nn.Module, hidden: Tensor, statistics: BlockStatistics) -> None:
        """Run a block over hidden [tokens, hidden] for what its products take in; `hidden` stays as it is."""
        hooks = [
            block.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, key=key: statistics.update(key, inputs[0])
            )
            for key, name in PRODUCTS.items()
        ]
        for _ in self._outputs(block, hidden):
            pass
        for hook in hooks:
            hook.remove()

    def advance(self, block: nn.Module, hidden: Tensor) -> None:
        """Replace hidden [tokens, hidden] by the block's outputs."""
        for rows, output in self._outputs(block, hidden):
            rows.copy_(output)

    def _outputs(self, block: nn.Module, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows of `hidden`, what the block makes of them), batch by batch."""
        at = 0
        for lengths in self._batches:
            rows = hidden[at : at + sum(lengths)]
            at += len(rows)
            x = rows.to(self.device, self.dtype, copy=True)  # the stream of residuals is written over in place
            out, residual = block(x, None, self._context(lengths))
            yield rows, residual.add_(materialize(out, self.dtype))

    def _context(self, lengths: Sequence[int]) -> ForwardContext:
        context = prompt_context(self.config, lengths, self.dtype, self.device)
        context.attention = DenseAttention()
        context.attention.plan(context.metadata)
        return context


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, but for CPUs without instructions for it: float32 there, as the CPU backend computes."""
    if device.type == "cpu" and dtype != torch.float32:
        supported = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return dtype if supported else torch.float32
    return dtype


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Prompts that are computed together; padding makes all of a batch as long as its longest, the first."""
    batches: list[list[int]] = []
    for length in lengths:
        if batches and (len(batches[-1]) + 1) * batches[-1][0] <= _TOKENS_AT_ONCE:
            batches[-1].append(length)
        else:
            batches.append([length])
    return batches
