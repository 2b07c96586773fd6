"""x @ weight.T with 4-bit weights, by own CUDA C++ (`int4/linear.cu`): streams the weight at memory bandwidth, for few
rows of x. Compute capability 8.0 and newer.

A kernel is compiled for each config, group size and dtype (`native_kernel.py`). Launches go to torch's current stream
and can be captured; on Hopper they are programmatically dependent (`kernels/dependent_launch.py`) and read the first
weights, which never change, while the kernel in front still computes x. A workspace of each launch and counters taken
in turn keep several streams apart.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from appliance.kernels import native_kernel
from appliance.kernels.dependent_launch import launch_options
from appliance.kernels.int4_layout import PER_WORD
from appliance.kernels.native_kernel import Kernel, load, read_sources
from appliance.kernels.skinny_linear import arrival_counters, multiprocessors

MOST_COLUMN_TILES = 8  # of 8 rows of x; with more rows, a tile of the weight is multiplied more than once
_SMALLEST_SHARED_LIMIT = 99 << 10  # of compute capability 8.6, 8.9 and 12.x
_RESERVED = 1280  # bytes of shared memory of a block that are not stages


@dataclass(frozen=True, slots=True)
class Config:
    """How a product is cut up, see `int4/linear.cu`. Whatever the choice, results differ in rounding only."""

    warps: int  # of a block
    row_tiles: int  # of 16 weight rows, of a warp
    chunk: int  # inner positions of a stage, 256 or 512
    stages: int  # in shared memory, the one being multiplied counted
    per_sm: int  # blocks of a multiprocessor
    column_tiles: int = 0  # of 8 rows of x; 0: what the rows of x need
    split: int = 0  # shares of a tile, each a block of a cluster, on Hopper; 0: work is dealt out evenly

    @property
    def name(self) -> str:
        """Says what it is, for people and for tables of tactics."""
        columns = f"x{8 * self.column_tiles}" if self.column_tiles else ""
        split = f" split{self.split}" if self.split else ""
        return (
            f"{self.rows}{columns}{split} warps{self.warps} chunk{self.chunk} stages{self.stages} blocks{self.per_sm}"
        )

    @property
    def rows(self) -> int:
        """Weight rows of a tile."""
        return 16 * self.row_tiles * self.warps

    def resolved(self, m: int) -> Config:
        """With the column tiles that m rows of x need, a power of two."""
        if self.column_tiles:
            return self
        needed = 1 << (-(-m // 8) - 1).bit_length()
        return replace(self, column_tiles=min(needed, MOST_COLUMN_TILES))

    def shared_bytes(self, m: int, group: int) -> int:
        """Of a block: stages with weights, x and scales; in their place in the end sums."""
        span = 128 if group % 128 == 0 else 64 if group % 64 == 0 else 32
        rows_of_x = 8 * self.resolved(m).column_tiles
        stages = self.stages * self.chunk * (self.rows // 2 + 2 * rows_of_x + self.rows * 4 // span)
        return max(stages, rows_of_x * (self.rows + 4) * 4 if self.split else 0)

    def fits(self, m: int, group: int, shared_limit: int) -> bool:
        """Whether a kernel can be made: copies are dealt to threads evenly, registers suffice, shared memory too."""
        columns, threads = 8 * self.resolved(m).column_tiles, 32 * self.warps
        x_rows_at_once = threads // (self.chunk // 8)
        even = x_rows_at_once >= 2 and columns % x_rows_at_once == 0 and threads // (self.chunk // 32) % 8 == 0
        registers = 64 + columns // 2 * self.row_tiles + 32 * self.row_tiles
        return (
            even
            and registers * threads * self.per_sm <= 65536
            and self.per_sm * (self.shared_bytes(m, group) + _RESERVED) <= shared_limit + 1024
        )


# Worth timing, the default of each number of column tiles (1, 2, 4, 8) first; the last ones fit multiprocessors with
# little shared memory.
CONFIGS: Mapping[int, tuple[Config, ...]] = {
    1: (
        Config(8, 1, 256, 4, 2),
        Config(8, 1, 256, 5, 2),
        Config(4, 1, 512, 4, 2),
        Config(4, 1, 256, 4, 4),
        Config(4, 1, 256, 5, 3),
        Config(4, 2, 256, 4, 2),
        Config(4, 2, 256, 3, 3),
        Config(8, 1, 512, 5, 1),
        Config(8, 2, 256, 5, 1),
        Config(16, 1, 512, 2, 1),
        Config(4, 1, 256, 4, 1),
    ),
    2: (
        Config(8, 1, 256, 4, 2),
        Config(4, 1, 512, 3, 2),
        Config(4, 1, 256, 3, 4),
        Config(4, 2, 256, 4, 2),
        Config(8, 2, 256, 5, 1),
        Config(8, 1, 512, 4, 1),
        Config(16, 1, 256, 5, 1),
        Config(4, 1, 256, 4, 1),
    ),
    4: (
        Config(4, 2, 256, 3, 2),
        Config(8, 1, 256, 3, 2),
        Config(8, 2, 256, 4, 1),
        Config(4, 1, 256, 4, 2),
        Config(4, 4, 256, 4, 1),
        Config(8, 1, 256, 6, 1),
        Config(16, 1, 256, 4, 1),
        Config(4, 1, 256, 3, 1),
    ),
    8: (
        Config(8, 2, 256, 3, 1),
        Config(4, 2, 256, 2, 2),
        Config(4, 2, 256, 4, 1),
        Config(8, 1, 256, 4, 1),
        Config(8, 1, 256, 2, 2),
        Config(4, 4, 256, 3, 1),
        Config(8, 2, 256, 3, 1, 4),
        Config(4, 1, 256, 2, 1),
    ),
}


@functools.cache
def unavailable(index: int) -> str | None:
    """Why the kernel cannot run on the GPU of that index, or None."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability(index) < (8, 0):
        return "the kernel is made for compute capability 8.0 and newer"
    return native_kernel.unavailable()


def takes(group: int, device: torch.device) -> bool:
    """Whether weights in groups of that size can be multiplied on `device`."""
    return device.type == "cuda" and group % 32 == 0 and unavailable(device.index or 0) is None


def candidates(m: int, group: int, device: torch.device) -> list[Config]:
    """Configs worth timing for m rows of x, the default first."""
    columns = Config(8, 1, 256, 4, 2).resolved(m).column_tiles
    limit = shared_limit(device.index or 0)
    return [config for config in CONFIGS[columns] if config.fits(m, group, limit)] or [Config(4, 1, 256, 2, 1)]


# Blocks with a share of a tile, worth timing for up to 8 and up to 16 rows of x, those that were quickest on an H200:
# warps, row tiles, chunk, blocks of a multiprocessor. On Hopper the first one is the default.
_CLUSTERED = {
    1: ((8, 2, 256, 1), (4, 2, 256, 3), (4, 1, 256, 4)),
    2: ((8, 2, 256, 1), (4, 2, 256, 2), (4, 1, 256, 4)),
}
# The others that were quickest there for some product.
_HOPPER = {
    1: (Config(16, 1, 512, 2, 1), Config(4, 2, 256, 3, 3)),
    2: (Config(8, 1, 512, 4, 1), Config(4, 2, 256, 4, 2)),
    4: (Config(8, 1, 256, 6, 1),),
    8: (),
}
_SPLITS = (1, 2, 3, 4, 5, 6, 8)  # blocks of a cluster; 8 is what every Hopper GPU can have


def hopper_candidates(n: int, k: int, m: int, group: int, sms: int, limit: int) -> list[Config]:
    """Configs worth timing for x [m, k] and weight [n, k] on Hopper, the default first; none with more rows than the
    kernel is quick for. `sms`: multiprocessors; `limit`: bytes of shared memory that a block can have."""
    columns = Config(8, 1, 256, 4, 2).resolved(m).column_tiles
    found: list[Config] = []
    for warps, row_tiles, chunk, per_sm in _CLUSTERED.get(columns, ()):
        chunks, fitting = -(-k // chunk), []
        for split in _SPLITS:
            for stages in range(-(-chunks // split) + 1, 2, -1):  # all of a share at once, if there is room
                config = Config(warps, row_tiles, chunk, min(stages, 10), per_sm, split=split)
                if split <= chunks and config.fits(m, group, limit):
                    fitting.append(config)
                    break
        found += sorted(fitting, key=lambda config: _busiest(config, n, k, m, sms))[:2]
    return found + [config for config in _HOPPER[columns] if config.fits(m, group, limit)]


@functools.cache
def default_config(n: int, k: int, m: int, group: int, device: torch.device) -> Config:
    """Where nothing was timed."""
    if torch.cuda.get_device_capability(device) == (9, 0):
        found = hopper_candidates(n, k, m, group, multiprocessors(device), shared_limit(device.index or 0))
        if found:
            return found[0]
    return candidates(m, group, device)[0]


def usable_multiprocessors(sms: int, split: int) -> int:
    """Those of a Hopper GPU that blocks of clusters of `split` can fill at once: a cluster lies within a part of the
    GPU (GPC), whose multiprocessors are no multiple of most cluster sizes. Measured on an H200: with 96 blocks, one a
    multiprocessor, clusters of 3 to 6 run at once, with 120 or 128 in clusters of 4, 5 or 8 they do not."""
    return sms if split <= 2 else sms * 7 // 8


def _busiest(config: Config, n: int, k: int, m: int, sms: int) -> float:
    """Cost of the multiprocessor that has most to do, in weight rows by chunks of 256 positions, with what a block
    costs in itself: for the choice among splits."""
    blocks = -(-n // config.rows) * -(-m // (8 * config.resolved(m).column_tiles)) * config.split
    usable = usable_multiprocessors(sms, config.split) if config.per_sm == 1 else sms  # several find room more easily
    waves, rest = divmod(blocks, usable * config.per_sm)
    share = -(-k // (256 * config.split)) + 1 + (config.split > 1)
    return (waves * config.per_sm + -(-rest // usable)) * config.rows * share


@functools.cache
def shared_limit(index: int) -> int:
    """Bytes of shared memory that a block can have."""
    properties = torch.cuda.get_device_properties(index)
    return int(getattr(properties, "shared_memory_per_block_optin", _SMALLEST_SHARED_LIMIT))


def stream_linear(
    x: Tensor, weight: Tensor, scale_zero: Tensor, bias: Tensor | None, config: Config | None = None
) -> Tensor:
    """x @ weight.T + bias, [m, n] in x's dtype: values less zero points exact, the rest in float32, rounded once.

    x [m, k], bfloat16 or float16, m >= 1; rows may be strided, and are copied if they are not 16-byte aligned. weight
    int32 [n, k // 8] and scale_zero float16 [n, groups, 2] as in `int4_layout.py`, contiguous, groups of a multiple of
    32 positions. bias [n] in x's dtype, or None. Does not synchronize; capturable after one call outside.
    """
    (m, k), n = x.shape, weight.shape[0]
    group = k // scale_zero.shape[1]
    assert m >= 1 and weight.shape[1] * PER_WORD == k and group * scale_zero.shape[1] == k and group % 32 == 0
    assert weight.is_contiguous() and scale_zero.is_contiguous()
    assert bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous()
    config = (config or default_config(n, k, min(m, 8 * MOST_COLUMN_TILES), group, x.device)).resolved(m)
    columns = 8 * config.column_tiles
    tiles = -(-n // config.rows) * -(-m // columns)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    partial = counters = None
    if config.split:
        blocks = tiles * config.split
    else:
        blocks = min(config.per_sm * multiprocessors(x.device), tiles * -(-k // config.chunk))
        partial = torch.empty(blocks * 2 * config.rows * columns, dtype=torch.float32, device=x.device)
        counters = arrival_counters(x.device, tiles)
    kernel = _kernel(config, group, x.dtype, x.device.index or 0)
    pointers = [0 if t is None else t.data_ptr() for t in (weight, scale_zero, x, bias, out, partial, counters)]
    kernel.launch(blocks, bool(launch_options(x.device)["PDL"]), (*pointers, m, n, k, x.stride(0)))
    return out


@functools.cache
def _kernel(config: Config, group: int, dtype: torch.dtype, index: int) -> Kernel:
    shared = config.shared_bytes(8 * config.column_tiles, group)
    return load("int4", source(), macros(config, group, dtype), 32 * config.warps, shared, index, "int4_linear")


def macros(config: Config, group: int, dtype: torch.dtype) -> dict[str, int]:
    """The kernel's compile-time constants; `config` has its column tiles."""
    assert config.column_tiles and dtype in (torch.bfloat16, torch.float16)
    return {
        "BF16": int(dtype == torch.bfloat16),
        "GROUP": group,
        "COLUMN_TILES": config.column_tiles,
        "ROW_TILES": config.row_tiles,
        "WARPS": config.warps,
        "CHUNK": config.chunk,
        "STAGES": config.stages,
        "BLOCKS_PER_SM": config.per_sm,
        "SPLIT": config.split,
    }


@functools.cache
def source() -> str:
    return read_sources(
        "dependent_launch.cuh",
        *(f"int4/{name}" for name in ("primitives.cuh", "cluster.cuh", "shares.cuh", "linear.cu")),
    )
