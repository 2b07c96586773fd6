"""The image, built for real and run by an OCI runtime: who may run it, what it writes, how it ends, what it lacks.

`make test-image`. On a machine that cannot do this every test is skipped with the reason.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from container_run import CACHE, Container, mounted_image
from image_build import ROOT, build, why_not

from appliance import __version__

pytestmark = [pytest.mark.image, pytest.mark.timeout(2400), pytest.mark.skipif(bool(why_not()), reason=str(why_not()))]

STRANGER = 1_234_567  # a UID that nothing knows, as OpenShift gives them
Run = Callable[..., Container]
QUESTION = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "temperature": 0}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    found: dict[str, Any] = build()["config"]
    return found


@pytest.fixture(scope="module")
def root(config: dict[str, Any]) -> Iterator[Path]:
    with mounted_image() as path:
        yield path


@pytest.fixture
def run(root: Path, config: dict[str, Any], tmp_path: Path) -> Run:
    def start(*words: str, **options: Any) -> Container:
        return Container(root, config, tmp_path, words, **options)

    return start


def directory(path: Path, uid: int, gid: int, mode: int) -> Path:
    path.mkdir()
    os.chown(path, uid, gid)
    path.chmod(mode)
    return path


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory, root: Path, config: dict[str, Any]) -> Path:
    """A cache directory of UID 1000 with the engine of a first start in it."""
    scratch = tmp_path_factory.mktemp("warm")
    cache = directory(scratch / "cache", 1000, 1000, 0o755)
    with Container(root, config, scratch, mounts={CACHE: cache}) as first:
        first.until_ready()
        assert "built in" in first.log
        first.kill(signal.SIGTERM)
        assert first.wait() == 0
    return cache


# ---------------------------------------------------------------- what the image is


def test_configuration(config: dict[str, Any]) -> None:
    assert config["User"] == "1000:0" and config["StopSignal"] == "SIGTERM" and "8000/tcp" in config["ExposedPorts"]
    assert config["Entrypoint"] == ["/opt/venv/bin/python", "/opt/appliance/entrypoint.py"] and not config.get("Cmd")
    assert config["Healthcheck"]["Test"] == ["CMD", *config["Entrypoint"], "health"]
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in config["Labels"].items()}
    assert {"title", "description", "licenses", "version", "revision", "created", "base.name"} <= set(labels)
    assert labels["licenses"] == "Apache-2.0" and labels["version"] == "9.9"


def test_content(root: Path) -> None:
    """The code as it is in the working tree and compiled; no compiler, no package installer; nothing that only root or
    nobody in particular may read or write."""
    for tree in ("appliance", "profiles"):
        tracked = subprocess.run(["git", "ls-files", tree], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in tracked.split():
            assert (root / "opt/appliance" / name).is_file(), name
    assert list(root.glob("opt/appliance/appliance/__pycache__/cli.*.pyc"))
    assert not (root / "opt/appliance/tests").exists()
    found = {path.name for place in ("usr/bin", "usr/local/bin", "opt/venv/bin") for path in (root / place).iterdir()}
    assert not found & {"gcc", "cc", "g++", "c++", "clang", "tcc", "nvcc", "pip", "pip3", "curl", "wget"}
    for path in (root / "opt").rglob("*"):
        if path.is_symlink():
            continue
        mode = path.stat().st_mode
        assert mode & stat.S_IROTH and not mode & stat.S_IWOTH, path
        assert mode & stat.S_IXOTH or not path.is_dir(), path


# ---------------------------------------------------------------- it serves


def test_first_and_second_start_as_uid_1000(run: Run, warm: Path) -> None:
    with run(mounts={CACHE: warm}) as second:
        second.until_phase("detecting", "selecting", "verifying", "loading", "warming", "ready")
        second.until_ready()
        assert re.search(r"engine \w+ found", second.log) and "built in" not in second.log
        status, answer = second.get("/v1/chat/completions", QUESTION)
        assert status == 200 and answer["choices"][0]["message"]["content"] == "42"
        loud = [json.loads(line) for line in second.log.splitlines() if "SERVING ON THE CPU" in line]
        assert len(loud) == 1 and loud[0]["level"] == "WARNING"
        health = second.execute("/opt/venv/bin/python", "/opt/appliance/entrypoint.py", "health")
        assert (health.returncode, health.stdout) == (0, "ready\n"), health
        assert second.execute("/usr/local/bin/appliance", "version").stdout == f"{__version__}\n"
        second.kill(signal.SIGTERM)
        assert second.wait() == 0 and second.reason == []
    assert {path.owner() for path in warm.rglob("*")} == {Path(warm).owner()}, "all of it is UID 1000's"


def test_stranger_in_group_0_without_a_shell(run: Run, tmp_path: Path) -> None:
    """As OpenShift runs it: any UID, GID 0; and every shell in the image replaced by a file that cannot be run."""
    cache = directory(tmp_path / "cache", 0, 0, 0o775)
    plain = tmp_path / "plain"
    plain.touch()
    mounts = {CACHE: cache, **{f"/usr/bin/{shell}": plain for shell in ("dash", "bash")}}
    with run("serve", "--port", "18234", user=f"{STRANGER}:0", mounts=mounts) as container:
        container.base = "http://127.0.0.1:18234"
        container.until_ready()
        assert container.get("/v1/chat/completions", QUESTION)[1]["choices"][0]["message"]["content"] == "42"
        health = container.execute("/opt/venv/bin/python", "/opt/appliance/entrypoint.py", "health")
        assert health.stdout == "ready\n", "the health check knows the port from process 1's flags"
        container.kill(signal.SIGTERM)
        assert container.wait() == 0
    assert {path.stat().st_uid for path in cache.rglob("*")} == {STRANGER}


def test_stranger_without_a_volume(config: dict[str, Any], tmp_path: Path) -> None:
    """`docker run` with nothing: the image's own cache directory, in a root that can be written."""
    with (
        mounted_image() as own,
        Container(own, config, tmp_path, user=f"{STRANGER}:0", read_only=False) as container,
    ):
        container.until_ready()
        container.kill(signal.SIGTERM)
        assert container.wait() == 0


def test_not_ready_is_not_healthy(run: Run, tmp_path: Path) -> None:
    with run(mounts={CACHE: directory(tmp_path / "cache", 1000, 1000, 0o755)}) as container:
        container.until_phase("detecting", "selecting", "verifying", "building")
        health = container.execute("/opt/venv/bin/python", "/opt/appliance/entrypoint.py", "health")
        assert health.returncode == 1 and health.stdout.startswith("not ready: "), health


# ---------------------------------------------------------------- it is told to stop


@pytest.mark.parametrize("phase", ["building", "loading"])
def test_sigterm_during_a_start(run: Run, warm: Path, tmp_path: Path, phase: str) -> None:
    cache = warm if phase == "loading" else directory(tmp_path / "cache", 1000, 1000, 0o755)
    with run(mounts={CACHE: cache}) as container:
        container.until_phase(phase)
        container.kill(signal.SIGTERM)
        assert container.wait(20) == 0 and container.reason == [], container.log
        assert "Traceback" not in container.log
    staging = cache / "engines/.staging"
    assert not staging.is_dir() or not any(staging.iterdir()), "nothing half-built is left"


def test_sigterm_of_a_command(run: Run, tmp_path: Path) -> None:
    """A Job's pod that is deleted ends at once, and not as if it had succeeded: process 1 has no default action."""
    cache = directory(tmp_path / "cache", 1000, 1000, 0o755)
    with run("build", mounts={CACHE: cache}) as container:
        deadline = time.monotonic() + 60
        while not any(cache.glob("engines/.staging/*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        container.kill(signal.SIGTERM)
        assert container.wait(10) == 128 + signal.SIGTERM, container.log


def test_sigterm_while_streaming(run: Run, warm: Path) -> None:
    """What cannot end in time is cut off, with a terminal event; the exit code is that of an orderly end."""
    body = {"prompt": "A", "max_tokens": 3500, "ignore_eos": True, "stream": True, "temperature": 0}
    with run("--drain-seconds", "1", mounts={CACHE: warm}) as container:
        container.until_ready()
        request = urllib.request.Request(
            f"{container.base}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as stream:
            first = stream.readline()
            assert first.startswith(b"data: ")
            container.kill(signal.SIGTERM)
            rest = [line for line in stream.read().decode().split("\n\n") if line.strip()]
        assert rest[-1] == "data: [DONE]"
        last = json.loads(rest[-2].removeprefix("data: "))
        assert "error" in last or last["choices"][0]["finish_reason"] is not None, last
        assert container.wait(20) == 0 and container.reason == []


# ---------------------------------------------------------------- it cannot start


def test_cache_of_another_user(run: Run, tmp_path: Path) -> None:
    """Exit code 5, and the fix that is printed is the fix."""
    cache = directory(tmp_path / "cache", 0, 0, 0o755)
    with run(mounts={CACHE: cache}) as container:
        assert container.wait() == 5
    assert f"the cache directory {CACHE} cannot be written by user 1000:0" in container.reason[0]
    command = re.search(r"`sudo (chown [^`]+)`", container.reason[1])
    assert command is not None, container.reason
    words = command[1].split()
    assert words[-1] == CACHE
    subprocess.run([*words[:-1], str(cache)], check=True)  # "on the host": what is mounted there
    with run(mounts={CACHE: cache}) as container:
        container.until_phase("building", "loading", "warming", "ready")


def test_no_volume_and_a_read_only_root(run: Run) -> None:
    with run() as container:
        assert container.wait() == 5
    assert "Read-only file system" in container.reason[0]
    assert f"-v DIR:{CACHE}" in container.reason[1] and "chown" not in container.reason[1]


def test_no_space(run: Run) -> None:
    with run(tmpfs={CACHE: "1m"}) as container:
        assert container.wait() == 6
    assert "needs" in container.reason[0] and "free" in container.reason[0]


def test_no_gpu_where_one_is_required(run: Run, warm: Path) -> None:
    with run("--require-gpu", mounts={CACHE: warm}) as container:
        assert container.wait(20) == 3
    assert "GPU" in container.reason[0] and len(container.reason) == 2, "what is missing, and what to do"


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["--port", "nine"], 2, "--port: 'nine' is not allowed"),
        (["--model", "/nowhere"], 4, "/nowhere"),
        (["download-to-cache", "--model", "/nowhere"], 4, "/nowhere"),
    ],
)
def test_mistakes(run: Run, warm: Path, words: list[str], code: int, reason: str) -> None:
    with run(*words, mounts={CACHE: warm}) as container:
        assert container.wait() == code, container.log
    assert reason in container.reason[0] and len(container.reason) == 2


def test_damaged_engine_as_the_model(run: Run, warm: Path, tmp_path: Path) -> None:
    key = next(path for path in (warm / "engines").iterdir() if not path.name.startswith("."))
    engine = tmp_path / "engine"
    shutil.copytree(key, engine)
    weights = engine / "rank-0.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with run("--model", "/engine", mounts={"/engine": engine}) as container:
        assert container.wait() == 7
    assert "rank-0.safetensors" in container.reason[0]


def test_engine_that_crashes_too_often(run: Run, warm: Path) -> None:
    with run("--restart-budget", "0", mounts={CACHE: warm}) as container:
        container.until_ready()
        processes = psutil.Process(container.first_pid()).children(recursive=True)
        engine = [child for child in processes if "appliance.engine_process" in child.cmdline()]
        assert len(engine) == 1
        engine[0].kill()
        assert container.wait(20) == 8
    assert container.reason[0].startswith("the engine failed 1 time")


# ---------------------------------------------------------------- no compiler is missed

_LOAD = "import appliance.kernels._triton; from triton.backends.nvidia.driver import CudaUtils; CudaUtils()"


def test_triton_loads_its_driver_module_without_a_compiler(run: Run, warm: Path, tmp_path: Path) -> None:
    """What Triton compiles in C before it launches any kernel is there. No GPU is needed: a library with the driver's
    name and functions that do nothing stands in for it."""
    module = next((Path(run().root) / "opt/appliance/prebuilt").iterdir())
    symbols = subprocess.run(["nm", "-D", "-u", str(module)], capture_output=True, text=True, check=True).stdout
    wanted = [name for name in re.findall(r" U (\w+)", symbols) if name.startswith("cu")]
    assert len(wanted) > 5
    source = tmp_path / "stub.c"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in wanted))
    stub = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", stub, source], check=True)
    env = {"LD_LIBRARY_PATH": "/driver", "TRITON_CACHE_DIR": "/opt/nim/.cache"}
    # The module is copied to Triton's cache and loaded from there, so not to a /tmp that executes nothing.
    cache = directory(tmp_path / "cache", 1000, 1000, 0o755)
    options: dict[str, Any] = {"mounts": {"/driver/libcuda.so.1": stub, CACHE: cache}, "env": env}
    python = ["/opt/venv/bin/python", "-c", _LOAD]
    with run(entrypoint=python, **options) as container:
        assert container.wait() == 0, container.log
    hidden = {**options["mounts"], CACHE: directory(tmp_path / "other", 1000, 1000, 0o755)}
    hidden |= {"/opt/appliance/prebuilt": directory(tmp_path / "none", 0, 0, 0o755)}
    with run(entrypoint=python, **{**options, "mounts": hidden}) as container:
        assert container.wait() != 0 and "compiler" in container.log, "else this test shows nothing"
