"""Work around a start: which graphs it waits for, what follows between requests, and a build's trial run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import make_checkpoint
from paged_fake import FakeExecutor, make_request
from runtime_helpers import make_core

from appliance.batching.core import EngineCore
from appliance.builder import warmup
from appliance.builder.request import BuildRequest
from appliance.builder.warmup import WarmedUp, run_steps, warm_up
from appliance.engine_process import EngineLoop
from appliance.ipc import AddRequests, Outputs, Shutdown
from appliance.layers import halves
from appliance.runtime.cuda_graphs import DecodeGraphs, decode_buckets, ready_buckets

# ---------------------------------------------------------------- graphs


class RecordingGraphs(DecodeGraphs):
    """Captures nothing, but in order; `full` is a size that there is no memory for."""

    full = 0

    def __init__(self) -> None:
        super().__init__(lambda inputs: torch.zeros(1), lambda size: None)  # type: ignore[arg-type,return-value]
        self.order: list[int] = []

    def capture(self, size: int) -> None:
        if size == self.full:
            raise torch.cuda.OutOfMemoryError("none left")
        self.order.append(size)
        self._sizes = sorted([*self._sizes, size])


@pytest.mark.parametrize("most", [1, 3, 64, 200, 256, 1000])
def test_a_start_captures_few_sizes_and_the_rest_follows(most: int) -> None:
    sizes = decode_buckets(most)
    first = ready_buckets(sizes)
    for n in range(1, most + 1):
        assert next(size for size in first if size >= n) < 2 * n or n == 1
    graphs, told = RecordingGraphs(), []
    graphs.capture_first(sizes, lambda done, total: told.append((done, total)))
    assert graphs.order == sorted(first, reverse=True) and graphs.bucket(most) == most
    assert told == [(i + 1, len(first)) for i in range(len(first))]
    if most >= 64:
        assert graphs.bucket(33) == 64
    while graphs.capture_next():
        pass
    assert sorted(graphs.order) == sizes and graphs.bucket(most + 1) is None
    if most >= 64:
        assert graphs.bucket(33) == 40


def test_the_largest_steps_are_not_captured() -> None:
    """Ranks make passes of more tokens in halves, which graphs do not hold."""
    assert decode_buckets(4096) == decode_buckets(2048) and decode_buckets(4096)[-1] == 2048 <= halves.MIN_TOKENS


def test_no_memory_for_more_graphs_ends_their_capture(caplog: pytest.LogCaptureFixture) -> None:
    graphs = RecordingGraphs()
    graphs.capture_first(decode_buckets(64), lambda done, total: None)
    graphs.full = 56
    before = list(graphs.order)
    assert graphs.capture_next() and not graphs.capture_next()
    assert graphs.order == before and "no memory for a CUDA graph of 56" in caplog.text


# ---------------------------------------------------------------- between requests


class Channel:
    """The engine's end: messages as the script gives them, and what happened in which order."""

    def __init__(self, script: list[Any], events: list[str]) -> None:
        self._script, self._events = script, events

    def receive(self, timeout: float) -> Any:
        if timeout:
            self._events.append("wait")
        if not self._script or (self._script[0] == "wait" and not timeout):
            return None
        message = self._script.pop(0)
        return None if message in (None, "wait") else message

    def send(self, message: object) -> None:
        if isinstance(message, Outputs) and any(output.finish_reason for output in message.outputs):
            self._events.append("finished")


def test_what_a_start_put_off_is_done_while_idle_and_yields_to_requests() -> None:
    events: list[str] = []
    pieces = 3

    def prepare_more() -> bool:
        nonlocal pieces
        if pieces == 0:
            return False
        pieces -= 1
        events.append("piece")
        return True

    request = make_request("a", [1, 2, 3], max_tokens=2)
    # One look finds nothing, the next a request; then nothing until the engine waits, then the end.
    script = [None, AddRequests(requests=[request]), "wait", Shutdown()]
    EngineLoop(EngineCore(FakeExecutor()), Channel(script, events), prepare_more).run()  # type: ignore[arg-type]
    assert events == ["piece", "finished", "piece", "piece", "wait"]


def test_a_busy_engine_does_a_piece_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    done: list[float] = []

    def prepare_more() -> bool:
        done.append(now)
        return len(done) < 3

    class Slow(FakeExecutor):
        def collect(self) -> Any:
            nonlocal now
            now += 0.5
            return super().collect()

    monkeypatch.setattr("appliance.engine_process.time.monotonic", lambda: now)
    script = [AddRequests(requests=[make_request("a", [1, 2, 3], max_tokens=40, ignore_eos=True)]), "wait", Shutdown()]
    EngineLoop(EngineCore(Slow()), Channel(script, []), prepare_more).run()  # type: ignore[arg-type]
    busy = done[:3]
    assert all(later - earlier >= 2.0 for earlier, later in zip([0.0, *busy], busy)), done
    assert len(done) == 4, "and then, idle, one look whether anything is left"


# ---------------------------------------------------------------- a build's trial run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    make_checkpoint(path, LlamaConfig(vocab_size=64, num_key_value_heads=1, max_position_embeddings=128, **sizes))
    return path


def test_the_trial_takes_every_kind_of_step(checkpoint: Path) -> None:
    """On the CPU backend, whose runner takes the same steps; prompts are cut to what the model was made for."""
    core = make_core(checkpoint, num_pages=512, max_num_seqs=16, max_num_batched_tokens=256)
    seen: list[Any] = []
    submit: Callable[[Any], None] = core._executor.submit

    def spy(plan: Any) -> None:
        seen.append(plan)
        submit(plan)

    core._executor.submit = spy  # type: ignore[method-assign]
    from appliance.checkpoint import read_model_config

    run_steps(core, read_model_config(checkpoint))
    core.check_integrity()
    lengths = {item.length for plan in seen for item in plan.scheduled}
    assert {1, 5, 16, 33, 124} <= lengths
    mixed = [plan for plan in seen if len({item.length for item in plan.scheduled}) > 1]
    assert mixed and max(len(plan.scheduled) for plan in seen) >= 10
    params = [new.params for plan in seen for new in plan.new]
    for name in ("top_k", "min_p", "presence_penalty", "logit_bias", "logprobs", "prompt_logprobs", "min_tokens"):
        assert any(getattr(p, name) for p in params), name
    assert any(p.greedy for p in params) and any(not p.greedy for p in params)


def request_of(**changes: Any) -> BuildRequest:
    values = {"checkpoint": "c", "cache": "c", "precision": "bf16", "backend": "cuda", "compute_capability": (9, 0)}
    return BuildRequest(**(values | changes))


def test_no_trial_without_the_gpu_that_the_engine_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(request: BuildRequest) -> WarmedUp:
        return warm_up(tmp_path, request, lambda detail: None)

    assert tried(request_of(backend="cpu")) == WarmedUp()
    assert "built on the CPU" in str(tried(request_of(device="cpu")).note)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "without a GPU" in str(tried(request_of()).note)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, index))
    assert "no GPU here has compute capability 9.0" in str(tried(request_of()).note)
    assert warmup.trial_device(request_of(compute_capability=(8, 1))) == torch.device("cuda", 1)


def test_a_failed_trial_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(engine_dir: Path, *others: Any) -> WarmedUp:
        (engine_dir / "kernels" / "triton").mkdir(parents=True)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(warmup, "trial_device", lambda request: torch.device("cuda", 0))
    monkeypatch.setattr(warmup, "_warm_up", fails)
    warmed = warm_up(tmp_path, request_of(), lambda detail: None)
    assert "out of memory" in str(warmed.note) and not warmed.kernels
    assert not (tmp_path / "kernels").exists(), "half of the kernels is not packed"


def test_the_engine_process_imports_what_it_needs_and_no_more() -> None:
    program = (
        "import sys; from appliance.engine_process import import_early; import_early()\n"
        "print(*(m for m in ('torch', 'appliance.runtime.loading', 'transformers', 'torch._inductor', 'sympy',"
        " 'fastapi', 'huggingface_hub', 'fsspec', 'safetensors') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    if torch.cuda.is_available():
        assert "transformers" not in done.stdout
    else:
        assert done.stdout.split() == ["torch", "appliance.runtime.loading"]


def test_a_trial_from_end_to_end(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU backend in the place of a GPU's: it has no choice of tactics and no kernels, and takes all steps."""
    from appliance.builder.build import build
    from appliance.engines import read_manifest, verify_engine
    from appliance.kernels.compiled import KERNELS

    (checkpoint / "tokenizer.json").write_text('{"version": "1.0"}')
    monkeypatch.setattr(warmup, "_for_gpu", lambda request: True)
    monkeypatch.setattr(warmup, "trial_device", lambda request: torch.device("cpu"))
    monkeypatch.setattr(warmup.torch.cuda, "get_device_name", lambda device: "Test GPU")

    def gather(directory: Path) -> dict[str, str]:
        (directory / "native").mkdir(parents=True)
        (directory / "native" / "decode.cubin").write_bytes(b"code")
        return {"native": "sm_90"}

    monkeypatch.setattr(KERNELS, "gather", gather)
    said: list[str] = []
    request = request_of(checkpoint=str(checkpoint), cache=str(tmp_path), backend="cpu", compute_capability=None)
    engine = build(request, lambda message: said.append(message.detail))
    manifest = read_manifest(engine)
    assert (manifest.build.gpu, manifest.kernels, manifest.tactics) == ("Test GPU", {"native": "sm_90"}, ())
    assert {"kernels/native/decode.cubin", "rank-0.safetensors"} <= {file.name for file in manifest.files}
    verify_engine(engine, "full")
    assert any("trying the engine" in detail for detail in said)
