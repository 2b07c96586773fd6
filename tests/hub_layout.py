"""A model in huggingface_hub's cache layout, made from a directory: what a download leaves, without a hub."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

COMMIT = "a" * 40


def put_into_hub(model: Path, cache: Path, name: str = "org/tiny") -> Path:
    """The snapshot's directory: links to blobs that are named after their SHA-256."""
    repository = cache / "hub" / f"models--{name.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    for directory in (snapshot, blobs, repository / "refs"):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file in model.iterdir():
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot
