"""What a start of several replicas is given: devices of each, from a selection or for an engine directory."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from selection_cases import LLAMA_8B
from test_engines import fill

from appliance import hardware
from appliance.errors import HardwareError, ProfileError, SettingsError
from appliance.launch.plan import choose, engine_options, make_plan, options_of_directory
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
