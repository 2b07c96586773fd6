"""How a group of GPUs adds up its numbers: own kernels over each other's memory, or the library, by what was timed.

Makes the workspace (torch's symmetric memory, no multicast), says why there is none where GPUs cannot read each other's
memory, and asks `TABLE`, like products do, which way serves how many rows. All ranks make the same choices: timings are
put together over the ranks. The kernels are those of `all_reduce.py`, `all_reduce_norm.py`, `exchange.py` and
`sharded_draw.py`; who the ranks are, and the library's all-reduce, come in as a `Group`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from appliance.kernels import copy_engines, norm, sum_norm_group
from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.all_reduce import (
    FLAG_BYTES,
    MAX_SLOTS,
    SIZES,
    Workspace,
    all_reduce_,
    all_reduce_reference,
    workspace_bytes,
)
from appliance.kernels.all_reduce_norm import (
    all_reduce_rms_norm,
    all_reduce_rms_norm_quantize,
    all_reduce_rms_norm_reference,
)
from appliance.kernels.all_reduce_push import MISSING, PushSpace, push_bytes, push_rms_norm, push_rms_norm_quantize
from appliance.kernels.copy_sums import CopySums
from appliance.kernels.deferred_scale import Product, materialize
from appliance.kernels.exchange import exchange, exchange_fits
from appliance.kernels.partial_sum import whole_stream
from appliance.kernels.peer_access import no_access
from appliance.kernels.peer_memory import agree, share
from appliance.kernels.sharded_draw import best_tokens, best_tokens_fit
from appliance.kernels.skinny_linear import multiprocessors
from appliance.kernels.sum_norm_group import WAYS, SumNorms
from appliance.kernels.tactics import ROW_BUCKETS, TABLE
from appliance.kernels.weight_prefetch import Ahead

log = logging.getLogger(__name__)

ONE_SHOT, TWO_SHOT = "one-shot", "two-shot"
TWO_SHOT_PUSH = "two-shot push"  # as a tactic of norms
LIBRARY = "library"  # as a tactic of all-reduces
SEPARATE = "separate"  # as a tactic of norms: an all-reduce by its own tactic, then the norm
_REGION_BYTES = 128 << 10  # of a slot, so messages up to 16 MiB on GPUs with 128 multiprocessors or more
# Where nothing was timed: up to so many bytes one-shot, by number of ranks (H200s with NVLink, µs of one- and two-shot
# at 128 KB: 7.9 and 7.4 of two ranks, 8.9 and 9.0 of four; at 512 KB 9.9 and 7.9, 13.1 and 9.7).
_ONE_SHOT_BYTES = {2: 128 << 10, 4: 128 << 10, 8: 64 << 10}
_CHECK_SHAPES = ((1, 512), (67, 4096))  # less than a tile; several slots
_PUSH_COLUMNS = 1024
COPY_SUMS = False  # sums in the background by copy engines
CLUSTER_NORMS = False  # norms by clusters of blocks
_MEMORY_OF_PROBES = 64 << 20  # bytes; messages beyond are the library's

Timer = Callable[[Sequence[Callable[[], object]], int], float]  # (calls, launches) -> µs of a call, in a CUDA graph


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


@dataclass(frozen=True)
class TimedChoice:
    """One row count's winner; µs are those of the slowest rank. Fields as of a manifest's tactic."""

    product: str
    scheme: str
    out_features: int  # hidden size
    in_features: int  # ranks
    rows: int
    tactic: str
    microseconds: float
    runner_up: str
    runner_up_microseconds: float


def key(kind: str, dtype: torch.dtype) -> str:
    """What `TABLE` calls an operation: `kind` "all_reduce" or "all_reduce_norm"."""
    return f"{kind} {str(dtype).removeprefix('torch.')}"


class AllReduce:
    """All-reduce, alone or in front of a norm (a `partial_sum.Reducer`). All ranks call the same in the same order;
    enqueues only, on the current stream, always the same one at a time; capturable in CUDA graphs."""

    def __init__(self, group: Group, workspace: Workspace, push: PushSpace | None = None) -> None:
        self._group = group
        self._workspace = workspace
        self._push = push
        self._forced: str | None = None
        self.on_abort: list[Callable[[], None]] = []  # of others that wait for ranks
        self._copies: CopySums | None = None
        self._sums: SumNorms | None = None

    @property
    def workspace(self) -> Workspace:
        return self._workspace

    @property
    def push(self) -> PushSpace | None:
        return self._push

    @property
    def copies(self) -> CopySums | None:
        """What adds up in the background; None: the library."""
        return self._copies

    @property
    def sums(self) -> SumNorms | None:
        """Further tactics of norms."""
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

    def rms_norm(
        self, x: Product, residual: Tensor, weight: Tensor, eps: float, ahead: Ahead | None = None
    ) -> tuple[Tensor, Tensor]:
        way = self._norm_tactic(x, residual)
        if self._sums is not None and way in WAYS:
            return self._sums.rms_norm(way, x, residual, weight, eps, ahead)
        residual = whole_stream(residual)
        if way == SEPARATE:
            return norm.rms_norm(self.all_reduce(materialize(x, x.dtype)), residual, weight, eps, ahead)
        if self._push is not None and way == TWO_SHOT_PUSH:
            return push_rms_norm(x, residual, weight, eps, self._push, ahead)
        two_shot = way == TWO_SHOT
        return all_reduce_rms_norm(x, residual, weight, eps, self._workspace, ahead, two_shot=two_shot)

    def rms_norm_quantize(
        self,
        x: Product,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
        scale: Tensor | None,
        ahead: Ahead | None = None,
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        way, space = self._norm_tactic(x, residual), self._workspace
        if self._sums is not None and way in WAYS:
            return self._sums.rms_norm_quantize(way, x, residual, weight, eps, dtype, scale, ahead)
        residual = whole_stream(residual)
        if way == SEPARATE:
            total = self.all_reduce(materialize(x, x.dtype))
            return norm.rms_norm_quantize(total, residual, weight, eps, dtype, scale, ahead)
        if self._push is not None and way == TWO_SHOT_PUSH:
            return push_rms_norm_quantize(x, residual, weight, eps, self._push, dtype, scale, ahead)
        two_shot = way == TWO_SHOT
        return all_reduce_rms_norm_quantize(x, residual, weight, eps, space, dtype, scale, ahead, two_shot=two_shot)

    def _in_pieces(self, x: Tensor) -> Tensor:
        """Two-shot, as many rows at a time as fit."""
        rows = max(1, self._workspace.capacity // (x.shape[1] * x.dtype.itemsize))
        for part in x.split(rows):
            all_reduce_(part, self._workspace, two_shot=True)
        return x

    def _tactic(self, x: Tensor) -> str:
        chosen = self._forced if self._forced in (ONE_SHOT, TWO_SHOT) else self._chosen("all_reduce", x)
        if not self._workspace.fits(x):
            # Not the library's, where a row's sum must not depend on how many rows there are.
            return TWO_SHOT if chosen == TWO_SHOT or TABLE.batch_invariant else LIBRARY
        if chosen in (ONE_SHOT, TWO_SHOT):
            return chosen
        return self._default(x) if chosen != LIBRARY or TABLE.batch_invariant else LIBRARY

    def _norm_tactic(self, x: Product, residual: Tensor) -> str:
        # A row's norm has the same bits for any number of rows if it is always the same kernel that makes it.
        if not self._workspace.fits_fused(x) or x.dtype != residual.dtype or TABLE.batch_invariant:
            return SEPARATE
        chosen = self._forced or self._chosen("all_reduce_norm", x)
        if chosen in self._norm_ways(x):
            return chosen
        return self._default(x) if x.shape[0] <= self._workspace.slots else SEPARATE

    def _norm_ways(self, x: Product) -> list[str]:
        """Tactics for a norm behind x, which `Workspace.fits_fused`."""
        ways = [SEPARATE, ONE_SHOT, TWO_SHOT]
        ways += [TWO_SHOT_PUSH] if self._push is not None and self._push.fits(x) else []
        return ways + (self._sums.tactics(x) if self._sums is not None else [])

    def _chosen(self, kind: str, x: Product) -> str | None:
        return TABLE.chosen(key(kind, x.dtype), x.shape[1], self._workspace.size, x.shape[0])

    def _default(self, x: Product) -> str:
        few = x.shape[0] * x.shape[1] * x.dtype.itemsize <= _ONE_SHOT_BYTES[self._workspace.size]
        return ONE_SHOT if few else TWO_SHOT

    # -------------------------------------------------- in the background

    def begin_all_reduce(self, x: Tensor) -> Callable[[], Tensor] | None:
        """`CopySums.begin`; None: x is for the library."""
        if self._copies is None or not self._copies.fits(x):
            return None
        return self._copies.begin(x)

    def use_copies(self, copies: CopySums | None) -> None:
        """For sums in the background; None: the library's."""
        if copies is not None and copies.abort not in self.on_abort:
            self.on_abort.append(copies.abort)
        self._copies = copies

    def use_sums(self, sums: SumNorms | None) -> None:
        """For norms, as further tactics."""
        if sums is not None:
            self.on_abort.append(sums.space.stop)
        self._sums = sums

    # -------------------------------------------------- what is not a sum

    def all_gather(self, x: Tensor) -> Tensor | None:
        """x [n, k] of every rank: [size, n, k]. None: too much for own kernels."""
        if not exchange_fits(x.numel() * x.dtype.itemsize, self._workspace):
            return None
        return exchange(x.contiguous(), self._workspace, to_each=False)

    def all_to_all(self, x: Tensor) -> Tensor | None:
        """x [size, n, k], of which part r is for rank r: what each rank had for this one, [size, n, k]. None: too much
        for own kernels."""
        if not exchange_fits(x.numel() * x.dtype.itemsize // self._workspace.size, self._workspace):
            return None
        return exchange(x.contiguous(), self._workspace, to_each=True)

    def best_tokens(self, scores: Tensor, tokens: Tensor) -> Tensor | None:
        """`sharded_draw.best_tokens`. None: too many rows."""
        return best_tokens(scores, tokens, self._workspace) if best_tokens_fit(len(scores), self._workspace) else None

    def give_up_push(self, reason: str | None) -> None:
        """Do without the kernels of `all_reduce_push.py`, for a reason; None: do nothing."""
        if reason is not None:
            self._push = None
        if reason:
            log.warning("no all-reduce by pushed numbers: %s", reason)

    def abort(self) -> None:
        """Let kernels that wait for ranks that are gone go on, with rubbish. From any thread; once."""
        for release in self.on_abort:
            release()
        flags = self._workspace.owner.memory[:FLAG_BYTES].view(torch.int32)
        with torch.cuda.device(flags.device), torch.cuda.stream(torch.cuda.Stream(flags.device)):
            flags.add_(1 << 30)
        if self._push is not None:
            self._push.stop()

    # -------------------------------------------------- timing

    def known(self, hidden: int, dtype: torch.dtype) -> bool:
        """Whether `TABLE` has choices for rows of `hidden` numbers."""
        return TABLE.chosen(key("all_reduce", dtype), hidden, self._workspace.size, 1) is not None

    @torch.inference_mode()
    def tune(
        self, hidden: int, dtype: torch.dtype, timer: Timer, quantized: torch.dtype | None = None
    ) -> list[TimedChoice]:
        """Time all ways for rows of `hidden` numbers, norms with results in `quantized` if they are rounded, by all
        ranks together; the choices are in `TABLE` afterwards.
        Takes a second or two, and some seconds more where kernels are yet to be compiled."""
        device = self._workspace.addresses.device
        weight = torch.ones(hidden, dtype=dtype, device=device)
        chosen = []
        for rows in ROW_BUCKETS:
            if rows * hidden * dtype.itemsize > _MEMORY_OF_PROBES:
                break
            x = torch.zeros(rows, hidden, dtype=dtype, device=device)  # sums of sums would grow
            residual = torch.zeros_like(x)
            launches = 24 if rows <= 256 else 6
            times = {LIBRARY: self._time(timer, partial(self._group.all_reduce, x), launches)}
            for way in (ONE_SHOT, TWO_SHOT) if self._workspace.fits(x) else (TWO_SHOT,):
                times[way] = self._time(timer, partial(self.all_reduce, x), launches, way)
            chosen.append(self._choose("all_reduce", x, times))
            if self._workspace.fits_fused(x):
                times = {}
                for way in self._norm_ways(x):
                    run: Callable[[], object] = partial(self.rms_norm, x, residual, weight, 1e-5)
                    if quantized is not None:
                        run = partial(self.rms_norm_quantize, x, residual, weight, 1e-5, quantized, None)
                    times[way] = self._time(timer, run, launches, way)
                chosen.append(self._choose("all_reduce_norm", x, times))
        return chosen

    def _time(self, timer: Timer, run: Callable[[], object], launches: int, way: str | None = None) -> float:
        """µs on the slowest rank."""
        self._forced = way
        try:
            run()
            mine = timer([run], launches)
        finally:
            self._forced = None
        device = self._workspace.addresses.device
        every = self._group.all_gather(torch.tensor([[mine]], dtype=torch.float32, device=device))
        return float(every.max())

    def _choose(self, kind: str, x: Tensor, times: dict[str, float]) -> TimedChoice:
        ranked = sorted(times, key=lambda way: times[way])
        best, other = ranked[0], ranked[min(1, len(ranked) - 1)]
        rows, hidden, size = x.shape[0], x.shape[1], self._workspace.size
        TABLE.choose(key(kind, x.dtype), hidden, size, rows, best)
        choice = TimedChoice(
            kind, key(kind, x.dtype), hidden, size, rows, best, round(times[best], 2), other, round(times[other], 2)
        )
        if self._workspace.rank == 0:
            ways = ", ".join(f"{way} {times[way]:.1f} µs" for way in ranked)
            log.info("%s of %d x %d over %d ranks: %s", kind, rows, hidden, size, ways)
        return choice


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
            found = AllReduce(group, workspace, _push_space(group, workspace, device))
        except RuntimeError as error:
            reason = f"torch gives no memory that GPUs share: {str(error).splitlines()[0]}"
        reason = agree(group, rank, size, reason)
        if reason is None and found is not None:
            reason = agree(group, rank, size, _check(found, device))
            if reason is None:
                found.give_up_push(agree(group, rank, size, _check_push(found, device)))
                if COPY_SUMS:
                    found.use_copies(copy_engines.connect(group, rank, size, device))
                if CLUSTER_NORMS:
                    found.use_sums(sum_norm_group.connect(group, rank, size, device))
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


def _push_space(group: Group, workspace: Workspace, device: torch.device) -> PushSpace:
    """RuntimeError where torch cannot map it."""
    slots, rank, size = workspace.slots, workspace.rank, workspace.size
    shared = share(group, rank, push_bytes(slots, _REGION_BYTES), device)
    shared.memory.view(torch.int32).fill_(MISSING)
    state = torch.zeros(slots, 2, dtype=torch.int32, device=device)
    stopped = torch.zeros(1, dtype=torch.int32, device=device)
    addresses = torch.tensor(shared.addresses, dtype=torch.int64, device=device)
    torch.cuda.synchronize(device)
    group.minimum(0)  # nobody sends before all memory says that nothing has come
    return PushSpace(rank, size, addresses, state, stopped, _REGION_BYTES, shared.memory, shared)


def _check(found: AllReduce, device: torch.device) -> str | None:
    """Run both kernels on numbers whose sum is known. Ranks wait for each other in every call, so each rank makes all
    calls, whatever comes out."""
    space = found.workspace
    wrong: list[str] = []
    for shape in _CHECK_SHAPES:
        generator = torch.Generator().manual_seed(shape[0])
        partials = [torch.randn(shape, generator=generator).bfloat16() for _ in range(space.size)]
        expected = all_reduce_reference(partials)
        for two_shot in (False, True, False, True):
            got = all_reduce_(partials[space.rank].to(device, copy=True), space, two_shot=two_shot).cpu()
            if not torch.equal(got, expected):
                way = TWO_SHOT if two_shot else ONE_SHOT
                wrong.append(f"the {way} kernel gives wrong sums on rank {space.rank}, of {shape[0]} x {shape[1]}")
    return wrong[0] if wrong else None


def _check_push(found: AllReduce, device: torch.device) -> str | None:
    """Likewise the kernel that pushes; more calls than there are buffers."""
    space, push = found.workspace, found.push
    assert push is not None
    shape = (space.slots + 3, _PUSH_COLUMNS)  # two rows of some slots
    weight = torch.ones(_PUSH_COLUMNS, dtype=torch.bfloat16)
    wrong = False
    for turn in range(4):
        generator = torch.Generator().manual_seed(turn)
        partials = [torch.randn(shape, generator=generator).bfloat16() for _ in range(space.size)]
        _, expected = all_reduce_rms_norm_reference(partials, torch.zeros_like(partials[0]), weight, 1e-5)
        x = partials[space.rank].to(device)
        _, got = push_rms_norm(x, torch.zeros_like(x), weight.to(device), 1e-5, push)
        wrong = wrong or not torch.equal(got.cpu(), expected)
    return f"the {TWO_SHOT_PUSH} kernel gives wrong sums on rank {space.rank}" if wrong else None
