"""Widening of FP8 pages: the Triton kernel (in the interpreter where there is no GPU) and the torch path."""

from __future__ import annotations

import pytest
import torch

from appliance.kernels.fp8_linear import FP8
from appliance.kernels.widen_pages import widen_pages, widen_pages_reference, widen_pages_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 16, 2, 64), (2, 4, 3, 24)])
def test_every_number_is_kept(shape, dtype):
    """All 254 numbers of e4m3 stay what they are; pages repeat and come in any order; the rest is left alone."""
    codes = torch.arange(5 * torch.Size(shape).numel()) % 254
    cache = (codes + (codes >= 127)).to(torch.uint8).view(FP8).view(5, *shape).to(DEVICE)
    pages = torch.tensor([4, 0, 4, 2], dtype=torch.int32, device=DEVICE)
    want = torch.cat((cache.float()[pages.long()], torch.full((2, *shape), 7.0, device=DEVICE)))
    for widen in (widen_pages, widen_pages_triton, widen_pages_reference):
        out = torch.full((6, *shape), 7.0, dtype=dtype, device=DEVICE)
        widen(cache, pages, out)
        assert torch.equal(out.float(), want)


def test_no_pages():
    out = torch.ones(1, 2, 4, 1, 8)
    widen_pages_triton(torch.zeros(3, 2, 4, 1, 8, dtype=FP8), torch.zeros(0, dtype=torch.int32), out)
    assert out.all()
