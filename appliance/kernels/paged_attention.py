"""Paged attention in Triton: the implementation for GPUs and dtypes that FlashInfer does not serve.

Knows the metadata and cache layout of `kernels/attention.py` (whose `ReferenceAttention` is its plain torch
reference); knows nothing of requests or of the model. Query heads that share a K/V head are computed together.

Decode rows: split-KV flash decoding (Dao et al., "Flash-Decoding for long-context inference", 2023). The launch grid
depends on tensor shapes only and lengths are read on the device, so the step can be captured in a CUDA graph.
Longer rows: flash attention (Dao, "FlashAttention-2", 2023) over tiles of query tokens, listed on the host.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from appliance.kernels._triton import triton
from appliance.kernels.attention import UNIT_SCALES, AttentionMetadata, KvScales
from appliance.kernels.paged_attention_kernels import decode_kernel, merge_kernel, prefill_kernel

_LOG2_E = 1.4426950408889634
_MAX_SPLITS = 64


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the launches have in common, from the tensors of a call."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    # 16-bit on tensor cores: their tiles; else smaller ones, whose float32 products are IEEE's.
    narrow: bool
    bytes_cached: bool  # the cache is FP8

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def dim_block(self) -> int:
        return max(16, int(triton.next_power_of_2(self.head_dim)))

    @property
    def precision(self) -> str:
        return "tf32" if self.narrow else "ieee"  # has no effect on 16-bit products

    @property
    def block_n(self) -> int:
        # Fits 99 KiB of shared memory (compute capability 8.6, 8.9, 12.0) at every head size up to 256.
        size = 64 if self.narrow else 32
        return size if self.dim_block <= 128 else size // 2

    @property
    def decode_block_n(self) -> int:
        # Of an FP8 cache twice as many tokens, so that as many bytes are on their way as with 16 bits.
        return 2 * self.block_n if self.bytes_cached and self.narrow else self.block_n


def _shape(q: Tensor, kv_cache: Tensor) -> _Shape:
    _, _, page_size, num_kv_heads, head_dim = kv_cache.shape
    if q.stride(-1) != 1 or kv_cache.stride(-1) != 1:
        raise ValueError("q and kv_cache must be contiguous in their last dimension")
    if q.shape[1] % num_kv_heads or q.shape[2] != head_dim:
        raise ValueError(f"q {tuple(q.shape)} does not fit a cache of {num_kv_heads} heads of size {head_dim}")
    narrow = q.element_size() == 2 and _has_tensor_cores(q.get_device())
    return _Shape(q.shape[1], num_kv_heads, head_dim, page_size, narrow, kv_cache.element_size() == 1)


@functools.cache
def _has_tensor_cores(index: int) -> bool:
    """Whether Triton uses those of a GPU (-1: none is there, and kernels are interpreted). Before compute capability
    8.0 it does not: large tiles would spill registers, and need more than the 64 KiB of shared memory of 7.5."""
    return index < 0 or torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)


class TritonAttention:
    """`Attention` in Triton, any head size up to 256, any page size, bf16, fp16 and fp32; with FP8 caches too, from
    compute capability 8.9 on.

    `plan` keeps the host description of the step; `attend` of a pure decode step needs no plan, so a captured step is
    replayed with nothing but new contents of the metadata's device tensors.
    """

    name = "triton"

    def __init__(self, num_sms: int | None = None, *, batch_invariant: bool = False) -> None:
        """num_sms: multiprocessors to spread decode rows over; None: of the current device (4 without a GPU).
        `batch_invariant`: a token's result has the same bits whatever else is in the step, and whether it is decoded or
        part of a prompt: one kernel for both, with one tile, whose programs go through the whole context."""
        if num_sms is None:
            gpu = torch.cuda.is_available()
            num_sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count if gpu else 4
        self._num_sms = num_sms
        self._batch_invariant = batch_invariant
        self._decode_tiles: dict[int, Tensor] = {}  # number of sequences -> a tile for the one new token of each
        self._num_decodes = 0
        self._tiles: dict[int, Tensor] = {}  # query tokens a tile -> int32 [2, tiles] on the device

    def plan(self, metadata: AttentionMetadata) -> None:
        """Finds the leading rows of one token; they are decoded, the rest is tiled when first attended."""
        self._tiles = {}
        if self._batch_invariant:
            self._num_decodes = 0
            if metadata.max_query_len == 1 and metadata.num_seqs not in self._decode_tiles:  # not in a capture
                tiles = torch.zeros(2, metadata.num_seqs, dtype=torch.int32, device=metadata.seq_lens.device)
                tiles[0] = torch.arange(metadata.num_seqs, device=tiles.device)
                self._decode_tiles[metadata.num_seqs] = tiles
            return
        longer = np.flatnonzero(np.diff(metadata.query_start_host) != 1)
        self._num_decodes = int(longer[0]) if len(longer) else len(metadata.seq_lens_host)

    def attend(
        self,
        q: Tensor,
        kv_cache: Tensor,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None,
        kv_scales: KvScales = UNIT_SCALES,
    ) -> Tensor:
        """See `Attention.attend`. Raises ValueError for tensors that do not fit together."""
        shape = _shape(q, kv_cache)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if metadata.max_query_len == 1 and self._batch_invariant:
            tiles = self._decode_tiles[metadata.num_seqs]
            self._prefill(q, kv_cache, out, metadata, shape, scale, window, kv_scales, tiles)
            return out
        if metadata.max_query_len == 1:
            self._decode(q, kv_cache, out, metadata, metadata.num_seqs, shape, scale, window, kv_scales)
            return out
        if self._num_decodes:
            self._decode(q, kv_cache, out, metadata, self._num_decodes, shape, scale, window, kv_scales)
        if self._num_decodes < len(metadata.seq_lens_host):
            tiles = self._tile_list(metadata, self._block_m(metadata, shape) // shape.group, q.device)
            self._prefill(q, kv_cache, out, metadata, shape, scale, window, kv_scales, tiles)
        out[int(metadata.query_start_host[-1]) :].zero_()
        return out

    def num_splits(self, rows: int, shape: _Shape, table_width: int) -> int:
        """Splits a decode launch provides for: about four programs a multiprocessor, none shorter than two blocks."""
        wanted = triton.cdiv(4 * self._num_sms, rows * shape.num_kv_heads)
        longest = triton.cdiv(table_width * shape.page_size, 2 * shape.decode_block_n)
        return int(min(triton.next_power_of_2(min(wanted, longest)), _MAX_SPLITS))

    def _decode(
        self,
        q: Tensor,
        kv_cache: Tensor,
        out: Tensor,
        metadata: AttentionMetadata,
        rows: int,
        shape: _Shape,
        scale: float,
        window: int | None,
        kv_scales: KvScales,
    ) -> None:
        """Rows [0, rows): q row i is the last token of sequence i."""
        if rows == 0:
            return
        table = metadata.page_table
        splits = self.num_splits(rows, shape, table.shape[1])
        partial = stats = out  # not read or written with one split
        if splits > 1:
            partial = torch.empty(rows, shape.num_heads, splits, shape.head_dim, dtype=torch.float32, device=q.device)
            stats = torch.empty(rows, shape.num_heads, splits, 2, dtype=torch.float32, device=q.device)
        windowed = window is not None
        block_n = shape.decode_block_n
        common = {"head_dim": shape.head_dim, "DIM": shape.dim_block, "BLOCK_N": block_n, "SPLITS": splits}
        decode_kernel[(rows, shape.num_kv_heads, splits)](
            q, kv_cache, out, partial, stats, metadata.seq_lens, table, window or 0, scale * kv_scales.k * _LOG2_E,
            kv_scales.v, table.stride(0), q.stride(0), q.stride(1), out.stride(0), out.stride(1),
            *kv_cache.stride()[:4],
            num_heads=shape.num_heads, group=shape.group, page_size=shape.page_size,
            BLOCK_H=max(16, triton.next_power_of_2(shape.group)), WINDOWED=windowed, PRECISION=shape.precision,
            **common, num_warps=4, num_stages=5 if shape.narrow else 2,  # page ids, then two K/V blocks in flight
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(rows, shape.num_heads)](
                partial, stats, out, metadata.seq_lens, window or 0, kv_scales.v, out.stride(0), out.stride(1),
                num_heads=shape.num_heads, WINDOWED=windowed, **common, num_warps=4,
            )  # fmt: skip

    def _prefill(
        self,
        q: Tensor,
        kv_cache: Tensor,
        out: Tensor,
        metadata: AttentionMetadata,
        shape: _Shape,
        scale: float,
        window: int | None,
        kv_scales: KvScales,
        tiles: Tensor,
    ) -> None:
        """The query tokens of `tiles`, int32 [2, tiles]; see `_tile_list`."""
        block_m = self._block_m(metadata, shape)
        table = metadata.page_table
        prefill_kernel[(tiles.shape[1] * shape.num_kv_heads,)](
            q, kv_cache, out, tiles, metadata.query_start, metadata.seq_lens, table, window or 0,
            scale * kv_scales.k * _LOG2_E, kv_scales.v, tiles.shape[1], table.stride(0), q.stride(0), q.stride(1),
            out.stride(0), out.stride(1), *kv_cache.stride()[:4],
            num_kv_heads=shape.num_kv_heads, group=shape.group, page_size=shape.page_size, head_dim=shape.head_dim,
            DIM=shape.dim_block, BLOCK_M=block_m, BLOCK_N=shape.block_n,
            WINDOWED=window is not None, INVARIANT=self._batch_invariant, PRECISION=shape.precision,
            num_warps=8 if block_m == 128 else 4, num_stages=3 if shape.narrow else 2,
        )  # fmt: skip

    def _block_m(self, metadata: AttentionMetadata, shape: _Shape) -> int:
        """Query rows of a tile, heads of a group counted apart."""
        largest = 128 if shape.narrow and shape.dim_block <= 128 else 32
        if self._batch_invariant:
            rows = min(64, largest)  # a choice by length could depend on how a prompt is cut into chunks
        else:
            rows = min(triton.next_power_of_2(metadata.max_query_len * shape.group), largest)
        return int(max(16, triton.next_power_of_2(shape.group), rows))

    def _tile_list(self, metadata: AttentionMetadata, tokens: int, device: torch.device) -> Tensor:
        """int32 [2, tiles]: sequence and first new token of each tile of `tokens` query tokens, longest K/V first (so
        that the last programs to start are short). Made once a step, at the first layer."""
        if tokens not in self._tiles:
            skip = self._num_decodes
            query_lens = np.diff(metadata.query_start_host)[skip:]
            counts = -(-query_lens // tokens)
            local = np.repeat(np.arange(len(query_lens)), counts)
            first = (np.arange(len(local)) - np.repeat(np.cumsum(counts) - counts, counts)) * tokens
            cached = metadata.seq_lens_host[skip:] - query_lens
            order = np.argsort(-(cached[local] + first), kind="stable")
            tiles = torch.from_numpy(np.stack((local[order] + skip, first[order])).astype(np.int32))
            self._tiles[tokens] = (tiles.pin_memory() if device.type == "cuda" else tiles).to(device, non_blocking=True)
        return self._tiles[tokens]
