"""Times all-reduces of a tensor-parallel group on GPUs of one host, µs per call inside CUDA graphs.

    torchrun --nproc-per-node 4 tests/perf/all_reduce.py --hidden 8192 --rows 1,8,32,64,256,1024

Library (NCCL), own kernels one-shot and two-shot; then, "norm": all-reduce and what follows it (residual add, RMS norm,
FP8 quantization) by the best all-reduce and a kernel for the rest, and in one kernel. Every way is first compared with
the sum in float32. The times are those of the slowest rank. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
os.environ["NCCL_NVLS_ENABLE"] = "0"

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from appliance.distributed import GroupCollectives
from appliance.kernels.all_reduce import all_reduce_, all_reduce_reference
from appliance.kernels.all_reduce_group import AllReduce, connect
from appliance.kernels.all_reduce_norm import all_reduce_rms_norm_quantize, all_reduce_rms_norm_reference
from appliance.kernels.norm import rms_norm_quantize
from appliance.kernels.row_quantization import FP8
from appliance.runtime.timing import time_in_graph

EPS = 1e-5


def partials(size: int, rows: int, hidden: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(rows)
    return [torch.randn(rows, hidden, generator=generator, device=device).bfloat16() for _ in range(size)]


def check(own: AllReduce, group: GroupCollectives, rank: int, size: int, rows: int, hidden: int) -> list[str]:
    """What is wrong with the ways, empty if nothing is."""
    device, space, wrong = torch.device("cuda", rank), own.workspace, []
    xs = partials(size, rows, hidden, device)
    expected = all_reduce_reference(xs)
    weight, residual = torch.randn_like(xs[0][0]), torch.randn_like(xs[0])
    torch.distributed.broadcast(weight, 0)
    torch.distributed.broadcast(residual, 0)
    library = group.all_reduce(xs[rank].clone())
    if not torch.allclose(library.float(), expected.float(), rtol=3e-2, atol=6e-2):
        wrong.append("library")
    for two_shot in (False, True):
        way = "two-shot" if two_shot else "one-shot"
        if space.fits(xs[rank]):
            for _ in range(3):
                if not torch.equal(all_reduce_(xs[rank].clone(), space, two_shot=two_shot), expected):
                    wrong.append(way)
                    break
        if space.fits_fused(xs[rank]):
            stream = residual.clone()
            got, _ = all_reduce_rms_norm_quantize(xs[rank], stream, weight, EPS, space, two_shot=two_shot)
            want, want_stream = all_reduce_rms_norm_reference(xs, residual.clone(), weight, EPS, FP8)
            same = torch.equal(stream, want_stream) and torch.allclose(got[1], want[1], rtol=1e-4)
            close = (got[0].float() - want[0].float()).abs().mean() < 1e-2 * want[0].float().abs().mean()
            if not (same and close):
                wrong.append(f"fused {way}")
    return wrong


def times(own: AllReduce, group: GroupCollectives, rows: int, hidden: int, device: torch.device) -> dict[str, float]:
    space = own.workspace
    x = torch.zeros(rows, hidden, dtype=torch.bfloat16, device=device)
    residual, weight = torch.zeros_like(x), torch.ones_like(x[0])
    launches = 24 if rows <= 256 else 6
    ways = {"library": lambda: group.all_reduce(x)}
    if space.fits(x):
        ways["one-shot"] = lambda: all_reduce_(x, space, two_shot=False)
        ways["two-shot"] = lambda: all_reduce_(x, space, two_shot=True)
    norms = {}
    if space.fits_fused(x):
        norms = {
            f"norm fused {way}": (
                lambda two_shot=way == "two-shot": all_reduce_rms_norm_quantize(
                    x, residual, weight, EPS, space, two_shot=two_shot
                )
            )
            for way in ("one-shot", "two-shot")
        }
    found = {}
    for name, way in ways.items():
        way()
        found[name] = slowest(time_in_graph([way], launches), group, device)
    best = ways[min(found, key=lambda name: found[name])]
    norms["norm separate"] = lambda: (best(), rms_norm_quantize(x, residual, weight, EPS))
    for name, way in norms.items():
        way()
        found[name] = slowest(time_in_graph([way], launches), group, device)
    return found


def slowest(mine: float, group: GroupCollectives, device: torch.device) -> float:
    return round(float(group.all_gather(torch.tensor([[mine]], device=device)).max()), 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,256,512,1024,4096")
    arguments = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.distributed.init_process_group("nccl", device_id=device)
    group = GroupCollectives(size, device)
    begin = time.perf_counter()
    own = connect(group, rank, size, device)
    seconds = time.perf_counter() - begin
    if own is None:
        print(f"rank {rank}: no own kernels here", flush=True)
        return 1
    rows_list = [int(rows) for rows in arguments.rows.split(",")]
    with torch.inference_mode():
        wrong = {rows: found for rows in rows_list if (found := check(own, group, rank, size, rows, arguments.hidden))}
        if wrong:
            print(f"rank {rank}: WRONG {wrong}", flush=True)
        result = {}
        for rows in rows_list:
            result[rows] = times(own, group, rows, arguments.hidden, device)
            if rank == 0:
                print(f"{rows:5} x {arguments.hidden}: {result[rows]}", flush=True)
    failed = group.minimum(0 if wrong else 1) == 0
    if rank == 0:
        print(
            json.dumps(
                {
                    "ranks": size,
                    "hidden": arguments.hidden,
                    "connect_s": round(seconds, 2),
                    "wrong": failed,
                    "us": result,
                }
            )
        )
    torch.distributed.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
