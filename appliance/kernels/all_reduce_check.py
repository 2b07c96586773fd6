"""Whether own all-reduces give right numbers on the GPUs at hand: before anything relies on them, each kernel is run on
numbers whose sum is known. By all ranks together, which wait for each other in every call: so each makes all of them,
whatever comes out. Knows nothing of what happens where one is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from appliance.kernels import norm
from appliance.kernels.all_reduce import Workspace, all_reduce_, all_reduce_reference
from appliance.kernels.all_reduce_push import PushSpace, push_rms_norm
from appliance.kernels.all_reduce_rows import dealt_rows, shared_rows_rms_norm, shared_rows_rms_norm_quantize

_SHAPES = ((1, 512), (67, 4096))  # less than a tile; several slots
_COLUMNS = 1024
_EPS = 1e-5
_RESULT_TOLERANCE = 3e-2  # of a normalized number, in 16 bits
_QUANTIZED_TOLERANCE = 6e-2  # in 8 bits: half of the largest over 127


def wrong_sums(space: Workspace, device: torch.device) -> str | None:
    """What is wrong with one-shot and two-shot; None: nothing."""
    wrong: list[str] = []
    for shape in _SHAPES:
        partials = _partials(shape, shape[0], space.size)
        expected = all_reduce_reference(partials)
        for two_shot in (False, True, False, True):
            got = all_reduce_(partials[space.rank].to(device, copy=True), space, two_shot=two_shot).cpu()
            if not torch.equal(got, expected):
                way = "two-shot" if two_shot else "one-shot"
                wrong.append(
                    f"the {way} kernel gives wrong sums on rank {space.rank}, of {shape[0]} x {shape[1]} numbers"
                )
    return wrong[0] if wrong else None


def wrong_pushed(push: PushSpace, device: torch.device) -> str | None:
    """Likewise of the kernels that push numbers; more calls than there are buffers."""
    rank, size = push.rank, push.size
    wrong: list[str] = []
    weight = torch.ones(_COLUMNS, dtype=torch.bfloat16)
    for turn in range(4):
        # Two rows of some slots; then two groups of rows, one of them short.
        for name, rows, run in (
            ("two-shot push", push.slots + 3, push_rms_norm),
            ("shared rows", (push.slots + 1) * size - 1, shared_rows_rms_norm),
        ):
            partials = _partials((rows, _COLUMNS), turn, size)
            total = all_reduce_reference(partials)
            x = partials[rank].to(device)
            got, stream = run(x, torch.zeros_like(x), weight.to(device), _EPS, push)
            own, expected = (dealt_rows(s, rank, size) if name == "shared rows" else s for s in (stream.cpu(), total))
            if not torch.equal(own, expected):
                wrong.append(f"the {name} kernel gives wrong sums on rank {rank}")
            want = norm.rms_norm_reference(total, None, weight, _EPS)[0]
            if not torch.allclose(got.cpu().float(), want.float(), _RESULT_TOLERANCE, _RESULT_TOLERANCE):
                wrong.append(f"the {name} kernel gives wrong results on rank {rank}")
        (values, scales), _ = shared_rows_rms_norm_quantize(
            x, torch.zeros_like(x), weight.to(device), _EPS, push, torch.int8
        )
        if not torch.allclose((values.float() * scales).cpu(), want.float(), 0.0, _QUANTIZED_TOLERANCE):
            wrong.append(f"the shared rows kernel gives wrong 8-bit results on rank {rank}")
    return wrong[0] if wrong else None


def _partials(shape: tuple[int, int], seed: int, size: int) -> list[Tensor]:
    """Every rank's numbers, the same on all."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).bfloat16() for _ in range(size)]
