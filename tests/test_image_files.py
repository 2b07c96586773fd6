"""What the image is made from, checked where none can be built: Dockerfile, lock, ignore file; see tests/container."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LOCK = (ROOT / "requirements-cuda.lock").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_hadolint() -> None:
    found = subprocess.run([Path(sys.executable).with_name("hadolint"), ROOT / "Dockerfile"], capture_output=True)
    assert found.returncode == 0, found.stdout.decode()


def test_base_is_one_exact_image() -> None:
    base = re.search(r"^ARG BASE=(\S+)$", DOCKERFILE, re.M)
    assert base is not None and re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d\d\.\d\d", base[1])


def locked() -> dict[str, list[str]]:
    """Versions by name of the lock; more than one where they differ by Python."""
    found: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([a-z0-9.-]+)==([^\s;\\]+)", LOCK, re.M):
        found.setdefault(name, []).append(version)
    return found


def test_every_locked_wheel_has_digests() -> None:
    entries = re.split(r"^(?=[a-z])", LOCK, flags=re.M)[1:]
    assert len(entries) > 80
    for entry in entries:
        assert re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry
    assert "://" not in LOCK, "where wheels come from is pip's business"


@pytest.mark.parametrize("group", ["dependencies", "pinned", "cuda", "otel"])
def test_lock_has_what_pyproject_pins(group: str) -> None:
    """`make lock` writes it anew after a change."""
    wanted = PROJECT["dependencies"] if group == "dependencies" else PROJECT["optional-dependencies"][group]
    found = locked()
    for line in wanted:
        name = re.match(r"[A-Za-z0-9-]+", line)
        assert name is not None
        assert name[0].lower() in found, line
        if pin := re.search(r"==([^;\s]+)", line):
            assert found[name[0].lower()] == [pin[1]], line


def test_torch_is_locked_as_built_for_cuda() -> None:
    assert "+cpu" not in LOCK
    assert {"nvidia-cublas", "nvidia-nccl-cu13", "triton"} <= set(locked())


def test_context_holds_what_is_copied() -> None:
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    allowed = {line[1:] for line in patterns if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M) for word in line.split()}
    assert {re.sub(r"\$\{TARGET\}", "*", word) for word in copied} == allowed
    assert "*" in patterns
