"""What is tried of own all-reduces before they are relied on."""

from __future__ import annotations

import torch

from appliance.kernels.all_reduce import Workspace, all_reduce_, all_reduce_reference

_CHECK_SHAPES = ((1, 512), (67, 4096))  # less than a tile; several slots


def check(space: Workspace, device: torch.device) -> str | None:
    """Run both kernels on numbers whose sum is known: what is wrong. Ranks wait for each other in every call, so each
    rank makes all calls, whatever comes out."""
    wrong: list[str] = []
    for shape in _CHECK_SHAPES:
        generator = torch.Generator().manual_seed(shape[0])
        partials = [torch.randn(shape, generator=generator).bfloat16() for _ in range(space.size)]
        expected = all_reduce_reference(partials)
        for two_shot in (False, True, False, True):
            got = all_reduce_(partials[space.rank].to(device, copy=True), space, two_shot=two_shot).cpu()
            if not torch.equal(got, expected):
                way = "two-shot" if two_shot else "one-shot"
                wrong.append(f"the {way} kernel gives wrong sums on rank {space.rank}, of {shape[0]} x {shape[1]}")
    return wrong[0] if wrong else None
