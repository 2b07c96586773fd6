"""What a decode step calls: the plan once a step, one launch a layer for rotary embedding, cache write and attention.

Which number of warps serves how many rows, and whether this kernel serves them at all, is in `TABLE` as ways to compute
products are (`tuning.py` times them). Knows steps' metadata; knows nothing of models or of what else could attend.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from appliance.kernels.attention import AttentionMetadata, HeadNorms, KvScales
from appliance.kernels.decode_attention.kernel import (
    Buffers,
    DecodeAttentionKernel,
    DecodeAttentionShape,
    DecodeInputs,
)
from appliance.kernels.decode_attention.plan import FIELDS, Cutting, make_plan
from appliance.kernels.deferred_scale import DeferredScale, Product
from appliance.kernels.native_kernel import unavailable
from appliance.kernels.tactics import TABLE

log = logging.getLogger(__name__)

WARPS = (4, 8, 16)  # of a block; more for few sequences, whose tokens they all take at once
TIMED_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512)  # steps of more rows do as the last
OTHER = "library"  # what `TABLE` calls doing without this kernel


class Form(NamedTuple):
    """Of the fused product."""

    int32: bool  # whole numbers
    deferred: bool  # scales are still to be applied
    normed: bool  # heads of q and k have a norm that is still to come


PLAIN = Form(int32=False, deferred=False, normed=False)


def name_of(warps: int) -> str:
    """What `TABLE` calls a way."""
    return f"own warps{warps}"


def table_key(shape: DecodeAttentionShape) -> tuple[str, int, int]:
    """What `TABLE` calls attention of this shape: in place of a scheme, output and input features."""
    dtype, kv_dtype = (str(d).removeprefix("torch.") for d in (shape.dtype, shape.kv_dtype))
    return f"decode_attention {dtype} {kv_dtype}", shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim


class DecodeAttention:
    """One instance serves all layers of a rank. Addresses of its buffers stay, so that launches can be captured; a
    graph of so many rows is replayed after a `plan` with as many. Device memory: heads * head_dim * 4 bytes for each of
    the rows and of the blocks that run at once."""

    def __init__(
        self,
        shape: DecodeAttentionShape,
        *,
        windows: Iterable[int | None],
        max_rows: int,
        device: torch.device,
    ) -> None:
        """`shape`: its warps and its product's form are chosen later. Compiles nothing."""
        self._shape, self._device = shape, device
        self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        able = [w for w in WARPS if self._of(w).refused(torch.cuda.get_device_capability(device)) is None]
        self.warps = tuple(able)
        items = max(self._cutting(w).capacity(max_rows) for w in self.warps)

        def room(size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        partial = room(items * shape.heads * shape.head_dim, torch.float32)
        statistics = room(items * shape.heads * 2, torch.float32)
        arrived = room(max_rows * shape.kv_heads, torch.int32)
        self._buffers = {
            window: Buffers(room(items * FIELDS, torch.int32).view(items, FIELDS), partial, statistics, arrived)
            for window in dict.fromkeys(windows)
        }
        self._kernels: dict[DecodeAttentionShape, DecodeAttentionKernel] = {}
        self._planned: tuple[int, int] | None = None  # warps, rows
        self.forced: int | None = None  # warps to plan with whatever `TABLE` says, while ways are being timed

    def _of(self, warps: int, form: Form = PLAIN) -> DecodeAttentionShape:
        return replace(self._shape, warps=warps, int32=form.int32, deferred=form.deferred, normed=form.normed)

    def _cutting(self, warps: int) -> Cutting:
        blocks = self._multiprocessors * self._of(warps).blocks_per_sm
        return Cutting(blocks, self._shape.kv_heads, smallest=32 * warps)

    @property
    def shape(self) -> DecodeAttentionShape:
        """Warps and form aside."""
        return self._shape

    def way(self, rows: int) -> int | None:
        """Warps that serve steps of so many rows; None: they are not served."""
        if self.forced is not None:
            return self.forced
        name = TABLE.chosen(*table_key(self._shape), min(rows, TIMED_ROWS[-1]))
        return next((warps for warps in self.warps if name == name_of(warps)), None)

    def plan(self, metadata: AttentionMetadata) -> None:
        """Of a step with one token a sequence, for a number of rows that is served. Enqueues a small copy a window."""
        rows = metadata.num_seqs
        warps = self.way(rows)
        assert warps is not None, f"decode steps of {rows} rows are not served"
        self._planned = (warps, rows)
        cutting = self._cutting(warps)
        for window, buffers in self._buffers.items():
            plan = torch.from_numpy(make_plan(metadata.seq_lens_host, rows, window, cutting))
            # Torch's pinned allocator keeps the block until the copy has run.
            buffers.plan[: len(plan)].copy_(plan.pin_memory(), non_blocking=True)

    def attend(
        self,
        qkv: Product,
        cos_sin: Tensor,
        kv_cache: Tensor,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None,
        kv_scales: KvScales,
        norms: HeadNorms | None = None,
    ) -> Tensor:
        """`FusedDecode.attend` of the step that was planned: each sequence's new token is the last of its planned
        length. Zeros for rows of padding."""
        assert self._planned is not None and self._planned[1] == qkv.shape[0]
        warps, rows = self._planned
        deferred = isinstance(qkv, DeferredScale)
        values = qkv.values if isinstance(qkv, DeferredScale) else qkv
        form = Form(values.dtype == torch.int32, deferred, norms is not None)
        assert values.stride(1) == 1 and kv_cache.is_contiguous() and (form.int32 or values.dtype == self._shape.dtype)
        if isinstance(qkv, DeferredScale) and qkv.bias is not None:
            assert qkv.bias.dtype == self._shape.dtype
        assert norms is None or norms.q_weight.dtype == norms.k_weight.dtype == self._shape.dtype
        out = torch.empty(
            (rows, self._shape.heads, self._shape.head_dim), dtype=self._shape.dtype, device=values.device
        )
        slots = metadata.slot_mapping
        inputs = DecodeInputs(qkv, cos_sin, kv_cache, metadata.page_table, slots, out, scale, kv_scales, norms)
        items = self._cutting(warps).capacity(rows)
        self.kernel(warps, form).launch(inputs, self._buffers[window], items)
        return out

    def kernel(self, warps: int, form: Form = PLAIN) -> DecodeAttentionKernel:
        """Compiled where nobody has it."""
        shape = self._of(warps, form)
        if shape not in self._kernels:
            self._kernels[shape] = DecodeAttentionKernel(shape, self._device)
        return self._kernels[shape]


def attention_shape(
    heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype, kv_dtype: torch.dtype
) -> DecodeAttentionShape:
    """Of a rank, warps and form aside."""
    return DecodeAttentionShape(heads, kv_heads, head_dim, page_size, dtype, kv_dtype, WARPS[0])


def decode_attention_for(
    shape: DecodeAttentionShape, *, windows: Iterable[int | None], max_rows: int, device: torch.device
) -> DecodeAttention | None:
    """An instance, or None, with a line in the log that says why."""
    reason = unavailable() or shape.refused(torch.cuda.get_device_capability(device))
    if reason is not None:
        log.info("decode attention: no own kernel: %s", reason)
        return None
    return DecodeAttention(shape, windows=windows, max_rows=max_rows, device=device)
