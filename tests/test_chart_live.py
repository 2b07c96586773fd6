"""What the chart tells Kubernetes to do, done to a live server: its environment, probes, end, test and pre-cache Job.

The server is started as the rendered container would be (arguments and environment), with another port and cache.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chart_tools import ROOT, manifests

FLAGS = ("--set", "auth.existingSecret=keys,metrics.serviceMonitor.enabled=true", "--set-json", "drainSeconds=2")
KEYS = "key-one,key-two"


@functools.cache
def pod(kind: str, name: str = "minimal", flags: tuple[str, ...] = FLAGS) -> dict[str, Any]:
    (item,) = [item for item in manifests(name, *flags) if item["kind"] == kind]
    spec: dict[str, Any] = item["spec"] if kind == "Pod" else item["spec"]["template"]["spec"]
    return spec


def environment(container: dict[str, Any], **other: str) -> dict[str, str]:
    """This process's, less what is ours, and the container's; secrets have the keys."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("APPLIANCE_", "NIM_"))}
    given = {item["name"]: item.get("value", KEYS) for item in container.get("env", [])}
    return own | given | other


class Pod:
    """The server's container, as a process here."""

    def __init__(self, spec: dict[str, Any], work: Path, **other: str) -> None:
        (self.container,) = spec["containers"]
        self.spec = spec
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        changed = {"APPLIANCE_PORT": str(self.port), "APPLIANCE_HOST": "127.0.0.1"}
        changed |= {"APPLIANCE_CACHE": str(work / "cache")}
        self.log = work / f"log-{self.port}"
        command = [sys.executable, str(ROOT / "entrypoint.py"), *self.container["args"]]
        self.began = time.monotonic()
        with self.log.open("wb") as log:
            variables = environment(self.container, **changed, **other)
            self.process = subprocess.Popen(command, cwd=work, env=variables, stderr=log)

    @property
    def scheme(self) -> str:
        return str(self.container["startupProbe"]["httpGet"]["scheme"]).lower()

    def probe(self, kind: str) -> int:
        """Status, as the kubelet asks: its path, its time, no certificate checked. 0: no connection."""
        probe = self.container[f"{kind}Probe"]
        return self.get(probe["httpGet"]["path"], probe["timeoutSeconds"])[0]

    def get(self, path: str, timeout: float = 10) -> tuple[int, bytes, Any]:
        """Status, body, headers."""
        url = f"{self.scheme}://127.0.0.1:{self.port}{path}"
        try:
            with urllib.request.urlopen(url, timeout=timeout, context=ssl._create_unverified_context()) as answer:
                return answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers
        except TimeoutError:
            raise
        except OSError as error:
            assert "timed out" not in str(error), f"{path} took more than {timeout} s"
            return 0, b"", None

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chart")


def test_the_pre_cache_job_runs(work: Path) -> None:
    flags = ("--set", "model.name=builtin,model.existingSecret=")
    (container,) = pod("Job", "pre-cached-beside", flags)["containers"]
    command = [sys.executable, str(ROOT / "entrypoint.py"), *container["args"]]
    variables = environment(container, APPLIANCE_CACHE=str(work / "cache"))
    done = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_dir()


@pytest.fixture(scope="module")
def started(work: Path) -> Iterator[tuple[Pod, dict[str, list[int]]]]:
    """A first start on an empty cache, probed until it is ready: the server, and what each probe said, in order."""
    running = Pod(pod("Deployment"), work)
    said: dict[str, list[int]] = {"startup": [], "liveness": [], "readiness": []}
    probe = running.container["startupProbe"]
    budget = probe["periodSeconds"] * probe["failureThreshold"]
    try:
        while not said["startup"] or said["startup"][-1] != 200:
            assert running.process.poll() is None, running.log.read_text()
            assert time.monotonic() - running.began < min(budget, 200), running.log.read_text()
            for kind in ("liveness", "readiness", "startup"):  # in this order: each may only be ahead of the next
                said[kind].append(running.probe(kind))
            time.sleep(0.05)
        yield running, said
    finally:
        running.end()


def test_probes_while_starting(started: tuple[Pod, dict[str, list[int]]]) -> None:
    _running, said = started
    answered = {kind: [status for status in statuses if status] for kind, statuses in said.items()}
    assert set(answered["liveness"]) == {200}, "never restarted for taking its time"
    assert set(said["startup"]) <= {0, 503, 200} and said["startup"].count(200) == 1
    assert answered["startup"].count(503) > 3, "the start was seen"
    assert set(answered["readiness"][:-2]) == {503}, "no traffic before it can answer"


def test_probes_while_ready(started: tuple[Pod, dict[str, list[int]]]) -> None:
    running, _ = started
    assert [running.probe(kind) for kind in ("startup", "readiness", "liveness")] == [200, 200, 200]
    assert running.get("/v1/models")[0] == 401, "the keys of the Secret are asked for"
    (monitor,) = [item for item in manifests("minimal", *FLAGS) if item["kind"] == "ServiceMonitor"]
    status, body, _headers = running.get(monitor["spec"]["endpoints"][0]["path"])
    assert status == 200 and b"num_requests_waiting{" in body, "scraped without a key"


def run_helm_test(running: Pod, wait: str, keys: str = KEYS) -> subprocess.CompletedProcess[str]:
    (container,) = pod("Pod")["containers"]
    assert container["command"] == ["python3", "-c"]
    script, url, _wait = container["args"]
    assert url == "http://demo-appliance:8000"
    command = [sys.executable, "-c", script, f"http://127.0.0.1:{running.port}", wait]
    variables = environment(container, APPLIANCE_API_KEYS=keys)
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


def test_helm_test_calls_the_api(started: tuple[Pod, dict[str, list[int]]]) -> None:
    done = run_helm_test(started[0], "10")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        word for what in ("ready", "live", "models", "chat", "tokens", "stream", "metrics") for word in ("ok", what)
    ]
    wrong = run_helm_test(started[0], "10", keys="no")
    assert wrong.returncode == 1 and "FAILED models" in wrong.stderr and "401" in wrong.stderr


def test_probes_while_draining(started: tuple[Pod, dict[str, list[int]]]) -> None:
    """SIGTERM under requests that run longer than the drain: these end properly, and all ends within the grace."""
    running, _ = started
    drain = float({item["name"]: item.get("value") for item in running.container["env"]}["APPLIANCE_DRAIN_SECONDS"])
    sleep = running.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    grace = running.spec["terminationGracePeriodSeconds"]
    lines: list[str] = []
    began = threading.Event()

    def ask() -> None:
        body = {"prompt": "one two", "max_tokens": 3800, "n": 16, "ignore_eos": True, "stream": True}
        headers = {"Content-Type": "application/json", "Authorization": "Bearer key-two"}
        url = f"http://127.0.0.1:{running.port}/v1/completions"
        request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            for line in answer:
                began.set()
                lines.append(line.decode())

    asking = threading.Thread(target=ask)
    asking.start()
    assert began.wait(30)
    running.process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    said = []
    while running.process.poll() is None and time.monotonic() - told < grace:
        said.append({kind: running.probe(kind) for kind in ("liveness", "readiness")})
        time.sleep(0.02)
    took = time.monotonic() - told
    asking.join(30)
    assert running.process.poll() == 0, running.log.read_text()
    assert drain <= took < grace - sleep
    during = [each for each in said if each["liveness"] and each["readiness"]]
    assert len(during) > 3 and {each["liveness"] for each in during} == {200}
    assert {each["readiness"] for each in during[1:]} == {503}, "the signal may be taken just after the first"
    events = [line.removeprefix("data: ").strip() for line in lines if line.strip()]
    assert json.loads(events[-2])["error"]["code"] == "unavailable" and events[-1] == "[DONE]"


def test_helm_test_says_what_is_wrong(started: tuple[Pod, dict[str, list[int]]]) -> None:
    """Comes last: nobody listens any more."""
    done = run_helm_test(started[0], "0")
    assert done.returncode == 1 and done.stderr.startswith("FAILED ready: (0,"), done.stderr


def test_probes_over_https(work: Path, tmp_path: Path) -> None:
    """With tls.existingSecret, as the kubelet asks: HTTPS, any certificate. A second start, with the first's cache."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, to make a certificate")
    (tmp_path / "tls.crt").touch()
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "1",
    ]
    command += ["-subj", "/CN=demo", "-keyout", str(tmp_path / "tls.key"), "-out", str(tmp_path / "tls.crt")]
    subprocess.run(command, check=True, capture_output=True)
    files = {f"APPLIANCE_SSL_{n}_PATH": str(tmp_path / f"tls.{e}") for n, e in (("CERTS", "crt"), ("KEY", "key"))}
    running = Pod(pod("Deployment", "minimal", ("--set", "tls.existingSecret=cert")), work, **files)
    try:
        assert running.scheme == "https"
        while running.probe("startup") != 200:
            assert running.process.poll() is None and time.monotonic() - running.began < 100, running.log.read_text()
            time.sleep(0.1)
        assert [running.probe("readiness"), running.probe("liveness")] == [200, 200]
        assert running.process.poll() is None
    finally:
        running.end()
