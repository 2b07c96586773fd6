"""Decode steps of few sequences through the persistent kernel: a loaded decoder's weights as the kernel's tables.

Knows where a `Decoder` keeps its tensors and how kernels/persistent/decode.cu lays out `Layer` and `Model`. Whether a
step is one for this kernel is the runner's decision: pure decode steps of a size in `sizes`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.kernels.fp8_linear import FP8
from appliance.kernels.int4_layout import PER_WORD
from appliance.kernels.persistent.exchange import RANKS, Exchange
from appliance.kernels.persistent.kernel import DecodeKernel, DecodeShape, compile_all, unavailable
from appliance.layers.attention import Attention
from appliance.layers.decoder import Decoder, DecoderLayer
from appliance.layers.linear import Linear, RowParallelLinear
from appliance.runtime.input_batch import InputBatch, StepInputs

SIZES = (1, 2, 4)  # rows that kernels are made for; a batch takes the next larger one


def shape_of(model: Decoder, kv_cache: Tensor, rows: int, ranks: int = 1) -> DecodeShape:
    """What a kernel for steps of `rows` sequences of this model, or of a rank's share of it, is compiled for. `ranks`:
    that add their sums up; 1, of a share: as if there were no others."""
    config, layer = model.config, _layers(model)[0]
    return DecodeShape(
        rows=rows,
        weights=_format(layer.attention.qkv),
        head=_format(model.lm_head),
        kv_fp8=kv_cache.dtype == FP8,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=layer.mlp.down.in_features,
        heads=layer.attention.num_heads,
        kv_heads=layer.attention.num_kv_heads,
        head_dim=config.head_dim,
        vocab=model.lm_head.out_features,
        page_size=kv_cache.shape[2],
        eps=config.rms_norm_eps,
        blocks=torch.cuda.get_device_properties(kv_cache.device).multi_processor_count,
        ranks=ranks,
    )


def refusal(model: Decoder, kv_caches: Sequence[Tensor]) -> str | None:
    """Why steps of this model, or of a rank's share of it, cannot go through the kernel, or None. As far as this rank
    sees; calls none of the others."""
    reason = unavailable()
    if reason is not None:
        return reason
    if model.stage.size > 1:
        return "this is a stage of a pipeline; the kernel takes whole models"
    if type(model).forward is not Decoder.forward or not all(type(layer) is DecoderLayer for layer in model.layers):
        return "the architecture has layers of its own"
    if model.tp.size > 1 and model.tp.size not in RANKS:
        return f"{model.tp.size} ranks; the kernel takes 2, 4 and 8"
    if model.tp.size > 1 and model.tp.own_reducer is None:
        return "the ranks' GPUs cannot write into each other's memory"
    if model.dtype != torch.bfloat16:
        return f"the model computes in {str(model.dtype).removeprefix('torch.')}, the kernel in bfloat16"
    formats = {_format(linear) for linear in _linears(model) if linear is not model.lm_head}
    if formats not in ({"fp8"}, {"bf16"}, {"int4"}):
        return "weights of layers are neither all FP8 with a scale per row, nor INT4 in groups of 128, nor bfloat16"
    if _format(model.lm_head) not in ("fp8", "bf16"):
        return "weights of the head are neither FP8 with a scale per row nor bfloat16"
    if kv_caches[0].dtype not in (torch.bfloat16, FP8):
        return f"the KV cache is {kv_caches[0].dtype}"
    return shape_of(model, kv_caches[0], 1, model.tp.size).refused()


class PersistentDecode:
    """Kernels of each size and their tables. Holds on to the tensors that the tables point to."""

    def __init__(
        self,
        model: Decoder,
        kv_caches: Sequence[Tensor],
        batch: InputBatch,
        sizes: Sequence[int],
        exchange: Exchange | None = None,
    ) -> None:
        """`model` is prepared and `refusal` said None. Compiles what has not been compiled before. `exchange`: of
        several ranks, for these sizes; without it a rank computes its share alone, which can be timed only."""
        device = kv_caches[0].device
        self._exchange = exchange
        self._rank = model.tp.rank
        ranks = 1 if exchange is None else exchange.ranks
        shapes = {rows: shape_of(model, kv_caches[0], rows, ranks) for rows in sizes}
        shapes = {rows: shape for rows, shape in shapes.items() if shape.refused() is None}
        compile_all(shapes.values())
        self._kernels = {rows: DecodeKernel(shape) for rows, shape in shapes.items()}
        self._held: list[Tensor] = list(kv_caches)
        layers = (self._layer(layer, cache) for layer, cache in zip(model.layers, kv_caches, strict=True))
        self._layers = _table(b"".join(layers), device)
        self._models: dict[int, Tensor] = {}
        self._logits: dict[int, Tensor] = {}
        for rows in self._kernels:
            self._models[rows] = self._model_table(model, shapes[rows], batch, device)
            self._logits[rows] = torch.empty(rows, shapes[rows].vocab, dtype=torch.float32, device=device)

    @property
    def sizes(self) -> list[int]:
        """Numbers of sequences, ascending, that steps are padded to."""
        return sorted(self._kernels)

    def serves(self, padded_seqs: int | None) -> bool:
        return padded_seqs in self._kernels

    def keep_below(self, size: int) -> None:
        """Give up kernels for `size` rows and more."""
        for rows in [rows for rows in self._kernels if rows >= size]:
            del self._kernels[rows], self._models[rows], self._logits[rows]

    def logits(self, inputs: StepInputs) -> Tensor:
        """Run a pure decode step whose padded size is one of `sizes`: float32 [size, vocab], overwritten by the next
        step of this size. Writes the KV caches. Device work only; can be captured in a CUDA graph. Of several ranks all
        run it, and each gets its own columns, as with `Decoder.raw_logits`."""
        rows = inputs.padded_seqs
        meta = inputs.metadata
        self._kernels[rows].launch(
            self._layers,
            self._models[rows],
            inputs.token_slots,
            inputs.positions,
            meta.slot_mapping,
            meta.seq_lens,
            self._logits[rows],
        )
        return self._logits[rows]

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        assert tensor.is_contiguous()
        self._held.append(tensor)
        return tensor.data_ptr()

    def _layer(self, layer: torch.nn.Module, cache: Tensor) -> bytes:
        assert isinstance(layer, DecoderLayer)
        attention: Attention = layer.attention
        linears = [attention.qkv, attention.o, layer.mlp.gate_up, layer.mlp.down]
        norms = [layer.input_norm, layer.post_attention_norm, attention.q_norm, attention.k_norm]
        addresses = [self._address(linear.prepared["weight"]) for linear in linears]
        addresses += [self._address(self._scales(linear, halves=linear is layer.mlp.gate_up)) for linear in linears]
        # Every rank holds the whole bias of what is added up over ranks; it must count once.
        addresses += [
            self._address(linear.bias if self._rank == 0 or not isinstance(linear, RowParallelLinear) else None)
            for linear in linears
        ]
        addresses += [self._address(None if norm is None else norm.weight) for norm in norms]
        addresses += [self._address(cache), attention.window or 0]
        return struct.pack("<18q2d", *addresses, attention.kv_scales.k, attention.kv_scales.v)

    @staticmethod
    def _scales(linear: Linear, *, halves: bool) -> Tensor | None:
        if "scale_zero" in linear.prepared:
            return scale_tiles(linear.prepared["scale_zero"], halves=halves)
        return linear.prepared.get("weight_scale")

    def _model_table(self, model: Decoder, shape: DecodeShape, batch: InputBatch, device: torch.device) -> Tensor:
        def scratch(*size: int, dtype: torch.dtype) -> int:
            return self._address(torch.zeros(size, dtype=dtype, device=device))

        head = model.lm_head.prepared
        rows, width = shape.rows, shape.heads * shape.head_dim
        addresses = [
            self._address(model.embedding.weight),
            self._address(model.norm.weight),
            self._address(head["weight"]),
            self._address(head.get("weight_scale")),
            self._address(model.rotary.cos_sin),
            scratch(rows, shape.hidden, dtype=torch.bfloat16),
            scratch(rows, shape.qkv_rows, dtype=torch.bfloat16),
            scratch(rows, width, dtype=torch.bfloat16),
            scratch(rows, shape.ffn, dtype=torch.bfloat16),
            scratch(shape.blocks, 4, shape.head_dim, dtype=torch.float32),
            scratch(shape.blocks, 4, 2, dtype=torch.float32),
            scratch(32, dtype=torch.int32),
            scratch(32, dtype=torch.int32),
            scratch(rows * shape.attention_items, dtype=torch.int32),
            scratch(shape.layers * 2 * rows, dtype=torch.float32),
            self._address(batch.token_table),
            batch.token_table.stride(0),
            self._address(batch.page_table),
            batch.page_table.stride(0),
        ]
        if self._exchange is None:
            addresses += [0] * (3 + shape.ranks)
        else:
            addresses += self._exchange.table(rows)
            self._held += self._exchange.held
        return _table(struct.pack(f"<{len(addresses)}q", *addresses), device)


def _table(data: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.int64).to(device)


def scale_tiles(scale_zero: Tensor, *, halves: bool) -> Tensor:
    """Scales and zero points of an INT4 weight, float16 [out, groups, 2], in the order in which the ring passes
    them: [tiles, groups, 8, 2, 2], the last three being the row within half a tile, the half of the tile, and scale or
    zero point. A tile is 16 rows, or with `halves` (gate and up) 8 of the first half of the weight and the 8 that
    belong to them of the second. A copy, padded with zeros: 6% of the weight."""
    out, groups, _ = scale_zero.shape
    tiles, parts = -(-out // 16), 2 if halves else 1
    rows = scale_zero.reshape(parts, out // parts, groups, 2)
    rows = F.pad(rows, (0, 0, 0, 0, 0, tiles * 16 // parts - out // parts))
    rows = rows.view(2, tiles, 8, groups, 2).transpose(0, 1) if halves else rows.view(tiles, 2, 8, groups, 2)
    return rows.permute(0, 3, 2, 1, 4).contiguous()


def _layers(model: Decoder) -> list[DecoderLayer]:
    return [layer for layer in model.layers if isinstance(layer, DecoderLayer)]


def _linears(model: Decoder) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def _format(linear: Linear) -> str:
    tensors = linear.prepared
    dtype = tensors["weight"].dtype if "weight" in tensors else None
    if dtype == FP8 and set(tensors) == {"weight", "weight_scale"}:
        return "fp8"
    if dtype == torch.bfloat16 and set(tensors) == {"weight"}:
        return "bf16"
    if dtype == torch.int32 and set(tensors) == {"weight", "scale_zero"}:
        groups, inner = tensors["scale_zero"].shape[1], tensors["weight"].shape[1] * PER_WORD
        return "int4" if inner == groups * 128 else "other"
    return "other"
