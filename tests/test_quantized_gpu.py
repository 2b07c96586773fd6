"""Checkpoints that others quantized, on a GPU: read there as on the CPU, and multiplied by the kernels that serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import PagedRunner, PagedSequence
from test_quantized_checkpoints import LAYOUTS, PROMPT, engine_of, make, opened, rounded_inputs

pytestmark = pytest.mark.gpu
# In bfloat16 throughout; on the CPU 0.02, 0.05 and 0.15, since inputs that round otherwise are amplified by random
# weights. Wrong numbers give about 1.
_LIMIT = {"int4": 5e-2, "int8": 1e-1, "fp8": 3e-1}


@pytest.fixture(scope="module", params=LAYOUTS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    quantizer, section, how = LAYOUTS[request.param]()
    path = tmp_path_factory.mktemp("checkpoint")
    return path, make(path, quantizer, section, **how)


def test_weights_read_on_a_gpu_are_the_same(made: tuple[Path, Any]) -> None:
    _, _, tensors, specs = opened(made[0])
    for spec in filter(tensors.holds, specs):
        here, there = vars(tensors.read(spec)), vars(tensors.read(spec, "cuda"))
        for field, value in here.items():
            assert (value is None) == (there[field] is None)
            if value is not None:
                assert there[field].is_cuda
                assert torch.equal(value.view(torch.uint8), there[field].cpu().view(torch.uint8)), (spec.name, field)


def test_logits_are_those_of_the_dequantized_model(made: tuple[Path, Any]) -> None:
    path, reference = made
    _, facts, tensors, _ = opened(path)
    if facts.precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8 arithmetic")
    with torch.inference_mode(), rounded_inputs(reference, facts, tensors):
        expected = reference(torch.tensor([PROMPT])).logits[0]
        runner = PagedRunner(engine_of(path, "cuda", torch.bfloat16))
        got = runner.step([(PagedSequence(), PROMPT)])[0].cpu()
        one_by_one, sequence = [], PagedSequence()
        for token in PROMPT:  # products of one row go through other kernels
            one_by_one.append(runner.step([(sequence, [token])])[0].cpu())
    for logits in (got, torch.cat(one_by_one)):
        error = float((logits - expected).norm() / expected.norm())
        assert error < _LIMIT[facts.precision], error
