"""One rank of `bench all-reduce`, a process of its own; the last line of rank 0 is what all have found, as JSON.

Knows the ways to add up; what is made of the figures is all_reduce.py's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from appliance.bench.report import numbers
from appliance.distributed import GroupCollectives
from appliance.kernels.all_reduce import all_reduce_, all_reduce_reference
from appliance.kernels.all_reduce_group import AllReduce, connect
from appliance.kernels.all_reduce_norm import all_reduce_rms_norm_quantize, all_reduce_rms_norm_reference
from appliance.kernels.norm import rms_norm_quantize
from appliance.kernels.partial_sum import whole_stream
from appliance.kernels.row_quantization import FP8
from appliance.kernels.sum_norm import Launch
from appliance.kernels.sum_norm_group import WAYS, Norms
from appliance.meeting import Meeting, Rendezvous, leave
from appliance.runtime.timing import time_in_graph

_EPS = 1e-5
_SHOTS = {"one-shot": False, "two-shot": True}
_CPU_CALLS = 8
_LIBRARY_TOLERANCE = (3e-2, 6e-2)  # relative and absolute: it rounds to 16 bits after each summand


class Rank:
    """What it adds up with. `own` None: the library only."""

    def __init__(self, rank: int, size: int, device: torch.device, group: GroupCollectives, hidden: int) -> None:
        self.rank, self.size, self.device, self.group, self.hidden = rank, size, device, group, hidden
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.own: AllReduce | None = connect(group, rank, size, device) if device.type == "cuda" else None
        if self.own is not None:
            self.own.connect_norms(Norms(hidden, self.dtype, FP8))

    # -------------------------------------------------- right

    def check(self, rows: int) -> list[str]:
        """The ways that give a wrong sum of so many rows."""
        xs = self._partials(rows)
        expected = all_reduce_reference(xs)
        library = self.group.all_reduce(xs[self.rank].clone())
        wrong = [] if torch.allclose(library.float(), expected.float(), *_LIBRARY_TOLERANCE) else ["library"]
        if self.own is None:
            return wrong
        space = self.own.workspace
        for name, two_shot in _SHOTS.items():
            if space.fits(xs[self.rank]):
                sums = [all_reduce_(xs[self.rank].clone(), space, two_shot=two_shot) for _ in range(3)]
                wrong += [] if all(torch.equal(got, expected) for got in sums) else [name]
        for name, norm in self._norms(xs[self.rank]).items():
            wrong += [] if self._norm_is_right(xs, norm) else [name]
        return wrong

    def _norms(self, x: Tensor) -> dict[str, Callable[..., Any]]:
        """The ways to add x up and normalize the sum by one kernel: (x, residual, weight, eps) -> what it returns."""
        if self.own is None:
            return {}
        space, sums = self.own.workspace, self.own.sums
        found: dict[str, Callable[..., Any]] = {}
        for name, two_shot in _SHOTS.items():
            if space.fits_fused(x):
                found[f"norm {name}"] = partial(all_reduce_rms_norm_quantize, workspace=space, two_shot=two_shot)
        if sums is not None:
            for name in sums.tactics(x):
                found[f"norm {name}"] = partial(sums.rms_norm_quantize, Launch(WAYS[name]), dtype=FP8, scale=None)
        return found

    def _partials(self, rows: int) -> list[Tensor]:
        """Every rank's summand, the same numbers on all."""
        generator = torch.Generator(self.device).manual_seed(rows)
        shape = (rows, self.hidden)
        made = [torch.randn(shape, generator=generator, device=self.device) for _ in range(self.size)]
        return [x.to(self.dtype) for x in made]

    def _norm_is_right(self, xs: Sequence[Tensor], norm: Callable[..., Any]) -> bool:
        generator = torch.Generator(self.device).manual_seed(7)
        make = partial(torch.randn, generator=generator, device=self.device, dtype=torch.float32)
        weight, residual = make(self.hidden).to(self.dtype), make(xs[0].shape).to(self.dtype)
        stream = residual.clone()
        got, stream = norm(xs[self.rank], stream, weight, _EPS)
        want, want_stream = all_reduce_rms_norm_reference(list(xs), residual.clone(), weight, _EPS, FP8)
        close = (got[0].float() - want[0].float()).abs().mean() < 1e-2 * want[0].float().abs().mean()
        same = torch.equal(whole_stream(stream), want_stream)
        return same and torch.allclose(got[1], want[1], rtol=1e-4) and bool(close)

    # -------------------------------------------------- fast

    def times(self, rows: int) -> dict[str, float]:
        """µs of each way on the slowest rank."""
        x = torch.zeros(rows, self.hidden, dtype=self.dtype, device=self.device)  # sums of sums would grow
        ways: dict[str, Callable[[], object]] = {"library": partial(self.group.all_reduce, x)}
        norms: dict[str, Callable[[], object]] = {}
        if self.own is not None:
            space = self.own.workspace
            residual, weight = torch.zeros_like(x), torch.ones_like(x[0])
            if space.fits(x):
                ways |= {name: partial(all_reduce_, x, space, two_shot=two) for name, two in _SHOTS.items()}
            norms = {name: partial(norm, x, residual, weight, _EPS) for name, norm in self._norms(x).items()}
        found = {name: self._time(way, rows) for name, way in ways.items()}
        if self.own is not None:
            best = ways[min(found, key=lambda name: found[name])]

            def separate() -> None:
                best()
                rms_norm_quantize(x, residual, weight, _EPS)

            norms["norm separate"] = separate
        return found | {name: self._time(way, rows) for name, way in norms.items()}

    def _time(self, way: Callable[[], object], rows: int) -> float:
        way()
        if self.device.type == "cuda":
            mine = time_in_graph([way], 24 if rows <= 256 else 6)
        else:
            begin = time.perf_counter()
            for _ in range(_CPU_CALLS):
                way()
            mine = (time.perf_counter() - begin) * 1e6 / _CPU_CALLS
        every = self.group.all_gather(torch.tensor([[mine]], dtype=torch.float32, device=self.device))
        return round(float(every.max()), 2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m appliance.bench.all_reduce_rank")
    for name in ("rank", "world-size", "master-port", "hidden"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--rows", required=True)
    return parser.parse_args()


@torch.inference_mode()
def main() -> int:
    args = _arguments()
    cuda = args.backend == "cuda"
    device = torch.device("cuda", args.rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    meeting = Meeting(Rendezvous(args.rank, args.world_size, master_port=args.master_port))
    meeting.join(device)
    group = GroupCollectives(args.world_size, device)
    begin = time.perf_counter()
    rank = Rank(args.rank, args.world_size, device, group, args.hidden)
    found: dict[str, Any] = {"connect_seconds": round(time.perf_counter() - begin, 2), "own": rank.own is not None}
    counts = [row[0] for row in numbers("--rows", args.rows, "N")]
    wrong = [f"{way} of {rows} rows" for rows in counts for way in rank.check(rows)]
    for line in wrong:
        print(f"rank {args.rank} is WRONG: {line}", file=sys.stderr, flush=True)
    all_right = group.minimum(0 if wrong else 1)
    found["wrong"] = wrong if wrong or all_right else ["on another rank, see its messages"]
    found["element_bytes"] = rank.dtype.itemsize
    found["rows"] = [{"rows": rows, "us": rank.times(rows)} for rows in counts]
    if args.rank == 0:
        print(json.dumps(found), flush=True)
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
