"""Times the sum over ranks with residual add, norm and FP8 rounding behind it, µs of the slowest rank in a CUDA graph.

    torchrun --nproc-per-node 4 tests/perf/sum_norm.py --rows 8,64,256 [--existing two-shot] [--hidden 8192]

For each number of rows: the kernels of other files that `--existing` names; the ways of kernels/sum_norm.py by how many
pieces a row is cut into (and blocks); and what the links alone take for as many bytes out of a rank as a trip of
summands has, (ranks - 1) / ranks of the rows in bf16: pushed, pulled, or pushed by bulk copies, with GB/s a direction.
Results are checked first, also in graphs while ranks are slow in turns. With fewer GPUs than ranks these share one:
times mean nothing then, `--check` leaves them out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
os.environ["NCCL_NVLS_ENABLE"] = "0"

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from appliance.distributed import GroupCollectives
from appliance.kernels.all_reduce_group import connect
from appliance.kernels.all_reduce_norm import all_reduce_rms_norm_reference
from appliance.kernels.dependent_launch import launch_options
from appliance.kernels.native_kernel import load
from appliance.kernels.partial_sum import dealt_rows
from appliance.kernels.peer_memory import share
from appliance.kernels.row_quantization import FP8
from appliance.kernels.sum_norm import (
    MISSING,
    Launch,
    SumSpace,
    Way,
    cuts,
    grid,
    sum_bytes,
    sum_rms_norm,
    sum_rms_norm_quantize,
)
from appliance.runtime.cuda_graphs import capture
from appliance.runtime.timing import time_in_graph
from appliance.settings import share_gpu

_EPS = 1e-5
_BULK_BYTES = 8192
_TRANSFERS = {"push": [(132, 256), (132, 1024), (528, 256)], "pull": [(132, 512), (528, 512)], "bulk": [(132, 32)]}
_CHECKED = [(1, None), (7, torch.int8), (8, FP8), (64, FP8), (130, None), (256, FP8), (700, FP8)]


class Bench:
    def __init__(self, rank: int, size: int, device: torch.device, hidden: int, launches: int) -> None:
        self.rank, self.size, self.device, self.hidden, self.launches = rank, size, device, hidden, launches
        self.group = GroupCollectives(size, device).library()
        self.space = self._space()
        self.weight = 1 + 0.1 * self.random(1, 77)[0]

    def _space(self) -> SumSpace:
        shared = share(self.group, self.rank, sum_bytes(), self.device)
        shared.memory.view(torch.int32).fill_(MISSING)
        counters = torch.zeros(2, dtype=torch.int32, device=self.device)
        addresses = torch.tensor(shared.addresses, dtype=torch.int64, device=self.device)
        torch.cuda.synchronize()
        self.group.minimum(0)
        count = torch.cuda.get_device_properties(self.device).multi_processor_count
        return SumSpace(self.rank, self.size, addresses, counters, torch.zeros_like(counters[:1]), count, shared)

    def random(self, rows: int, seed: int) -> Tensor:
        """The same on every rank."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(rows, self.hidden, generator=generator, device=self.device).bfloat16()

    # -------------------------------------------------- right

    def wrong(self, rows: int, dtype: torch.dtype | None, way: Way, pieces: int) -> str | None:
        """Three calls, and a graph of three replayed while ranks are slow in turns."""
        xs = [self.random(rows, 1000 * rows + r) for r in range(self.size)]
        before = self.random(rows, 5)
        want, want_stream = all_reduce_rms_norm_reference(xs, before.clone(), self.weight, _EPS, dtype)
        stream = torch.empty_like(before)

        def run() -> Any:
            stream.copy_(before)
            given = (xs[self.rank], stream, self.weight, _EPS, self.space, Launch(way, pieces=pieces))
            return sum_rms_norm(*given) if dtype is None else sum_rms_norm_quantize(*given, dtype)

        for _ in range(3):
            found = self._compare(run(), stream, want, want_stream, way)
        graph, got = capture(run)
        for turn in range(min(self.launches, 24)):
            if turn % self.size == self.rank:
                torch.cuda._sleep(20_000)  # type: ignore[no-untyped-call]
            graph.replay()
        return found or self._compare(got, stream, want, want_stream, way)

    def _compare(self, got: Any, stream: Tensor, want: Any, want_stream: Tensor, way: Way) -> str | None:
        if way is Way.DEALT:
            stream, want_stream = (dealt_rows(x, self.rank, self.size) for x in (stream, want_stream))
        found = [] if torch.equal(stream, want_stream) else ["stream"]
        if isinstance(got, Tensor):
            found += [] if torch.allclose(got.float(), want.float(), rtol=1.6e-2, atol=1e-3) else ["numbers"]
            bits = got.view(torch.int16).long()
        else:
            found += [] if torch.allclose(got[1], want[1], rtol=1e-5) else ["scales"]
            apart = (got[0].float() != want[0].float()).float().mean()
            found += [] if apart < 1e-3 else [f"{float(apart):.4f} of the numbers"]
            bits = got[0].view(torch.int8).long()
        digest = torch.stack([bits.sum(), (bits * torch.arange(bits.numel(), device=self.device).view_as(bits)).sum()])
        digests = self.group.all_gather(digest[None])
        found += [] if bool((digests == digests[:1]).all()) else ["ranks differ"]
        return ", ".join(found) or None

    # -------------------------------------------------- fast

    def slowest(self, call: Callable[[], object]) -> float:
        call()
        mine = time_in_graph([call], self.launches)
        every = self.group.all_gather(torch.tensor([[mine]], dtype=torch.float32, device=self.device))
        return round(float(every.max()), 2)

    def norms(self, rows: int) -> dict[str, float]:
        x = torch.zeros(rows, self.hidden, dtype=torch.bfloat16, device=self.device)
        residual, found = torch.zeros_like(x), {}
        for way in Way:
            if not self.space.fits(x, way) or (way is Way.ONE_SHOT and rows > 64):
                continue
            for pieces in cuts(self.hidden, self.size):
                blocks, _ = grid(rows, self.hidden, self.size, way, self.space.multiprocessors, pieces)
                if blocks < min(rows, 64) or (pieces == 8 and rows > 256):
                    continue
                given = (x, residual, self.weight, _EPS, self.space, Launch(way, pieces=pieces))
                run = partial(sum_rms_norm_quantize, *given)
                found[f"{way.name.lower()}/{pieces} ({blocks})"] = self.slowest(run)
        return found

    def transfers(self, rows: int, addresses: Tensor) -> dict[str, str]:
        count = rows * self.hidden * 2 // self.size // 16
        found = {}
        for name, launches in _TRANSFERS.items():
            for blocks, threads in launches:
                kernel = transfer(name, self.size, threads, self.device.index)
                arguments = (addresses.data_ptr(), self.rank, count * 16 * self.size, count)
                dependent = launch_options(self.device)["PDL"]
                us = self.slowest(partial(kernel.launch, blocks, dependent, arguments))
                found[f"{name} {blocks}x{threads}"] = f"{us} ({count * 16e-3 * (self.size - 1) / us:.0f})"
        return found


def transfer(name: str, size: int, threads: int, index: int) -> Any:
    source = Path(__file__).with_name("transfers.cu").read_text()
    return load("perf", source, {"RANKS": size, "BULK_BYTES": _BULK_BYTES}, threads, 0, index, name, "a")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="8,16,32,64,128,256,512,1024")
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--existing", default="", help="ways of AllReduce, e.g. two-shot,separate")
    parser.add_argument("--launches", type=int, default=40, help="in a graph")
    parser.add_argument("--check", action="store_true", help="no times")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank % torch.cuda.device_count())
    if torch.cuda.device_count() < size:
        share_gpu(rank)
    torch.cuda.set_device(device)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.distributed.init_process_group("nccl", device_id=device)
    bench = Bench(rank, size, device, arguments.hidden, arguments.launches)

    def say(*words: object) -> None:
        if rank == 0:
            print(f"{time.perf_counter() - begin:5.1f} s", *words, flush=True)

    say("connected")
    wrong: list[str] = []
    with torch.inference_mode():
        for rows, dtype in _CHECKED:
            for way in Way:
                probe = torch.empty(rows, arguments.hidden, dtype=torch.bfloat16, device=device)
                for pieces in cuts(arguments.hidden, size) if bench.space.fits(probe, way) else ():
                    found = bench.wrong(rows, dtype, way, pieces)
                    if found:
                        wrong.append(f"{way.name} {rows} rows {dtype} {pieces} pieces: {found}")
                        print(f"rank {rank} WRONG: {wrong[-1]}", flush=True)
        say("checked")
        result: dict[str, Any] = {}
        counts = [] if arguments.check else [int(rows) for rows in arguments.rows.split(",")]
        for rows in counts:
            result[f"{rows} sum_norm"] = bench.norms(rows)
            say(rows, result[f"{rows} sum_norm"])
        if counts:
            shared = share(bench.group, rank, 2 * max(counts) * arguments.hidden * 2, device)
            addresses = torch.tensor(shared.addresses, dtype=torch.int64, device=device)
            for rows in counts:
                result[f"{rows} transfers"] = bench.transfers(rows, addresses)
                say(rows, "us (GB/s)", result[f"{rows} transfers"])
        if arguments.existing and counts:
            own = connect(bench.group, rank, size, device)
            assert own is not None
            say("Triton's kernels compiled")
            for rows in counts:
                x = torch.zeros(rows, arguments.hidden, dtype=torch.bfloat16, device=device)
                run = partial(own.rms_norm_quantize, x, torch.zeros_like(x), bench.weight, _EPS, FP8, None)
                for way in arguments.existing.split(","):
                    with own.by(way):
                        result.setdefault(f"{rows} existing", {})[way] = bench.slowest(run)
                say(rows, result[f"{rows} existing"])
    if rank == 0:
        print(json.dumps({"ranks": size, "hidden": arguments.hidden, "wrong": wrong, "us": result}), flush=True)
    torch.distributed.destroy_process_group()
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
