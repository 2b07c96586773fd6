"""What a start of several replicas is given: devices of each, from a selection or for an engine directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from selection_cases import LLAMA_8B
from test_engines import fill

from appliance import hardware
from appliance.builder import BuildRequest
from appliance.errors import EngineBuildError, HardwareError, ProfileError, SettingsError
from appliance.ipc import Progress
from appliance.launch import build
from appliance.launch.plan import choose, devices_of_build, engine_options, make_plan, options_of_directory
from appliance.launch.replicas import split
from appliance.settings import load

MACHINES = Path(__file__).parent / "hardware"


def test_a_selections_replicas_get_its_groups_of_gpus(tmp_path: Path) -> None:
    machine = hardware.load(MACHINES / "h200-x4.yaml")
    uuids = {gpu.uuid for gpu in machine.gpus}
    settings = load({"cache": str(tmp_path)}, {})
    plan = make_plan(settings, choose(settings, machine, LLAMA_8B), tmp_path)
    options = engine_options(plan, tmp_path)
    assert options.replicas == plan.settings.replicas == 4, "throughput: one on every GPU"
    assert [len(part.devices) for part in split(options)] == [1] * 4
    assert {device for part in split(options) for device in part.devices} == uuids
    settings = load({"cache": str(tmp_path), "replicas": "2"}, {})
    options = engine_options(make_plan(settings, choose(settings, machine, LLAMA_8B), tmp_path), tmp_path)
    assert options.replicas == 2 and len(set(options.devices)) == 2
    settings = load({"cache": str(tmp_path), "replicas": "5"}, {})
    with pytest.raises(ProfileError, match="5 replicas"):
        make_plan(settings, choose(settings, machine, LLAMA_8B), tmp_path)


def test_an_engine_is_built_on_the_gpus_that_will_serve_it(tmp_path: Path) -> None:
    machine = hardware.load(MACHINES / "busy-node.yaml")
    settings = load({"cache": str(tmp_path), "replicas": "1"}, {})
    plan = make_plan(settings, choose(settings, machine, LLAMA_8B), tmp_path)
    devices = devices_of_build(plan)
    assert devices == engine_options(plan, tmp_path).devices
    assert devices and machine.gpus[0].uuid not in devices, "the first one is busy"
    several = load({"cache": str(tmp_path), "nnodes": "2", "node_rank": "0", "master_addr": "127.0.0.1"}, {})
    selection = choose(several, hardware.load(MACHINES / "h200-x2.yaml"), LLAMA_8B)
    assert devices_of_build(make_plan(several, selection, tmp_path)) == ()


@pytest.mark.parametrize(("devices", "seen"), [((), "7"), (("GPU-3", "GPU-1"), "GPU-3,GPU-1")])
async def test_the_builder_sees_these(
    devices: tuple[str, ...], seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, str]] = []

    class NoChild:
        def __init__(self, *_: Any, environment: dict[str, str], **__: Any) -> None:
            started.append(environment)

        async def listen(self, _: Callable[[Any], None]) -> str:
            return "the builder was not started"

        def close(self) -> None:
            """Nothing is open."""

    def ignore(_: Progress) -> None:
        """Nobody looks."""

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(build, "Child", NoChild)
    request = BuildRequest("model", str(tmp_path), "bf16", "cuda")
    settings = load({"cache": str(tmp_path)}, {})
    with pytest.raises(EngineBuildError, match="was not started"):
        await build.run_builder(request, settings, tmp_path, ignore, devices)
    assert started[0]["CUDA_VISIBLE_DEVICES"] == seen


def test_replicas_of_an_engine_directory(tmp_path: Path) -> None:
    machine = hardware.load(MACHINES / "h200-x4.yaml")
    settings = load({"cache": str(tmp_path), "replicas": "2"}, {})
    on_cpu = options_of_directory(tmp_path, manifest := fill(tmp_path), settings, machine)
    assert (on_cpu.devices, on_cpu.replicas) == ((), 2)
    of_two_ranks = msgspec.structs.replace(manifest, backend="cuda", compute_capability=(9, 0), tp_size=2)
    options = options_of_directory(tmp_path, of_two_ranks, settings, machine)
    assert [len(set(part.devices)) for part in split(options)] == [2, 2] and len(set(options.devices)) == 4
    three = load({"cache": str(tmp_path), "replicas": "3"}, {})
    with pytest.raises(HardwareError, match=r"needs 6 GPUs of compute capability 9.0 for 3 replicas; here are 4"):
        options_of_directory(tmp_path, of_two_ranks, three, machine)
    one = msgspec.structs.replace(of_two_ranks, tp_size=1)
    with pytest.raises(HardwareError, match=r"needs 1 GPU of compute capability 9\.0; here are 0"):
        options_of_directory(tmp_path, one, load({"cache": str(tmp_path)}, {}), hardware.load(MACHINES / "l4.yaml"))


@pytest.mark.parametrize("asked", [{"tp_size": "2"}, {"pp_size": "2"}, {"precision": "fp8"}, {"backend": "cuda"}])
def test_an_engine_directory_is_not_another_engine(asked: dict[str, str], tmp_path: Path) -> None:
    machine, manifest = hardware.load(MACHINES / "none.yaml"), fill(tmp_path)
    name, value = next(iter(asked.items()))
    words = rf"{name} {value} was asked for, .* was built for {name} {getattr(manifest, name)} \(leave --{name[:2]}"
    with pytest.raises(SettingsError, match=words):
        options_of_directory(tmp_path, manifest, load({"cache": str(tmp_path), **asked}, {}), machine)
    same = load({"cache": str(tmp_path), name: str(getattr(manifest, name))}, {})
    assert options_of_directory(tmp_path, manifest, same, machine).backend == manifest.backend


def test_ranks_of_an_engine_directory_go_where_the_links_are(tmp_path: Path) -> None:
    pairs, mixed = (hardware.load(MACHINES / f"{name}.yaml") for name in ("h100-x4-pairs", "mixed-hopper-ada"))
    manifest = msgspec.structs.replace(fill(tmp_path), backend="cuda", compute_capability=(9, 0), tp_size=2)
    settings = load({"cache": str(tmp_path), "replicas": "2"}, {})
    assert options_of_directory(tmp_path, manifest, settings, pairs).devices == ("GPU-0", "GPU-2", "GPU-1", "GPU-3")
    alone = options_of_directory(tmp_path, manifest, load({"cache": str(tmp_path)}, {}), mixed)
    assert alone.devices == tuple(gpu.uuid for gpu in mixed.gpus if gpu.compute_capability == (9, 0))
