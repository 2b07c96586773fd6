"""How a group of GPUs adds up its numbers: own kernels over each other's memory, or the library, by what was timed.

Makes the workspace (torch's symmetric memory, no multicast), says why there is none where GPUs cannot read each other's
memory, and asks `TABLE`, like products do, which way serves how many rows. All ranks make the same choices: timings are
put together over the ranks (`all_reduce_tuning.py`). The kernels are those of `all_reduce.py`, `exchange.py` and
`sharded_draw.py`, and with a norm behind the sum those of `sum_norm.py`, or, where these cannot be, of
`all_reduce_norm.py`; who the ranks are, and the library's all-reduce, come in as a `Group`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from appliance.kernels import all_reduce_check, all_reduce_tuning, norm, sum_norm_group
from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.all_reduce import FLAG_BYTES, MAX_SLOTS, SIZES, Workspace, all_reduce_, workspace_bytes
from appliance.kernels.all_reduce_norm import all_reduce_rms_norm, all_reduce_rms_norm_quantize
from appliance.kernels.all_reduce_tuning import key
from appliance.kernels.deferred_scale import Product, materialize
from appliance.kernels.exchange import exchange, exchange_fits
from appliance.kernels.partial_sum import whole_stream
from appliance.kernels.peer_access import no_access
from appliance.kernels.peer_memory import agree, share
from appliance.kernels.sharded_draw import best_tokens, best_tokens_fit
from appliance.kernels.skinny_linear import multiprocessors
from appliance.kernels.sum_norm import MOST_ONE_SHOT, Launch, Way
from appliance.kernels.sum_norm_group import CLUSTER_DEALT, CLUSTER_ONE_SHOT, WAYS, Norms, SumNorms
from appliance.kernels.tactics import TABLE, TimedChoice, Timer

log = logging.getLogger(__name__)

ONE_SHOT, TWO_SHOT = "one-shot", "two-shot"
LIBRARY = "library"  # as a tactic of all-reduces
SEPARATE = "separate"  # as a tactic of norms: an all-reduce by its own tactic, then the norm
_REGION_BYTES = 128 << 10  # of a slot, so messages up to 16 MiB on GPUs with 128 multiprocessors or more
# Where nothing was timed: up to so many bytes one-shot, by number of ranks (H200s with NVLink, µs of one- and two-shot
# at 128 KB: 7.9 and 7.4 of two ranks, 8.9 and 9.0 of four; at 512 KB 9.9 and 7.9, 13.1 and 9.7).
_ONE_SHOT_BYTES = {2: 128 << 10, 4: 128 << 10, 8: 64 << 10}


class Group(Protocol):
    """The library's collective operations; those of `distributed.Collectives` that are needed here."""

    @property
    def process_group(self) -> torch.distributed.ProcessGroup | None:
        """Torch's; None: the default one."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum, perhaps over x."""

    def all_gather(self, x: Tensor) -> Tensor:
        """x [n, k] of every rank: [size, n, k]."""

    def minimum(self, value: int) -> int:
        """The smallest of the ranks' numbers."""


class AllReduce:
    """All-reduce, alone or in front of a norm (a `partial_sum.Reducer`). All ranks call the same in the same order;
    enqueues only, on the current stream, always the same one at a time; capturable in CUDA graphs."""

    def __init__(self, group: Group, workspace: Workspace) -> None:
        self._group = group
        self._workspace = workspace
        self._forced: str | None = None
        self.on_abort: list[Callable[[], None]] = []  # of others that wait for ranks
        self._sums: SumNorms | None = None

    @property
    def workspace(self) -> Workspace:
        return self._workspace

    @property
    def rank(self) -> int:
        return self._workspace.rank

    @property
    def size(self) -> int:
        return self._workspace.size

    @property
    def device(self) -> torch.device:
        return self._workspace.addresses.device

    @property
    def sums(self) -> SumNorms | None:
        """Norms behind sums in one kernel, for rows that it `fits`."""
        return self._sums

    # -------------------------------------------------- use

    def all_reduce(self, x: Tensor) -> Tensor:
        """x [n, k]: the sum, perhaps over x. Own kernels round once, the library after each summand."""
        tactic = self._tactic(x)
        if tactic == LIBRARY or not x.is_contiguous():
            return self._group.all_reduce(x)
        if not self._workspace.fits(x):
            return self._in_pieces(x)
        return all_reduce_(x, self._workspace, two_shot=tactic == TWO_SHOT)

    def rms_norm(self, x: Product, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        way = self._norm_tactic(x, residual)
        if self._sums is not None and way in WAYS:
            return self._sums.rms_norm(Launch(WAYS[way]), x, residual, weight, eps)
        residual = whole_stream(residual)
        if way == SEPARATE:
            return norm.rms_norm(self.all_reduce(materialize(x, x.dtype)), residual, weight, eps)
        return all_reduce_rms_norm(x, residual, weight, eps, self._workspace, two_shot=way == TWO_SHOT)

    def rms_norm_quantize(
        self, x: Product, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, scale: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        way, space = self._norm_tactic(x, residual), self._workspace
        if self._sums is not None and way in WAYS:
            return self._sums.rms_norm_quantize(Launch(WAYS[way]), x, residual, weight, eps, dtype, scale)
        residual = whole_stream(residual)
        if way == SEPARATE:
            total = self.all_reduce(materialize(x, x.dtype))
            return norm.rms_norm_quantize(total, residual, weight, eps, dtype, scale)
        return all_reduce_rms_norm_quantize(x, residual, weight, eps, space, dtype, scale, two_shot=way == TWO_SHOT)

    def fuses(self, x: Product) -> bool:
        """As of `partial_sum.Reducer`."""
        return self._sums is not None and not TABLE.batch_invariant and self._sums.space.fits(x, Way.DEALT)

    def _in_pieces(self, x: Tensor) -> Tensor:
        """Two-shot, as many rows at a time as fit."""
        rows = max(1, self._workspace.capacity // (x.shape[1] * x.dtype.itemsize))
        for part in x.split(rows):
            all_reduce_(part, self._workspace, two_shot=True)
        return x

    def _tactic(self, x: Tensor) -> str:
        chosen = self._forced if self._forced in (LIBRARY, ONE_SHOT, TWO_SHOT) else self._chosen("all_reduce", x)
        if not self._workspace.fits(x):
            # Not the library's, where a row's sum must not depend on how many rows there are.
            return TWO_SHOT if chosen == TWO_SHOT or TABLE.batch_invariant else LIBRARY
        if chosen in (ONE_SHOT, TWO_SHOT):
            return chosen
        return self._default(x) if chosen != LIBRARY or TABLE.batch_invariant else LIBRARY

    def _norm_tactic(self, x: Product, residual: Tensor) -> str:
        # A row's norm has the same bits for any number of rows if it is always the same kernel that makes it.
        if x.dtype != residual.dtype or TABLE.batch_invariant:
            return SEPARATE
        chosen, ways = self._forced or self._chosen("all_reduce_norm", x), self.norm_ways(x)
        if chosen in ways:
            return chosen
        if CLUSTER_DEALT in ways:
            return CLUSTER_ONE_SHOT if x.shape[0] <= MOST_ONE_SHOT else CLUSTER_DEALT
        return self._default(x) if TWO_SHOT in ways and x.shape[0] <= self._workspace.slots else SEPARATE

    def norm_ways(self, x: Product) -> list[str]:
        """Tactics for a norm behind the sum of x. Where clusters of blocks can be launched they always beat the kernels
        that read their peers' memory (four H200s, 8 to 1024 rows of 8192: by a quarter to two fifths)."""
        if self._sums is not None and (fused := self._sums.tactics(x)):
            return [SEPARATE, *fused]
        return [SEPARATE, ONE_SHOT, TWO_SHOT] if self._workspace.fits_fused(x) else [SEPARATE]

    def sum_ways(self, x: Tensor) -> list[str]:
        """Tactics for the sum of x."""
        return [LIBRARY, ONE_SHOT, TWO_SHOT] if self._workspace.fits(x) else [LIBRARY, TWO_SHOT]

    def _chosen(self, kind: str, x: Product) -> str | None:
        return TABLE.chosen(key(kind, x.dtype), x.shape[1], self._workspace.size, x.shape[0])

    def _default(self, x: Product) -> str:
        few = x.shape[0] * x.shape[1] * x.dtype.itemsize <= _ONE_SHOT_BYTES[self._workspace.size]
        return ONE_SHOT if few else TWO_SHOT

    # -------------------------------------------------- norms behind sums

    def connect_norms(self, norms: Norms) -> None:
        """Let norms be made by the kernels of `sum_norm.py`, where they can be. Called by all ranks."""
        group, device = self._group, self.device
        self.use_sums(sum_norm_group.connect(group, self.rank, self.size, device, norms, self.gather))

    def use_sums(self, sums: SumNorms | None) -> None:
        """For norms, instead of the kernels that read their peers' memory."""
        if sums is not None:
            self.on_abort.append(sums.space.stop)
        self._sums = sums

    # -------------------------------------------------- what is not a sum

    def all_gather(self, x: Tensor) -> Tensor | None:
        """x [n, k] of every rank: [size, n, k]. None: too much for own kernels."""
        if not exchange_fits(x.numel() * x.dtype.itemsize, self._workspace):
            return None
        return exchange(x.contiguous(), self._workspace, to_each=False)

    def gather(self, x: Tensor) -> Tensor:
        """`all_gather` of however much."""
        found = self.all_gather(x)
        return self._group.all_gather(x) if found is None else found

    def all_to_all(self, x: Tensor) -> Tensor | None:
        """x [size, n, k], of which part r is for rank r: what each rank had for this one, [size, n, k]. None: too much
        for own kernels."""
        if not exchange_fits(x.numel() * x.dtype.itemsize // self._workspace.size, self._workspace):
            return None
        return exchange(x.contiguous(), self._workspace, to_each=True)

    def best_tokens(self, scores: Tensor, tokens: Tensor) -> Tensor | None:
        """`sharded_draw.best_tokens`. None: too many rows."""
        return best_tokens(scores, tokens, self._workspace) if best_tokens_fit(len(scores), self._workspace) else None

    def abort(self) -> None:
        """Let kernels that wait for ranks that are gone go on, with rubbish. From any thread; once."""
        for release in self.on_abort:
            release()
        flags = self._workspace.owner.memory[:FLAG_BYTES].view(torch.int32)
        with torch.cuda.device(flags.device), torch.cuda.stream(torch.cuda.Stream(flags.device)):
            flags.add_(1 << 30)

    # -------------------------------------------------- timing

    def known(self, hidden: int, dtype: torch.dtype) -> bool:
        """Whether `TABLE` has choices for rows of `hidden` numbers."""
        return TABLE.chosen(key("all_reduce", dtype), hidden, self._workspace.size, 1) is not None

    def tune(
        self, hidden: int, dtype: torch.dtype, timer: Timer, quantized: torch.dtype | None = None
    ) -> list[TimedChoice]:
        """`all_reduce_tuning.tune`, by all ranks together; the choices are in `TABLE` afterwards."""
        return all_reduce_tuning.tune(self, hidden, dtype, timer, quantized)

    @contextmanager
    def by(self, way: str) -> Iterator[None]:
        """All-reduces, or norms behind them, go this way."""
        self._forced = way
        try:
            yield
        finally:
            self._forced = None

    def slowest(self, value: float) -> float:
        """The largest of the ranks' numbers. Waits for the device."""
        every = self._group.all_gather(torch.tensor([[value]], dtype=torch.float32, device=self.device))
        return float(every.max())


# ---------------------------------------------------------------- setting up


_connected = False  # of this process


def connect(group: Group, rank: int, size: int, device: torch.device) -> AllReduce | None:
    """The group's own all-reduce; None, with a line in the log that says why, where the library has to do. Called by
    all ranks once torch's default process group is theirs; enqueues on the current stream and waits for it."""
    global _connected
    reason = _refusal(group, rank, size, device)
    if reason is None and _connected:
        # torch would take the second group of a process for its first, since both have the same name.
        reason = f"the process of rank {rank} has been in a group with shared memory before"
    reason = agree(group, rank, size, reason)
    if reason is None:
        _connected = True
        found: AllReduce | None = None
        try:
            workspace = _workspace(group, rank, size, device)
            found = AllReduce(group, workspace)
        except RuntimeError as error:
            reason = f"torch gives no memory that GPUs share: {str(error).splitlines()[0]}"
        reason = agree(group, rank, size, reason)
        if reason is None and found is not None:
            reason = agree(group, rank, size, all_reduce_check.check(found.workspace, device))
            if reason is None:
                return found
    if reason:
        log.warning("all-reduce by NCCL only: %s", reason)
    return None


def _refusal(group: Group, rank: int, size: int, device: torch.device) -> str | None:
    """Why own kernels cannot serve these ranks, as far as this one sees."""
    if size not in SIZES:
        return f"own kernels are made for {', '.join(map(str, SIZES))} ranks, these are {size}"
    reason = no_access(group, rank, device)
    return reason if HAS_TRITON else "Triton is not installed"


def _workspace(group: Group, rank: int, size: int, device: torch.device) -> Workspace:
    """RuntimeError where torch cannot map it."""
    slots = group.minimum(min(MAX_SLOTS, multiprocessors(device)))
    epochs = torch.zeros(slots, dtype=torch.int32, device=device)
    shared = share(group, rank, workspace_bytes(slots, _REGION_BYTES), device)
    addresses = torch.tensor(shared.addresses, dtype=torch.int64, device=device)
    return Workspace(rank, size, addresses, epochs, _REGION_BYTES, shared)
