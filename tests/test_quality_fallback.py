"""A build that spoils a model: refused with its numbers, or another precision serves; never the spoiled one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from selection_cases import FACTS, LLAMA_8B, PROFILES, machine
from torch import Tensor

from appliance import builtin, registry
from appliance.builder import BuildRequest
from appliance.builder.build import build
from appliance.engines import EngineStore, read_manifest
from appliance.engines.quality import recall
from appliance.errors import CheckpointError, EngineQualityError
from appliance.ipc import Built, Progress
from appliance.launch.prepare import prepare_engine
from appliance.profiles import capabilities, reasons, select
from appliance.profiles.load import default_directory

LIMIT = 0.1


def damaged(kind: str, name: str) -> Any:
    """The plug-ins, but fp8 has some scales too large by half, as a wrong index would make them."""
    module: ModuleType = registry.load(kind, name)
    if (kind, name) != ("quantization", "fp8"):
        return module

    class Scheme(module.Scheme):  # type: ignore[misc, name-defined]
        def quantize(self, weight: Tensor) -> dict[str, Tensor]:
            stored: dict[str, Tensor] = super().quantize(weight)
            stored["weight_scale"][::3] *= 1.5
            return stored

    return SimpleNamespace(Scheme=Scheme, PLUGIN=module.PLUGIN)


def forgiving(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of single products lets it pass: this is about what only a model's predictions show."""
    monkeypatch.setattr("appliance.builder.selfcheck._limit", lambda *_: 1.0)


def request_of(cache: Path, **changes: Any) -> BuildRequest:
    values = {"checkpoint": str(builtin.checkpoint_dir()), "cache": str(cache), "precision": "fp8", "backend": "cpu"}
    return BuildRequest(**(values | changes))  # type: ignore[arg-type]


def test_a_good_build_writes_what_it_measured(tmp_path: Path) -> None:
    said: list[Progress] = []
    manifest = read_manifest(build(request_of(tmp_path, max_kl=LIMIT), said.append))
    found = manifest.quality
    assert found is not None and found.kl_divergence is not None and found.tokens >= 1024
    assert found.kl_divergence < 0.05 and (found.top1_agreement or 0) > 0.9
    assert found.limit == LIMIT and found.note == ""
    assert any("against the checkpoint: KL " in (message.detail or "") for message in said)
    plain = read_manifest(build(request_of(tmp_path, precision="bf16", max_kl=LIMIT)))
    assert plain.quality is None, "the checkpoint's own numbers"
    wider = read_manifest(build(request_of(tmp_path, precision="fp16", max_kl=LIMIT)))
    assert wider.quality is not None and wider.quality.top1_agreement == 1


def test_a_damaged_build_fails_with_the_numbers_and_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgiving(monkeypatch)
    with pytest.raises(EngineQualityError, match=r"the fp8 engine of model differs too much.*KL .*allows KL 0\.1"):
        build(request_of(tmp_path, max_kl=LIMIT), load_plugin=damaged)
    store = EngineStore(tmp_path)
    assert store.list_engines() == [] and not list(store.engines.glob(".staging/*"))
    (refused,) = store.engines.glob(".refused/*.json")
    known = recall(store.engines, refused.stem)
    assert known is not None and (known.kl_divergence or 0) > LIMIT
    began = time.monotonic()
    monkeypatch.setattr("appliance.builder.build.Job", None)
    with pytest.raises(EngineQualityError, match="differs too much"):
        build(request_of(tmp_path, max_kl=LIMIT), load_plugin=damaged)  # nothing is converted to say it again
    assert time.monotonic() - began < 5
    monkeypatch.undo()
    refused.write_bytes(b"{")
    assert recall(store.engines, refused.stem) is None
    build(request_of(tmp_path, max_kl=LIMIT))  # mended since, and nothing is known any more


def test_without_a_limit_it_is_built_and_refused_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgiving(monkeypatch)
    quality = read_manifest(build(request_of(tmp_path), load_plugin=damaged)).quality
    assert quality is not None and (quality.kl_divergence or 0) > LIMIT and quality.limit is None


# ---------------------------------------------------------------- a start


@pytest.fixture
def damaged_builder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Starts build in this process, fp8 damaged, and prefer fp8 to bf16. Returns the precisions that were built."""
    directory = tmp_path / "profiles"
    shutil.copytree(default_directory(), directory)
    for file in directory.glob("*.yaml"):
        if file.stem not in ("fp8-cpu", "bf16-cpu"):
            file.unlink()
    fp8 = directory / "fp8-cpu.yaml"
    fp8.write_text(fp8.read_text().replace("{default: 30}", "{default: 99}"))
    monkeypatch.setattr("appliance.profiles.load.default_directory", lambda: directory)
    forgiving(monkeypatch)
    built: list[str] = []

    async def run(request: BuildRequest, _: Any, where: Path, progress: Callable[[Progress], None], *__: Any) -> Built:
        built.append(request.precision)
        path = build(request, progress, load_plugin=damaged)
        return Built(str(path), path.name, 0.0)

    monkeypatch.setattr("appliance.launch.obtain.run_builder", run)
    return built


def test_a_start_falls_back_to_another_precision_and_says_so(
    tmp_path: Path, damaged_builder: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    options = prepare_engine("builtin", cache=tmp_path)
    assert read_manifest(Path(options.engine_dir)).precision == "bf16" and damaged_builder == ["fp8", "bf16"]
    loud = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert loud[0].startswith("QUALITY: the fp8 engine of model differs too much from its checkpoint: KL ")
    assert loud[1] == "FALLING BACK from fp8-cpu-tp1 to bf16-cpu-tp1"


@pytest.mark.parametrize("asked", [{"precision": "fp8"}, {"profile": "fp8-cpu"}])
def test_what_was_asked_for_by_name_is_not_replaced(
    tmp_path: Path, damaged_builder: list[str], asked: dict[str, str]
) -> None:
    with pytest.raises(EngineQualityError, match="differs too much"):
        prepare_engine("builtin", cache=tmp_path, **asked)  # type: ignore[arg-type]
    assert damaged_builder == ["fp8"]


def test_a_start_fails_or_ignores_as_it_is_told(tmp_path: Path, damaged_builder: list[str]) -> None:
    with pytest.raises(EngineQualityError, match="differs too much") as raised:
        prepare_engine("builtin", cache=tmp_path, overrides={"on_quality_failure": "fail"})
    assert raised.value.exit_code == 7 and damaged_builder == ["fp8"]
    options = prepare_engine("builtin", cache=tmp_path, overrides={"on_quality_failure": "ignore"})
    assert read_manifest(Path(options.engine_dir)).precision == "fp8"
    # Now it is in the store, with its numbers: a start that has a limit does not serve it.
    again = prepare_engine("builtin", cache=tmp_path)
    assert read_manifest(Path(again.engine_dir)).precision == "bf16"
    assert damaged_builder == ["fp8", "fp8", "bf16"]


def test_the_selection_says_why_another_precision_serves() -> None:
    bad = dict.fromkeys(("fp8", "fp8-kv8"), "was refused: the fp8 engine of m differs too much")
    selection = select(
        machine("h200-x1"), LLAMA_8B, PROFILES, capabilities=capabilities(), gpu_facts=FACTS, refused=bad
    )
    assert selection.selected is not None and selection.selected.name == "bf16-tp1"
    assert "not fp8-tp1, fp8-kv8-tp1: was refused: the fp8 engine of m differs too much" in reasons(selection)


@pytest.mark.parametrize("hardware", ["a100-80gb-x1", "l40s", "t4"])
def test_int4_found_by_gptq_comes_before_another_precision(hardware: str) -> None:
    bad = {"int4": "was refused: the int4 engine of m differs too much"}
    selection = select(machine(hardware), LLAMA_8B, PROFILES, capabilities=capabilities(), gpu_facts=FACTS, refused=bad)
    assert selection.selected is not None and selection.selected.name == "int4-gptq-tp1"


@pytest.mark.parametrize("damage", ["quality", "nan"])
def test_a_calibration_that_ends_in_a_refusal_leaves_nothing(tmp_path: Path, damage: str) -> None:
    """A second one would end alike, so there is nothing to go on with."""
    source = tmp_path / "model"
    shutil.copytree(builtin.checkpoint_dir(), source)
    if damage == "nan":
        file = source / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
    request = request_of(
        tmp_path, checkpoint=str(source), precision="int4", max_kl=1e-6, calibration_samples=8, calibration_length=256
    )
    with pytest.raises(EngineQualityError if damage == "quality" else CheckpointError):
        build(request)
    assert not list((tmp_path / "engines" / ".staging").glob("*"))
