"""Compiling and launching the decode attention kernel (attention.cu): sizes in, a launch on torch's current stream out.

Sizes are compile-time constants, so a kernel serves one model's attention, one form of its fused product and one number
of warps; NVRTC compiles it in about a second, without headers, and the cubin goes the way of all compiled kernels
(kernels/compiled.py). Knows what attention.cu takes; knows nothing of steps.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from appliance.kernels.attention import HeadNorms, KvScales
from appliance.kernels.deferred_scale import DeferredScale
from appliance.kernels.dependent_launch import launch_options
from appliance.kernels.fp8_linear import FP8
from appliance.kernels.native_kernel import load, read_sources

HEAD_DIMS = (64, 128)
MOST_GROUP = 16  # query heads that share a K/V head
_SOURCES = (
    "persistent/primitives.cuh",
    "dependent_launch.cuh",
    *(
        f"decode_attention/{name}"
        for name in ("instructions.cuh", "strip.cuh", "heads.cuh", "merge.cuh", "attention.cu")
    ),
)
_ASSEMBLY = 3  # of them need a GPU's
_SHARED_BYTES = {(8, 0): 163, (9, 0): 227, (10, 0): 227}  # KiB of a block, by compute capability
_LEAST_SHARED_BYTES = 99 << 10  # of 8.6, 8.9 and 12.x
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class DecodeAttentionShape:
    """What a kernel is compiled for. Heads are those of a rank."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype  # of the model, bf16 or fp16
    kv_dtype: torch.dtype  # of the cache: the same or FP8
    warps: int  # of a block
    int32: bool = False  # the fused product is whole numbers
    deferred: bool = False  # its scales are still to be applied
    normed: bool = False  # heads of q and k have a norm

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def blocks_per_sm(self) -> int:
        """Of a multiprocessor: what registers have room for, more than eight heads a group needing more of them."""
        return 16 // self.warps if self.group <= 8 else {4: 3, 8: 1}.get(self.warps, 1)

    @property
    def shared_bytes(self) -> int:
        """`Scratch` of merge.cuh."""
        octet_heads = -(-self.group // 8) * 8
        queries = octet_heads * (self.head_dim + 32) * 2
        rows = 2 * self.head_dim * self.kv_dtype.itemsize
        warps = self.warps * 4 * (2 * octet_heads + self.group * (self.head_dim + 4))
        return queries + rows + warps + 16

    def refused(self, capability: tuple[int, int]) -> str | None:
        """Why no kernel can be made for this shape on a GPU of that compute capability, or None."""
        if capability < (8, 9 if self.kv_dtype == FP8 else 0):
            return f"compute capability {capability[0]}.{capability[1]}"
        if self.dtype not in (torch.bfloat16, torch.float16) or self.kv_dtype not in (self.dtype, FP8):
            return f"{self.dtype} with a cache in {self.kv_dtype}"
        if self.head_dim not in HEAD_DIMS:
            return f"heads of size {self.head_dim}; the kernel takes {' and '.join(map(str, HEAD_DIMS))}"
        if self.heads % self.kv_heads or self.group > MOST_GROUP:
            return f"{self.heads} query heads to {self.kv_heads}; the kernel takes up to {MOST_GROUP} to one"
        if self.page_size % 16:
            return f"pages of {self.page_size} tokens; the kernel takes multiples of 16"
        if self.warps > (16 if self.group <= 8 else 8):
            return f"{self.warps} warps for {self.group} query heads to a K/V head"
        limit = _SHARED_BYTES.get(capability, 0) << 10 or _LEAST_SHARED_BYTES
        if self.shared_bytes > limit:
            return f"{self.shared_bytes} bytes of shared memory; a block can have {limit}"
        return None

    def macros(self) -> dict[str, str]:
        numbers = {
            "HEADS": self.heads,
            "KV_HEADS": self.kv_heads,
            "HEAD_DIM": self.head_dim,
            "PAGE_SIZE": self.page_size,
            "WARPS": self.warps,
            "BLOCKS_PER_SM": self.blocks_per_sm,
            "KV_FP8": int(self.kv_dtype == FP8),
            "FLOAT16": int(self.dtype == torch.float16),
            "QKV_INT32": int(self.int32),
            "DEFERRED": int(self.deferred),
            "NORMED": int(self.normed),
        }
        return {name: str(number) for name, number in numbers.items()}


def kernel_source(*, emulated: bool = False) -> str:
    """All of the kernel, to be compiled with a shape's `macros`; `emulated`: without what needs a GPU's assembly."""
    return read_sources(*_SOURCES[_ASSEMBLY if emulated else 0 :])


@dataclass(frozen=True, slots=True)
class Buffers:
    """Of the device, at addresses that stay. Layers share them, as they run one after the other."""

    plan: Tensor  # int32 [items, FIELDS]
    partial: Tensor  # float32 [items * heads * head_dim]
    statistics: Tensor  # float32 [items * heads * 2]
    arrived: Tensor  # int32 [rows * kv_heads], zeros between launches


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """One layer's, of one step."""

    qkv: Tensor | DeferredScale  # [rows, (heads + 2 * kv_heads) * head_dim]
    cos_sin: Tensor  # float32 [positions, head_dim]
    kv_cache: Tensor  # [pages, 2, page_size, kv_heads, head_dim], contiguous
    page_table: Tensor  # int32 [rows, max_pages], rows contiguous
    slots: Tensor  # int64 [rows]; -1: the new token is not written
    out: Tensor  # [rows, heads, head_dim], contiguous
    scale: float
    kv_scales: KvScales
    norms: HeadNorms | None = None


def arguments(inputs: DecodeInputs, buffers: Buffers) -> tuple[int, ...]:
    """Of `decode_attention`, in order: pointers and numbers of eight bytes, floats as their bits."""
    deferred = inputs.qkv if isinstance(inputs.qkv, DeferredScale) else None
    values = inputs.qkv.values if isinstance(inputs.qkv, DeferredScale) else inputs.qkv
    return (
        values.data_ptr(),
        0 if deferred is None else deferred.row_scales.data_ptr(),
        0 if deferred is None else deferred.column_scales.data_ptr(),
        0 if deferred is None or deferred.bias is None else deferred.bias.data_ptr(),
        inputs.cos_sin.data_ptr(),
        inputs.kv_cache.data_ptr(),
        inputs.page_table.data_ptr(),
        inputs.slots.data_ptr(),
        buffers.plan.data_ptr(),
        inputs.out.data_ptr(),
        buffers.partial.data_ptr(),
        buffers.statistics.data_ptr(),
        buffers.arrived.data_ptr(),
        inputs.page_table.shape[0],
        values.stride(0),
        inputs.page_table.stride(0),
        _bits(inputs.scale * inputs.kv_scales.k * _LOG2_E),
        _bits(inputs.kv_scales.v),
        _bits(1.0 / inputs.kv_scales.k),
        _bits(1.0 / inputs.kv_scales.v),
        0 if inputs.norms is None else inputs.norms.q_weight.data_ptr(),
        0 if inputs.norms is None else inputs.norms.k_weight.data_ptr(),
        0 if inputs.norms is None else _bits(inputs.norms.eps),
    )


def _bits(value: float) -> int:
    found: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return found


class DecodeAttentionKernel:
    """One compiled kernel, loaded."""

    def __init__(self, shape: DecodeAttentionShape, device: torch.device) -> None:
        """RuntimeError where the compiler or the driver refuses."""
        self.shape = shape
        self._device = device
        index = device.index if device.index is not None else torch.cuda.current_device()
        threads, shared = shape.warps * 32, shape.shared_bytes
        self._kernel = load("attention", kernel_source(), shape.macros(), threads, shared, index, "decode_attention")

    def launch(self, inputs: DecodeInputs, buffers: Buffers, items: int) -> None:
        """Of the first `items` items of the plan, on torch's current stream; can be captured."""
        dependent = bool(launch_options(self._device)["PDL"])
        self._kernel.launch(items * self.shape.kv_heads, dependent, arguments(inputs, buffers))
