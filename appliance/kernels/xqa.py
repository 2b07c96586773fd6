"""Decode attention over FP8 caches through XQA, a kernel that FlashInfer carries (from NVIDIA's TensorRT-LLM).

It multiplies FP8 numbers as they lie in the cache: on compute capability 9.0 queries (at a scale of 1) and
probabilities are rounded to e4m3 too, and products are FP8's; on 10.x it widens K and V instead. In return it reads
the cache at nearly the memory's speed, and it is not planned: it takes the page table and the lengths on the device.

Knows one kernel's rules; knows nothing of steps or of other kernels. Checked against the sources of flashinfer-python
0.7.2.post1; what they do not show to work (other head sizes and groups) is refused, and FlashInfer's FA2 serves it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from appliance.kernels.attention import KvScales
from appliance.kernels.fp8_linear import FP8

log = logging.getLogger(__name__)

HEAD_DIMS = (64, 128)
GROUPS = (4, 8, 16)  # query heads per K/V head. The kernel of compute capability 9.0 traps with 17 to 24
PAGE_SIZES = (16, 32, 64, 128)
# FlashInfer takes the first 8 MiB for semaphores, which it wants zeroed once and leaves zero; a split sequence's parts
# follow: a few per multiprocessor, at most 16 x 128 numbers of 16 bits each.
_WORKSPACE_BYTES = 32 << 20


def unsupported(
    *,
    capability: tuple[int, int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
) -> str | None:
    """None when XQA serves decode steps of this shape on a GPU of this compute capability, else one line why not."""
    if kv_dtype != FP8:
        return f"XQA is used for a KV cache in {FP8}, not {kv_dtype}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"XQA needs queries in bfloat16 or float16, not {dtype}"
    if capability != (9, 0) and capability[0] != 10:
        return f"XQA needs compute capability 9.0 or 10.x, this GPU has {capability[0]}.{capability[1]}"
    if head_dim not in HEAD_DIMS:
        return f"XQA needs a head size of {' or '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if num_heads % num_kv_heads or num_heads // num_kv_heads not in GROUPS:
        return f"XQA needs {', '.join(map(str, GROUPS))} query heads per K/V head, not {num_heads} to {num_kv_heads}"
    if page_size not in PAGE_SIZES:
        return f"XQA needs pages of {', '.join(map(str, PAGE_SIZES))} tokens, not {page_size}"
    return None


class XqaDecode:
    """Attention of one new token a sequence, for shapes that `unsupported` lets through. Addresses of its buffers stay,
    so that calls can be captured in CUDA graphs, after `load`. Device memory: 32 MiB."""

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: torch.dtype,
        max_rows: int,
        device: torch.device,
    ) -> None:
        """Raises what importing FlashInfer raises. Compiles nothing."""
        import flashinfer.xqa  # noqa: F401
        from flashinfer.decode import xqa_batch_decode_with_kv_cache

        self._kernel = xqa_batch_decode_with_kv_cache
        self._module = (dtype, FP8, page_size, head_dim, num_heads // num_kv_heads)
        self._dtype = dtype
        self._page_size = page_size
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._lens = torch.ones(max_rows, dtype=torch.int32, device=device)
        self._unsigned_lens = self._lens.view(torch.uint32)  # as the kernel declares them

    def load(self, windows: Iterable[int | None]) -> None:
        """Load the library's modules for these windows, compiling those that its cache lacks. Raises whatever the
        library raises where it can do neither."""
        from flashinfer.xqa import get_xqa_module

        for sliding in sorted({window is not None for window in windows}):
            get_xqa_module(*self._module, sliding, self._dtype, 1)

    def plan(self, seq_lens: Tensor) -> None:
        """Lengths of the rows of the calls that follow, int [rows], on the device; 0 for padding. Enqueues one kernel.

        Padding rows attend to one token: of a row without tokens the kernel writes nothing at all. The lengths belong
        here and not before each call, as the kernel reads them before the launch ahead of it has ended."""
        self._lens[: len(seq_lens)].copy_(seq_lens.clamp(min=1))

    def attend(
        self,
        q: Tensor,
        kv_cache: Tensor,
        page_table: Tensor,
        scale: float,
        window: int | None,
        kv_scales: KvScales,
        out: Tensor,
    ) -> None:
        """`Attention.attend` for one token a row: q and out [rows, num_heads, head_dim], page_table int32 [rows, max
        pages], contiguous; rows of padding must name a page that exists first."""
        self._kernel(
            q.contiguous(),
            kv_cache,
            self._workspace,
            page_table,
            self._unsigned_lens[: len(q)],
            page_table.shape[1] * self._page_size,
            bmm1_scale=scale * kv_scales.k,
            bmm2_scale=float(kv_scales.v),
            window_left=-1 if window is None else window - 1,  # without the token itself
            out=out,
        )


def xqa_for(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    max_rows: int,
    device: torch.device,
) -> XqaDecode | None:
    """XQA for this shape, or None, for FP8 caches with a line in the log that says why. `max_rows`: of one step."""
    reason = unsupported(
        capability=torch.cuda.get_device_capability(device),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        kv_dtype=kv_dtype,
    )
    if reason is None:
        try:
            return XqaDecode(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                page_size=page_size,
                dtype=dtype,
                max_rows=max_rows,
                device=device,
            )
        except ImportError as error:
            reason = f"this FlashInfer has no XQA: {error}"
    if kv_dtype == FP8:
        log.info("decode attention over the FP8 cache: FA2, as %s", reason)
    return None
