"""`health`: what it asks, whom, and what it makes of the answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from appliance.cli import main, make_parser
from appliance.commands.health import flags_of, run_health


@contextmanager
def answering(status: int, body: dict[str, object]) -> Iterator[int]:
    """A server on loopback that answers so at /v1/health/ready, and 404 elsewhere; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/v1/health/ready" else 404)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def test_ready(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(200, {"status": "ready"}) as port:
        assert main(["health", "--port", str(port)]) == 0
        assert capsys.readouterr().out == "ready\n"
        assert main(["health", "--port", "1", "--health-port", str(port), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"status": "ready"}


def test_not_ready_says_how_far(capsys: pytest.CaptureFixture[str]) -> None:
    body = {"phase": "building", "reason": "building: layer 3", "percent": 43.2, "eta_seconds": 20.4}
    with answering(503, body) as port:
        assert main(["health", "--port", str(port)]) == 1
    assert capsys.readouterr().out == "not ready: building, building: layer 3, 43%, 20 s left (status 503)\n"


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(200, {}) as port:
        pass
    assert main(["health", "--port", str(port)]) == 1
    assert f"nobody answers on port {port}: " in capsys.readouterr().out


def test_flags_of_the_server_are_those_of_process_1(tmp_path: Path) -> None:
    proc = tmp_path / "cmdline"
    with answering(200, {}) as port:
        words = ["/opt/venv/bin/python", "/opt/appliance/entrypoint.py", "serve", "--model", "x", "--port", str(port)]
        proc.write_bytes("\0".join(words).encode() + b"\0")
        assert flags_of(proc) == {"model": "x", "port": str(port)}
        assert run_health(make_parser("health").parse_args(["health"]), proc) == 0
        assert run_health(make_parser("health").parse_args(["health", "--port", "9"]), proc) == 1, "its own win"


@pytest.mark.parametrize("words", [["/sbin/init"], [], ["python", "entrypoint.py", "--port"]])
def test_other_processes_have_no_flags_for_us(tmp_path: Path, words: list[str]) -> None:
    proc = tmp_path / "cmdline"
    proc.write_bytes("\0".join(words).encode() + b"\0" if words else b"")
    assert flags_of(proc) == {}
    assert flags_of(tmp_path / "absent") == {}
