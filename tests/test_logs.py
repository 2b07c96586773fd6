"""Log lines: both formats, request ids, secrets, probes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from appliance import logs


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def test_json_lines_with_request_id_and_exception(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO", None, process="engine", secrets=["hunter22"])  # no terminal here: JSON
    token = logs.request_id.set("r-1")
    try:
        raise ValueError("bad hunter22")
    except ValueError:
        logging.getLogger("x.y").exception("it %s with hunter22", "failed")
    finally:
        logs.request_id.reset(token)
    logging.getLogger("x").debug("below the level")
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert entry["message"] == "it failed with ***" and entry["process"] == "engine" and entry["logger"] == "x.y"
    assert entry["level"] == "ERROR" and entry["request_id"] == "r-1" and entry["time"].endswith("Z")
    assert "ValueError: bad ***" in entry["exception"]


def test_human_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO", False, secrets=["hunter22"])
    logging.getLogger("x").info("plain")
    logging.getLogger("x").warning("hunter22 came")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(" server: plain") and second.endswith(" WARNING server: *** came")


def test_probes_stay_out_of_the_access_log(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO", False)
    access = logging.getLogger("uvicorn.access")
    for path in ("/v1/health/live", "/metrics", "/v1/models"):
        access.info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:1", "GET", path, "1.1", 200)
    (line,) = capsys.readouterr().err.splitlines()
    assert "GET /v1/models" in line
