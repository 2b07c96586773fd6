"""Detection through a fake NVML, visibility, limits, cgroups, and the recorded-file format."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from conftest import visible_gpus
from fake_nvml import GIB, FakeNvml, card

from appliance import hardware
from appliance.errors import HardwareError, SettingsError
from appliance.hardware.host import Host, host
from appliance.sizes import parse_size
from appliance.types import Gpu, Hardware

RECORDED = sorted((Path(__file__).parent / "hardware").glob("*.yaml"))
HOST = Host(cpu_cores=16, memory=64 * GIB, free_memory=50 * GIB)


def detect(
    *cards: dict[str, Any], visible: str | None = None, cuda_build: str | None = "13.0", **more: Any
) -> Hardware:
    nvml = FakeNvml(list(cards), **more)
    found = hardware.detect(visible, nvml=nvml, host_facts=HOST, cuda_build=cuda_build)
    assert nvml.open == 0, "NVML was left open"
    return found


TWO = (card("GPU-aaaa0000"), card("GPU-bbbb0001"))


def test_a_gpu_is_described():
    found = detect(card("GPU-aaaa0000", utilization=3))
    assert found.gpus == (
        Gpu(0, "NVIDIA H100 80GB HBM3", "GPU-aaaa0000", "10de:2330", (9, 0), 80 * GIB, 79 * GIB, utilization=3),
    )
    assert (found.driver_version, found.cuda_version, found.problem, found.notes) == ("580.95", "13.0", None, ())
    assert (found.cpu_cores, found.memory, found.free_memory) == (16, 64 * GIB, 50 * GIB)
    assert hardware.require_gpu(found) == found.gpus


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA driver found"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "not loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "reboot"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "permissions"),
        (pynvml.NVML_ERROR_UNKNOWN, "the NVIDIA driver fails"),
    ],
)
def test_no_driver_or_a_failing_one_is_one_plain_line(code: int, words: str):
    found = detect(init=code)
    assert found.gpus == () and found.problem is not None
    assert words in found.problem and "\n" not in found.problem
    with pytest.raises(HardwareError, match="a GPU is required") as caught:
        hardware.require_gpu(found)
    assert words in str(caught.value)


def test_a_driver_without_gpus():
    assert "no GPU is visible" in (detect().problem or "")


def test_old_gpu_old_driver_and_cpu_torch_are_left_out_with_a_reason():
    old = detect(card("GPU-aaaa0000", name="Tesla V100", cc=(7, 0)))
    assert "7.0 is older than 7.5" in (old.problem or "") and old.usable_gpus == ()
    driver = detect(*TWO, cuda=12020, driver="535.1")
    assert "driver 535.1 supports CUDA 12.2" in (driver.problem or "") and "580" in (driver.problem or "")
    assert driver.usable_gpus == () and len(driver.gpus) == 2 and driver.cuda_version == "12.2"
    torch = detect(*TWO, cuda_build=None)
    assert "no CUDA support" in (torch.problem or "")
    mixed = detect(card("GPU-aaaa0000", cc=(7, 0)), card("GPU-bbbb0001"))
    assert mixed.problem is None and [g.uuid for g in mixed.usable_gpus] == ["GPU-bbbb0001"]
    assert len(mixed.notes) == 1 and "GPU 0" in mixed.notes[0]
    assert hardware.apply_limits(mixed) == mixed  # idempotent
    newer_minor = detect(*TWO, cuda_build="13.2")
    assert newer_minor.usable_gpus  # any driver of the major version runs its minor versions


def test_unified_memory_is_the_systems():
    gb10 = card("GPU-aaaa0000", raises={"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NOT_SUPPORTED})
    (gpu,) = detect(gb10).gpus
    assert gpu.unified_memory and (gpu.total_memory, gpu.free_memory) == (64 * GIB, 50 * GIB) and gpu.usable


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"recovery": 1}, "reset the GPU"),
        ({"recovery": 2}, "reboot"),
        ({"remapped": (0, 1, 1, 0)}, "remapped"),
        ({"remapped": (0, 1, 0, 1)}, "replaced"),
        ({"retired": 1}, "retired"),
        ({"ecc": 3}, "3 uncorrectable"),
        ({"fabric": (2, 0)}, "fabric is not ready"),
        ({"fabric": (3, 9)}, "joining the NVLink fabric failed"),
        ({"compute_mode": 2}, "prohibited"),
        ({"raises": {"handle": pynvml.NVML_ERROR_GPU_IS_LOST}}, "lost"),
        ({"raises": {"nvmlDeviceGetRemappedRows": pynvml.NVML_ERROR_GPU_IS_LOST}}, "lost"),
        ({"raises": {"nvmlDeviceGetName": pynvml.NVML_ERROR_UNKNOWN}}, "cannot reach it"),
    ],
)
def test_an_unhealthy_gpu_is_left_out_and_said_so(facts: dict[str, Any], words: str):
    found = detect(card("GPU-aaaa0000", **facts), TWO[1])
    assert not found.gpus[0].healthy and words in (found.gpus[0].problem or "")
    assert [gpu.uuid for gpu in found.usable_gpus] == ["GPU-bbbb0001"]
    assert any("GPU 0" in note and words in note for note in found.notes)


def test_healthy_answers_are_no_problem():
    fine = {"recovery": 0, "remapped": (5, 0, 0, 0), "retired": 0, "ecc": 0, "fabric": (3, 0), "compute_mode": 0}
    assert detect(card("GPU-aaaa0000", **fine)).gpus[0].usable
    assert detect(card("GPU-aaaa0000", fabric=(0, 0))).gpus[0].usable  # no NVSwitch


def links(a: dict[str, Any], b: dict[str, Any]) -> tuple[str, str]:
    found = detect(card("GPU-aaaa0000", **a), card("GPU-bbbb0001", **b)).gpus
    return found[0].links[1], found[1].links[0]


def test_links():
    to_b, to_a = ("GPU-bbbb0001", 2), ("GPU-aaaa0000", 2)
    assert links({"p2p": {to_b: 0}}, {"p2p": {to_a: 0}}) == ("nvlink", "nvlink")
    assert links({"nvlinks": [TWO[1]["bus"]]}, {"nvlinks": [TWO[0]["bus"]]}) == ("nvlink", "nvlink")
    assert links({"nvlinks": ["switch"]}, {"nvlinks": [None, "switch"]}) == ("nvlink", "nvlink")
    assert links({"nvlinks": ["switch"]}, {}) == ("none", "none")
    read_b, read_a = ("GPU-bbbb0001", 0), ("GPU-aaaa0000", 0)
    assert links({"p2p": {read_b: 0, to_b: 5}}, {"p2p": {read_a: 0}}) == ("pcie", "pcie")
    assert links({"p2p": {read_b: 1}}, {"p2p": {read_a: 4}}) == ("none", "none")
    assert links({}, {}) == ("none", "none")


def test_how_far_apart_gpus_are_on_pcie():
    levels = {10: "switch", 20: "switches", 30: "host", 40: "numa", 50: "system", 0: "switch"}
    for level, name in levels.items():
        near = detect(card("GPU-aaaa0000", ancestor={"GPU-bbbb0001": level}), card("GPU-bbbb0001")).gpus
        assert (near[0].paths, near[1].paths) == ({1: name}, {}), "one answers, the other's driver does not say"
    lost = {"raises": {"nvmlDeviceGetTopologyCommonAncestor": pynvml.NVML_ERROR_UNKNOWN}}
    assert detect(card("GPU-aaaa0000", **lost), TWO[1]).gpus[0].paths == {}


def mig_card() -> dict[str, Any]:
    slices = [
        card("MIG-1111", name="NVIDIA H100 80GB HBM3 MIG 3g.40gb", memory=(39 * GIB, 38 * GIB)),
        card("MIG-2222", name="NVIDIA H100", memory=(10 * GIB, 9 * GIB), compute_slices=1),
    ]
    return card("GPU-aaaa0000", mig=1, slices=slices)


def test_mig_slices_are_devices():
    gpus = detect(mig_card(), TWO[1]).gpus
    assert [(g.uuid, g.mig_profile, g.free_memory, g.index) for g in gpus] == [
        ("MIG-1111", "3g.40gb", 38 * GIB, 0),
        ("MIG-2222", "1g.11gb", 9 * GIB, 0),
        ("GPU-bbbb0001", None, 79 * GIB, 1),
    ]
    assert gpus[0].name.endswith("MIG 3g.40gb") and gpus[0].links == {} and gpus[0].mig_enabled
    assert detect(card("GPU-aaaa0000", mig=0)).gpus[0].mig_enabled is False
    empty = detect(card("GPU-aaaa0000", mig=1))
    assert empty.usable_gpus == () and "no slice exists" in (empty.problem or "")


@pytest.mark.parametrize(
    ("visible", "uuids", "words"),
    [
        (None, ["GPU-aaaa0000", "GPU-bbbb0001", "GPU-cccc0002"], None),
        ("1", ["GPU-bbbb0001"], "2 of 3 devices hidden"),
        ("2, 0", ["GPU-cccc0002", "GPU-aaaa0000"], "1 of 3"),
        ("GPU-bbbb0001", ["GPU-bbbb0001"], "2 of 3"),
        ("gpu-CCCC", ["GPU-cccc0002"], "2 of 3"),
        ("", [], "hides all 3"),
        ("-1", [], "hides all 3"),
        ("0,-1,1", ["GPU-aaaa0000"], "2 of 3"),
        ("0,7,1", ["GPU-aaaa0000"], "there is no GPU 7"),
        ("9", [], "there is no GPU 9"),
        ("GPU-dddd", [], "no device with UUID"),
        ("cuda:0", [], "neither an index nor a UUID"),
        ("1,1", [], "named twice"),
        ("0:0", [], "no MIG slice 0"),
    ],
)
def test_visible_devices(visible: str | None, uuids: list[str], words: str | None):
    found = detect(*TWO, card("GPU-cccc0002"), visible=visible)
    assert [gpu.uuid for gpu in found.gpus] == uuids
    said = " ".join((found.problem or "", *found.notes))
    assert (words in said) if words else said.strip() == ""
    assert (found.problem is None) == bool(uuids)
    for gpu in found.gpus:  # links lead to visible GPUs only
        assert gpu.links.keys() == {other.index for other in found.gpus} - {gpu.index}


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        ("MIG-2222", ["MIG-2222"]),
        ("MIG-1", ["MIG-1111"]),
        ("0:1", ["MIG-2222"]),
        ("0", ["MIG-1111", "MIG-2222"]),
        ("1,MIG-1111", ["GPU-bbbb0001", "MIG-1111"]),
        ("MIG-3333", []),
        ("GPU-aaaa0000", []),
    ],
)
def test_visible_mig_slices(visible: str, uuids: list[str]):
    assert [gpu.uuid for gpu in detect(mig_card(), TWO[1], visible=visible).gpus] == uuids


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, ["GPU-aaaa0000", "GPU-bbbb0001", "GPU-cccc0002", "GPU-dddd0003"]),
        ("2", ["GPU-cccc0002"]),
        ("3,GPU-aaaa", ["GPU-dddd0003", "GPU-aaaa0000"]),
        ("", []),
    ],
)
def test_gpu_tests_count_what_they_may_use(visible: str | None, uuids: list[str]):
    cards = [*TWO, card("GPU-cccc0002"), card("GPU-dddd0003")]
    assert visible_gpus(visible, FakeNvml(cards)) == uuids
    assert visible_gpus(visible, FakeNvml(cards, init=pynvml.NVML_ERROR_DRIVER_NOT_LOADED)) == []


def test_gpu_tests_see_one_mig_slice():
    assert visible_gpus(None, FakeNvml([mig_card()])) == ["MIG-1111"]
    assert visible_gpus(None, FakeNvml([mig_card(), TWO[1]])) == ["GPU-bbbb0001"]


def test_an_ambiguous_prefix_names_nothing():
    found = detect(card("GPU-aaaa0000"), card("GPU-aaaa0001"), visible="GPU-aaaa")
    assert found.gpus == () and "fits 2 devices" in (found.problem or "")


def test_the_installed_torch_is_asked_without_importing_it():
    assert hardware.built_cuda_version() is None or hardware.built_cuda_version()[0].isdigit()


def test_real_nvml_here_never_raises():
    found = hardware.detect()
    assert found.cpu_cores >= 1 and 0 < found.free_memory <= found.memory
    assert found.gpus or found.problem


# ---------------------------------------------------------------- host


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_cgroup_v2_limits_memory_and_cpu(tmp_path: Path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/kube/pod/c1\n",
            "sys/fs/cgroup/kube/memory.max": str(512 << 20),
            "sys/fs/cgroup/kube/memory.current": str(300 << 20),
            "sys/fs/cgroup/kube/memory.stat": f"anon 1\ninactive_file {100 << 20}\n",
            "sys/fs/cgroup/kube/pod/c1/memory.max": "max\n",
            "sys/fs/cgroup/kube/pod/c1/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
        },
    )
    found = host(root)
    assert (found.memory, found.free_memory, found.cpu_cores) == (512 << 20, 312 << 20, 1)


def test_cgroup_v1_limits_memory_and_cpu(tmp_path: Path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(256 << 20),  # the host's path is not mounted here
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(56 << 20),
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    )
    found = host(root)
    assert (found.memory, found.free_memory, found.cpu_cores) == (256 << 20, 200 << 20, 1)


def test_no_cgroup_limit_leaves_the_machine(tmp_path: Path):
    unlimited = {"sys/fs/cgroup/memory/memory.limit_in_bytes": str((1 << 63) - 4096), "sys/fs/cgroup/memory.max": "max"}
    assert host(write(tmp_path, unlimited)).memory == host(tmp_path / "nothing").memory > 1 << 28


# ---------------------------------------------------------------- recorded files


@pytest.mark.parametrize("path", RECORDED, ids=lambda p: p.stem)
def test_recorded_files_load_and_survive_a_round_trip(path: Path, tmp_path: Path):
    found = hardware.load(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(hardware.dump(found))
    assert hardware.load(copy) == found
    assert bool(found.usable_gpus) != bool(found.problem)
    assert len({gpu.uuid for gpu in found.gpus}) == len(found.gpus)


def test_the_required_machines_are_recorded():
    names = {path.stem for path in RECORDED}
    counts = {f"{gpu}-x{n}" for gpu in ("h100", "h200", "a100-80gb") for n in (1, 2, 4, 8)}
    single = {"a100-40gb", "l40s", "a10", "l4", "t4", "rtx-4090", "rtx-5090", "b200-x8", "gb10", "h100-mig-3g.40gb"}
    assert counts | single | {"mixed", "none", "busy-node", "unhealthy", "v100", "driver-failing"} <= names
    assert {"l40s-x4", "rtx-4090-x2", "rtx-4090-x4", "h100-x4-pairs", "mixed-hopper-ada"} <= names


def test_a_detected_machine_can_be_recorded(tmp_path: Path):
    path = tmp_path / "here.yaml"
    found = detect(mig_card(), TWO[1])
    path.write_text(hardware.dump(found))
    assert hardware.load(path) == found


TWO_CARDS = """gpus: [{name: x, pci_id: "10de:2331", compute_capability: "9.0", total_memory: 1 GiB, count: 2}]"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpu: []", "did you mean 'gpus'"),
        ("gpus: [{nam: x}]", "did you mean 'name'"),
        ("[]", "must be a mapping"),
        ("gpus: [{name: x, compute_capability: 9}]", "compute_capability is 9"),
        ('gpus: [{name: x, compute_capability: "9.0", total_memory: 80 parsecs}]', "is not a size"),
        ('gpus: [{name: x, compute_capability: "9.0", count: 0}]', "count is 0"),
        ('gpus: [{name: x, compute_capability: "9.0", total_memory: 1 GiB}]', "pci_id"),
        ("links: carrier pigeon", "links is"),
        (f"numa_nodes: [[0], [0, 1]]\n{TWO_CARDS}", "must have each of the GPUs [0, 1] once"),
        (f"numa_nodes: [[0]]\n{TWO_CARDS}", "must have each of the GPUs [0, 1] once"),
        ("gpus: [", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_named_with_the_key(text: str, words: str, tmp_path: Path):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        hardware.load(path)
    assert words in str(caught.value) and "wrong.yaml" in str(caught.value)


def test_a_missing_file_is_a_settings_error(tmp_path: Path):
    with pytest.raises(SettingsError, match="cannot read"):
        hardware.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "size"), [(5, 5), ("12", 12), ("1.5 GiB", 3 * 2**29), ("80GB", 80 * 10**9), (" 7 mib ", 7 * 2**20)]
)
def test_sizes(text: int | str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 GiBi", "0x10", True])
def test_wrong_sizes(text: Any):
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@pytest.mark.gpu
def test_the_real_driver_answers() -> None:
    """In a process of its own: a wrong call into the driver's library ends the process instead of raising."""
    code = "from appliance import hardware as h; found = h.detect(); print(h.dump(found)); assert found.usable_gpus"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    import torch

    assert torch.cuda.get_device_name(0) in done.stdout


def test_an_engine_finds_its_gpu_by_uuid_among_the_visible_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_VISIBLE_DEVICES=3,2 of four: selection gives UUIDs, and torch counts what is visible."""
    import torch

    from appliance.backends import cuda

    chosen = detect(*TWO, card("GPU-cccc0002"), card("GPU-dddd0003"), visible="3,2").gpus
    of_torch = [SimpleNamespace(uuid=gpu.uuid.removeprefix("GPU-")) for gpu in chosen]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(of_torch))
    monkeypatch.setattr(torch.cuda, "get_device_properties", of_torch.__getitem__)
    assert [cuda._index_of_uuid(gpu.uuid) for gpu in chosen] == [0, 1]
    assert cuda._index_of_uuid("GPU-cccc0002") == 1
    with pytest.raises(HardwareError, match="GPU-aaaa0000 is not visible to this process"):
        cuda._index_of_uuid("GPU-aaaa0000")
