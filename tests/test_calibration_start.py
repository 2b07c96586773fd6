"""From the settings of a start to a calibrated engine: which text, found where."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from calibrated_models import CASES, make_source

from appliance.cli import main
from appliance.engines import read_manifest
from appliance.errors import CheckpointError, SettingsError
from appliance.launch.prepare import prepare_engine
from appliance.runtime.sample_text import SAMPLE_TEXT


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("llama") / "model", CASES["llama"], layers=2)


def put_dataset(cache: Path, name: str = "org/text") -> Path:
    """A data set in huggingface_hub's cache layout, as a download leaves it."""
    repository = cache / "hub" / f"datasets--{name.replace('/', '--')}"
    commit = "c" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").write_text(json.dumps({"text": SAMPLE_TEXT}) + "\n")
    return snapshot


def test_a_start_calibrates_with_what_the_settings_name(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A data set of the hub, which a start without network finds in the cache; then the same engine once more."""
    cache = tmp_path / "cache"
    snapshot = put_dataset(cache)
    chosen = {
        "calibration_data": "org/text",
        "calibration_samples": "20",
        "calibration_length": "60",
        "offline": "true",
    }
    options = prepare_engine(str(source), precision="int4", backend="cpu", cache=cache, overrides=chosen)
    manifest = read_manifest(Path(options.engine_dir))
    summary = manifest.calibration
    assert manifest.scheme == "int4_awq" and summary is not None
    assert (summary.data, summary.samples, summary.tokens) == (str(snapshot), 20, 1200)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items() if name != "offline"]
    wanted = ["--model", str(source), "--precision", "int4", "--backend", "cpu", "--cache", str(cache), "--offline"]
    assert main(["serve", "--dry-run", *wanted, *words]) == 0
    assert f"found in {options.engine_dir}" in capsys.readouterr().out
    (snapshot / "train.jsonl").unlink()
    (snapshot.parents[1] / "refs" / "main").unlink()
    missing = "org/text (revision main) is not in the cache, and downloading is off"
    assert main(["serve", "--dry-run", *wanted, *words]) == CheckpointError.exit_code, "as a start would end"
    assert f"problem       {missing}" in capsys.readouterr().out
    assert main(["serve", "--dry-run", *wanted, *words, "--no-offline"]) == 0
    assert f"its key is not known before its calibration data is downloaded: {missing}" in capsys.readouterr().out


def test_text_that_is_not_there_ends_the_start(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the checkpoint is hashed, by a dry run too."""
    monkeypatch.setattr("appliance.launch.obtain.digest", lambda *_, **__: pytest.fail("it was hashed"))
    short = tmp_path / "short.txt"
    short.write_text("Not much to read here.")
    for data, error, words in (
        ("./none.txt", CheckpointError, "neither a file or directory here nor a data set of the hub"),
        (str(short), SettingsError, r"too short: .*short\.txt has 22 tokens, which make 0 samples of 256, and 128"),
    ):
        with pytest.raises(error, match=words):
            prepare_engine(
                str(source), precision="int4", backend="cpu", cache=tmp_path, overrides={"calibration_data": data}
            )
        words_of_it = ["--precision", "int4", "--backend", "cpu", "--cache", str(tmp_path), "--calibration-data", data]
        assert main(["serve", "--dry-run", "--model", str(source), *words_of_it]) == error.exit_code
        assert re.search(f"problem .*{words}", capsys.readouterr().out)
