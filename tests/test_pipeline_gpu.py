"""Engines of pipeline stages on GPUs: what they answer, replayed and eager, alone and with tensor parallelism inside of
stages, as in `test_ranks_gpu.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from calibrated_models import make_source
from conftest import GPU_COUNT
from test_ranks_gpu import CONFIG, build_for, compare, in_own_process, lose_a_rank

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "m", CONFIG, outliers=1.0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.timeout(280)
@pytest.mark.parametrize(("size", "stages"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_stages_give_what_they_should(
    precision: str, size: int, stages: int, source: Path, cache: Path, tmp_path: Path
) -> None:
    if size > 2 * GPU_COUNT:
        pytest.skip(f"gpu test: needs {size // 2} GPUs, here are {GPU_COUNT}")
    log = tmp_path / "stderr"
    compare(in_own_process(build_for, source, cache, precision, size, stages, log=log), source, size, stages, log)
    assert "is loaded" in log.read_text(), "what ranks say is read"
    assert "unbatched P2P" not in log.read_text()  # torch's warning of messages between stages


@pytest.mark.timeout(200)
def test_a_stage_killed_on_a_gpu_is_named_within_seconds(source: Path, cache: Path) -> None:
    engine_dir = in_own_process(build_for, source, cache, "bf16", 2, 2)
    reason, seconds = in_own_process(lose_a_rank, engine_dir, 2)
    assert "rank 1 was killed by SIGKILL" in reason and seconds < 20, (reason, seconds)
