"""Log lines: both formats, request ids, secrets, probes."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from server_fakes import eventually, ready_state, text

from appliance import logs
from appliance.server.app import create_app
from appliance.settings import inherited_secrets, load, secrets_of


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


async def test_request_ids_reach_uvicorns_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A real server: its access line and the traceback of a failed request carry the id that the client has."""
    state, _engine = await ready_state()
    state.tokenizer = None

    def broken() -> None:
        raise RuntimeError("broken hunter22")

    state.require_tokenizer = broken  # type: ignore[method-assign, assignment]
    logs.configure("INFO", True, secrets=["hunter22"])
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(state), log_config=None, lifespan="off"))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    await eventually(lambda: server.started)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as http:
        answer = await http.post("/v1/completions", json=text(), headers={"X-Request-Id": "my-id"})
        await http.get("/v1/models", headers={"X-Request-Id": "other-id"})
    server.should_exit = True
    await task
    listener.close()
    assert answer.status_code == 500 and answer.headers["X-Request-Id"] == "my-id"
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    of = {(line["logger"], line.get("request_id")): line for line in lines}
    assert "POST /v1/completions" in of["uvicorn.access", "my-id"]["message"]
    assert "RuntimeError: broken ***" in of["uvicorn.error", "my-id"]["exception"]
    assert "GET /v1/models" in of["uvicorn.access", "other-id"]["message"]


def test_a_progress_bar_may_take_the_place_of_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    logs.configure("INFO", False)
    elsewhere = io.StringIO()
    monkeypatch.setattr("sys.stderr", elsewhere)
    logging.getLogger("x").info("a line")
    assert elsewhere.getvalue().endswith("server: a line\n")


def test_children_keep_inherited_secrets_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert inherited_secrets() == ["hf_secret"]
    flags = {"api_keys": "key-1,key-2", "engine_source": "s3://user:passw@host/x", "hf_token": "hf_other"}
    assert set(secrets_of(load(flags, {}))) == {"key-1", "key-2", "passw", "hf_other"}


def test_probes_stay_out_of_the_access_log(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO", False)
    access = logging.getLogger("uvicorn.access")
    for path in ("/v1/health/live", "/metrics", "/v1/models"):
        access.info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:1", "GET", path, "1.1", 200)
    (line,) = capsys.readouterr().err.splitlines()
    assert "GET /v1/models" in line


def test_a_failed_engine_logs_a_traceback_only_of_what_nobody_expected(caplog: pytest.LogCaptureFixture) -> None:
    from appliance.engine_process import _log_failure
    from appliance.errors import HardwareError

    def logged(error: Exception, reason: Exception) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "appliance.engine"):
            try:
                raise error
            except Exception:
                _log_failure(error, reason)
        return [record.message for record in caplog.records]

    purposeful, odd = HardwareError("rank 1 was killed"), ValueError("odd")
    assert logged(odd, purposeful) == [], "it follows from the lost rank, which has its line"
    assert logged(purposeful, purposeful) == ["engine failed: rank 1 was killed"]
    (line,) = logged(odd, odd)
    assert "Traceback" in line and "ValueError: odd" in line
