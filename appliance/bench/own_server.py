"""A server as a child process of a benchmark: `appliance serve` on a free loopback port, until the block ends.

Knows the command line, the health routes and the processes below the server; knows nothing of what is measured.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from appliance.errors import ApplianceError

_POLL_SECONDS = 0.02
_TAIL_LINES = 40  # of the log of a server that failed
_END_SECONDS = 60  # for a server that was told to end; more than its own drain


class OwnServer:
    """`with OwnServer(model, cache, …) as server`: the process runs, and may not answer yet. Times are seconds since it
    was started."""

    def __init__(
        self,
        model: str,
        cache: str | None = None,
        precision: str | None = None,
        flags: Sequence[str] = (),
        log: Path | None = None,
    ) -> None:
        """`flags`: further ones for `serve`. `log`: file for what the server writes; None: it writes where we do."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "appliance.cli", "serve", "--model", model]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--cache", cache] if cache else []
        command += ["--precision", precision] if precision else []
        self._command = [*command, *flags]
        self._log = log

    def __enter__(self) -> Self:
        self._begin = time.perf_counter()
        if self._log is None:
            self._process = subprocess.Popen(self._command)
        else:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def until(self, path: str, timeout: float) -> float:
        """Seconds from the start until `path` answers 200. ApplianceError if the server ends or takes too long."""
        while self._process.poll() is None:
            if get_json(self.url + path)[0] == 200:
                return time.perf_counter() - self._begin
            if time.perf_counter() - self._begin > timeout:
                raise ApplianceError(
                    f"no answer 200 from {self.url}{path} within {timeout:.0f} s", hint="raise --timeout"
                )
            time.sleep(_POLL_SECONDS)
        if self._log is not None:
            lines = self._log.read_text(errors="replace").splitlines()
            print(*lines[-_TAIL_LINES:], sep="\n", file=sys.stderr)
        raise ApplianceError(
            f"the server ended with exit code {self._process.returncode}", hint="its own messages are above"
        )

    def until_replicas(self, timeout: float) -> None:
        """Wait until every replica is up, where the first makes the server ready. ApplianceError as `until`."""
        while self._process.poll() is None:
            phases = [each["phase"] for each in get_json(self.url + "/v1/health/ready")[1].get("replicas", [])]
            if all(phase == "ready" for phase in phases):
                return
            if time.perf_counter() - self._begin > timeout:
                raise ApplianceError(f"replicas are {', '.join(phases)} after {timeout:.0f} s", hint="see its log")
            time.sleep(_POLL_SECONDS)
        raise ApplianceError(f"the server ended with exit code {self._process.returncode}", hint="see its log")

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time so far of the server's process and of the engine's."""
        server = psutil.Process(self._process.pid)
        used = {"server": _cpu(server)}
        for child in server.children():
            if any("engine_process" in word for word in child.cmdline()):
                used["engine"] = _cpu(child)
        return used


def get_json(url: str, api_key: str | None = None) -> tuple[int, dict[str, Any]]:
    """Status and body of a GET; 0 where nothing answers, {} for a body that is no JSON object."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            status, body = int(response.status), response.read()
    except urllib.error.HTTPError as error:
        status, body = error.code, error.read()
    except OSError:
        return 0, {}
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    return status, found if isinstance(found, dict) else {}


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
