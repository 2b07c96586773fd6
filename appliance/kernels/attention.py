"""What every paged-attention implementation shares: a step's metadata, the interface, and the plain torch reference.

KV cache of one layer: [num_pages, 2, page_size, num_kv_heads, head_dim]; index 1 is K (0) or V (1). The same layout
serves FlashInfer ("NHD"), the Triton kernels and the reference.

What is stored: in a cache of 16 or 32-bit floats the numbers themselves. In an FP8 cache (torch.float8_e4m3fn, one
byte, largest number 448: kernels/fp8_linear.py) a layer's K is byte * scales.k and its V is byte * scales.v, with one
`KvScales` per layer, fixed when the engine is loaded.

Written: e4m3(clamp(x * float32(1 / scale), -448, 448)) of the float32 x (rotated K is not rounded to 16 bits before),
to the nearest, ties to even; NaN stays NaN. Read: scores are (q . K bytes) * (softmax scale * scales.k), the output is
(probabilities . V bytes) * scales.v. Both factors are applied to float32 sums; any other dtype holds the bytes exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from appliance.kernels.deferred_scale import Product
from appliance.kernels.fp8_linear import FP8, FP8_MAX

FP8_CACHE_CAPABILITY = (8, 9)  # the oldest GPUs with instructions that convert e4m3


@dataclass(frozen=True, slots=True)
class KvScales:
    """What the bytes of one layer's FP8 cache are multiplied with to give K and V. Above 0; 1 where the cache is not
    FP8. Powers of two lose nothing: products with them are exact."""

    k: float = 1.0
    v: float = 1.0


UNIT_SCALES = KvScales()


def store_kv(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """x (float) as a cache of `dtype` keeps it: scaled, saturated and rounded for FP8, else only rounded."""
    if dtype != FP8:
        return x.to(dtype)
    return (x.float() * (1.0 / scale)).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


@dataclass(slots=True)
class AttentionMetadata:
    """One step's sequences. Device tensors may be longer than the step (CUDA-graph padding): padding sequences have
    seq_len 0 and padding tokens have slot_mapping -1; their outputs are undefined but finite."""

    num_seqs: int  # rows of seq_lens and page_table, padding included
    num_tokens: int  # rows of q, padding included
    max_query_len: int  # longest run of new tokens of a sequence; 1: a pure decode step
    max_seq_len: int  # longest sequence, new tokens included
    query_start: Tensor  # int32 [num_seqs + 1], on the device: sequence i has q rows [query_start[i], query_start[i+1])
    seq_lens: Tensor  # int32 [num_seqs], on the device: tokens in the cache after this step's K/V are written
    page_table: Tensor  # int32 [num_seqs, max_pages], on the device; entries past a sequence's pages are undefined
    slot_mapping: Tensor  # int64 [num_tokens], on the device: page * page_size + offset of each new token, -1: none
    # Host copies for implementations that plan on the CPU (FlashInfer); not padded.
    query_start_host: np.ndarray  # int32 [n + 1]
    seq_lens_host: np.ndarray  # int32 [n]
    page_table_host: np.ndarray  # int32 [n, max_pages]


class Attention(Protocol):
    """A paged-attention implementation. `plan` is called once a step before the forward pass, outside any CUDA graph;
    `attend` once a layer, inside the graph where there is one. Neither synchronizes with the device."""

    name: str

    def plan(self, metadata: AttentionMetadata) -> None: ...

    def attend(
        self,
        q: Tensor,
        kv_cache: Tensor,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None,
        kv_scales: KvScales = UNIT_SCALES,
    ) -> Tensor:
        """q [num_tokens, num_heads, head_dim] over each sequence's pages, causal; this step's K/V are written already.

        `scale`: of the softmax. `window`: a token at position p sees positions (p - window, p]. `kv_scales`: with which
        the cache was written. Returns [num_tokens, num_heads, head_dim], q's dtype; accumulates in float32.
        """
        ...


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Of the RMS norm over each head of q and of k: weights [head_dim]."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float


class FusedDecode(Protocol):
    """What does all of a decode step's attention in one launch a layer."""

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
        """`qk_rms_norm_` (norm.py) with `norms`, if there are any, and `rope_and_write` (rope_cache.py) of the fused
        product [num_tokens, (heads + 2 * kv_heads) * head_dim] of one token a sequence, which may be written over, then
        `Attention.attend`."""
        ...


def fused_decode(attention: Attention) -> FusedDecode | None:
    """What serves the step for which `plan` was called last, if that is a decode step and `attention` has such a thing:
    its property `fused`. Else, and where a step is not run with it all the same, `attend` serves."""
    found: FusedDecode | None = getattr(attention, "fused", None)
    return found


def gather_pages(kv_cache: Tensor, pages: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """K and V as stored, each [length, num_kv_heads, head_dim], of a sequence whose page table row is `pages`."""
    page_size = kv_cache.shape[2]
    used = kv_cache[pages[: (length + page_size - 1) // page_size].long()]  # [pages, 2, page_size, heads, dim]
    flat = used.transpose(0, 1).reshape(2, -1, *kv_cache.shape[3:])
    return flat[0, :length], flat[1, :length]


class ReferenceAttention:
    """Paged attention in plain torch, one sequence at a time, float32 inside. Runs on any device."""

    name = "reference"

    def plan(self, metadata: AttentionMetadata) -> None:
        pass

    def attend(
        self,
        q: Tensor,
        kv_cache: Tensor,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None,
        kv_scales: KvScales = UNIT_SCALES,
    ) -> Tensor:
        out = torch.zeros_like(q)
        for i in range(len(metadata.seq_lens_host)):
            begin, end = int(metadata.query_start_host[i]), int(metadata.query_start_host[i + 1])
            length = int(metadata.seq_lens_host[i])
            keys, values = gather_pages(kv_cache, metadata.page_table[i], length)
            attended = _causal(q[begin:end], keys, values, scale * kv_scales.k, window)
            out[begin:end] = (attended * kv_scales.v).to(q.dtype)
        return out


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """q [n, heads, dim] are the last n positions of k, v [length, kv_heads, dim]. Returns float32."""
    n, length = q.shape[0], k.shape[0]
    groups = q.shape[1] // k.shape[1]
    qf = q.float().transpose(0, 1).unflatten(0, (k.shape[1], groups))  # [kv_heads, groups, n, dim]
    kf = k.float().permute(1, 2, 0).unsqueeze(1)  # [kv_heads, 1, dim, length]
    scores = qf @ kf * scale
    query_pos = torch.arange(length - n, length, device=q.device)[:, None]
    key_pos = torch.arange(length, device=q.device)[None, :]
    hidden = key_pos > query_pos
    if window is not None:
        hidden |= key_pos <= query_pos - window
    scores.masked_fill_(hidden, float("-inf"))
    out = scores.softmax(-1) @ v.float().transpose(0, 1).unsqueeze(1)  # [kv_heads, groups, n, dim]
    return out.flatten(0, 1).transpose(0, 1)
