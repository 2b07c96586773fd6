"""The server process with a fake start and a fake engine: live at once, exit codes, signals, nothing left behind."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from appliance.errors import SettingsError
from appliance.ipc import Progress
from appliance.launch.engine import show_progress
from appliance.launch.http import open_sockets
from appliance.launch.report import SILENCE_SECONDS, breakdown, progress_line, report_progress
from appliance.launch.scratch import socket_directory
from appliance.launch.server import default_model_name
from appliance.server.lifecycle import Lifecycle
from appliance.settings import load

ROOT = Path(__file__).parent.parent
SCRIPT = """
import asyncio, sys, time
from appliance.errors import CheckpointError
from appliance.launch.server import serve
from appliance.settings import load
from appliance.types import EngineOptions

class Start:
    def __init__(self, settings, state, directory):
        self.state = state
    async def prepare(self):
        if sys.argv[1] == "hang":
            self.state.lifecycle.enter("building", "layers.0")
            await asyncio.sleep(600)
        if sys.argv[1] == "stuck":
            await asyncio.sleep(1.0)
            time.sleep(600)
        if sys.argv[1] == "fail":
            raise CheckpointError("the shard is truncated", hint="download it again")
        return EngineOptions(engine_dir="/nowhere", backend="fake", replicas=2 if sys.argv[1] == "two" else 1)
    async def repair(self, error):
        raise error

flags = dict(word.split("=") for word in sys.argv[2:])
sys.exit(serve(load(flags), sequence=Start, engine_module="fake_engine"))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(port: int, path: str, timeout: float = 5.0) -> tuple[int, dict[str, object]]:
    """Status and JSON body; (0, {}) if nothing answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=timeout) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
    except OSError:
        return 0, {}


def wait_for(port: int, path: str, status: int, seconds: float, timeout: float = 5.0) -> dict[str, object]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, body = get(port, path, timeout)
        if found == status:
            return body
        time.sleep(0.02)
    raise AssertionError(f"{path} did not answer {status} within {seconds} s")


class Server:
    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port

    def end(self, seconds: float = 20) -> tuple[int, str]:
        """Exit code and log."""
        _, log = self.process.communicate(timeout=seconds)
        return self.process.returncode, log


@contextmanager
def server(tmp_path: Path, start: str, mode: str = "ok", **flags: object) -> Iterator[Server]:
    port = free_port()
    words = [f"{name}={value}" for name, value in ({"port": port, "host": "127.0.0.1"} | flags).items()]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}",
        "FAKE_ENGINE_MODE": mode,
        "TMPDIR": str(tmp_path),
    }
    command = [sys.executable, "-c", SCRIPT, start, *words]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Server(process, port)
        finally:
            process.kill()


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pids: list[int]) -> bool:
    """Whether no living process has one of these pids, within ten seconds."""
    for _ in range(1000):
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.01)
    return False


def alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_live_at_once_while_the_start_hangs_then_leaves_on_sigterm(tmp_path: Path) -> None:
    with server(tmp_path, "hang") as running:
        wait_for(running.port, "/v1/health/live", 200, 20)
        # What 2 s allow on an idle machine; in CPU time, because the tests may share the machine with others.
        spent = psutil.Process(running.process.pid).cpu_times()
        assert spent.user + spent.system < 3.0
        status, body = get(running.port, "/v1/health/ready")
        assert status == 503 and body["phase"] == "building" and body["reason"] == "layers.0"
        children = children_of(running.process.pid)
        assert len(children) == 1, "the engine process is started early"
        running.process.send_signal(signal.SIGTERM)
        code, log = running.end()
        assert code == 0, log
        assert gone(children) and not list(tmp_path.glob("appliance-*")), "nothing is left behind"


def test_idle_connections_outlive_the_pools_of_clients(tmp_path: Path) -> None:
    with server(tmp_path, "hang") as running:
        wait_for(running.port, "/v1/health/live", 200, 20)
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
        for wait_seconds in (0.0, 5.5):  # httpx, which openai uses, keeps them for 5 s
            time.sleep(wait_seconds)
            if connection.sock is not None:
                readable, _, _ = select.select([connection.sock], [], [], 0)
                assert not readable, "the server has closed it"
            connection.request("GET", "/v1/health/live")
            assert connection.getresponse().read()
        connection.close()


def test_ready_with_breakdown_on_both_ports(tmp_path: Path) -> None:
    health_port = free_port()
    with server(tmp_path, "ok", health_port=health_port, served_model_name="a,b") as running:
        assert wait_for(running.port, "/v1/health/ready", 200, 15)["phase"] == "ready"
        assert get(health_port, "/v1/health/ready")[0] == 200
        models = get(running.port, "/v1/models")[1]["data"]
        assert isinstance(models, list) and [model["id"] for model in models] == ["a", "b"]
        running.process.send_signal(signal.SIGINT)
        code, log = running.end()
        messages = [json.loads(line)["message"] for line in log.splitlines()]
        assert code == 0
        assert any(message.startswith("ready after ") and "loading" in message for message in messages)


def test_tls_and_client_certificates(tmp_path: Path) -> None:
    """MTLS with one self-signed certificate for both ends: served to who shows it, refused to who does not."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(cert), "-keyout", str(key)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    files = {"ssl_certs_path": cert, "ssl_key_path": key, "ssl_ca_certs_path": cert}
    with server(tmp_path, "hang", ssl_mode="MTLS", **files) as running:
        known = ssl.create_default_context(cafile=str(cert))
        known.load_cert_chain(cert, key)
        url = f"https://127.0.0.1:{running.port}/v1/health/live"
        deadline = time.monotonic() + 10
        while True:
            try:
                with urllib.request.urlopen(url, context=known, timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        with pytest.raises(OSError):
            urllib.request.urlopen(url, context=ssl.create_default_context(cafile=str(cert)), timeout=5)


def test_a_failed_start_gives_its_exit_code_and_one_line(tmp_path: Path) -> None:
    with server(tmp_path, "fail") as running:
        code, log = running.end()
    assert code == 4
    errors = [line for line in map(json.loads, log.splitlines()) if line["level"] == "ERROR"]
    assert [line["message"] for line in errors] == ["the shard is truncated (download it again)"]
    assert log.count("the shard is truncated") == 1, "said once"


def test_a_stuck_event_loop_fails_liveness_and_then_ends_the_server(tmp_path: Path) -> None:
    reason = tmp_path / "termination-log"
    reason.touch()
    with server(tmp_path, "stuck", stuck_seconds=1.5, termination_log=reason) as running:
        wait_for(running.port, "/v1/health/live", 200, 20)
        children = children_of(running.process.pid)
        body = wait_for(running.port, "/v1/health/live", 503, 20, timeout=0.3)  # one connection may hang in the loop
        assert body["phase"] == "failed" and "the event loop has not turned for" in str(body["reason"])
        assert get(running.port, "/v1/chat/completions")[0] == 503
        code, log = running.end()
    assert code == 1 and "in prepare" in log, "the log has the place where it is stuck"
    assert "has not turned for 3 s" in reason.read_text() and gone(children)


def test_an_engine_that_keeps_crashing_ends_the_server(tmp_path: Path) -> None:
    with server(tmp_path, "ok", "crash-in-load", restart_budget=0) as running:
        code, log = running.end()
    assert code == 8 and "failed 1 time within 10 minutes" in log


def test_the_server_goes_on_without_a_replica_and_ends_with_the_last(tmp_path: Path) -> None:
    with server(tmp_path, "two", "steps", restart_budget=0) as running:
        wait_for(running.port, "/v1/health/ready", 200, 20)
        deadline = time.monotonic() + 20
        while get(running.port, "/v1/health/ready")[1]["reason"]:
            assert time.monotonic() < deadline, "the second one is not ready"
            time.sleep(0.02)
        first, second = children_of(running.process.pid)
        os.kill(second, signal.SIGKILL)
        while not (reason := str(get(running.port, "/v1/health/ready")[1]["reason"])):
            time.sleep(0.02)
        status, body = get(running.port, "/v1/health/ready")
        assert status == 200 and body["phase"] == "ready"
        assert reason.startswith("1 of 2 replicas serve; replica 1: "), reason
        replicas = body["replicas"]
        assert isinstance(replicas, list) and [each["restarts"] for each in replicas] == [0, 1]
        time.sleep(0.5)
        assert running.process.poll() is None and alive(first) and not alive(second)
        os.kill(first, signal.SIGKILL)
        code, log = running.end()
    assert code == 8 and "replica 1 is given up, 1 of 2 remain: replica 1 failed 1 time within 10 minutes" in log


def test_second_signal_leaves_at_once(tmp_path: Path) -> None:
    with server(tmp_path, "ok", "stubborn") as running:
        wait_for(running.port, "/v1/health/live", 200, 10)
        while get(running.port, "/v1/health/ready")[1].get("phase") != "warming":
            time.sleep(0.02)
        children = children_of(running.process.pid)
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert running.process.poll() is None, "the first signal waits for the engine, which does not listen"
        began = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert running.end()[0] == 128 + signal.SIGTERM
        assert time.monotonic() - began < 10.0  # the engine would be waited for 30 s
        assert gone(children)


def test_directories_of_killed_runs_are_removed_by_the_next_one(tmp_path: Path) -> None:
    def left() -> set[str]:
        return {path.name for path in tmp_path.glob("appliance-*")}

    (tmp_path / "appliance-other").mkdir()  # not one of a run
    with server(tmp_path, "hang") as first:
        wait_for(first.port, "/v1/health/live", 200, 20)
        with server(tmp_path, "hang") as second:
            wait_for(second.port, "/v1/health/live", 200, 20)
            assert len(left()) == 3, "a running server's is left alone"
            second.process.kill()
            second.process.wait()
        assert len(left()) == 3
        with server(tmp_path, "hang") as third:
            wait_for(third.port, "/v1/health/live", 200, 20)
            assert len(left()) == 3, "the killed one's is gone, the third's there"
            third.process.send_signal(signal.SIGTERM)
            assert third.end()[0] == 0
        first.process.send_signal(signal.SIGTERM)
        assert first.end()[0] == 0
    assert left() == {"appliance-other"}


@pytest.mark.parametrize("seconds", [0.05, 0.2, 0.4, 0.6])
def test_sigterm_in_the_first_moments_leaves_without_a_traceback(tmp_path: Path, seconds: float) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "entrypoint.py", "serve", "--port", str(free_port()), "--cache", str(tmp_path / "c")]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    assert process.returncode in (0, 128 + signal.SIGTERM, -signal.SIGTERM) and "Traceback" not in log, log


def test_no_place_for_temporary_files_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    match = r"No usable temporary directory found \(mount a writable /tmp"
    with pytest.raises(SettingsError, match=match), socket_directory():
        pass


def test_port_in_use_is_one_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"cannot listen on 127.0.0.1 port {port}: .* \(stop what uses it"):
            open_sockets(load({"port": port, "host": "127.0.0.1"}, {}))


async def test_a_long_phase_is_never_silent(caplog: pytest.LogCaptureFixture) -> None:
    """The interval is ten seconds, shortened here: a line at least that often while nothing moves, none when ready."""
    assert SILENCE_SECONDS <= 10.0
    life = Lifecycle()
    with caplog.at_level(logging.INFO):
        reporter = asyncio.create_task(report_progress(life, silence_seconds=0.2, poll_seconds=0.02))
        life.enter("building", "layers.0")
        await asyncio.sleep(1.1)
        said = [record.created for record in caplog.records]
        life.enter("ready")
        caplog.clear()
        await asyncio.sleep(0.5)
        reporter.cancel()
    assert len(said) >= 4 and all(later - earlier < 0.6 for earlier, later in pairwise(said))
    assert not caplog.records


def test_model_names(tmp_path: Path) -> None:
    assert default_model_name("hf://org/name@main") == "org/name"
    assert default_model_name("org/name") == "org/name"
    assert default_model_name(str(tmp_path / "nothing" / "model-x")) == "model-x"
    assert default_model_name("builtin") == "appliance-builtin"


def test_progress_lines_and_breakdown() -> None:
    now = 0.0
    life = Lifecycle(lambda: now)
    life.enter("building", "x")
    life.progress(percent=43.2, detail="layers.3", bytes_done=1 << 30, bytes_total=3 << 30, eta_seconds=20.4)
    assert progress_line(life) == "building: layers.3 (43%, 1.00 of 3.00 GiB, 20 s left)"
    now = 2.0
    life.enter("loading")
    now = 2.5
    life.progress(percent=50.0)
    assert life.eta_seconds is None, "half a second says nothing"
    now = 4.0
    show_progress(life, Progress("load", percent=50.0), load_bytes=4 << 30)
    assert progress_line(life) == "loading (50%, 2.00 of 4.00 GiB, 2 s left)"
    assert life.as_dict()["bytes_done"] == 2 << 30 and life.as_dict()["eta_seconds"] == 2.0
    now = 3.0
    life.enter("ready")
    line = breakdown(life, 0.5, {"imports": 2.0, "weights": 0.4, "tiny": 0.001})
    parts, beside = line.split("; ")
    assert parts == "3.5 s: python 0.5, starting 0.0, building 2.0, loading 1.0 (weights 0.4)"
    assert beside == "beside it, imports took 2.0 s"
