"""The doctor: each problem is found and comes with its fix; offline nothing is asked of the network."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from hub_layout import put_into_hub

from appliance import builtin, doctor
from appliance.doctor import machine as of_machine
from appliance.doctor import model as of_model
from appliance.doctor import nodes as of_nodes
from appliance.hardware import load as load_hardware
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
    assert by_name["driver"].status == "warning" and by_name["model"].status == "ok"
    assert by_name["cache"].status == by_name["port"].status == by_name["temporary files"].status == "ok"
    assert "WARNING driver: no driver\n        fix: " in doctor.as_text(checks)
    body = json.loads(doctor.as_json(checks))
    assert body["ok"] is True and len(body["checks"]) == len(checks)


def test_driver_and_gpus(tmp_path: Path) -> None:
    assert (
        of_machine.check_driver(settings(tmp_path, require_gpu=True), machine(problem="no driver")).status == "failed"
    )
    good = machine(gpu(), driver_version="580.1", cuda_version="13.0")
    assert "driver 580.1" in of_machine.check_driver(settings(tmp_path), good).message
    assert of_machine.check_gpus(good).status == "ok" and of_machine.check_gpus(machine()).status == "skipped"
    busy = of_machine.check_gpus(machine(gpu(free_memory=10 * GIB)))
    assert busy.status == "warning" and "10 of 141 GiB free" in busy.message and "nvidia-smi" in busy.fix
    old = gpu(1, problem="compute capability 7.0 is older than 7.5", compute_capability=(7, 0))
    assert of_machine.check_gpus(machine(gpu(), old)).status == "warning"
    found = of_machine.check_gpus(machine(old))
    assert found.status == "failed" and "7.0 is older than 7.5" in found.message


def test_links_between_gpus() -> None:
    assert of_machine.check_links(machine(gpu())).status == "skipped"
    recorded = Path(__file__).parent / "hardware"
    paired = of_machine.check_links(load_hardware(recorded / "h100-x4-pairs.yaml"))
    assert paired.status == "ok" and paired.message.startswith("NVLink: GPUs 0-2, 1-3; PCIe, peer to peer: GPUs 0-1, ")
    apart = of_machine.check_links(load_hardware(recorded / "rtx-4090-x2.yaml"))
    assert apart.status == "warning" and apart.message == "no peer access: GPUs 0-1" and "host memory" in apart.fix
    assert of_machine.check_links(load_hardware(recorded / "h100-mig-3g.40gb.yaml")).status == "skipped"


def test_shared_memory_matters_with_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = type("Usage", (), {"total": 64 << 20})
    monkeypatch.setattr(of_machine.shutil, "disk_usage", lambda path: small)
    assert of_machine.check_shared_memory(machine(gpu()), tmp_path).status == "ok"
    found = of_machine.check_shared_memory(machine(gpu(0), gpu(1)), tmp_path)
    assert found.status == "failed" and "64 MiB" in found.message and "--shm-size=1g" in found.fix
    assert of_machine.check_shared_memory(machine(gpu(0), gpu(1)), tmp_path / "none").status == "failed"


def test_cache_that_cannot_be_written_has_the_exact_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = of_machine.check_cache(settings(tmp_path, cache=str(tmp_path / "file" / "cache")))
    assert found.status == "failed" and f"{os.getuid()}:{os.getgid()}" in found.fix and "--cache" in found.fix


def test_disk_is_compared_with_what_the_model_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_model, "free_bytes", lambda path: 20 * GIB)
    chosen = settings(tmp_path)
    assert of_model.check_disk(chosen, 5 * GIB, 5 * GIB).status == "ok"
    assert of_model.check_disk(chosen, 15 * GIB, 15 * GIB).status == "warning"
    found = of_model.check_disk(chosen, 30 * GIB, 30 * GIB)
    assert found.status == "failed" and "30.0 GiB to download" in found.message and "--cache" in found.fix
    assert of_model.check_disk(chosen, None, None).status == "ok"
    monkeypatch.setattr(of_model, "free_bytes", lambda path: GIB)
    assert of_model.check_disk(chosen, None, None).status == "failed"


def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = of_machine.check_port(settings(tmp_path, port=taken.getsockname()[1]))
    assert found.status == "failed" and "--port" in found.fix


def test_node_0_needs_its_port(tmp_path: Path) -> None:
    assert of_nodes.check_nodes(settings(tmp_path)).status == "skipped"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        where = {"nnodes": 2, "master_addr": "127.0.0.1", "master_port": port}
        found = of_nodes.check_nodes(settings(tmp_path, node_rank=0, **where))
        assert found.status == "failed" and f"port {port}: Address already in use" in found.message
        assert "--master-port" in found.fix
        assert of_nodes.check_nodes(settings(tmp_path, node_rank=1, **where)).status == "ok", "node 0 is there"
    found = of_nodes.check_nodes(settings(tmp_path, node_rank=0, **where))
    assert found.status == "ok" and f"can listen for the others on port {port}" in found.message
    found = of_nodes.check_nodes(settings(tmp_path, node_rank=1, **where))
    assert found.status == "warning" and f"nobody listens at node 0's 127.0.0.1:{port} yet" in found.message


def test_node_0_has_to_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    found = of_nodes.check_nodes(settings(tmp_path, nnodes=2))
    assert found.status == "failed" and "node_rank is not set" in found.message
    found = of_nodes.check_nodes(settings(tmp_path, nnodes=2, node_rank=1))
    assert found.status == "failed" and "needs master_addr" in found.message
    away = settings(tmp_path, nnodes=2, node_rank=1, master_addr="leader")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    found = of_nodes.check_nodes(away)
    assert found.status == "failed" and "leader has no address: Name or service not known" in found.message
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("10.0.0.7", 29500))])

    def silent(*_: object, **__: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    found = of_nodes.check_nodes(away)
    assert found.status == "warning" and "leader:29500 (10.0.0.7) cannot be reached: no answer" in found.message
    checks = doctor.examine(away, machine(problem="no driver"))
    assert [check.status for check in checks if check.name == "nodes"] == ["warning"] and doctor.passed(checks)


class Hub:
    """HfApi with an answer of its own."""

    answer: object = None

    def __init__(self, token: str | None) -> None:
        assert token == "hf_x"

    def model_info(self, name: str, *, revision: str | None, timeout: float, files_metadata: bool) -> object:
        assert (name, revision) == ("org/name", "main") and timeout <= 5 and files_metadata
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: object) -> list[doctor.Check]:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", type("Answering", (Hub,), {"answer": answer}))
    return of_model.check_model(settings(tmp_path, model="hf://org/name@main", hf_token="hf_x"))


def test_a_hub_that_cannot_be_reached_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, disk = ask(tmp_path, monkeypatch, ConnectionError("no route"))
    assert found.status == "failed" and "no route" in found.message and "HTTPS_PROXY" in found.fix
    assert "hf_x" not in found.message and disk.name == "disk"


def test_size_on_the_hub_against_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sibling = type("File", (), {"rfilename": "model.safetensors", "size": 100 * GIB})
    other = type("File", (), {"rfilename": "model.bin", "size": 900 * GIB})
    monkeypatch.setattr(of_model, "free_bytes", lambda path: 50 * GIB)
    answer = type("Info", (), {"id": "org/name", "siblings": [sibling, other]})
    found, disk = ask(tmp_path, monkeypatch, answer)
    assert found.status == "ok" and "with the token; 100.0 GiB of weights, which is to be downloaded" in found.message
    assert disk.status == "failed" and "100.0 GiB to download" in disk.message


def test_offline_looks_at_what_is_here_and_opens_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    chosen = settings(tmp_path, model="org/tiny", offline=True, engine_source="https://engines.invalid/x")
    found, _ = of_model.check_model(chosen)
    assert found.status == "failed" and "is missing" in found.message and "bundle" in found.fix
    assert of_model.check_engine_source(chosen).status == "warning"
    put_into_hub(builtin.checkpoint_dir(), tmp_path / "cache")
    found, disk = of_model.check_model(chosen)
    assert found.status == disk.status == "ok", found


def test_kernels_for_the_compute_capability(tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    assert of_machine.check_kernels(chosen, machine()).status == "skipped"
    hopper = of_machine.check_kernels(chosen, machine(gpu()))
    assert "GPU 0 (9.0): bf16" in hopper.message and "fp8" in hopper.message
    ampere = of_machine.check_kernels(chosen, machine(gpu(compute_capability=(8, 0))))
    assert "fp8" not in ampere.message and "bf16" in ampere.message
    ancient = of_machine.check_kernels(chosen, machine(gpu(compute_capability=(5, 2))))
    assert ancient.status == "failed" and "nothing" in ancient.message and ancient.fix


def test_engine_source(tmp_path: Path) -> None:
    assert of_model.check_engine_source(settings(tmp_path)).status == "skipped"
    gone = of_model.check_engine_source(settings(tmp_path, engine_source=str(tmp_path / "none")))
    assert gone.status == "warning" and "there is no directory" in gone.message and gone.fix
    assert of_model.check_engine_source(settings(tmp_path, engine_source=str(tmp_path))).status == "ok"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}"
        hangs = of_model.check_engine_source(settings(tmp_path, engine_source=url, engine_source_timeout=0.5))
    assert hangs.status == "warning" and "secret" not in hangs.message + hangs.fix


def test_every_line_that_is_not_ok_has_its_fix(tmp_path: Path) -> None:
    """Over all recorded machines, good and bad."""
    (tmp_path / "file").write_text("")
    bad = settings(
        tmp_path, cache=str(tmp_path / "file" / "c"), model="./nothing", engine_source=str(tmp_path / "none")
    )
    seen = set()
    for recorded in sorted((Path(__file__).parent / "hardware").glob("*.yaml")):
        for check in doctor.examine(bad, load_hardware(recorded), shm=tmp_path / "no-shm"):
            assert check.fix or check.status in ("ok", "skipped"), check
            seen.add((check.name, check.status))
    assert {("driver", "warning"), ("gpus", "failed"), ("kernels", "ok"), ("shared memory", "failed")} <= seen
    assert {("cache", "failed"), ("model", "failed"), ("engine source", "warning")} <= seen
