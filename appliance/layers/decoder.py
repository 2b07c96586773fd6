"""The decoder that Llama and its relatives share: pre-norm layers of attention and gated MLP over a residual stream.

What differs between the relatives is in `ModelConfig` (biases, head norms, windows, rotary scaling) or in the model's
own file (`models/*.py`), which derives from `Decoder`. A pipeline stage is a decoder with some of the layers, which
takes the residual stream from the stage before and gives it to the next. Knows nothing of batches, pages or samplers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from appliance.distributed import PipelineStage, TensorParallel
from appliance.errors import CheckpointError, EngineDamagedError
from appliance.kernels.deferred_scale import Product, materialize
from appliance.layers import halves
from appliance.layers.attention import Attention, ForwardContext
from appliance.layers.embedding import Embedding
from appliance.layers.linear import ColumnParallelLinear, Linear
from appliance.layers.mlp import GatedMLP
from appliance.layers.norm import FinalRMSNorm, ResidualRMSNorm
from appliance.layers.rotary import RotaryEmbedding
from appliance.quantization.scheme import HEAD, PrecisionScheme
from appliance.types import ModelConfig

_PLAIN = {torch.float32, torch.float16, torch.bfloat16}  # converted into each other when loading


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm. Takes and returns (x, residual): the stream is their sum; x may be a
    product whose scales are still to be applied."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        *,
        rotary: RotaryEmbedding,
        scheme: PrecisionScheme,
        dtype: torch.dtype,
        tp: TensorParallel,
    ) -> None:
        super().__init__()
        name, size, eps = f"layers.{index}", config.hidden_size, config.rms_norm_eps
        self.attention = Attention(config, index, f"{name}.attention", rotary=rotary, scheme=scheme, dtype=dtype, tp=tp)
        self.mlp = GatedMLP(config, f"{name}.mlp", scheme=scheme, dtype=dtype, tp=tp)
        self.input_norm = ResidualRMSNorm(size, eps, self.attention.qkv.scheme, dtype)
        self.post_attention_norm = ResidualRMSNorm(size, eps, self.mlp.gate_up.scheme, dtype)

    def forward(self, x: Product, residual: Tensor | None, ctx: ForwardContext) -> tuple[Product, Tensor]:
        normed, residual = self.input_norm(x, residual, self.attention.qkv.prepared)
        x = self.attention(normed, ctx)
        normed, residual = self.post_attention_norm(x, residual, self.mlp.gate_up.prepared)
        return self.mlp(normed), residual


class Decoder(nn.Module):
    """A causal language model. Built under `torch.device("meta")`; then `load`, then `prepare`, then `forward`.

    The names of its parameters are the names of the engine's tensors.
    """

    # What a stage does not have, its model lacks.
    embedding: Embedding  # first stage
    norm: FinalRMSNorm  # last stage
    lm_head: ColumnParallelLinear  # last stage
    layers: nn.ModuleList  # nothing in place of other stages' layers

    def __init__(
        self,
        config: ModelConfig,
        scheme: PrecisionScheme,
        dtype: torch.dtype,
        tp: TensorParallel | None = None,
        stage: PipelineStage | None = None,
    ) -> None:
        """`scheme` tells, by name, how each linear layer is stored; `dtype` is that of activations and of weights that
        it does not store otherwise. CheckpointError for a configuration that these layers cannot express, HardwareError
        if `tp` does not divide the heads."""
        super().__init__()
        if config.hidden_act not in ("silu", "swish"):
            raise CheckpointError(
                f"activation {config.hidden_act!r} is not supported by {config.architecture}: only silu"
            )
        tp, stage = tp or TensorParallel(), stage or PipelineStage()
        self.config = config
        self.dtype = dtype
        self.tp = tp
        self.stage = stage
        self.own_layers = config.layers_of_stage(stage.index, stage.size)
        self.num_kv_heads = tp.share_or_copy(config.num_key_value_heads, "key/value heads")  # of this rank
        self.rotary = RotaryEmbedding(config)
        if stage.is_first:
            self.embedding = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, rotary=self.rotary, scheme=scheme, dtype=dtype, tp=tp)
            if i in self.own_layers
            else nn.Identity()
            for i in range(config.num_hidden_layers)
        )
        if not stage.is_last:
            return
        self.norm = FinalRMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.lm_head = ColumnParallelLinear(
            config.hidden_size,
            tp.padded_share(config.vocab_size),
            bias=False,
            scheme=scheme.of(HEAD),
            dtype=dtype,
            defer=True,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def load(self, tensors: Iterable[tuple[str, Tensor]], device: torch.device | str) -> None:
        """Take all parameters from (name, tensor) pairs as in an engine, in any order, one by one: moved to `device`;
        plain floats converted to the model's dtype. (`runtime/weights.py` does the same from an engine's file, faster.)
        EngineDamagedError for a name, shape or dtype that does not fit, and for parameters left without a tensor."""
        missing = dict(self.named_parameters())
        for name, tensor in tensors:
            wanted = missing.pop(name, None)
            if wanted is None:
                raise EngineDamagedError(
                    f"engine tensor {name!r} is given twice or unknown to {self.config.architecture}"
                )
            if tensor.shape != wanted.shape:
                raise EngineDamagedError(
                    f"engine tensor {name!r} has shape {list(tensor.shape)}, expected {list(wanted.shape)}"
                )
            if tensor.dtype != wanted.dtype and not {tensor.dtype, wanted.dtype} <= _PLAIN:
                raise EngineDamagedError(f"engine tensor {name!r} is {tensor.dtype}, expected {wanted.dtype}")
            module, _, attribute = name.rpartition(".")
            value = tensor.to(device=device, dtype=wanted.dtype)
            self.get_submodule(module).register_parameter(attribute, nn.Parameter(value, requires_grad=False))
        if missing:
            raise EngineDamagedError(f"engine has no tensor for {len(missing)} parameters, the first: {min(missing)}")

    def prepare(self, max_positions: int) -> None:
        """After loading: bring weights into the form that the products want, compute the rotary table for positions
        below `max_positions`. Parameters that a scheme has taken over are no longer listed by the module. Called again,
        it makes the table anew and nothing else."""
        self.rotary.build(max_positions, self.device)
        for module in self.modules():
            if isinstance(module, Linear):
                module.prepare()
        self.eval()

    def forward(self, token_ids: Tensor | None, ctx: ForwardContext, received: Tensor | None = None) -> Tensor:
        """token_ids int64 [n] -> hidden states [n, hidden], final norm applied. Writes the KV caches of `ctx`.

        Of several stages the others than the first take `received` instead, the residual stream [n, hidden] as the one
        before gave it, and the others than the last give that: rounded to the model's dtype, as the next norm would
        round it, so that stages change no number."""
        if self.stage.is_first:
            assert token_ids is not None
            received = self.embedding(token_ids)
        assert received is not None
        x: Product = received
        residual: Tensor | None = None
        if halves.pays(received, self.tp):
            x, residual = halves.forward(self._layers(), received, ctx)
        else:
            for layer in self._layers():
                self.stage.progress()
                x, residual = layer(x, residual, ctx)
        if self.stage.is_last:
            hidden: Tensor = self.norm(x, residual)
            return hidden
        x = materialize(x, self.dtype)
        return x if residual is None else x + residual

    def _layers(self) -> list[DecoderLayer]:
        """Of this stage."""
        return [cast(DecoderLayer, self.layers[index]) for index in self.own_layers]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [m, hidden] -> float32 [m, vocab], whole on every rank."""
        logits = materialize(self.raw_logits(hidden), torch.float32)
        return self.tp.all_gather(logits)[:, : self.config.vocab_size]

    def raw_logits(self, hidden: Tensor) -> Product:
        """This rank's columns of the logits, [m, vocab / size], the vocabulary padded at its end, as the product gives
        them: in the model's dtype, or with scales still to be applied. For those who may need neither the others' nor
        float32 (`runtime/sampler.py`, `runtime/sharded_sampler.py`)."""
        logits: Product = self.lm_head(hidden)
        return logits
