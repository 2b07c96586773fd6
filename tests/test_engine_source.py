"""Fetch before build, in the start-up sequence: a fleet builds once, and a source that is down delays little.

Against an HTTP server on loopback that serves a directory, is cut off in mid-transfer, and hangs."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from test_engines import http  # noqa: F401  a fixture

from appliance.engines import EngineStore
from appliance.errors import SettingsError
from appliance.launch.prepare import prepare
from appliance.settings import Settings, load

Http = tuple[str, Path, dict[str, int]]


def settings(cache: Path, source: str, **flags: object) -> Settings:
    common = {"cache": str(cache), "engine_source": source, "profile": "bf16-cpu-tp1", "offline": False}
    return load({**common, **flags}, {})


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to which the first member of a fleet has published its engine."""
    place = tmp_path_factory.mktemp("fleet")
    (place / "shelf").mkdir()
    prepare(settings(place / "first", str(place / "shelf"), engine_publish=True))
    return place / "shelf"


def key_of(shelf: Path) -> str:
    (engine,) = shelf.iterdir()
    assert (engine / "engine.json").is_file()
    return engine.name


def test_the_second_of_a_fleet_builds_nothing(shelf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        options = prepare(settings(tmp_path / "second", str(shelf)))
    assert Path(options.engine_dir).name == key_of(shelf)
    assert f"engine {key_of(shelf)[:12]} fetched" in caplog.text and "built in" not in caplog.text


def test_publishing_needs_leave_and_a_place(shelf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    first = shelf.parent / "first"
    with caplog.at_level(logging.INFO):
        prepare(settings(first, str(empty)))
        assert list(empty.iterdir()) == [], "it was not allowed"
        prepare(settings(first, str(empty), engine_publish=True))
    assert key_of(empty) == key_of(shelf), "an engine found here is published too, if the source lacks it"
    assert f"engine {key_of(shelf)[:12]} is at {empty}" in caplog.text
    with pytest.raises(SettingsError, match="engine_publish needs engine_source"):
        load({"engine_publish": True}, {})
    with pytest.raises(SettingsError, match="only for fetching"):
        settings(first, "https://engines.invalid", engine_publish=True)


def test_a_source_that_cannot_be_written_is_no_obstacle(shelf: Path, caplog: pytest.LogCaptureFixture) -> None:
    (shelf.parent / "file").write_text("")
    prepare(settings(shelf.parent / "first", str(shelf.parent / "file" / "x"), engine_publish=True))
    assert "the engine could not be published" in caplog.text


def serve_shelf(http: Http, shelf: Path) -> tuple[str, dict[str, int]]:  # noqa: F811
    url, root, faults = http
    (root / key_of(shelf)).symlink_to(shelf / key_of(shelf))
    return url, faults


def test_a_transfer_that_is_cut_goes_on(
    shelf: Path,
    tmp_path: Path,
    http: Http,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    url, faults = serve_shelf(http, shelf)
    faults |= {"cuts": 2, "cut_from": 0}  # two connections end in the middle; the library asks for ranges
    with caplog.at_level(logging.INFO):
        prepare(settings(tmp_path / "cache", url))
    assert "fetched" in caplog.text and "built in" not in caplog.text and faults["cuts"] == 0
    EngineStore(tmp_path / "cache").verify(key_of(shelf), "full")


def test_a_source_that_hangs_delays_by_its_timeout_and_the_build_goes_on(
    shelf: Path,
    tmp_path: Path,
    http: Http,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    url, faults = serve_shelf(http, shelf)
    faults["hang_from"] = 0
    with caplog.at_level(logging.INFO):
        prepare(settings(tmp_path / "cache", url, engine_source_timeout=1.0))
    times = {record.getMessage(): record.created for record in caplog.records}
    gave_up = next(at for text, at in times.items() if text.startswith("building the engine, since it could not be"))
    began = next(at for text, at in times.items() if text.startswith("fetching"))
    assert gave_up - began < 4.0, "1 s, and what a busy machine adds"
    assert "built in" in caplog.text
    (stored,) = EngineStore(tmp_path / "cache").list_engines()
    assert stored.manifest is not None and stored.key == key_of(shelf)


def test_a_source_that_is_down_or_damaged_delays_nothing(
    shelf: Path,
    tmp_path: Path,
    http: Http,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    url, root, _ = http
    (root / key_of(shelf)).mkdir()
    for file in (shelf / key_of(shelf)).iterdir():
        if file.is_file():
            (root / key_of(shelf) / file.name).write_bytes(file.read_bytes())
    rank = root / key_of(shelf) / "rank-0.safetensors"
    rank.write_bytes(bytes(rank.stat().st_size))
    prepare(settings(tmp_path / "cache", url))
    assert "does not match the digest" in caplog.text or "is missing at its URL" in caplog.text
    assert EngineStore(tmp_path / "cache").find(key_of(shelf)) is not None
    began = time.monotonic()
    with pytest.raises(Exception, match=r"cannot be reached|did not answer"):
        from appliance.engines import fetch

        fetch("http://127.0.0.1:9", "0" * 64, EngineStore(tmp_path / "other"), patience=5.0)
    assert time.monotonic() - began < 5.0, "refused at once: nothing to wait for"
