"""Runs the image with crun, an OCI runtime: what containerd and Kubernetes start containers with is of this kind.

The image's own ENTRYPOINT, USER, ENV and WORKDIR apply. Unless told otherwise a container has what a strict cluster
gives: a read-only root, no capabilities, no new privileges, no devices, a /tmp that executes nothing, a termination
log. It shares the machine's network, so tests reach it over loopback. Knows OCI's config.json, nothing of the appliance
but its port.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from image_build import IMAGE, WORK, buildah

CACHE = "/opt/nim/.cache"
_TMPFS = ["nosuid", "nodev", "noexec", "mode=1777"]


@contextlib.contextmanager
def mounted_image() -> Iterator[Path]:
    """The image's root file system, for all containers of a test run: they do not write to it."""
    container = buildah("from", "--pull-never", IMAGE)
    try:
        yield Path(buildah("mount", container))
    finally:
        buildah("rm", container)


@dataclass
class Container:
    """`with Container(...) as c:` starts it; leaving kills what is left of it."""

    root: Path
    config: Mapping[str, Any]  # the image's
    scratch: Path  # for the bundle, the log and the termination log
    words: Sequence[str] = ()  # after the image's name, as in `docker run IMAGE serve --flag`
    user: str = ""  # UID:GID instead of the image's
    mounts: Mapping[str, Path] = field(default_factory=dict)  # path in the container -> directory or file here
    tmpfs: Mapping[str, str] = field(default_factory=dict)  # path -> size
    env: Mapping[str, str] = field(default_factory=dict)
    read_only: bool = True
    entrypoint: Sequence[str] = ()

    def __enter__(self) -> Container:
        self.name = f"appliance-test-{uuid4().hex[:8]}"
        self.port = _free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        bundle = self.scratch / self.name
        bundle.mkdir()
        self.termination_log = bundle / "termination-log"
        self.termination_log.touch()
        self.termination_log.chmod(0o666)  # as the kubelet makes it
        (bundle / "config.json").write_text(json.dumps(self._oci()))
        self._log = bundle / "log"
        self._began = time.monotonic()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                _crun("run", "--bundle", str(bundle), self.name), stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.kill(signal.SIGKILL)
            self.process.wait(30)
        subprocess.run(_crun("delete", "--force", self.name), capture_output=True)

    # ------------------------------------------------------------ looking

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def reason(self) -> list[str]:
        """The lines of the termination log."""
        return self.termination_log.read_text().splitlines()

    def get(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """Status and JSON body; status 0 when nobody answers."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())
        except OSError:
            return 0, {}

    def until_phase(self, *phases: str, seconds: float = 120.0) -> str:
        while time.monotonic() - self._began < seconds and self.process.poll() is None:
            phase = self.get("/v1/health/ready")[1].get("phase", "")
            if phase in phases:
                return str(phase)
            time.sleep(0.02)
        raise AssertionError(f"not in {phases} after {seconds} s:\n{self.log}")

    def until_ready(self, seconds: float = 180.0) -> None:
        self.until_phase("ready", seconds=seconds)

    # ------------------------------------------------------------ acting

    def kill(self, number: signal.Signals) -> None:
        """A signal to process 1, as `docker stop` and the kubelet send it."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(self.first_pid(), number)

    def first_pid(self) -> int:
        """Process 1's number here. Raises FileNotFoundError once it is gone."""
        done = subprocess.run(_crun("state", self.name), capture_output=True, text=True)
        if done.returncode:
            raise FileNotFoundError(done.stderr)
        return int(json.loads(done.stdout)["pid"])

    def wait(self, seconds: float = 60.0) -> int:
        """The exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.log}") from None

    def execute(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command in the running container, as the health check is run: same user and environment."""
        return subprocess.run(
            _crun("exec", "--user", self.user or self.config["User"], self.name, *words),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )

    # ------------------------------------------------------------ OCI

    def _oci(self) -> dict[str, Any]:
        image = self.config
        uid, gid = (int(part) for part in (self.user or image["User"]).split(":"))
        given = {"APPLIANCE_HOST": "127.0.0.1", "APPLIANCE_PORT": str(self.port), **self.env}
        args = [*(self.entrypoint or image["Entrypoint"]), *(self.words or image.get("Cmd") or ())]
        none: list[str] = []
        return {
            "ociVersion": "1.0.2",
            "root": {"path": str(self.root), "readonly": self.read_only},
            "hostname": self.name,
            "process": {
                "terminal": False,
                "user": {"uid": uid, "gid": gid, "umask": 0o022},
                "args": args,
                "env": [*image["Env"], *(f"{name}={value}" for name, value in given.items())],
                "cwd": image["WorkingDir"],
                "noNewPrivileges": True,
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted", "inheritable"), none),
            },
            "mounts": self._mounts(),
            "linux": {
                "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")],
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        }

    def _mounts(self) -> list[dict[str, Any]]:
        def tmpfs(path: str, size: str, *options: str) -> dict[str, Any]:
            return {"destination": path, "type": "tmpfs", "source": "tmpfs", "options": [*options, f"size={size}"]}

        bound = {"/dev/termination-log": self.termination_log, **self.mounts}
        return [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            tmpfs("/dev", "64k", "nosuid", "mode=755"),
            tmpfs("/dev/shm", "64m", *_TMPFS),
            tmpfs("/tmp", "64m", *_TMPFS),
            *(tmpfs(path, size, *_TMPFS) for path, size in self.tmpfs.items()),
            *(
                {"destination": path, "type": "bind", "source": str(source), "options": ["rbind", "nosuid", "nodev"]}
                for path, source in bound.items()
            ),
        ]


def _crun(*words: str) -> list[str]:
    """crun in a mount namespace of its own, without the second half of a hybrid cgroup hierarchy, which it refuses."""
    command = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'
    outside = ["unshare", "--mount", "--propagation", "private", "sh", "-c", command, "sh"]
    return [*outside, "crun", "--cgroup-manager=disabled", "--root", str(WORK / "crun"), *words]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
