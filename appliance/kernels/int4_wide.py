"""x @ weight.T with 4-bit weights on Hopper, by own CUDA C++ (`int4/wide.cu`), for up to some hundred rows of x.

The products are the warpgroups' of compute capability 9.0, with weights that become 16-bit numbers in registers; shares
of the inner dimension are added up within clusters of blocks, in their order. Compiled and launched like the kernel for
few rows on any GPU (`int4_native.py`), dependent launch included; needs no workspace.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from appliance.kernels.dependent_launch import launch_options
from appliance.kernels.int4_layout import PER_WORD
from appliance.kernels.int4_native import shared_limit, unavailable, usable_multiprocessors
from appliance.kernels.native_kernel import Kernel, load, read_sources
from appliance.kernels.skinny_linear import multiprocessors

MOST_COLUMNS = 128  # rows of x of a tile: with more, a thread's registers do not hold the sums
_SPLITS = (1, 2, 3, 4, 5, 6, 8)  # blocks of a cluster; 8 is what every Hopper GPU can have
_MOST_STAGES = 16
_RESERVED = 1024  # bytes of shared memory that each block has beside its own


@dataclass(frozen=True, slots=True)
class WideConfig:
    """How a product is cut up, see `int4/wide.cu`. Whatever the choice, results differ in rounding only."""

    warpgroups: int  # of a block, each with 64 weight rows
    columns: int  # rows of x of a tile
    chunk: int  # inner positions of a stage, 64, 128 or 256
    stages: int  # in shared memory, the two being multiplied counted
    split: int  # shares of the inner dimension, the blocks of a cluster
    per_sm: int  # blocks of a multiprocessor

    @property
    def name(self) -> str:
        """Says what it is, for people and for tables of tactics."""
        tile = f"{self.rows}x{self.columns} split{self.split}"
        return f"{tile} chunk{self.chunk} stages{self.stages} blocks{self.per_sm}"

    @property
    def rows(self) -> int:
        """Weight rows of a tile."""
        return 64 * self.warpgroups

    def stage_bytes(self, group: int) -> int:
        """x, weight and scales of a chunk."""
        spans = self.chunk // min(group & -group, self.chunk)
        size = self.chunk * (2 * self.columns + self.rows // 2) + self.rows * spans * 4
        return -(-size // 1024) * 1024

    def shared_bytes(self, group: int) -> int:
        """Of a block: its stages, and in their place in the end its sums."""
        return max(self.stages * self.stage_bytes(group), self.columns * (self.rows + 4) * 4)

    def macros(self, group: int, dtype: torch.dtype) -> dict[str, int]:
        """The kernel's compile-time constants."""
        assert dtype in (torch.bfloat16, torch.float16)
        return {
            "BF16": int(dtype == torch.bfloat16),
            "GROUP": group,
            "COLUMNS": self.columns,
            "WARPGROUPS": self.warpgroups,
            "CHUNK": self.chunk,
            "STAGES": self.stages,
            "SPLIT": self.split,
            "BLOCKS_PER_SM": self.per_sm,
        }


# Blocks worth timing by rows of x of a tile, those that were quickest on an H200 or may be: (warpgroups, chunk,
# blocks of a multiprocessor), and of how many splits each.
_BLOCKS: dict[int, tuple[tuple[tuple[int, int, int], ...], int]] = {
    8: (((4, 256, 1),), 1),
    16: (((1, 128, 4), (4, 256, 1)), 2),
    32: (((2, 128, 2), (4, 128, 1), (1, 128, 3), (4, 256, 1)), 1),
    64: (((4, 128, 1), (2, 128, 2), (2, 256, 1)), 1),
    128: (((4, 128, 1), (2, 128, 1), (2, 64, 2)), 1),
}


def takes(group: int, device: torch.device) -> bool:
    """Whether weights in groups of that size can be multiplied on `device`."""
    if device.type != "cuda" or group % 32 or unavailable(device.index or 0) is not None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def columns_for(m: int) -> int:
    """Rows of x of a tile where x has m."""
    return max(8, min(1 << (m - 1).bit_length(), MOST_COLUMNS))


def staged(
    warpgroups: int, columns: int, chunk: int, per_sm: int, split: int, k: int, group: int, limit: int
) -> WideConfig | None:
    """The config with as many stages as fit, or as a share needs; None if that is too few."""
    config = WideConfig(warpgroups, columns, chunk, 4, split, per_sm)
    room = min((limit + _RESERVED) // per_sm - _RESERVED, limit)
    chunks = -(-k // chunk)
    needed = -(-chunks // split) + 2
    stages = min(room // config.stage_bytes(group), max(needed, 4), _MOST_STAGES)
    config = WideConfig(warpgroups, columns, chunk, stages, split, per_sm)
    return config if stages >= 4 and config.shared_bytes(group) <= room else None


def _cost(config: WideConfig, n: int, k: int, m: int, sms: int) -> float:
    """Of the busiest multiprocessor, in 64 weight rows by 128 positions, with what a block costs in itself: for the
    choice among splits only."""
    blocks = -(-n // config.rows) * -(-m // config.columns) * config.split
    usable = usable_multiprocessors(sms, config.split)
    waves, rest = divmod(blocks, usable * config.per_sm)
    at_once = waves * config.per_sm + -(-rest // usable)
    share = -(-k // (128 * config.split))
    return at_once * config.warpgroups * (share + 2 + (2 if config.split > 1 else 0))


def candidates(n: int, k: int, m: int, group: int, sms: int, limit: int) -> list[WideConfig]:
    """Configs worth timing for x [m, k] and weight [n, k], the default first. `limit`: bytes of shared memory that a
    block can have; `sms`: multiprocessors."""
    columns = columns_for(m)
    blocks, splits_each = _BLOCKS[columns]
    found: list[WideConfig] = []
    for warpgroups, chunk, per_sm in blocks:
        splits = [staged(warpgroups, columns, chunk, per_sm, split, k, group, limit) for split in _SPLITS]
        fitting = [config for config in splits if config is not None and config.split * 2 * chunk <= k]
        found += sorted(fitting, key=lambda config: _cost(config, n, k, m, sms))[:splits_each]
    if not found:  # a short inner dimension
        smallest = staged(1, columns, 64, 1, 1, k, group, limit)
        assert smallest is not None
        return [smallest]
    best = min(found, key=lambda config: _cost(config, n, k, m, sms))
    return [best, *(config for config in found if config != best)]


@functools.cache
def default_config(n: int, k: int, m: int, group: int, sms: int, limit: int) -> WideConfig:
    """Where nothing was timed."""
    return candidates(n, k, m, group, sms, limit)[0]


def wide_linear(
    x: Tensor, weight: Tensor, scale_zero: Tensor, bias: Tensor | None, config: WideConfig | None = None
) -> Tensor:
    """x @ weight.T + bias, [m, n] in x's dtype: values less zero points exact, scales and products with them rounded to
    x's dtype, summed in float32. Arguments as of `int4_native.stream_linear`, any number of rows from 1. Does not
    synchronize; capturable after one call outside."""
    (m, k), n = x.shape, weight.shape[0]
    group = k // scale_zero.shape[1]
    assert m >= 1 and weight.shape[1] * PER_WORD == k and group * scale_zero.shape[1] == k and group % 32 == 0
    assert weight.is_contiguous() and scale_zero.is_contiguous()
    assert bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous()
    index = x.device.index or 0
    if config is None:
        rows = min(columns_for(m), m) if m <= MOST_COLUMNS else m
        config = default_config(n, k, rows, group, multiprocessors(x.device), shared_limit(index))
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    blocks = -(-n // config.rows) * -(-m // config.columns) * config.split
    kernel = _kernel(config, group, x.dtype, index)
    pointers = [0 if t is None else t.data_ptr() for t in (weight, scale_zero, x, bias, out)]
    kernel.launch(blocks, bool(launch_options(x.device)["PDL"]), (*pointers, m, n, k, x.stride(0)))
    return out


@functools.cache
def source() -> str:
    return read_sources(
        "dependent_launch.cuh",
        *(f"int4/{name}" for name in ("primitives.cuh", "cluster.cuh", "shares.cuh", "warpgroup.cuh", "wide.cu")),
    )


@functools.cache
def _kernel(config: WideConfig, group: int, dtype: torch.dtype, index: int) -> Kernel:
    macros, threads = config.macros(group, dtype), 128 * config.warpgroups
    return load("int4", source(), macros, threads, config.shared_bytes(group), index, "int4_linear", "a")
