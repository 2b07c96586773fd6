"""Compiling and launching the persistent decode kernel (decode.cu): sizes in, a launch on torch's current stream out.

Every size is a compile-time constant, so a kernel serves one model, one number of rows and one GPU type. NVRTC compiles
it in a second or so, without headers; the cubin goes the way of all compiled kernels (kernels/compiled.py). Knows no
model: what the tables hold is `runtime/persistent_decode.py`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from appliance.kernels import native_kernel
from appliance.kernels.cuda_core import cuda_core, current_stream, load_kernel
from appliance.kernels.native_kernel import cubin, read_sources

SHARED_BYTES = 227 * 1024  # that a block can have with compute capability 9.0 and 10.x; 12.x has less
THREADS = 640
MAX_ROWS = 16
_SOURCES = (
    "primitives.cuh",
    "ring.cuh",
    "attention.cuh",
    "tables.cuh",
    "input.cuh",
    "exchange.cuh",
    "product.cuh",
    "decode.cu",
)
_CHUNK = 2048  # bytes of a weight row per copy, as in ring.cuh
_WARPS = 16
_LAYER_BYTES = 160
_SCALE_GROUP = 128  # elements of an INT4 weight's row that share a scale


@dataclass(frozen=True, slots=True)
class _Format:
    """How weights are stored, as in `Sizes` of tables.cuh."""

    number: int
    elements: int  # of a row, in a chunk
    multiple: int  # that rows are of
    held_chunks: int  # of x that registers hold, of up to 8 rows
    staged_row: int  # bytes of a row's chunk of x in the staging area
    max_rows: int


FORMATS = {
    "bf16": _Format(0, _CHUNK // 2, 32, 8, 2048 + 64, MAX_ROWS),
    "fp8": _Format(1, _CHUNK, 64, 4, 4096 + 16, MAX_ROWS),  # activations too
    "int4": _Format(2, _CHUNK * 2, _SCALE_GROUP, 4, 2 * (4096 + 16), 4),  # in groups of 128
}


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """What a kernel is compiled for. `rows`: sequences of a step, each with one token. Sizes are those of a rank's
    share; the hidden size is whole on each."""

    rows: int
    weights: str  # of the layers, a name in FORMATS
    head: str  # weights of the head: bf16 or fp8
    kv_fp8: bool
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    page_size: int
    eps: float
    blocks: int  # multiprocessors of the GPU
    ranks: int = 1

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def attention_items(self) -> int:
        """Heads' groups of up to four that share a K/V head, over all K/V heads; of one sequence."""
        return self.kv_heads * -(-(self.heads // self.kv_heads) // 4)

    @property
    def slots(self) -> int:
        """Slots of the ring: what shared memory has left."""
        heads = 4 * (_WARPS * 4 * self.head_dim + 2 * _WARPS * 4)
        attention = heads + 2 * 4 * (self.head_dim + 32) + 2 * self.head_dim * (1 if self.kv_fp8 else 2) + 48
        sums = 4 * 2 * _WARPS * self.rows * 20
        row = [self.rows * FORMATS[name].staged_row for name in (self.weights, self.head)]
        staged = max(max(36864 // size, 1) * size for size in row)
        tiles = max(self._tiles(n) for n in (self.vocab, self.hidden, 2 * self.ffn, self.qkv_rows))
        epilogues = 16 * (8 * tiles + 2 * self.rows * self._tiles(self.hidden))
        others = self.layers * _LAYER_BYTES + self.rows * (40 + 8 * _WARPS) + 1024 + epilogues
        slot = 16 * (_CHUNK + 64)
        if self.weights == "int4":
            others += FORMATS["int4"].held_chunks * _WARPS * self.rows * 16
            slot += _CHUNK
        return (SHARED_BYTES - max(attention, sums, staged) - others) // slot

    def _tiles(self, rows: int) -> int:
        """Tiles of a weight of so many rows that a block has, at most."""
        tiles = (rows + 15) // 16
        return -(-tiles // self.blocks)

    def refused(self) -> str | None:
        """Why no kernel can be made for this shape, or None."""
        weights, head = FORMATS[self.weights], FORMATS[self.head]
        tiles = 1 if self.rows <= 8 else 2
        if not 1 <= self.rows <= weights.max_rows:
            return f"steps of {self.rows} rows; the kernel takes 1 to {weights.max_rows} with {self.weights} weights"
        if self.head == "int4":
            return "a head in int4; the kernel takes it in fp8 and bf16"
        if self.head_dim not in (32, 64, 128):
            return f"heads of size {self.head_dim}; the kernel takes 32, 64 and 128"
        for name, k in (
            ("hidden size", self.hidden),
            ("feed-forward size", self.ffn),
            ("heads", self.heads * self.head_dim),
        ):
            if k % weights.multiple:
                return f"{name} of {k} elements; the kernel takes multiples of {weights.multiple}"
        if self.rows & (self.rows - 1):
            return f"steps of {self.rows} rows; the kernel takes powers of two"
        # Elements of a row that registers hold at a time; the norm needs whole rows.
        whole, of_head = (form.held_chunks // tiles * form.elements for form in (weights, head))
        if self.hidden > min(whole, of_head):
            return f"hidden size {self.hidden}; the kernel takes up to {min(whole, of_head)} with {self.rows} rows"
        few = self.rows == 1 if self.weights == "int4" else self.rows < 4
        plain = whole // 2 if not few else whole if self.weights == "int4" else whole * 3 // 4
        widest = max(self.ffn, self.heads * self.head_dim)
        if widest > plain and -(-self.hidden // 16) > 8 * self.blocks:
            return f"hidden size {self.hidden} is too large for the {self.blocks} multiprocessors"
        if self.slots < 4:
            return f"{self.layers} layers and {self.rows} rows leave too little shared memory"
        return None

    def macros(self) -> dict[str, str]:
        return {
            "ROWS": str(self.rows),
            "WEIGHTS": str(FORMATS[self.weights].number),
            "HEAD_WEIGHTS": str(FORMATS[self.head].number),
            "KV_FP8": str(int(self.kv_fp8)),
            "KV_BYTES": "1" if self.kv_fp8 else "2",
            "LAYERS": str(self.layers),
            "HIDDEN": str(self.hidden),
            "FFN": str(self.ffn),
            "HEADS": str(self.heads),
            "KV_HEADS": str(self.kv_heads),
            "HEAD_DIM": str(self.head_dim),
            "VOCAB": str(self.vocab),
            "PAGE_SIZE": str(self.page_size),
            "EPS": f"{self.eps!r}f",
            "SOFTMAX_SCALE": f"{self.head_dim**-0.5!r}f",
            "GRID": str(self.blocks),
            "RANKS": str(self.ranks),
            "SLOTS": str(self.slots),
            "SHARED_BYTES": str(SHARED_BYTES),
        }


@functools.cache
def unavailable() -> str | None:
    """Why this process cannot run such kernels at all, or None."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] not in (9, 10):
        return "the kernel is made for compute capability 9.0 and 10.x"
    return native_kernel.unavailable()


class DecodeKernel:
    """One compiled kernel. `launch` needs a GPU with as many free multiprocessors as `shape.blocks`: all of its blocks
    wait for each other, so the launch is cooperative."""

    def __init__(self, shape: DecodeShape) -> None:
        self.shape = shape
        self._kernel = load_kernel(_cubin(shape), "decode_step", SHARED_BYTES, torch.cuda.current_device())
        self._config = cuda_core().LaunchConfig(
            grid=shape.blocks, block=THREADS, shmem_size=SHARED_BYTES, is_cooperative=True
        )

    def launch(self, *tensors: torch.Tensor) -> None:
        """The kernel's arguments in order, all of them pointers, on torch's current stream; can be captured."""
        cuda_core().launch(current_stream(), self._config, self._kernel, *(tensor.data_ptr() for tensor in tensors))


def compile_all(shapes: Iterable[DecodeShape]) -> None:
    """Have the code of these kernels, so that making them is quick: what must be compiled is, side by side."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(_cubin, shapes))


def _cubin(shape: DecodeShape) -> bytes:
    # "a": instructions of exactly this architecture, here the dealing of registers among warps.
    return cubin("decode", kernel_source(), shape.macros(), "a")[1]


def kernel_source(*, emulated: bool = False) -> str:
    """All of the kernel, to be compiled with a shape's `macros`; `emulated`: without what needs a GPU's assembly."""
    return read_sources(*(f"persistent/{name}" for name in _SOURCES[1 if emulated else 0 :]))
