"""`download-to-cache`, `create-model-store`, `build`, `engines` with a real, small model: what they make and print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_layout import put_into_hub

from appliance import builtin, cli
from appliance.commands import engine as of_engine
from appliance.engines import EngineStore, verify_engine
from appliance.launch.prepare import prepare_engine

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache")
    put_into_hub(builtin.checkpoint_dir(), path)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as on a machine without a GPU

    def call(*words: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_download_takes_the_model_and_where_a_gpu_is_at_hand_the_engine(
    cache: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["download-to-cache", "--model", "org/tiny", "--offline", "--cache", cache, "--json"]
    code, out, err = run(*common)
    assert code == 0, err
    snapshot = cache / "hub" / "models--org--tiny" / "snapshots" / ("a" * 40)
    assert json.loads(out) == {"checkpoint": str(snapshot), "engines": []}, (
        "no GPU: a CPU engine is made where it serves"
    )
    code, out, _ = run(*common, "-p", "bf16-cpu-tp1")
    (engine,) = json.loads(out)["engines"]
    assert verify_engine(Path(engine), "full").manifest.precision == "bf16"
    # With a GPU at hand, seen through the seam that asks for one.
    monkeypatch.setattr(of_engine, "_has_gpu", lambda settings: True)
    assert json.loads(run(*common)[1])["engines"] == [engine]
    assert json.loads(run(*common, "--model-only")[1])["engines"] == []
    plain = run(*common[:-1], "-p", "bf16-cpu-tp1")[1]
    assert plain.splitlines() == [str(snapshot), engine]


def test_all_profiles_that_can_run(cache: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_engine, "obtain", lambda settings: Path(settings.profile or "none"))
    code, out, _ = run("download-to-cache", "--all", "--model", "org/tiny", "--offline", "--cache", cache, "--json")
    listed = json.loads(run("list-model-profiles", "--json", "--model", "org/tiny", "--offline", "--cache", cache)[1])
    runnable = {row["name"] for row in listed if row["status"] == "runnable"}
    assert code == 0 and set(json.loads(out)["engines"]) == runnable and "bf16-cpu-tp1" in runnable


def test_a_model_store_serves_by_itself(cache: Path, tmp_path: Path, run: Run) -> None:
    common = ["create-model-store", "--model", "org/tiny", "--offline", "--cache", cache, "-p", "bf16-cpu-tp1"]
    code, out, _ = run(*common, "-m", tmp_path / "store", "--json")
    assert code == 0 and json.loads(out) == {"store": str(tmp_path / "store")}
    opened = prepare_engine(str(tmp_path / "store"), cache=tmp_path / "empty")
    assert opened.engine_dir == str(tmp_path / "store") and not (tmp_path / "empty").exists()
    assert run(*common, "-m", tmp_path / "store")[0] == 2, "it is not empty any more"


def test_build_publish_fetch(cache: Path, tmp_path: Path, run: Run) -> None:
    shelf = tmp_path / "shelf"
    common = ["--cache", cache, "--json"]
    words = ["build", "--model", "org/tiny", "--offline", "-p", "bf16-cpu-tp1", "--publish", shelf]
    code, out, err = run(*words, *common)
    assert code == 0, err
    found = json.loads(out)
    key = Path(found["engine"]).name
    assert found["published"] == f"{shelf}/{key}"
    other = ["--cache", tmp_path / "other", "--json"]
    code, out, _ = run("engines", "fetch", key, shelf, *other)
    assert code == 0 and json.loads(out) == {"engine": str(tmp_path / "other" / "engines" / key)}
    assert EngineStore(tmp_path / "other").verify(key, "full")
    code, out, _ = run("engines", "publish", key[:10], tmp_path / "second", *other)
    assert code == 0 and json.loads(out) == {"published": f"{tmp_path / 'second'}/{key}"}
