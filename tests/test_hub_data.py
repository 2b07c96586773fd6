"""Text of the hub's data sets, from a hub on the loopback interface."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from appliance import checkpoint
from appliance.checkpoint import hub_data
from appliance.engines.meter import Snapshot
from appliance.errors import CheckpointError, NoSpaceError

SHA = "b" * 40
FILES = {
    "README.md": b"about",
    "data/test.jsonl": b'{"text": "t"}\n' * 40,
    "data/train-0.jsonl": b'{"text": "a"}\n' * 100,
    "data/train-1.jsonl": b'{"text": "b"}\n' * 100,
    "data/train.parquet": b"PAR1",
    "dataset_infos.json": b"{}",
    "run.py": b"raise SystemExit",
}


class Hub(BaseHTTPRequestHandler):
    """Data set org/text, as much of the API as a download needs."""

    def __init__(self, state: dict[str, Any], *args: Any) -> None:
        self.state = state
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        files = self.state["files"]
        self.state["asked"].append(path)
        if path == "/api/datasets/org/text/revision/main":
            self._send(json.dumps({"id": "org/text", "sha": SHA, "siblings": []}).encode())
        elif path == f"/api/datasets/org/text/tree/{SHA}":
            listed = [
                {"type": "file", "oid": f"{i:040d}", "size": len(files[n]), "path": n} for i, n in enumerate(files)
            ]
            self._send(json.dumps(listed).encode())
        elif path.startswith("/datasets/org/text/resolve/"):
            name = path.split("/", 6)[-1]
            etag = f"{list(files).index(name):040d}"
            self._send(files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": SHA}, body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, data: bytes, head: dict[str, str] | None = None, body: bool = True) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), **(head or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, Any]]]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    state: dict[str, Any] = {"files": dict(FILES), "asked": []}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, state))
    threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.02}).start()
    yield f"http://127.0.0.1:{server.server_port}", state
    server.shutdown()
    server.server_close()


def names(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", ["org/text", "hf://org/text@main", "hf://datasets/org/text"])
def test_text_files_come_and_are_then_found_offline(hub: tuple[str, dict[str, Any]], tmp_path: Path, name: str) -> None:
    endpoint, state = hub
    seen: list[Snapshot] = []
    path = checkpoint.resolve_text(name, tmp_path, endpoint=endpoint, progress=seen.append)
    assert names(path) == ["data/test.jsonl", "data/train-0.jsonl", "data/train-1.jsonl"]
    assert (path / "data/train-1.jsonl").read_bytes() == FILES["data/train-1.jsonl"]
    assert not [asked for asked in state["asked"] if asked.endswith((".py", ".parquet"))], "no code, nothing useless"
    assert seen[-1].bytes_done == seen[-1].bytes_total == sum(len(FILES[file]) for file in names(path))
    asked = len(state["asked"])
    assert checkpoint.resolve_text(name, tmp_path, endpoint=endpoint, offline=True) == path
    assert len(state["asked"]) == asked


def test_files_for_training_first_until_there_is_enough(
    hub: tuple[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_data, "ENOUGH", 1000)
    path = checkpoint.resolve_text("org/text", tmp_path, endpoint=hub[0])
    assert names(path) == ["data/train-0.jsonl"]


def test_what_cannot_be_had_is_said(
    hub: tuple[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, state = hub
    for name, words in (
        ("org/other", "org/other does not exist on the hub"),
        ("./missing.txt", "neither a file or directory here nor a data set of the hub"),
        ("one/two/three", "neither a file or directory here"),
    ):
        with pytest.raises(CheckpointError, match=words):
            checkpoint.resolve_text(name, tmp_path, endpoint=endpoint)
    with pytest.raises(
        CheckpointError, match=r"org/text \(revision main\) is not in the cache, and downloading is off"
    ):
        checkpoint.resolve_text("org/text", tmp_path, endpoint=endpoint, offline=True)
    dataset = hub_data.HubDataset("org/text", "main", tmp_path / "hub", None, endpoint)
    with pytest.raises(NoSpaceError, match="downloading org/text needs"):
        dataset.text(None, free=lambda path: 1000)
    state["files"] = {"train.parquet": b"PAR1"}
    with pytest.raises(CheckpointError, match=r"data set org/text has no text that can be read: \*\.txt"):
        checkpoint.resolve_text("org/text", tmp_path, endpoint=endpoint)


def test_local_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("x")
    assert checkpoint.resolve_text(str(file), tmp_path) == file
    assert checkpoint.resolve_text(str(tmp_path), tmp_path, offline=True) == tmp_path
