"""Copies pages of an FP8 KV cache into 16-bit ones, for attention kernels that read 16-bit pages faster than bytes.

Knows the cache layout of `kernels/attention.py`; knows nothing of scales: the bytes become the same numbers, exactly.
"""

from __future__ import annotations

from torch import Tensor

from appliance.kernels._triton import tl, triton

_BLOCK = 2048  # numbers a program copies


def widen_pages(kv_cache: Tensor, pages: Tensor, out: Tensor) -> None:
    """out[i] = kv_cache[pages[i]] for every i.

    kv_cache [num_pages, 2, page_size, num_kv_heads, head_dim], FP8; pages int32 [n]; out [m, 2, page_size,
    num_kv_heads, head_dim], bf16, fp16 or fp32, m >= n: entries from n on keep what they have. Both contiguous.
    """
    if kv_cache.is_cuda:
        widen_pages_triton(kv_cache, pages, out)
    else:
        widen_pages_reference(kv_cache, pages, out)


def widen_pages_reference(kv_cache: Tensor, pages: Tensor, out: Tensor) -> None:
    """`widen_pages` in plain torch, any device."""
    out[: len(pages)] = kv_cache[pages.long()].to(out.dtype)


@triton.jit
def _widen_kernel(cache_ptr, pages_ptr, out_ptr, page_numbers, BLOCK: tl.constexpr):
    """Program (page, block): BLOCK of the `page_numbers` numbers of a page, K and V being one run of them."""
    index = tl.program_id(0).to(tl.int64)
    page = tl.load(pages_ptr + index).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(cache_ptr + page * page_numbers + at, mask=at < page_numbers, other=0.0)
    tl.store(out_ptr + index * page_numbers + at, x.to(out_ptr.dtype.element_ty), mask=at < page_numbers)


def widen_pages_triton(kv_cache: Tensor, pages: Tensor, out: Tensor) -> None:
    """`widen_pages` as one Triton kernel; launches only."""
    assert kv_cache.is_contiguous() and out.is_contiguous() and kv_cache.shape[1:] == out.shape[1:]
    if len(pages):
        numbers = kv_cache[0].numel()
        _widen_kernel[(len(pages), triton.cdiv(numbers, _BLOCK))](kv_cache, pages, out, numbers, BLOCK=_BLOCK)
