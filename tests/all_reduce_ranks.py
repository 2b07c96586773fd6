"""One rank of tests/test_all_reduce_gpu.py: own all-reduces on a real GPU group, against sums in float32."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from appliance.distributed import GroupCollectives
from appliance.kernels.all_reduce import all_reduce_, all_reduce_reference
from appliance.kernels.all_reduce_group import AllReduce, connect
from appliance.kernels.all_reduce_norm import all_reduce_rms_norm_reference
from appliance.kernels.deferred_scale import DeferredScale
from appliance.kernels.exchange import all_to_all_reference
from appliance.kernels.partial_sum import whole_stream
from appliance.kernels.row_quantization import FP8
from appliance.kernels.sampling import score_blocks
from appliance.kernels.sum_norm import rows_at_once
from appliance.kernels.sum_norm_group import CAPABILITY, CLUSTER_DEALT, WAYS, Norms
from appliance.kernels.tactics import TABLE
from appliance.runtime.cuda_graphs import capture
from appliance.runtime.timing import time_in_graph
from appliance.settings import share_gpu

SHAPES = [(1, 8192), (3, 4096), (64, 8192), (200, 5120), (1000, 8192), (7, 1024)]


def partials(size: int, rows: int, columns: int, device: torch.device, seed: int) -> list[Tensor]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator).bfloat16().to(device) for _ in range(size)]


def run(rank: int, size: int, address: str) -> None:
    device = torch.device("cuda", rank % torch.cuda.device_count())
    if torch.cuda.device_count() < size:
        share_gpu(rank)
    torch.cuda.set_device(device)
    distributed.init_process_group("nccl", init_method=address, rank=rank, world_size=size, device_id=device)
    group = GroupCollectives(size, device)
    own = connect(group, rank, size, device)
    assert own is not None, "no peer access here"
    with torch.inference_mode():
        eager(own, rank, size, device)  # by kernels that read their peers' memory
        own.connect_norms(Norms(4096, torch.bfloat16, FP8))
        clusters = torch.cuda.get_device_capability() >= CAPABILITY
        assert (own.sums is not None) == clusters, "its check found something"
        if clusters:
            eager(own, rank, size, device)
            in_rounds(own, rank, size, device)
        in_graphs(own, rank, size, device)
        with_scales(own, rank, size, device)
        exchanged(own, rank, size, device)
        chosen = own.tune(4096, torch.bfloat16, time_in_graph, FP8)
    rows = torch.tensor([[c.rows, len(c.tactic)] for c in chosen], dtype=torch.int64, device=device)
    gathered = group.all_gather(rows)
    assert (gathered == gathered[:1]).all() and own.known(4096, torch.bfloat16), "ranks chose differently"
    TABLE.clear()
    distributed.destroy_process_group()


def eager(own: AllReduce, rank: int, size: int, device: torch.device) -> None:
    """Every shape one after the other, in changing order: slots' epochs move apart."""
    for seed, (rows, columns) in enumerate(SHAPES * 3):
        xs = partials(size, rows, columns, device, seed)
        expected = all_reduce_reference(xs)
        two_shot = bool(seed % 2)
        got = all_reduce_(xs[rank].clone(), own.workspace, two_shot=two_shot)
        assert torch.equal(got, expected), f"{rows} x {columns}, two-shot {two_shot}"
        weight = partials(1, 1, columns, device, 77)[0][0]
        residual = partials(1, rows, columns, device, 78)[0]
        for dtype in (None, torch.int8, FP8):
            if dtype == FP8 and torch.cuda.get_device_capability() < (8, 9):
                continue
            want, want_stream = all_reduce_rms_norm_reference(xs, residual.clone(), weight, 1e-5, dtype)
            for way in own.norm_ways(xs[rank]):
                given = (xs[rank].clone(), residual.clone(), weight, 1e-5)
                with own.by(way):
                    if dtype is None:
                        out, stream = own.rms_norm(*given)
                        torch.testing.assert_close(out, want, rtol=1.6e-2, atol=1e-3)
                    else:
                        found, stream = own.rms_norm_quantize(*given, dtype, None)
                        same_numbers(found, want)
                assert torch.equal(stream, want_stream), f"{rows} x {columns}, {way}"


def same_numbers(found: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    (values, scales), (want_values, want_scales) = found, want
    """But for those that are rounded to the number beside, where sums of squares were added up in another order."""
    torch.testing.assert_close(scales, want_scales, rtol=1e-4, atol=0)
    apart = (values.float() - want_values.float()).abs()
    beside = 1.01 if values.dtype == torch.int8 else 0.14 * want_values.float().abs() + 2**-9
    assert bool((apart <= beside).all()) and float((apart > 0).float().mean()) < 1e-3


def in_rounds(own: AllReduce, rank: int, size: int, device: torch.device) -> None:
    """More rows than a launch takes, the last round with fewer; and again with the stream that is dealt out."""
    rows = 2 * rows_at_once(4096, size) + 5
    xs = [torch.randn(rows, 4096, generator=torch.Generator(device).manual_seed(r), device=device) for r in range(size)]
    xs = [x.bfloat16() for x in xs]
    weight, residual = partials(1, 1, 4096, device, 77)[0][0], torch.zeros_like(xs[0])
    with own.by(CLUSTER_DEALT):
        _, stream = own.rms_norm(xs[rank], residual.clone(), weight, 1e-5)
        found, stream = own.rms_norm_quantize(xs[rank], stream, weight, 1e-5, FP8, None)
    _, want_stream = all_reduce_rms_norm_reference(xs, residual, weight, 1e-5)
    want, want_stream = all_reduce_rms_norm_reference(xs, want_stream, weight, 1e-5, FP8)
    same_numbers(found, want)
    assert torch.equal(whole_stream(stream), want_stream)


def with_scales(own: AllReduce, rank: int, size: int, device: torch.device) -> None:
    """Products whose scales are still to be applied, with a bias and a scale given beforehand."""
    rows, columns = 37, 4096
    weight, bias = partials(2, 1, columns, device, 3)
    generator = torch.Generator().manual_seed(4)
    scales = [torch.rand(shape, generator=generator).to(device) for shape in ((rows, 1), (1, columns))]
    for dtype in (torch.bfloat16, torch.int32):
        xs = [(x * 50).to(dtype) for x in partials(size, rows, columns, device, 5)]
        products = [DeferredScale(x, *scales, bias[0], torch.bfloat16) for x in xs]
        residual, static = partials(1, rows, columns, device, 6)[0], torch.full((1,), 0.05, device=device)
        want, want_stream = all_reduce_rms_norm_reference(
            products, residual.clone(), weight[0], 1e-5, torch.int8, static
        )
        for way in own.norm_ways(products[rank])[1:]:  # in one kernel
            given = (products[rank], residual.clone(), weight[0], 1e-5, torch.int8, static)
            with own.by(way):
                (values, got_scales), stream = own.rms_norm_quantize(*given)
            assert torch.equal(stream, want_stream) and torch.equal(got_scales, want[1]), f"{dtype}, {way}"
            assert (values.int() - want[0].int()).abs().max() <= 1, f"{dtype}, {way}"


def in_graphs(own: AllReduce, rank: int, size: int, device: torch.device) -> None:
    """Graphs with an odd number of all-reduces of each kind, replayed while ranks are slow in turns."""
    xs = partials(size, 5, 4096, device, 5)
    expected = all_reduce_reference(xs)
    places = [torch.empty_like(xs[rank]) for _ in range(3)]
    summed: list[Tensor] = []
    ways = [way for way in WAYS if own.sums is not None] * 2 + own.norm_ways(xs[rank])[-1:]  # an odd number of calls
    weight = torch.ones_like(xs[0][0])

    def step() -> None:
        for at, place in enumerate(places):
            place.copy_(xs[rank])
            all_reduce_(place, own.workspace, two_shot=at == 1)
        summed.clear()
        for way in ways:
            with own.by(way):
                summed.append(own.rms_norm(xs[rank].clone(), torch.zeros_like(xs[rank]), weight, 1e-5)[1])

    step()
    graph, _ = capture(step)
    for turn in range(300):
        if turn % size == rank:
            torch.cuda._sleep(20_000)
        graph.replay()
        if turn % 20 == 0:
            for place in places + [whole_stream(stream) for stream in summed]:
                assert torch.equal(place, expected), f"replay {turn}"
    torch.cuda.synchronize()
    for place in places + [whole_stream(stream) for stream in summed]:
        assert torch.equal(place, expected)


def exchanged(own: AllReduce, rank: int, size: int, device: torch.device) -> None:
    """Small tensors and best tokens, in between all-reduces, eagerly and in a graph, while ranks are slow in turns."""
    share, rows = 5000, 40
    logits = partials(size, rows, share, device, 9)
    whole = torch.cat([x.round() for x in logits], 1)  # many equals
    sums = partials(size, 3, 4096, device, 10)
    parts = [x.view(size, rows // size, share) for x in logits]
    want = whole.argmax(1), torch.stack(logits), all_to_all_reference(parts)[rank], all_reduce_reference(sums)

    def step() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mine = logits[rank].round()
        best = own.best_tokens(*score_blocks(mine, None, None, None, None, rank * share))
        everyones, for_me = own.all_gather(logits[rank]), own.all_to_all(parts[rank])
        assert best is not None and everyones is not None and for_me is not None
        return best, everyones, for_me, all_reduce_(sums[rank].clone(), own.workspace, two_shot=True)

    def check(found: tuple[Tensor, ...], when: str) -> None:
        for name, got, expected in zip(("best", "all_gather", "all_to_all", "sum"), found, want, strict=True):
            assert torch.equal(got, expected), f"{name}, {when}"

    check(step(), "eager")
    graph, found = capture(step)
    for turn in range(200):
        if turn % size == rank:
            torch.cuda._sleep(20_000)
        graph.replay()
        if turn % 10 == 0:
            check(found, f"replay {turn}")
            check(step(), f"eager after replay {turn}")
