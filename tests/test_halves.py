"""Passes in two halves give the numbers of passes in one piece; which passes go in halves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_helpers import make_checkpoint
from tensor_parallel_pool import Job, run_job
from test_tensor_parallel import ARCHITECTURES
from thread_ranks import Meeting

from appliance.distributed import TensorParallel
from appliance.kernels.tactics import TABLE
from appliance.layers import halves
from appliance.layers.linear import RowParallelLinear
from appliance.quantization.unquantized import Scheme

# Scheme, parameters, tolerance, as in test_tensor_parallel.py: 8-bit activations are rounded by a scale of the inputs
# that a rank has.
SCHEMES = {
    "fp32": ("none", {}, 1e-5),
    "fp8": ("fp8", {}, 0.16),
    "int4 in order": ("int4_gptq", {"group_size": 32, "act_order": True}, 1e-4),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
def test_halves_compute_what_the_whole_does(
    architecture: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten prompt tokens of two sequences, the first half ending within one; then two more tokens in one piece. Each
    layer adds up twice, in the background, each half for itself."""
    make_checkpoint(tmp_path / "m", ARCHITECTURES[architecture])
    name, parameters, limit = SCHEMES[scheme]
    job = Job(tmp_path / "m", 2, name, parameters)
    alone = run_job(job, TensorParallel())
    whole = Meeting(2).run(lambda tp: run_job(job, tp))
    monkeypatch.setattr(halves, "MIN_TOKENS", 4)
    monkeypatch.setattr(halves, "MIN_BYTES", 0)
    meeting = Meeting(2)
    found = meeting.run(lambda tp: run_job(job, tp))
    layers = ARCHITECTURES[architecture].num_hidden_layers
    assert meeting.calls.count("background all_reduce") == 2 * 2 * layers
    assert meeting.calls.count("all_reduce") == 2 * layers, "two tokens go in one piece"
    assert torch.equal(found[0], found[1])
    for other in (alone, whole[0]):
        assert float((found[0] - other).norm() / other.norm()) <= limit


def test_what_goes_in_halves() -> None:
    several, rows = TensorParallel(0, 2), torch.zeros(halves.MIN_TOKENS + 1, 8193, dtype=torch.bfloat16)
    assert halves.pays(rows, several) and not halves.pays(rows, TensorParallel())
    assert not halves.pays(rows[1:], several) and not halves.pays(rows[:, :4096], several)
    for fuses in (False, True):
        collectives: Any = SimpleNamespace(own=SimpleNamespace(fuses=lambda x, fuses=fuses: fuses))
        assert halves.pays(rows, TensorParallel(0, 2, collectives)) is not fuses, "the norm comes with the sum"
    TABLE.batch_invariant = True
    try:
        assert not halves.pays(rows, several), "the library's sums depend on how many rows there are"
    finally:
        TABLE.batch_invariant = False


def test_a_sum_in_the_background_counts_the_bias_once() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(5, 16), torch.randn(5)

    def act(tp: TensorParallel) -> torch.Tensor:
        layer = RowParallelLinear(8, 5, bias=True, scheme=Scheme(), dtype=torch.float32, tp=tp, defer=True)
        layer.load_state_dict({"weight": weight[:, 8 * tp.rank :][:, :8], "bias": bias})
        layer.prepare()
        return layer.begin(x)()

    for found in Meeting(2).run(act):
        torch.testing.assert_close(found, torch.cat([x, x], 1) @ weight.T + bias)
    single = TensorParallel()
    layer = RowParallelLinear(8, 5, bias=True, scheme=Scheme(), dtype=torch.float32, tp=replace(single), defer=True)
    layer.load_state_dict({"weight": weight[:, :8], "bias": bias})
    layer.prepare()
    torch.testing.assert_close(layer.begin(x)(), x @ weight[:, :8].T + bias)
