"""What a build does while it converts: models with made-up weights, steps, timings that wait for their turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_helpers import make_checkpoint

from appliance import registry
from appliance.builder import ahead, warmup
from appliance.builder.build import build
from appliance.builder.job import Job
from appliance.builder.made_up import describe_model, first_layers, make_up, parameter_bytes
from appliance.builder.request import BuildRequest, key_inputs_of
from appliance.builder.tactics import Tuner, layers_timed
from appliance.checkpoint import Checkpoint, read_model_config
from appliance.engines import read_manifest
from appliance.kernels.compiled import KERNELS
from appliance.kernels.tactics import ROW_BUCKETS, TABLE, Tactic, Tactics
from appliance.layers.linear import Linear
from appliance.quantization import unquantized
from appliance.runtime.single_prompt import run_prompt

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty_table() -> Iterator[None]:
    TABLE.clear()
    yield
    TABLE.clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3Config

    path = tmp_path_factory.mktemp("ahead") / "qwen3"
    config = Qwen3Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    make_checkpoint(path, config)
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    return path


# ---------------------------------------------------------------- made-up models


@pytest.mark.parametrize("scheme", ["none", "fp8", "int4_awq", "int8_smoothquant"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_made_up_model_computes(checkpoint: Path, scheme: str, tp_size: int) -> None:
    config = read_model_config(checkpoint)
    parameters = {"group_size": 16} if scheme == "int4_awq" else {}
    model = describe_model(config, scheme, torch.float32, parameters, tp_size, 3)
    announced = parameter_bytes(model)
    make_up(model, CPU)
    assert len(model.layers) == 3 and announced > 0
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    for layer in layers:
        out = layer.multiply(layer.scheme.tactic_input(torch.randn(2, layer.in_features)))
        assert torch.isfinite(torch.as_tensor(out)).all() and float(torch.as_tensor(out).abs().max()) > 0
    places = [tensor.data_ptr() for layer in layers for tensor in layer.prepared.values()]
    assert len(set(places)) == len(places), "or weights would come from the cache when they are timed"
    if tp_size == 1:
        few = first_layers(model, 2)
        hidden, caches = run_prompt(few, torch.arange(7))
        assert len(caches) == 2 and torch.isfinite(few.logits(hidden)).all()
        assert few.layers[1] is model.layers[1] and len(model.layers) == 3


def test_as_many_layers_as_timing_goes_through() -> None:
    assert [layers_timed(n) for n in (0, 1 << 20, 4096 * 4096, 1 << 27, 1 << 30)] == [256 << 20, 256, 16, 2, 2]


# ---------------------------------------------------------------- a rehearsal


class Events:
    """What happened, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """The CPU stands for a GPU, whose products without quantization are computed in two ways."""
    seen = Events()

    def tactics(self: Any, out_features: int, in_features: int, rows: int, device: torch.device) -> Tactics:
        return {"library": _library, "own": _own}

    def apply(self: Any, tensors: Any, x: Any, bias: Any, dtype: Any) -> Any:
        n, k = tensors["weight"].shape
        tactic = TABLE.find("none", n, k, len(x), lambda rows: self.tactics(n, k, rows, x.device))
        return (tactic or _library)(tensors, x, bias, dtype)

    def timed(calls: Sequence[Callable[[], object]], launches: int) -> float:
        assert all(torch.is_tensor(call()) for call in calls)
        seen.names.append("timed")
        return 10.0 if _ran[threading.get_ident()] is _library else 5.0

    def steps(core: Any, config: Any) -> None:
        time.sleep(0.1)  # meanwhile tactics are compiled, and wait
        take_steps(core, config)
        seen.names.append(f"steps of {config.num_hidden_layers} layers")

    take_steps = ahead.run_steps
    monkeypatch.setattr(unquantized.Scheme, "tactics", tactics)
    monkeypatch.setattr(unquantized.Scheme, "apply", apply)
    monkeypatch.setattr(ahead, "time_in_graph", timed)
    monkeypatch.setattr(ahead, "run_steps", steps)
    monkeypatch.setattr(ahead, "_PAGE_BYTES", 16 << 20)
    for module in (ahead, warmup):
        monkeypatch.setattr(module, "trial_device", lambda request: CPU)
    monkeypatch.setattr(ahead, "for_gpu", lambda backend: True)
    monkeypatch.setattr(warmup, "_for_gpu", lambda request: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    monkeypatch.setattr(KERNELS, "gather", lambda directory: {})
    return seen


_ran: dict[int, Tactic] = {}


def _library(tensors: Any, x: Any, bias: Any, dtype: Any) -> Any:
    _ran[threading.get_ident()] = _library
    return F.linear(x, tensors["weight"], bias)


def _own(tensors: Any, x: Any, bias: Any, dtype: Any) -> Any:
    _ran[threading.get_ident()] = _own
    return F.linear(x, tensors["weight"], bias)


def request_of(checkpoint: Path, cache: Path, **changes: Any) -> BuildRequest:
    facts = {"checkpoint": str(checkpoint), "cache": str(cache), "precision": "fp32", "backend": "cpu"}
    return BuildRequest(**(facts | {"max_num_seqs": 4, "max_num_batched_tokens": 256} | changes))


def test_a_build_uses_what_was_found_beside_it(checkpoint: Path, tmp_path: Path, events: Events) -> None:
    engine = build(request_of(checkpoint, tmp_path))
    manifest = read_manifest(engine)
    assert events.names[0] == "steps of 2 layers", "products are timed when nothing else runs"
    assert events.names.count("timed") == len(events.names) - 1 > 0
    products = {tactic.product for tactic in manifest.tactics}
    assert products == {"qkv", "o", "gate_up", "down", "lm_head"}
    assert {tactic.rows for tactic in manifest.tactics} == set(ROW_BUCKETS)
    assert {tactic.tactic for tactic in manifest.tactics} == {"own"}
    phases = manifest.build.phases
    assert phases["beside.steps"] > 0.1 and phases["beside.tactics"] > 0 and phases["trial.steps"] > 0
    assert "trial.tactics" not in phases, "timed once"
    assert [key for key in phases if "." not in key][:4] == ["headers", "digest", "prepare", "convert"]


def test_without_a_rehearsal_the_trial_times(
    checkpoint: Path, tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def fails(*facts: Any) -> Any:
        raise RuntimeError("no such model")

    monkeypatch.setattr(ahead, "describe_model", fails)

    class Quick(Tuner):
        def __init__(self, *facts: Any, **options: Any) -> None:
            super().__init__(*facts, timer=ahead.time_in_graph, **options)

    monkeypatch.setattr(warmup, "Tuner", Quick)
    manifest = read_manifest(build(request_of(checkpoint, tmp_path)))
    assert "the trial does it: RuntimeError: no such model" in caplog.text
    assert {tactic.tactic for tactic in manifest.tactics} == {"own"}
    assert manifest.build.phases["trial.tactics"] > 0


def job_of(checkpoint: Path, cache: Path, **changes: Any) -> Job:
    request = request_of(checkpoint, cache, **changes)
    opened = Checkpoint(checkpoint)
    return Job.start(request, key_inputs_of(request), read_model_config(checkpoint), opened, registry.load)


def test_a_build_that_ends_early_ends_its_timing(
    checkpoint: Path, tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[ahead.Ahead] = []

    def stopping(calls: Sequence[Callable[[], object]], launches: int) -> float:
        prepared[0].stop()
        events.names.append("timed")
        return 1.0

    monkeypatch.setattr(ahead, "time_in_graph", stopping)
    prepared.append(ahead.prepare_ahead(job_of(checkpoint, tmp_path), tmp_path, lambda detail: None, rehearse=True))
    found = prepared[0].result()
    assert found.tactics is not None and {tactic.rows for tactic in found.tactics} == {1}
    assert len({tactic.product for tactic in found.tactics}) == 1, "after the first product of the first row count"


def test_products_of_a_rank_are_timed_without_the_others(checkpoint: Path, tmp_path: Path, events: Events) -> None:
    """Layers of a stage have the shapes of any other's; the head, which only the last stage has, is timed as well."""
    job = job_of(checkpoint, tmp_path, tp_size=2, pp_size=2)
    found = ahead.prepare_ahead(job, tmp_path, lambda detail: None, rehearse=True).result()
    shapes = {tactic.product: (tactic.out_features, tactic.in_features) for tactic in found.tactics or ()}
    assert shapes == {"qkv": (64, 64), "o": (64, 32), "gate_up": (128, 64), "down": (64, 64), "lm_head": (48, 64)}
    assert set(events.names) == {"timed"}, "steps need the other ranks"


def test_calibration_leaves_the_gpu_alone(checkpoint: Path, tmp_path: Path, events: Events) -> None:
    found = ahead.prepare_ahead(job_of(checkpoint, tmp_path), tmp_path, lambda detail: None, rehearse=False).result()
    assert found.tactics is None and not events.names


def test_timing_takes_turns_with_what_else_is_computed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, quiet, stop = job_of(checkpoint, tmp_path), threading.Event(), threading.Event()
    turns = ahead._Turns(job, torch.device("cuda", 1), quiet, stop)
    monkeypatch.setattr(ahead, "time_in_graph", lambda calls, launches: float(job.turns[1].locked()))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"synchronize": lambda s: 0})())
    times: list[float] = []
    clock = turns.clock()
    with job.gpu_turn(torch.device("cuda", 1)):
        thread = threading.Thread(target=lambda: times.append(turns([], 1)))
        thread.start()
        quiet.set()
        thread.join(0.1)
        assert thread.is_alive() and not times, "somebody else computes there"
    thread.join(5)
    assert times == [1.0] and not job.turns[1].locked()
    assert turns.waited > 0.09 and turns.clock() - clock < 0.09, "waiting is no time of the tuner's"
    assert 0 not in job.turns, "another GPU's turn is another's"
    stop.set()
    assert turns.clock() == float("inf")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_on_a_gpu(checkpoint: Path, tmp_path: Path, precision: str, caplog: pytest.LogCaptureFixture) -> None:
    """All of it, beside a conversion: nothing is left to the trial."""
    caplog.set_level("INFO")
    capability = torch.cuda.get_device_capability()
    request = request_of(checkpoint, tmp_path, precision=precision, backend="cuda", compute_capability=capability)
    manifest = read_manifest(build(request))
    for words in ("not prepared", "not rehearsed", "could not be tried"):
        assert words not in caplog.text
    assert not any("first start" in note for note in manifest.build.notes)
    assert {tactic.product for tactic in manifest.tactics} == {"qkv", "o", "gate_up", "down", "lm_head"}
    phases = manifest.build.phases
    assert {"beside.steps", "beside.tactics", "trial.load_weights", "trial.steps"} <= phases.keys()
    assert "trial.tactics" not in phases and manifest.kernels.get("triton")


@pytest.mark.gpu
def test_the_gpus_of_several_ranks_convert_together(checkpoint: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    capability = torch.cuda.get_device_capability()
    facts: dict[str, Any] = {"precision": "fp8", "backend": "cuda", "compute_capability": capability, "tp_size": 2}
    engines = [
        build(request_of(checkpoint, tmp_path / device, device=device, tactics=False, **facts))
        for device in ("auto", "cuda:1", "cpu")
    ]
    assert read_manifest(engines[0]).build.device == "cuda:0, cuda:1"
    for rank in (0, 1):
        first, *others = [(engine / f"rank-{rank}.safetensors").read_bytes() for engine in engines]
        assert all(other == first for other in others)
