"""Causal attention over packed conversations: the fast path on CUDA, and the plain reference that also runs on CPU.

Both take query [n, heads, head_dim] and key, value [n, kv_heads, head_dim] of all conversations back to back.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.builtin.network import AttentionFn, Packed


def pack(lengths: Sequence[int], device: torch.device) -> Packed:
    """Borders and positions of conversations of these lengths."""
    sizes = torch.tensor(lengths, dtype=torch.int64)
    ends = sizes.cumsum(0)
    positions = torch.arange(int(ends[-1])) - torch.repeat_interleave(ends - sizes, sizes)
    cu_seqlens = F.pad(ends, (1, 0)).to(torch.int32)
    return Packed(
        positions.to(device, non_blocking=True), cu_seqlens.to(device, non_blocking=True), tuple(lengths), max(lengths)
    )


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each key/value head for its group of query heads: [n, kv_heads, d] -> [n, heads, d]."""
    return x.repeat_interleave(heads // x.shape[-2], dim=-2)


def padded_attention(query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
    """The reference: conversations of similar length are padded to one shape and attended to together."""
    heads = query.shape[1]
    key, value = expand_heads(key, heads), expand_heads(value, heads)
    starts = [0, *accumulate(packed.lengths)]
    classes: dict[int, list[int]] = {}
    for index, length in enumerate(packed.lengths):
        classes.setdefault(max(16, 1 << (length - 1).bit_length()), []).append(index)
    pieces: dict[int, Tensor] = {}
    for members in classes.values():
        rows = [slice(starts[i], starts[i] + packed.lengths[i]) for i in members]
        q, k, v = (
            torch.nn.utils.rnn.pad_sequence([x[row] for row in rows], batch_first=True).transpose(1, 2)
            for x in (query, key, value)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        for row, i in enumerate(members):
            pieces[i] = out[row, : packed.lengths[i]]
    return torch.cat([pieces[i] for i in range(len(pieces))])


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
    """FlashAttention over the borders, with no padding (torch's kernel; CUDA, 16-bit only)."""
    from torch.nn.attention.varlen import varlen_attn

    heads = query.shape[1]
    cu, longest = packed.cu_seqlens, packed.max_length
    out = varlen_attn(
        query, expand_heads(key, heads), expand_heads(value, heads), cu, cu, longest, longest, window_size=(-1, 0)
    )
    assert isinstance(out, Tensor)
    return out


def aten_attention(query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
    """The same kernel through the operator that torch versions without `window_size` have."""
    heads = query.shape[1]
    cu, longest = packed.cu_seqlens, packed.max_length
    return torch.ops.aten._flash_attention_forward(
        query, expand_heads(key, heads), expand_heads(value, heads), cu, cu, longest, longest, 0.0, True, False
    )[0]


_KERNELS = {"varlen": varlen_attention, "aten": aten_attention, "padded": padded_attention}


def choose(device: torch.device, heads: int, kv_heads: int, head_dim: int) -> str:
    """Name of the first kernel that agrees with the reference here, forward and backward; says why it left one out."""
    if device.type != "cuda":
        return "padded"
    packed = pack([5, 300, 64, 1, 130], device)
    generator = torch.Generator(device).manual_seed(0)
    inputs = [
        torch.randn(500, n, head_dim, device=device, dtype=torch.bfloat16, generator=generator, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    ]
    expected = padded_attention(*inputs, packed)
    gradient = torch.randn(expected.shape, device=device, dtype=expected.dtype, generator=generator)
    wanted = [expected, *torch.autograd.grad(expected, inputs, gradient)]
    for name, kernel in _KERNELS.items():
        try:
            out = kernel(*inputs, packed)
            got = [out, *torch.autograd.grad(out, inputs, gradient)]
            worst = max(float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True))
        except (RuntimeError, TypeError, ValueError, ImportError, AttributeError) as error:
            print(f"attention kernel {name} does not run here: {error}", flush=True)
            continue
        if worst < 0.03:  # bf16 rounding gives about 0.005
            return name
        print(f"attention kernel {name} differs from the reference by {worst:.1%}: not used", flush=True)
    return "padded"


def attention_over(name: str, packed: Packed) -> AttentionFn:
    """The attention function of one batch, by a kernel of `choose`."""
    kernel = _KERNELS[name]
    return lambda query, key, value, layer: kernel(query, key, value, packed)
