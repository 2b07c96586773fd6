"""Paged attention through the FlashInfer library (Ye et al., "FlashInfer", 2025), for bf16 and fp16 on NVIDIA GPUs.

Knows FlashInfer's wrappers, their plans and their CUDA-graph rules; knows nothing of requests or of the model beyond
its attention shape. FlashInfer is imported only when an instance is made. Everything here that touches a wrapper's
private attributes was checked against flashinfer-python 0.7.2.post1, the version that pyproject pins.

Decode rows run on the tensor-core decode wrapper (the FA2 kernel: it splits long sequences over the GPU and takes
rows without pages, so padding rows cost nothing), longer rows on the prefill wrapper (FA3 on compute capability 9.0).

FP8 caches: FA2 reads the bytes as they are. FA3 takes them only with FP8 queries, which would cost accuracy; so where
there are many queries per cached token, the step's pages are widened to 16 bits, layer by layer, into pages of this
object, which FA3 reads. Both see the same numbers. Decode rows go through XQA where it can serve them (xqa.py), in
graphs and beside prompts: its queries and probabilities are FP8 too on compute capability 9.0. It needs no plan.

Steps with nothing but decodes are left to our own kernel (decode_attention/), which rotates and writes too, for numbers
of rows that it was timed to be quicker for.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from appliance.kernels.attention import FP8_CACHE_CAPABILITY, UNIT_SCALES, AttentionMetadata, FusedDecode, KvScales
from appliance.kernels.decode_attention.decode import attention_shape, decode_attention_for
from appliance.kernels.fp8_linear import FP8
from appliance.kernels.pinned_ring import PinnedRing
from appliance.kernels.widen_pages import widen_pages
from appliance.kernels.xqa import XqaDecode, xqa_for

log = logging.getLogger(__name__)

HEAD_DIMS = (64, 128, 256)
_WIDE_BYTES = 128 << 20  # for the widened pages of one layer; steps with longer sequences read the bytes
# Widening moves three bytes per number more than FA2 reads; it is paid back by FA3's faster products from about this
# many queries per cached token on (H200 data sheet: 4.8 TB/s; FA2 half as fast as FA3).
_WIDE_QUERIES = 64
_INT_WORKSPACE_BYTES = 8 << 20  # FlashInfer's own size: schedules of up to some 100,000 tiles


def available(
    head_dim: int = 128, dtype: torch.dtype = torch.bfloat16, kv_dtype: torch.dtype | None = None
) -> str | None:
    """None when FlashInfer can serve this head size, dtype and KV cache (None: of the same dtype) on the current GPU,
    else one line that says why not.

    Does not compile anything; a missing nvcc shows at `load_modules`, unless the compiled modules are cached.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashInfer attention needs bfloat16 or float16, not {dtype}"
    if kv_dtype not in (None, dtype, FP8):
        return f"FlashInfer attention needs a KV cache in {dtype} or {FP8}, not {kv_dtype}"
    if head_dim not in HEAD_DIMS:
        return f"FlashInfer attention needs a head size of {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if not torch.cuda.is_available():
        return "FlashInfer attention needs an NVIDIA GPU, and torch sees none"
    capability = torch.cuda.get_device_capability()
    oldest = FP8_CACHE_CAPABILITY if kv_dtype == FP8 else (8, 0)
    if capability < oldest:
        what = "an FP8 KV cache" if kv_dtype == FP8 else "FlashInfer attention"
        return f"{what} needs compute capability {oldest[0]}.{oldest[1]}, this GPU has {capability[0]}.{capability[1]}"
    try:
        import flashinfer  # noqa: F401
    except Exception as error:  # a broken install fails in many ways; every one of them means "not here"
        return f"flashinfer-python cannot be imported: {error}"
    return None


def import_lean() -> None:
    """Import the parts of FlashInfer that are used here, without the rest of its package, which takes four times as
    long. For a process that is ours alone: `import flashinfer` gives an almost empty package afterwards. Does nothing
    where the library is absent, imported already, or cannot be imported so."""
    spec = None if "flashinfer" in sys.modules else importlib.util.find_spec("flashinfer")
    if spec is None:
        return
    sys.modules["flashinfer"] = importlib.util.module_from_spec(spec)  # its __init__ is not run
    try:
        for part in ("decode", "prefill", "utils"):
            importlib.import_module(f"flashinfer.{part}")
    except Exception:  # the whole package is tried when it is needed
        for name in [name for name in sys.modules if name.partition(".")[0] == "flashinfer"]:
            del sys.modules[name]


def page_lists(
    page_table: np.ndarray, seq_lens: np.ndarray, page_size: int, num_rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The page table as FlashInfer wants it: (indptr [num_rows + 1], indices [indptr[-1]], last_page_len [num_rows]).

    page_table int [n, max_pages], seq_lens int [n] tokens; n <= num_rows: rows beyond n are padding and get no pages.
    All outputs int32. last_page_len is 1..page_size, also (unused) where a row has no pages.
    """
    n = len(seq_lens)
    pages = np.zeros(num_rows, dtype=np.int32)
    pages[:n] = -(-seq_lens // page_size)
    indptr = np.zeros(num_rows + 1, dtype=np.int32)
    np.cumsum(pages, out=indptr[1:])
    width = int(pages.max(initial=0))
    indices = page_table[:n, :width][np.arange(width) < pages[:n, None]].astype(np.int32, copy=False)
    last = np.ones(num_rows, dtype=np.int32)
    last[:n] = (np.maximum(seq_lens, 1) - 1) % page_size + 1
    return indptr, indices, last


@dataclass(slots=True)
class _Planned:
    """Wrappers that serve one window in the current step: q rows [0, num_decodes) and [num_decodes, num_rows)."""

    decode: Any | XqaDecode | None
    prefill: Any | None
    num_decodes: int
    num_rows: int
    widened: Tensor | None  # int32: the pages that `prefill` wants widened; None: it reads the cache itself


class FlashInferAttention:
    """`Attention` on FlashInfer. One instance serves all layers of a rank.

    `windows`: every distinct sliding window of the model (None: full attention); `attend` takes no other.
    `graph_batch_sizes`: padded values of `num_seqs` that decode steps are captured with; each has wrappers of its own,
    whose buffers stay at their addresses. A captured step is replayed after a `plan` with the same `num_seqs`.
    Device memory: `workspace_bytes` + 16 MiB a window + page indices (4 bytes × max_num_seqs × pages of max_model_len);
    with FP8 caches up to 128 MiB more for widened pages and 32 MiB for XQA.
    """

    name = "flashinfer"

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: torch.dtype,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device | str,
        kv_dtype: torch.dtype | None = None,
        scale: float | None = None,
        windows: Iterable[int | None] = (None,),
        graph_batch_sizes: Sequence[int] = (),
        workspace_bytes: int = 256 << 20,
    ) -> None:
        """Raises ValueError when `available` gives a reason. Compiles nothing; the first plans do."""
        if (reason := available(head_dim, dtype, kv_dtype)) is not None:
            raise ValueError(reason)
        self._num_heads, self._num_kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim
        self._page_size = page_size
        self._dtype, self._kv_dtype = dtype, kv_dtype or dtype
        self._scale = head_dim**-0.5 if scale is None else scale
        self._windows = tuple(dict.fromkeys(windows))
        self._device = torch.device(device)
        self._prefill_backend = self._choose_prefill_backend(self._kv_dtype)
        self._float_workspace = torch.zeros(workspace_bytes, dtype=torch.uint8, device=self._device)
        self._ring = PinnedRing(3 * 2 * len(self._windows), _INT_WORKSPACE_BYTES)
        # Graph wrappers of all sizes share these: a step plans one size, and whatever it replays reads them afterwards.
        rows = max(max_num_seqs, *graph_batch_sizes) if graph_batch_sizes else 0
        pages = -(-max_model_len // page_size)
        self._indptr = torch.zeros(rows + 1, dtype=torch.int32, device=self._device)
        self._indices = torch.zeros(rows * pages, dtype=torch.int32, device=self._device)
        self._last_page_len = torch.ones(rows, dtype=torch.int32, device=self._device)
        self._wide = self._wide_pages(max(max_num_seqs, 1) * pages)
        self._wide_order = torch.arange(0 if self._wide is None else len(self._wide), dtype=torch.int32, device=device)
        self._wide_prefill: dict[int | None, Any] = {}
        self._decode: dict[int | None, Any] = {}
        self._prefill: dict[int | None, Any] = {}
        self._graph_decode: dict[tuple[int | None, int], Any] = {}
        for window in self._windows:
            self._make_wrappers(window, graph_batch_sizes)
        self._planned: dict[int | None, _Planned] = {}
        self._xqa = xqa_for(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            dtype=dtype,
            kv_dtype=self._kv_dtype,
            max_rows=max(rows, max_num_seqs),
            device=self._device,
        )
        self._own = decode_attention_for(
            attention_shape(num_heads, num_kv_heads, head_dim, page_size, dtype, self._kv_dtype),
            windows=self._windows,
            max_rows=max(rows, max_num_seqs),
            device=self._device,
        )
        self._fused = False  # whether the step planned is for the own kernel

    def _wide_pages(self, most: int) -> Tensor | None:
        """Pages of this object for widened copies, `most` or as many as _WIDE_BYTES hold; None where FA3 is not used or
        reads the cache itself."""
        if self._kv_dtype == self._dtype or self._choose_prefill_backend(self._dtype) != "fa3":
            return None
        shape = (2, self._page_size, self._num_kv_heads, self._head_dim)
        page_bytes = int(np.prod(shape)) * self._dtype.itemsize
        return torch.zeros((min(most, _WIDE_BYTES // page_bytes), *shape), dtype=self._dtype, device=self._device)

    def _choose_prefill_backend(self, kv_dtype: torch.dtype) -> str:
        from flashinfer.utils import determine_attention_backend

        return str(
            determine_attention_backend(
                self._device,
                0,  # no position encoding inside the kernel
                False,  # no fp16 reduction of q @ k
                False,  # no custom mask
                self._dtype,
                kv_dtype,
                head_dim_qk=self._head_dim,
                head_dim_vo=self._head_dim,
            )
        )

    def _make_wrappers(self, window: int | None, graph_batch_sizes: Sequence[int]) -> None:
        from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper
        from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

        def share(wrapper: Any, int_workspace: Tensor) -> Any:
            # A schedule is copied in by `plan` and read by the runs that follow in the same stream, so wrappers that
            # are never planned for the same step may share its memory (8 MiB each otherwise, pinned and on the device).
            wrapper._int_workspace_buffer = int_workspace
            wrapper._pin_memory_int_workspace_buffer = None  # set from the ring before each plan
            return wrapper

        ints = [torch.empty(_INT_WORKSPACE_BYTES, dtype=torch.uint8, device=self._device) for _ in range(2)]
        prefill = BatchPrefillWithPagedKVCacheWrapper(self._float_workspace, "NHD", backend=self._prefill_backend)
        self._prefill[window] = share(prefill, ints[0])
        if self._wide is not None:
            wide = BatchPrefillWithPagedKVCacheWrapper(self._float_workspace, "NHD", backend="fa3")
            self._wide_prefill[window] = share(wide, ints[0])
        decode = BatchDecodeWithPagedKVCacheWrapper(self._float_workspace, "NHD", use_tensor_cores=True, backend="fa2")
        self._decode[window] = share(decode, ints[1])
        for size in graph_batch_sizes:
            graph = BatchDecodeWithPagedKVCacheWrapper(
                self._float_workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=self._indptr[: size + 1],
                paged_kv_indices_buffer=self._indices,
                paged_kv_last_page_len_buffer=self._last_page_len[:size],
                backend="fa2",
            )
            self._graph_decode[window, size] = share(graph, ints[1])

    def load_modules(self) -> None:
        """Loads the library's kernels, compiling those that its cache lacks (12 to 80 s each, with nvcc).

        Raises whatever the library raises where it can do neither. Without XQA's alone, FA2 decodes.
        """
        if self._xqa is not None:
            try:
                self._xqa.load(self._windows)
            except Exception as error:  # no compiler, and an engine or cache from before
                log.warning("decode attention: FA2, as XQA can be neither loaded nor compiled: %s", error)
                self._xqa = None
        zeros = torch.zeros(2, dtype=torch.int64, device=self._device)
        for length in (2, _WIDE_QUERIES):  # the second is prefilled by the wide wrapper, where there is one
            self.plan(
                AttentionMetadata(
                    num_seqs=2,
                    num_tokens=1 + length,
                    max_query_len=length,
                    max_seq_len=length,
                    query_start=zeros,
                    seq_lens=zeros,
                    page_table=zeros,
                    slot_mapping=zeros,
                    query_start_host=np.array([0, 1, 1 + length], dtype=np.int32),
                    seq_lens_host=np.array([1, length], dtype=np.int32),
                    page_table_host=np.zeros((2, -(-length // self._page_size)), dtype=np.int32),
                )
            )

    def plan(self, metadata: AttentionMetadata) -> None:
        """Schedules the step for every window, from the host copies; enqueues small copies on the current stream."""
        self._planned = {}
        self._fused = (
            metadata.max_query_len == 1 and self._own is not None and self._own.way(metadata.num_seqs) is not None
        )
        if self._fused and self._own is not None:
            self._own.plan(metadata)
        else:
            self._plan(metadata)

    @property
    def fused(self) -> FusedDecode | None:
        """What serves the step planned, if that is a decode step that the own kernel was the quickest way for."""
        return self._own if self._fused else None

    def _plan(self, metadata: AttentionMetadata) -> None:
        """Of the library's kernels."""
        query_lens = np.diff(metadata.query_start_host)
        if metadata.max_query_len == 1:
            num_decodes, rows = metadata.num_seqs, metadata.num_seqs
        else:
            longer = np.flatnonzero(query_lens != 1)
            num_decodes = int(longer[0]) if len(longer) else len(query_lens)
            rows = int(metadata.query_start_host[-1])
        lens, table = metadata.seq_lens_host, metadata.page_table_host
        real = min(num_decodes, len(lens))
        decode_pages = None
        if num_decodes and self._xqa is not None:
            self._xqa.plan(metadata.seq_lens[:num_decodes])
        elif num_decodes:
            decode_pages = self._upload(table[:real], lens[:real], num_decodes)
        prefill_pages = widened = None
        if num_decodes < len(lens):
            prefill_pages = self._upload(table[num_decodes:], lens[num_decodes:], len(lens) - num_decodes)
            if self._worth_widening(query_lens[num_decodes:], lens[num_decodes:]):
                indptr, widened, last = prefill_pages
                prefill_pages = (indptr, self._wide_order[: len(widened)], last)
        for window in self._windows:
            decode: Any = self._xqa if num_decodes else None
            prefill = None
            if decode_pages is not None:
                graph = self._graph_decode.get((window, num_decodes)) if metadata.max_query_len == 1 else None
                decode = graph or self._decode[window]
                self._plan_wrapper(decode, decode_pages, window)
            if prefill_pages is not None:
                prefill = (self._prefill if widened is None else self._wide_prefill)[window]
                query_start = torch.from_numpy(metadata.query_start_host[num_decodes:] - np.int32(num_decodes))
                self._plan_wrapper(prefill, prefill_pages, window, query_start.pin_memory())
            self._planned[window] = _Planned(decode, prefill, num_decodes, rows, widened)

    def _worth_widening(self, query_lens: np.ndarray, seq_lens: np.ndarray) -> bool:
        """Of the sequences to prefill: their pages fit into the wide ones, and their queries pay for the copy."""
        if self._wide is None or int((-(-seq_lens // self._page_size)).sum()) > len(self._wide):
            return False
        return int(np.dot(query_lens.astype(np.int64), seq_lens)) >= _WIDE_QUERIES * int(seq_lens.sum())

    def _upload(self, table: np.ndarray, lens: np.ndarray, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """`page_lists` as FlashInfer's `plan` takes them without waiting: indptr and last page lengths in pinned host
        memory (it reads and uploads them), indices already on the device (from the host it would copy synchronously).
        Torch's pinned allocator keeps a block until the copies that read it have run."""
        indptr, indices, last = page_lists(table, lens, self._page_size, num_rows)
        on_device = torch.from_numpy(indices).pin_memory().to(self._device, non_blocking=True)
        return torch.from_numpy(indptr).pin_memory(), on_device, torch.from_numpy(last).pin_memory()

    def _plan_wrapper(
        self,
        wrapper: Any,
        pages: tuple[Tensor, Tensor, Tensor],
        window: int | None,
        query_start: Tensor | None = None,
    ) -> None:
        buffer, copied = self._ring.next()
        wrapper._pin_memory_int_workspace_buffer = buffer
        shape = (self._num_heads, self._num_kv_heads, self._head_dim, self._page_size)
        common: dict[str, Any] = {
            "window_left": -1 if window is None else window - 1,  # FlashInfer's window leaves the token itself out
            "sm_scale": self._scale,
            "q_data_type": self._dtype,
            "kv_data_type": self._dtype if wrapper is self._wide_prefill.get(window) else self._kv_dtype,
            "o_data_type": self._dtype,
        }
        if query_start is None:
            wrapper.plan(*pages, *shape, **common)
        else:
            wrapper.plan(query_start, *pages, *shape, causal=True, **common)
        copied.record()

    def attend(
        self,
        q: Tensor,
        kv_cache: Tensor,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None,
        kv_scales: KvScales = UNIT_SCALES,
    ) -> Tensor:
        """See `Attention.attend`. Raises ValueError for a window or scale that the instance was not made for."""
        if self._fused and not self._planned:  # a step of pieces, which only brings queries here
            self._plan(metadata)
        planned = self._planned.get(window)
        if planned is None:
            raise ValueError(f"window {window} was not planned; this instance serves the windows {self._windows}")
        if abs(scale - self._scale) > 1e-6 * self._scale:
            raise ValueError(f"scale {scale} differs from {self._scale}, which this instance was made for")
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        n, rows = planned.num_decodes, planned.num_rows
        scales = {"k_scale": kv_scales.k, "v_scale": kv_scales.v}  # that of V costs a kernel unless it is 1
        if isinstance(planned.decode, XqaDecode):
            planned.decode.attend(q[:n], kv_cache, metadata.page_table[:n], scale, window, kv_scales, out[:n])
        elif planned.decode is not None:
            planned.decode.run(q[:n], kv_cache, out=out[:n], **scales)
        if planned.prefill is not None:
            pages = kv_cache
            if planned.widened is not None and self._wide is not None:
                pages = self._wide
                widen_pages(kv_cache, planned.widened, pages)
            planned.prefill.run(q[n:rows], pages, out=out[n:rows], **scales)
        if rows < len(q):
            out[rows:].zero_()
        return out
