"""Engines of pipeline stages on GPUs against one GPU: the same tokens, replayed and eager, alone and with tensor
parallelism inside the stages. On a machine with fewer GPUs ranks share them, as in `test_ranks_gpu.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from calibrated_models import make_source
from conftest import GPU_COUNT
from test_ranks_gpu import CONFIG, PROMPTS, answers, assert_near, build_for, in_own_process, lose_a_rank

from appliance.engines import read_manifest

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "m", CONFIG)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.timeout(280)
@pytest.mark.parametrize(("size", "stages"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_stages_give_what_one_gpu_does(
    precision: str, size: int, stages: int, source: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if size > 2 * GPU_COUNT:
        pytest.skip(f"gpu test: needs {size // 2} GPUs, here are {GPU_COUNT}")
    alone = in_own_process(build_for, source, cache, precision, 1)
    one, expected = in_own_process(answers, alone, 1, False)
    engine_dir = in_own_process(build_for, source, cache, precision, size, stages)
    manifest = read_manifest(engine_dir)
    assert manifest.kernels and manifest.tactics, manifest.build.notes  # the trial ran on all stages
    eager, _ = in_own_process(answers, engine_dir, size, False, stages)
    replayed, best = in_own_process(answers, engine_dir, size, True, stages)
    assert "unbatched P2P" not in capfd.readouterr().err  # torch's warning of messages between stages
    assert_near(best, expected, precision)
    pairs = [(eager, replayed)]
    if size == stages or precision == "bf16":  # ranks of a stage scale their own shares of 8-bit activations
        pairs += [(eager, one), (replayed, one)]
    for found, other in pairs:
        same = sum(found[name][:8] == other[name][:8] for name in one)
        assert same >= len(PROMPTS) - 2, "they differ by rounding at most"


@pytest.mark.timeout(200)
def test_a_stage_killed_on_a_gpu_is_named_within_seconds(source: Path, cache: Path) -> None:
    engine_dir = in_own_process(build_for, source, cache, "bf16", 2, 2)
    reason, seconds = in_own_process(lose_a_rank, engine_dir, 2)
    assert "rank 1 was killed by SIGKILL" in reason and seconds < 20, (reason, seconds)
