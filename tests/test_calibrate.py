"""Calibrated builds of tiny models: they load, run, are closer to the checkpoint than rounding to nearest, hold two
blocks in memory however many there are, say what they do, and go on after a kill."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from calibrated_models import CASES, byte_tokenizer, load_engine, make_source, request_of
from model_helpers import load_model

from appliance import registry
from appliance.builder import calibrate, key_of
from appliance.builder.build import build
from appliance.builder.calibration_blocks import BlockRunner, block_weights, blocks_of, compute_dtype, read_block
from appliance.builder.calibration_data import calibration_tokens
from appliance.builder.calibration_store import BlockReport, CalibrationStore
from appliance.builder.job import Job
from appliance.builder.request import key_inputs_of
from appliance.checkpoint import Checkpoint, read_model_config
from appliance.engines import EngineStore, read_manifest
from appliance.engines.meter import ByteMeter
from appliance.errors import EngineBuildError, NoSpaceError, SettingsError
from appliance.hardware.host import Host
from appliance.ipc import Progress
from appliance.layers.decoder import Decoder
from appliance.quantization.calibration.block import PRODUCTS
from appliance.quantization.calibration.statistics import BlockStatistics
from appliance.runtime.prompt_batch import prompt_context
from appliance.runtime.sample_text import SAMPLE_TEXT
from appliance.runtime.single_prompt import run_prompt

torch.set_num_threads(1)
SCHEMES = {"int4_awq": "int4", "int4_gptq": "int4", "int8_smoothquant": "int8"}
IDS = torch.tensor(byte_tokenizer().encode(SAMPLE_TEXT).ids[:200])


@pytest.fixture(scope="module", params=CASES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp(request.param) / "model", CASES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("llama") / "model", CASES["llama"], layers=5)


def divergence(reference: Decoder, model: Decoder) -> float:
    """KL divergence of the next-token distributions over a text that no calibration saw, nats per token."""
    p, q = (each.logits(run_prompt(each, IDS)[0]).log_softmax(-1) for each in (reference, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


# ---------------------------------------------------------------- what is built


@pytest.mark.parametrize("scheme", SCHEMES)
def test_calibrated_engines_are_closer_than_rounding_to_nearest(source: Path, tmp_path: Path, scheme: str) -> None:
    reference = load_model(source)
    wanted = {"precision": SCHEMES[scheme], "scheme": scheme}
    engine = build(request_of(source, tmp_path, **wanted))
    nearest = build(request_of(source, tmp_path, **wanted, calibration_data="none"))
    got, plain = divergence(reference, load_engine(engine)), divergence(reference, load_engine(nearest))
    assert 0 < got < 0.95 * plain, (got, plain)
    manifest = read_manifest(engine)
    summary = manifest.calibration
    assert summary is not None and read_manifest(nearest).calibration is None
    assert summary.data == "the text that ships" and summary.tokens == 24 * 64 and summary.resumed_blocks == 0
    assert list(summary.choices) == [f"layers.{i}" for i in range(3)]
    assert all(0 < summary.error[key] <= summary.nearest_error[key] < 0.3 for key in PRODUCTS)
    assert sum(summary.error.values()) < sum(summary.nearest_error.values())
    assert manifest.key_inputs.calibration == {"data": summary.digest, "samples": 24, "length": 64}
    checked = [check.name for check in manifest.self_check]
    assert any("attention.qkv over the calibration text" in name for name in checked)


def test_key_depends_on_the_text_and_its_amount(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SAMPLE_TEXT)
    same = tmp_path / "copy.txt"
    shutil.copyfile(text, same)
    keys = {
        name: key_of(request_of(llama, tmp_path, **changes))
        for name, changes in {
            "default": {},
            "file": {"calibration_data": str(text)},
            "copy": {"calibration_data": str(same)},
            "samples": {"calibration_samples": 25},
            "length": {"calibration_length": 65},
            "none": {"calibration_data": "none"},
        }.items()
    }
    assert keys["file"] == keys["copy"], "the text counts, not where it lies"
    assert len(set(keys.values())) == len(keys) - 1
    text.write_text(SAMPLE_TEXT + "!")
    assert key_of(request_of(llama, tmp_path, calibration_data=str(text))) != keys["file"]
    plain = {"precision": "fp8"}
    assert key_of(request_of(llama, tmp_path, **plain)) == key_of(
        request_of(llama, tmp_path, **plain, calibration_samples=9)
    ), "what is not calibrated does not depend on it"


def test_refused_before_any_long_work(llama: Path, tmp_path: Path) -> None:
    """Before the checkpoint is hashed, which for a large one takes minutes."""
    text = tmp_path / "short.txt"
    text.write_text("Too short. " * 40)
    for changes, words in (
        (
            {"calibration_data": str(text)},
            r"too short: .*short\.txt has 440 tokens, which make 6 samples of 64, and 24",
        ),
        ({"calibration_data": str(tmp_path / "no")}, "there is no file or directory"),
        ({"calibration_samples": 8}, r"8 calibration samples of 64 tokens are 512 tokens; allowed: at least 1024"),
    ):
        seen: list[Progress] = []
        with pytest.raises(SettingsError, match=words):
            build(request_of(llama, tmp_path / "cache", **changes), seen.append)
        assert not [message for message in seen if message.phase == "verify"]


def test_no_space_counts_what_is_kept_beside_the_engine(llama: Path, tmp_path: Path) -> None:
    needed: list[float] = []
    for data in ("none", ""):
        store = EngineStore(tmp_path / f"cache{data}", free_bytes=lambda path: 1 << 10)
        with pytest.raises(NoSpaceError) as refused:
            build(request_of(llama, store.root, calibration_data=data, calibration_samples=1024), store=store)
        needed.append(float(refused.value.message.split("needs ")[1].split(" MiB")[0]))
    hidden = 2 * 1024 * 64 * 128 * compute_dtype(torch.bfloat16, torch.device("cpu")).itemsize / 2**20
    assert needed[1] > needed[0] + hidden


def test_what_does_not_fit_is_refused(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        EngineBuildError, match=r"layers\.1\.mlp\.down is to stay unquantized, but calibration quantizes"
    ):
        build(request_of(llama, tmp_path, scheme_parameters={"unquantized": ["layers.1.mlp.down"]}))
    monkeypatch.setattr(calibrate, "host", lambda: Host(cpu_cores=1, memory=1 << 30, free_memory=700_000))
    with pytest.raises(
        SettingsError, match=r"calibrating with 1536 tokens needs .* KiB of memory .* 683\.6 KiB are free"
    ):
        build(request_of(llama, tmp_path))


# ---------------------------------------------------------------- progress


def test_progress_and_a_line_per_block(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Progress] = []
    details: list[str] = []

    class Meter(ByteMeter):
        def advance(self, count: int, detail: str | None = None) -> None:
            details.append(detail or "")
            super().advance(count, detail)

    with Checkpoint(llama) as checkpoint:
        source, job = _source(llama, tmp_path, checkpoint)
        total = sum(source.work(spec) for spec in job.specs)
        meter = Meter(total, lambda snapshot: seen.append(snapshot), interval=0.01)  # type: ignore[arg-type]
        with caplog.at_level(logging.INFO), meter, torch.inference_mode():
            for spec, _ in source.tensors(meter):
                meter.advance(source.work(spec), spec.name)
    for i in range(1, 6):
        steps = [detail for detail in details if detail.startswith(f"calibrating block {i} of 5: ")]
        words = [step.partition(": ")[2].split()[0] for step in steps]
        assert words == ["reading", "measuring", "quantizing", "keeping", "running"]
    first = next(s for s in seen if s.detail.startswith("calibrating block 1 "))  # type: ignore[attr-defined]
    assert first.eta_seconds is None, "nothing is known before the first block is done"
    later = [s for s in seen if s.detail.startswith("calibrating block 4 ")]  # type: ignore[attr-defined]
    assert later and all(0.55 < s.bytes_done / s.bytes_total < 0.65 for s in later)
    assert all(0 < s.eta_seconds < 60 for s in later)
    lines = [record.message for record in caplog.records if "errors, nearest -> calibrated" in record.message]
    assert [line.split(", ")[:2] for line in lines] == [
        [f"calibration: block {i + 1} of 5", f"layers.{i}"] for i in range(5)
    ]
    assert all(f"{key} " in line for line in lines for key in PRODUCTS)
    steps = caplog.records[-1].message.partition(": ")[2]
    assert re.fullmatch(
        r"[\d.]+ s: reading [\d.]+, measuring [\d.]+, quantizing [\d.]+, keeping [\d.]+, running [\d.]+", steps
    )


# ---------------------------------------------------------------- memory


def _source(path: Path, cache: Path, checkpoint: Checkpoint, **changes: Any) -> tuple[calibrate.CalibratedTensors, Job]:
    request = request_of(path, cache, **changes)
    config = read_model_config(path)
    job = Job.start(request, key_inputs_of(request), config, checkpoint, registry.load)
    tokens = calibration_tokens("", path, request.calibration_samples, 64, vocab_size=288, max_length=256)
    directory = cache / "kept"
    directory.mkdir(parents=True, exist_ok=True)
    return calibrate.CalibratedTensors(job, tokens, directory), job


def _live_bytes() -> int:
    """Of all tensors that the garbage collector knows, each storage once."""
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor) and found.device.type == "cpu":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class _Watch(ByteMeter):
    """The largest sum of all tensors alive, statistics left out, whenever calibration says what it does next and
    whenever a block runs."""

    def __init__(self, statistics: dict[str, int]) -> None:
        super().__init__(1, None)
        self._statistics, self.most = statistics, 0

    def advance(self, count: int, detail: str | None = None) -> None:
        time.sleep(0.02)  # for the thread that reads ahead
        step = (detail or "").partition(": ")[2].partition(" ")[0]
        self.look(self._statistics.get(step, 0))

    def look(self, statistics: int = 0) -> None:
        self.most = max(self.most, _live_bytes() - statistics)


@pytest.mark.parametrize("scheme", ["int4_awq", "int4_gptq"])
def test_memory_holds_two_blocks_however_many_there_are(
    tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the hidden states of all tokens, statistics and what is stored of a block; reading ahead included."""
    inputs = 3 * 128 + 256
    hessians = 4 * (3 * 128**2 + 256**2) if scheme == "int4_gptq" else 0
    itemsize = compute_dtype(torch.bfloat16, torch.device("cpu")).itemsize
    statistics = {"measuring": hessians, "quantizing": hessians + 24 * 64 * inputs * itemsize}
    peaks = {}
    for layers in (2, 5):
        path = make_source(tmp_path / f"model{layers}", CASES["llama"], layers=layers)
        with Checkpoint(path) as checkpoint:
            source, job = _source(path, tmp_path / f"cache{layers}", checkpoint, scheme=scheme)
            names = [name for spec in job.specs if spec.name.startswith("layers.0.") for name in spec.sources]
            block = sum(checkpoint.info(name).nbytes for name in names) // 4 * itemsize
            gc.collect()
            gc.freeze()  # what there is by now is neither counted nor looked at again
            watch = _Watch(statistics)
            advance = BlockRunner.advance

            def looking(runner: BlockRunner, *given: Any, watch: _Watch = watch, advance: Any = advance) -> None:
                watch.look()
                advance(runner, *given)

            monkeypatch.setattr(BlockRunner, "advance", looking)
            with torch.inference_mode():
                for _ in source.tensors(watch):
                    pass
            gc.unfreeze()
            monkeypatch.setattr(BlockRunner, "advance", advance)
            peaks[layers] = watch.most
    hidden = 24 * 64 * 128 * itemsize
    assert peaks[5] < 1.05 * peaks[2], peaks
    stored = 0.6 * block  # of int4: as GroupedWeight before, packed afterwards
    assert 2 * block < peaks[5] < 2 * block + stored + hidden, (peaks, block)


# ---------------------------------------------------------------- interruptions


def test_killed_calibration_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    path = make_source(tmp_path / "model", CASES["qwen3"], layers=8)
    whole = build(request_of(path, tmp_path / "whole"))
    request = request_of(path, tmp_path / "killed")
    state = tmp_path / "killed" / "engines" / ".staging" / f"{whole.name}.calibration" / "state.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "appliance.builder", "--request", msgspec.json.encode(request).decode()],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if state.is_file() and len(json.loads(state.read_bytes())["blocks"]) >= 2:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, "the build ended before it was killed"
    (state.parent / "foreign").write_bytes(b"x")
    hidden = list(state.parent.glob("hidden-*.bin"))
    assert 1 <= len(hidden) <= 2, "only the latest, and the one being written"
    seen: list[Progress] = []
    engine = build(request, seen.append)
    assert engine.name == whole.name
    summary = read_manifest(engine).calibration
    assert summary is not None and 2 <= summary.resumed_blocks < 8
    told = [message.detail for message in seen]
    assert "checking the blocks of an interrupted calibration" in told
    assert not [detail for detail in told if detail.startswith("calibrating block 2 ")]
    assert seen[-1].phase == "build" and seen[-1].percent == 100.0
    assert (engine / "rank-0.safetensors").read_bytes() == (whole / "rank-0.safetensors").read_bytes()
    assert not list(state.parent.parent.glob("*")), "nothing is left once the engine is there"


def _kept(directory: Path, blocks: int, key: str = "k", rows: int = 6) -> CalibrationStore:
    store = CalibrationStore(directory, key, (rows, 4), torch.float32)
    for i in range(store.done, blocks):
        report = BlockReport(f"layers.{i}", 0.5, {"qkv": 0.1}, {"qkv": 0.05}, {"qkv": "ratio 0.5"})
        store.save({f"layers.{i}.x": torch.full((3,), i)}, torch.full((rows, 4), float(i)), report)
        store.wait()
    return store


def test_store_keeps_blocks_and_the_latest_hidden_states(tmp_path: Path) -> None:
    _kept(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"block-{i:03}.safetensors" for i in range(3)),
        "hidden-002.bin",
        "state.json",
    ]
    again = _kept(tmp_path, 0)
    assert again.done == 3 and again.reports[2].choices == {"qkv": "ratio 0.5"}
    assert torch.equal(again.tensors(1)["layers.1.x"], torch.full((3,), 1))
    hidden = torch.empty(6, 4)
    again.load_hidden(hidden)
    assert torch.equal(hidden, torch.full((6, 4), 2.0))
    assert _kept(tmp_path, 4).done == 4


def test_store_removes_what_cannot_be_gone_on_with(tmp_path: Path) -> None:
    def damage(directory: Path, name: str) -> None:
        content = bytearray((directory / name).read_bytes())
        content[-1] ^= 1
        (directory / name).write_bytes(content)

    for number, (change, changes) in enumerate(
        (
            (lambda at: damage(at, "block-001.safetensors"), {}),
            (lambda at: damage(at, "hidden-002.bin"), {}),
            (lambda at: damage(at, "state.json"), {}),
            (lambda at: (at / "block-000.safetensors").unlink(), {}),
            (lambda at: (at / "hidden-002.bin").write_bytes(b""), {}),
            (lambda at: None, {"key": "another"}),
            (lambda at: None, {"rows": 7}),
        )
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        _kept(directory, 3)
        change(directory)
        assert _kept(directory, 0, **changes).done == 0, number  # type: ignore[arg-type]
        assert list(directory.iterdir()) == [], number
    (tmp_path / "0" / "odd").mkdir()
    _kept(tmp_path / "0", 2)
    assert not (tmp_path / "0" / "odd").exists()


def test_leftovers_of_other_calibrations_go_when_one_begins(tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    other = EngineStore(tmp_path)
    with store.build_lock("a" * 64):
        left = store.calibration_staging("a" * 64)
    with other.build_lock("b" * 64):
        live = other.calibration_staging("b" * 64)
        assert not left.exists() and live.exists()
        with store.build_lock("c" * 64), store.staging("c" * 64):  # a build without calibration removes none
            assert live.exists()
            mine = store.calibration_staging("c" * 64)
            assert live.exists() and mine.exists(), "somebody works on it"
    with store.build_lock("d" * 64), store.staging("d" * 64):
        assert live.exists(), "kept for the next build of its key"
    store.collect_garbage(damaged=True)
    assert not live.exists(), "unless the disk is full"


# ---------------------------------------------------------------- blocks


def test_blocks_compute_what_the_model_does(source: Path) -> None:
    """All blocks one after the other, prompts of three lengths in several batches, against the whole model."""
    config = read_model_config(source)
    model = load_model(source)
    rows = [IDS[:120].tolist(), IDS[5:95].tolist(), IDS[50:57].tolist()]
    plugin = registry.load("models", registry.architectures()[config.architecture].name)
    runner = BlockRunner(plugin, config, [len(row) for row in rows], torch.float32, torch.device("cpu"))
    runner._batches = [[120], [90, 7]]
    ids = torch.tensor([token for row in rows for token in row])
    hidden = model.embedding(ids).clone()
    with Checkpoint(source) as checkpoint, torch.inference_mode():
        for i, specs in enumerate(blocks_of(plugin.weight_specs(config), config)):
            tensors = read_block(checkpoint, specs, torch.float32)
            weights = block_weights(f"layers.{i}", tensors, config)
            statistics = BlockStatistics(weights, hessian=True)
            before = hidden.clone()
            runner.observe(runner.block(i, tensors), hidden, statistics)
            assert torch.equal(hidden, before), "observing changes nothing"
            statistics.check()
            assert {statistics[key].count for key in PRODUCTS} == {len(ids)}
            runner.advance(runner.block(i, tensors), hidden)
        context = prompt_context(config, [len(row) for row in rows], torch.float32, torch.device("cpu"))
        expected = model(ids, context)
        got = model.norm(hidden, None)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_architectures_with_other_products_are_refused(llama: Path) -> None:
    config = read_model_config(llama)
    plugin = registry.load("models", "llama")
    specs = [
        msgspec.structs.replace(spec, name=spec.name.replace("mlp.down", "mlp.experts.0.down"))
        for spec in plugin.weight_specs(config)
    ]
    with pytest.raises(EngineBuildError, match=r"cannot be calibrated: layers\.0 has the products .*experts\.0\.down"):
        blocks_of(specs, config)


@pytest.mark.gpu
def test_calibration_on_the_gpu(llama: Path, tmp_path: Path) -> None:
    """The blocks run by the GPU's kernels; the engine is as good as one calibrated on the CPU."""
    reference = load_model(llama)
    on_gpu = build(request_of(llama, tmp_path / "gpu", device="cuda"))
    on_cpu = build(request_of(llama, tmp_path / "cpu"))
    got, expected = (divergence(reference, load_engine(engine)) for engine in (on_gpu, on_cpu))
    assert got < 1.2 * expected
