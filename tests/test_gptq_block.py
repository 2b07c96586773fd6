"""The inner loop of GPTQ: one kernel against the loop in torch, and both against the paper's algorithm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from appliance.kernels._triton import HAS_TRITON
from appliance.kernels.gptq_block import gptq_block_reference, gptq_block_triton

HERE = Path(__file__).parent


def inputs(rows: int, columns: int, *, per_column: bool, device: str = "cpu") -> tuple[Tensor, ...]:
    """weight (rows strided, as a part of a wider one), original, factor, scales, zeros."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    wide = torch.randn(rows, columns + 8, generator=generator)
    original = wide[:, 8:] + 0.05 * torch.randn(rows, columns, generator=generator)
    factor = torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=generator).triu(1)
    groups = columns if per_column else 1
    scales = (0.1 + 0.2 * torch.rand(rows, groups, generator=generator)).half().float()
    zeros = torch.randint(0, 16, (rows, groups), generator=generator).float()
    return tuple(tensor.to(device) for tensor in (wide[:, 8:], original, factor, scales, zeros))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (37, 24), (3, 1)])
def test_kernel_equals_the_loop(rows: int, columns: int, per_column: bool) -> None:
    case = inputs(rows, columns, per_column=per_column)
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here: test_kernel_on_a_gpu")
    values, errors = gptq_block_triton(*case)
    expected_values, expected_errors = gptq_block_reference(*case)
    assert torch.equal(values, expected_values)
    assert torch.allclose(errors, expected_errors, rtol=0, atol=1e-6)
    assert values.unique().numel() > 8 or columns == 1  # not all at an end of the range


def test_rows_are_independent() -> None:
    case = inputs(20, 16, per_column=False)
    values, errors = gptq_block_reference(*case)
    weight, original, factor, scales, zeros = case
    some_values, some_errors = gptq_block_reference(weight[5:9], original[5:9], factor, scales[5:9], zeros[5:9])
    assert torch.equal(values[5:9], some_values) and torch.equal(errors[5:9], some_errors)


@pytest.mark.gpu
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(4096, 128), (1000, 64), (37, 96)])
def test_kernel_on_a_gpu(rows: int, columns: int, per_column: bool) -> None:
    """A multiplication and a subtraction may be one operation there, so now and then a number halfway between two
    values goes the other way, and the rest of its row follows."""
    case = inputs(rows, columns, per_column=per_column, device="cuda")
    values, errors = gptq_block_triton(*case)
    expected_values, expected_errors = gptq_block_reference(*case)
    equal_rows = (values == expected_values).all(1)
    assert float(equal_rows.float().mean()) > 0.97
    assert torch.allclose(errors[equal_rows], expected_errors[equal_rows], rtol=0, atol=1e-4)
    assert torch.equal(gptq_block_triton(*case)[0], values)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
def test_kernel_compiles_and_spills_nothing(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    command = [sys.executable, "-W", "ignore", str(HERE / "compile_gptq_block.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["capability"] for line in compiled] == [75, 80, 86, 89, 90]
    assert [line for line in compiled if line["stack"] != 0] == []
