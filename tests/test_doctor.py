"""The doctor: each problem is found and comes with its fix; offline nothing is asked of the network."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from appliance import doctor
from appliance.settings import Settings, load
from appliance.types import Gpu, Hardware

GIB = 1 << 30


def gpu(index: int = 0, **facts: object) -> Gpu:
    values: dict[str, object] = {
        "index": index,
        "name": "NVIDIA H200",
        "uuid": f"GPU-{index}",
        "pci_id": "10de:2335",
        "compute_capability": (9, 0),
        "total_memory": 141 * GIB,
        "free_memory": 140 * GIB,
    }
    return Gpu(**(values | facts))  # type: ignore[arg-type]


def machine(*gpus: Gpu, **facts: object) -> Hardware:
    return Hardware(gpus=gpus, cpu_cores=2, memory=8 * GIB, free_memory=7 * GIB, **facts)  # type: ignore[arg-type]


def settings(tmp_path: Path, **flags: object) -> Settings:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return load({"cache": str(tmp_path / "cache"), "port": port, "host": "127.0.0.1"} | flags, {})


def test_a_good_machine_passes_as_text_and_json(tmp_path: Path) -> None:
    checks = doctor.examine(settings(tmp_path), machine(problem="no driver"))
    assert doctor.passed(checks)
    by_name = {check.name: check for check in checks}
    assert by_name["driver"].status == "warning" and by_name["hub"].status == "skipped"
    assert by_name["cache"].status == by_name["port"].status == by_name["temporary files"].status == "ok"
    assert "WARNING driver: no driver\n        fix: " in doctor.as_text(checks)
    body = json.loads(doctor.as_json(checks))
    assert body["ok"] is True and len(body["checks"]) == len(checks)


def test_driver_and_gpus(tmp_path: Path) -> None:
    assert doctor.check_driver(settings(tmp_path, require_gpu=True), machine(problem="no driver")).status == "failed"
    good = machine(gpu(), driver_version="580.1", cuda_version="13.0")
    assert "driver 580.1" in doctor.check_driver(settings(tmp_path), good).message
    assert doctor.check_gpus(good).status == "ok" and doctor.check_gpus(machine()).status == "skipped"
    busy = doctor.check_gpus(machine(gpu(free_memory=10 * GIB)))
    assert busy.status == "warning" and "10 of 141 GiB free" in busy.message and "nvidia-smi" in busy.fix
    old = gpu(1, problem="compute capability 7.0 is older than 7.5", compute_capability=(7, 0))
    assert doctor.check_gpus(machine(gpu(), old)).status == "warning"
    found = doctor.check_gpus(machine(old))
    assert found.status == "failed" and "7.0 is older than 7.5" in found.message


def test_shared_memory_matters_with_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = type("Usage", (), {"total": 64 << 20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: small)
    assert doctor.check_shared_memory(machine(gpu()), tmp_path).status == "ok"
    found = doctor.check_shared_memory(machine(gpu(0), gpu(1)), tmp_path)
    assert found.status == "failed" and "64 MiB" in found.message and "--shm-size=1g" in found.fix
    assert doctor.check_shared_memory(machine(gpu(0), gpu(1)), tmp_path / "none").status == "failed"


def test_cache_that_cannot_be_written_has_the_exact_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = doctor.check_cache(settings(tmp_path, cache=str(tmp_path / "file" / "cache")))
    assert found.status == "failed" and f"{os.getuid()}:{os.getgid()}" in found.fix and "--cache" in found.fix


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_bytes", lambda path: GIB)
    assert doctor.check_disk(settings(tmp_path)).status == "failed"
    monkeypatch.setattr(doctor, "free_bytes", lambda path: 5 * GIB)
    assert doctor.check_disk(settings(tmp_path)).status == "ok"
    assert doctor.check_disk(settings(tmp_path, model="org/name")).status == "warning"


def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = doctor.check_port(settings(tmp_path, port=taken.getsockname()[1]))
    assert found.status == "failed" and "--port" in found.fix


def test_offline_opens_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert doctor.check_hub(settings(tmp_path, model="org/name", offline=True)).status == "skipped"


def test_a_hub_that_cannot_be_reached_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Unreachable:
        def __init__(self, token: str | None) -> None:
            assert token == "hf_x"

        def model_info(self, name: str, timeout: float) -> None:
            assert name == "org/name" and timeout <= 5
            raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "HfApi", Unreachable)
    found = doctor.check_hub(settings(tmp_path, model="hf://org/name@main", hf_token="hf_x"))
    assert found.status == "failed" and "no route" in found.message and "HTTPS_PROXY" in found.fix
    assert "hf_x" not in found.message
