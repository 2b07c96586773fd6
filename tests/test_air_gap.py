"""A start without a network: it opens no socket but its own, checks what it has, and names what is missing or damaged.

The server runs in a network namespace that has nothing but loopback, where the system lets us make one, and under an
audit hook in each of its Python processes that writes down every address which is asked for.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_layout import put_into_hub

from appliance import builtin
from appliance.errors import CheckpointError
from appliance.launch.prepare import prepare_engine

ROOT = Path(__file__).parent.parent

GUARD = """
import os, sys
def note(event, args):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        address = args[1] if event in ("socket.connect", "socket.bind", "socket.sendto") else args[:2]
        if not isinstance(address, (str, bytes)):  # a path: a Unix socket
            with open(os.environ["GUARD_LOG"], "a") as log:
                log.write(f"{event} {address!r} {sys.argv[:3]}\\n")
sys.addaudithook(note)
"""

# Run inside of the namespace: loopback up, serve, ask, stop. Prints one JSON object.
INSIDE = """
import fcntl, json, signal, socket, struct, subprocess, sys, time, urllib.error, urllib.request
if sys.argv[1] == "namespace":
    with socket.socket() as any_socket:
        request = struct.pack("16sH14x", b"lo", 0x1 | 0x40)  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(any_socket, 0x8914, request)  # SIOCSIFFLAGS
    with socket.socket() as probe:
        probe.settimeout(3)
        outside = probe.connect_ex(("192.0.2.1", 80))
else:
    outside = None
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
command = [sys.executable, *sys.argv[2:], "--port", str(port), "--host", "127.0.0.1"]
server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
try:
    base, deadline, ready = f"http://127.0.0.1:{port}", time.monotonic() + 120, False
    while not ready and time.monotonic() < deadline and server.poll() is None:
        try:
            ready = urllib.request.urlopen(base + "/v1/health/ready", timeout=5).status == 200
        except (OSError, urllib.error.HTTPError):
            time.sleep(0.1)
    text = None
    if ready:
        body = json.dumps({"prompt": "one two three", "max_tokens": 4}).encode()
        request = urllib.request.Request(base + "/v1/completions", body, {"Content-Type": "application/json"})
        text = json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["text"]
finally:
    server.send_signal(signal.SIGTERM)
    log = server.communicate(timeout=60)[1]
found = {"ready": ready, "text": text, "port": port, "outside": outside, "code": server.returncode, "log": log}
print(json.dumps(found))
"""


def has_namespaces() -> bool:
    """Whether this system lets us make a network namespace."""
    return shutil.which("unshare") is not None and subprocess.run(["unshare", "-rn", "true"]).returncode == 0


def test_an_offline_start_opens_no_socket_but_its_own(tmp_path: Path) -> None:
    cache, guard = tmp_path / "cache", tmp_path / "guard"
    put_into_hub(builtin.checkpoint_dir(), cache)
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{guard}:{ROOT}",
        "GUARD_LOG": str(tmp_path / "addresses"),
        "HF_TOKEN": "hf_would_authenticate",
    }
    namespace = has_namespaces()
    serve = [str(ROOT / "entrypoint.py"), "serve", "--model", "org/tiny", "--cache", str(cache)]
    command = [sys.executable, "-c", INSIDE, "namespace" if namespace else "here", *serve]
    done = subprocess.run(
        [*(["unshare", "-rn"] if namespace else []), *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ready"] and found["text"] and found["code"] == 0, found["log"]
    assert "built in" in found["log"], "the builder process was guarded too"
    assert "hf_would_authenticate" not in found["log"]
    assert found["outside"] is None or found["outside"] != 0, "the namespace has a way out"
    lines = [line for line in (tmp_path / "addresses").read_text().splitlines() if "'-c'" not in line]
    own = f"socket.bind ('127.0.0.1', {found['port']}) "
    assert [line for line in lines if line.startswith(own)], "the guard saw the server's own socket"
    assert [line for line in lines if not line.startswith(own)] == []


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    put_into_hub(builtin.checkpoint_dir(), tmp_path)
    return tmp_path


def snapshot_of(cache: Path) -> Path:
    (found,) = (cache / "hub").glob("models--*/snapshots/*")
    return found


def start(cache: Path) -> None:
    prepare_engine("org/tiny", precision="bf16", cache=cache, overrides={"offline": True})


def test_what_is_missing_is_named(cache: Path) -> None:
    snapshot = snapshot_of(cache)
    for name, said in (
        ("config.json", "has no config.json"),
        ("tokenizer.json", "none of tokenizer.json"),
        ("model.safetensors", r"has no \*\.safetensors files"),
    ):
        link = snapshot / name
        target = link.readlink()
        link.unlink()
        with pytest.raises(CheckpointError, match=said):
            start(cache)
        link.symlink_to(target)
    blob = (snapshot / "model.safetensors").resolve()
    blob.rename(cache / "elsewhere")
    with pytest.raises(CheckpointError, match=r"snapshots/a+/model\.safetensors is missing: what it links to"):
        start(cache)
    (cache / "elsewhere").rename(blob)
    reference = snapshot.parents[1] / "refs" / "main"
    reference.rename(cache / "elsewhere")
    with pytest.raises(CheckpointError, match=r"not in the cache, and downloading is off: .*/refs/main is missing"):
        start(cache)
    (cache / "elsewhere").rename(reference)
    snapshot.rename(cache / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"snapshots/{snapshot.name} is missing"):
        start(cache)
    shutil.rmtree(snapshot.parents[1])
    with pytest.raises(CheckpointError, match=r"models--org--tiny is missing"):
        start(cache)


def test_a_damaged_checkpoint_is_refused_and_not_built_from(cache: Path) -> None:
    blob = (snapshot_of(cache) / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-5] ^= 1
    blob.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: its content does not match its SHA-256"):
        start(cache)
    assert not list((cache / "engines").glob("[0-9a-f]*"))
