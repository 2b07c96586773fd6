"""The builder: what it writes, what it refuses, what it survives; and loading what it wrote."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from appliance import registry
from appliance.builder import BuildRequest, key_of
from appliance.builder.build import build
from appliance.builder.convert import convert
from appliance.builder.job import Job
from appliance.builder.memory import Memory
from appliance.builder.plain import PlainTensors
from appliance.builder.process import main
from appliance.builder.request import key_inputs_of
from appliance.builder.shards import plan_tensors
from appliance.checkpoint import Checkpoint, SafetensorsWriter, read_model_config
from appliance.engines import ByteMeter, DamagedFileError, EngineStore, read_manifest, verify_engine
from appliance.engines.disk import gib
from appliance.errors import CheckpointError, EngineBuildError, EngineDamagedError, NoSpaceError
from appliance.ipc import Built, Failed, Progress, ServerEnd, Shutdown
from appliance.models import llama
from appliance.quantization import fp8, int4_gptq, unquantized
from appliance.runtime.weights import load_weights, load_weights_reference
from appliance.types import WeightSpec

torch.set_num_threads(1)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _save_llama(path: Path, **changes: Any) -> None:
    """A tiny Llama with biases, in several shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attention_bias": True,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(shape | changes)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(path, max_shard_size="60KB")
    _write_tokenizer(path)


def _write_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "tokenizer_config.json").write_text("{}")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer file."""
    path = tmp_path_factory.mktemp("tiny-llama")
    _save_llama(path)
    assert len(list(path.glob("model-*.safetensors"))) > 2
    return path


def request_of(source: Path, cache: Path, **changes: Any) -> BuildRequest:
    defaults = {"checkpoint": str(source), "cache": str(cache), "precision": "bf16", "backend": "cpu"}
    return BuildRequest(**(defaults | changes))


def originals(source: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in source.glob("*.safetensors") for k, v in load_file(file).items()}


class Plugins:
    """Plug-ins whose quantize first calls `before`, to count, block or fail in mid-build."""

    def __init__(self, before: Any) -> None:
        class Scheme(unquantized.Scheme):
            def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
                before()
                return super().quantize(weight)

        self._quantization = SimpleNamespace(Scheme=Scheme)

    def __call__(self, kind: str, name: str) -> ModuleType:
        return self._quantization if kind == "quantization" else registry.load(kind, name)  # type: ignore[return-value]


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_engine_holds_the_checkpoint_fused_and_cast(source: Path, tmp_path: Path, precision: str) -> None:
    engine = build(request_of(source, tmp_path, precision=precision))
    stored, original = load_file(engine / "rank-0.safetensors"), originals(source)
    dtype = DTYPES[precision]
    prefix = "model.layers.1"
    for part in ("weight", "bias"):
        qkv = torch.cat([original[f"{prefix}.self_attn.{x}_proj.{part}"] for x in "qkv"])
        assert torch.equal(stored[f"layers.1.attention.qkv.{part}"], qkv.to(dtype))
    gate_up = torch.cat([original[f"{prefix}.mlp.{x}_proj.weight"] for x in ("gate", "up")])
    assert torch.equal(stored["layers.1.mlp.gate_up.weight"], gate_up.to(dtype))
    assert torch.equal(stored["embedding.weight"], original["model.embed_tokens.weight"].to(dtype))
    assert torch.equal(stored["lm_head.weight"], original["lm_head.weight"].to(dtype))
    assert sum(t.numel() for t in stored.values()) == sum(t.numel() for t in original.values())
    assert (engine / "tokenizer" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert (engine / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_fp8_engine_and_its_manifest(source: Path, tmp_path: Path) -> None:
    request = request_of(source, tmp_path, precision="fp8")
    engine = build(request)
    stored, original = load_file(engine / "rank-0.safetensors"), originals(source)
    weight, scale = stored["layers.0.mlp.down.weight"], stored["layers.0.mlp.down.weight_scale"]
    assert weight.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    expected = original["model.layers.0.mlp.down_proj.weight"]
    assert ((weight.float() * scale - expected).norm() / expected.norm()) < 0.04
    assert stored["norm.weight"].dtype == torch.bfloat16
    manifest = read_manifest(engine)
    assert manifest.key == engine.name == key_of(request)
    assert (manifest.scheme, manifest.dtype, manifest.rank_files) == ("fp8", "bfloat16", ("rank-0.safetensors",))
    assert manifest.model == read_model_config(source)
    assert {file.name for file in manifest.files} == {
        p.relative_to(engine).as_posix() for p in engine.rglob("*") if p.is_file() and p.name != "engine.json"
    }
    verify_engine(engine, "full")
    checked = {check.name.partition(" ")[0]: check for check in manifest.self_check}
    assert {"layers.0.attention.qkv", "lm_head", "forward"} <= checked.keys()
    measured = checked["lm_head"].value
    assert measured is not None and 0.01 < measured < 0.06, "FP8 products differ from exact ones by a few percent"
    build_facts = manifest.build
    assert build_facts.source == source.name and build_facts.source_bytes == sum(t.nbytes for t in original.values())
    assert build_facts.device == "cpu" and build_facts.peak_memory > 0


def test_tied_embeddings_and_double_build(tmp_path: Path) -> None:
    """Every precision gives another key; the same request the same engine, with nothing built."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    source = tmp_path / "qwen"
    config = Qwen2Config(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(source)
    _write_tokenizer(source)
    seen: list[Progress] = []
    engines = [build(request_of(source, tmp_path, precision=p), seen.append) for p in ("bf16", "fp8", "bf16")]
    assert engines[0] == engines[2] != engines[1]
    stored = load_file(engines[0] / "rank-0.safetensors")
    assert torch.equal(stored["lm_head.weight"], stored["embedding.weight"])
    assert "layers.0.attention.qkv.bias" in stored and "layers.0.attention.o.bias" not in stored
    done = [m for m in seen if m.percent == 100.0 and m.detail == "checking the built engine"]
    assert len(done) == 2 and all(m.bytes_done == m.bytes_total > 0 for m in done)


def test_rows_quantized_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from appliance.quantization import blocks as module

    weight = torch.randn(37, 48)
    whole = fp8.Scheme().quantize(weight)
    monkeypatch.setattr(module, "_AT_ONCE", 10 * 48)
    blocks = module.quantize(fp8.Scheme(), weight)
    assert blocks.keys() == whole.keys()
    for suffix, tensor in whole.items():
        assert torch.equal(blocks[suffix].view(torch.uint8), tensor.view(torch.uint8))
    # Two blocks of 48 rows, and an order of 48 inputs, which is not doubled.
    ordered = int4_gptq.Scheme({"group_size": 16, "act_order": True})
    weight = torch.randn(96, 48)
    monkeypatch.setattr(module, "_AT_ONCE", 48 * 48)
    blocks, whole = module.quantize(ordered, weight), ordered.quantize(weight)
    assert {suffix: tensor.tolist() for suffix, tensor in blocks.items()} == {k: t.tolist() for k, t in whole.items()}


class _Held:
    """Bytes of tensors that a conversion holds: from the moment they are asked for until they are written."""

    def __init__(self) -> None:
        self.now = self.most = self.specs = self.most_specs = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int, specs: int) -> None:
        with self._lock:
            self.now, self.specs = self.now + nbytes, self.specs + specs
            self.most, self.most_specs = max(self.most, self.now), max(self.most_specs, self.specs)


def _convert_slowly(source: Path, to: Path, devices: list[torch.device], precision: str) -> tuple[_Held, int]:
    """Convert with a writer that is slower than the source; what was held, and bytes of the largest spec."""
    held = _Held()

    class Counting(PlainTensors):
        def stored(self, spec: WeightSpec, device: torch.device) -> dict[str, torch.Tensor]:
            held.add(self.device_bytes(spec), 1)
            return super().stored(spec, device)

    class Slow(SafetensorsWriter):
        def write(self, name: str, tensor: torch.Tensor) -> None:
            time.sleep(0.002)
            super().write(name, tensor)

    class Meter(ByteMeter):
        def advance(self, count: int, detail: str | None = None) -> None:
            held.add(-weights.device_bytes(by_name[detail or ""]), -1)
            super().advance(count, detail)

    request = request_of(source, to, precision=precision)
    with Checkpoint(source) as checkpoint:
        job = Job.start(request, key_inputs_of(request), read_model_config(source), checkpoint, registry.load)
        weights, by_name = Counting(job), {spec.name: spec for spec in job.specs}
        with Slow(to / "x", plan_tensors(job.specs, job.scheme, job.dtype)) as writer, Meter(1, None) as meter:
            convert(weights, [writer], meter, devices=devices)
            writer.finish()
        assert (held.now, held.specs) == (0, 0) and len(by_name) > 10
        return held, max(weights.device_bytes(spec) for spec in job.specs)


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_conversion_holds_no_more_than_it_says(
    source: Path, tmp_path: Path, precision: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    cpu = torch.device("cpu")
    (tmp_path / "wide").mkdir()
    wide, largest = _convert_slowly(source, tmp_path / "wide", [cpu], precision)
    assert wide.most_specs == 3, "three threads of the CPU"
    monkeypatch.setattr("appliance.builder.memory._MOST", 2 * largest)
    (tmp_path / "narrow").mkdir()
    caplog.clear()
    narrow, _ = _convert_slowly(source, tmp_path / "narrow", [cpu], precision)
    assert largest <= narrow.most <= 2 * largest
    assert f"at most {gib(2 * largest)} of host memory" in caplog.text
    assert (tmp_path / "wide" / "x").read_bytes() == (tmp_path / "narrow" / "x").read_bytes()
    # Two devices: each has its threads and its bound.
    (tmp_path / "two").mkdir()
    two, _ = _convert_slowly(source, tmp_path / "two", [cpu, cpu], precision)
    assert narrow.most < two.most <= 4 * largest
    assert (tmp_path / "two" / "x").read_bytes() == (tmp_path / "wide" / "x").read_bytes()


def test_what_is_larger_than_the_bound_is_held_alone() -> None:
    memory = Memory(torch.device("cpu"), threads=3, limit=10, host_bytes=10)
    with memory.hold(6), memory.hold(4):
        waiting = threading.Thread(target=lambda: _hold(memory, 25))
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive() and memory.most == 10
    waiting.join(5)
    assert not waiting.is_alive() and memory.most == 25 and memory.held == 0


def _hold(memory: Memory, nbytes: int) -> None:
    with memory.hold(nbytes):
        pass


def test_an_error_in_one_thread_of_a_conversion_ends_the_others(source: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise EngineBuildError("the second is one too many")
        time.sleep(0.02)

    with pytest.raises(EngineBuildError, match="one too many"):
        build(request_of(source, tmp_path), load_plugin=Plugins(fail))
    assert len(calls) <= 4, "the other two threads ended what they had in hand"
    assert EngineStore(tmp_path).list_engines() == []


# ---------------------------------------------------------------- refusals


def test_requests_that_cannot_be_built(source: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match="pp_size=3"):
        build(request_of(source, tmp_path, pp_size=3))
    with pytest.raises(EngineBuildError, match=r"int4 needs .* multiples of 128; layers\.0\.attention\.qkv has 64"):
        build(request_of(source, tmp_path, precision="int4", calibration_data="none"))
    for wrong, words in (
        ({"scheme": "fp8"}, r"int8 has no scheme 'fp8'; allowed: int8_smoothquant"),
        ({"scheme_parameters": {"group_size": 64}}, r"int8_smoothquant cannot have group_size=64; its param"),
        ({"scheme_parameters": {"head": 8}}, r"have head=8; its parameters: head \(str\), unquantized"),
    ):
        with pytest.raises(EngineBuildError, match=words):
            build(request_of(source, tmp_path, precision="int8", calibration_data="none", **wrong))
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    config = json.loads((source / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(CheckpointError, match=r"quantized \(awq\), but none of its layers is"):
        build(request_of(broken, tmp_path))
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight .* \[112, 64\], expected \[96, 64\]"):
        build(request_of(broken, tmp_path))
    odd = {"precision": "fp8", "backend": "cuda", "compute_capability": (9, 0), "device": "cpu"}
    _save_llama(tmp_path / "odd", intermediate_size=72)
    with pytest.raises(EngineBuildError, match=r"multiples of 16; layers\.0\.mlp\.down has 72"):
        build(request_of(tmp_path / "odd", tmp_path, **odd))
    assert EngineStore(tmp_path).list_engines() == []


def test_no_space_is_found_before_writing(source: Path, tmp_path: Path) -> None:
    store = EngineStore(tmp_path, free_bytes=lambda path: 1 << 20)
    with pytest.raises(NoSpaceError, match=rf"the bf16 engine of {source.name} needs"):
        build(request_of(source, tmp_path), store=store)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_full_disk_is_one_error_wherever_it_is_met(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    empty = EngineStore(tmp_path, free_bytes=lambda path: 0)
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", full)  # the lock's file: who holds it is no reason to give up
        with pytest.raises(NoSpaceError, match=r"the bf16 engine of .* needs .*, 0 bytes are free"):
            build(request_of(source, tmp_path), store=empty)
    assert not list((tmp_path / "engines").glob(".staging/*")), "nothing was written"
    places = ["shutil.copyfile", "appliance.builder.build.write_manifest", "tempfile.NamedTemporaryFile", "os.fsync"]
    for place in places:
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(NoSpaceError, match="no space is left on the file system of") as caught:
                build(request_of(source, tmp_path))
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value), place
    assert EngineStore(tmp_path).list_engines() == []


def test_what_headers_show_is_found_before_hashing(source: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    config = json.loads((source / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(CheckpointError, match="gate_proj"):
        build(request_of(broken, tmp_path))
    assert not (tmp_path / "digests").exists()


def test_self_check_finds_a_scheme_that_stores_nonsense_and_weights_that_are_not_finite(
    source: Path, tmp_path: Path
) -> None:
    class Wrong(unquantized.Scheme):
        def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"weight": weight.flip(0)}

    def load_plugin(kind: str, name: str) -> Any:
        return SimpleNamespace(Scheme=Wrong) if kind == "quantization" else registry.load(kind, name)

    with pytest.raises(EngineBuildError, match=r"fails its self-check, layers\.0\.attention\.qkv.*relative error"):
        build(request_of(source, tmp_path), load_plugin=load_plugin)
    infinite = tmp_path / "infinite"
    shutil.copytree(source, infinite)
    shard = next(f for f in infinite.glob("*.safetensors") if "model.norm.weight" in load_file(f))
    tensors = load_file(shard)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(EngineBuildError, match="forward pass on the CPU: logits are not finite"):
        build(request_of(infinite, tmp_path))
    assert EngineStore(tmp_path).list_engines() == []


# ---------------------------------------------------------------- tokenizer


def test_tokenizer_without_a_fast_file_is_converted(source: Path, tmp_path: Path) -> None:
    """GPT-2's form, vocabulary and merges, becomes tokenizer.json."""
    old = tmp_path / "old"
    shutil.copytree(source, old)
    (old / "tokenizer.json").unlink()
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", "a", "b", "c", "ab", "abc"])}
    (old / "vocab.json").write_text(json.dumps(vocab))
    (old / "merges.txt").write_text("#version: 0.2\na b\nab c\n")
    (old / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    engine = build(request_of(old, tmp_path))
    from tokenizers import Tokenizer

    assert Tokenizer.from_file(str(engine / "tokenizer" / "tokenizer.json")).encode("abc").ids == [5]
    assert "converted from" in " ".join(read_manifest(engine).build.notes)
    (old / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.Y", null]}}')
    with pytest.raises(CheckpointError, match="own code"):
        build(request_of(old, tmp_path))


def test_a_tokenizer_that_is_none_is_one_line_before_anything_is_converted(source: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(source, tmp_path / "old"))
    (old / "tokenizer.json").unlink()
    converted = Plugins(lambda: pytest.fail("weights were converted"))
    with pytest.raises(CheckpointError, match=r"has no tokenizer \(none of tokenizer\.json, tokenizer\.model, vocab"):
        build(request_of(old, tmp_path), load_plugin=converted)
    (old / "tokenizer.model").write_bytes(b"nonsense")
    (old / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(CheckpointError, match=r"\(.*tokenizer\.model.*\) cannot be converted to") as caught:
        build(request_of(old, tmp_path), load_plugin=converted)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


# ---------------------------------------------------------------- crashes and company

_BLOCKING = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.test_builder import Plugins, build, request_of
count = 0
def before():
    global count
    count += 1
    if count == 4:
        print("mid-build", flush=True); time.sleep(60)
build(request_of(Path(sys.argv[1]), Path(sys.argv[2])), load_plugin=Plugins(before))
"""


def _start_blocking(source: Path, cache: Path) -> subprocess.Popen[str]:
    root = str(Path(__file__).parent.parent)
    child = subprocess.Popen(
        [sys.executable, "-c", _BLOCKING, str(source), str(cache), root], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert child.stdout is not None and child.stdout.readline() == "mid-build\n"
    return child


def test_killed_in_mid_build_then_started_again(source: Path, tmp_path: Path) -> None:
    child = _start_blocking(source, tmp_path)
    staging = tmp_path / "engines" / ".staging"
    (left,) = staging.iterdir()
    assert (left / "rank-0.safetensors").stat().st_size > 0
    # Meanwhile a second builder waits, says for whom, and goes on when that one dies.
    seen: list[Progress] = []
    done: list[Path] = []
    second = threading.Thread(target=lambda: done.append(build(request_of(source, tmp_path), seen.append)))
    second.start()
    deadline = time.monotonic() + 10
    while not any("waiting" in m.detail for m in seen) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert any(f"waiting for process {child.pid} on" in m.detail for m in seen)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert child.stdout is not None
    child.stdout.close()
    second.join(20)
    assert done == [EngineStore(tmp_path).find(key_of(request_of(source, tmp_path)))]
    verify_engine(done[0], "full")
    assert list(staging.iterdir()) == []


def test_two_builders_build_once(source: Path, tmp_path: Path) -> None:
    calls: list[int] = []
    plugins = Plugins(lambda: (calls.append(1), time.sleep(0.01)))
    done: list[Path] = []
    threads = [
        threading.Thread(target=lambda: done.append(build(request_of(source, tmp_path), load_plugin=plugins)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    linears = [s for s in llama.weight_specs(read_model_config(source)) if s.kind == "linear"]
    assert len(done) == 2 and done[0] == done[1] and len(calls) == len(linears)


def test_damaged_engine_is_named_and_built_anew(source: Path, tmp_path: Path) -> None:
    request = request_of(source, tmp_path)
    engine = build(request)
    before = read_manifest(engine)
    store = EngineStore(tmp_path)
    time.sleep(0.05)
    store.verify(before.key)
    os.truncate(engine / "rank-0.safetensors", (engine / "rank-0.safetensors").stat().st_size - 1)
    with pytest.raises(DamagedFileError, match=r"rank-0\.safetensors is damaged"):
        store.verify(before.key)
    assert build(request) == engine
    assert store.verify(before.key, "full").manifest.files == before.files, "the same bytes as before"


# ---------------------------------------------------------------- the child process


def _run_main(address: str, request: str) -> int:
    return subprocess.run(
        [sys.executable, "-m", "appliance.builder", "--ipc", address, "--request", request],
        cwd=Path(__file__).parent.parent,
        timeout=60,
    ).returncode


async def _messages(end: ServerEnd) -> list[Any]:
    messages: list[Any] = []
    while not messages or not isinstance(messages[-1], Built | Failed):
        messages.append(await end.receive())
    return messages


async def test_child_process_reports_progress_and_result(source: Path, tmp_path: Path) -> None:
    end = ServerEnd(tmp_path / "s")
    request = request_of(source, tmp_path)
    code: list[int] = []
    file = tmp_path / "request.json"
    file.write_bytes(msgspec.json.encode(request))
    runner = threading.Thread(target=lambda: code.append(_run_main(end.address, str(file))))
    runner.start()
    *progress, last = await _messages(end)
    runner.join(30)
    end.close()
    assert isinstance(last, Built) and code == [0]
    assert Path(last.engine_dir) == EngineStore(tmp_path).find(last.engine_key) and last.seconds > 0
    assert all(isinstance(m, Progress) and m.phase in ("verify", "build") for m in progress)
    assert [m.percent for m in progress][-1] == 100.0


async def test_child_process_reports_failure_with_its_exit_code(tmp_path: Path) -> None:
    end = ServerEnd(tmp_path / "s")
    request = msgspec.json.encode(request_of(tmp_path / "nothing", tmp_path)).decode()
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--ipc", end.address, "--request", request]) == 4
    signal.signal(signal.SIGTERM, before)
    failed = (await _messages(end))[-1]
    end.close()
    assert (failed.error, failed.hint) == ("CheckpointError", "is it the directory of a Hugging Face checkpoint?")


def _fail(request: BuildRequest, send: Any) -> Path:
    raise ZeroDivisionError("surprise")


async def test_errors_of_our_own_bugs_and_of_subclasses_have_names_that_the_server_knows(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def damaged(request: BuildRequest, send: Any) -> Path:
        raise DamagedFileError(tmp_path, "rank-0.safetensors", "x")

    request = msgspec.json.encode(request_of(tmp_path, tmp_path)).decode()
    before = signal.getsignal(signal.SIGTERM)
    for run, name, exit_code in ((_fail, "EngineBuildError", 7), (damaged, "EngineDamagedError", 7)):
        end = ServerEnd(tmp_path / "s")
        assert main(["--ipc", end.address, "--request", request], run) == exit_code
        assert (await _messages(end))[-1].error == name
        end.close()
    signal.signal(signal.SIGTERM, before)
    assert "ZeroDivisionError: surprise" in capfd.readouterr().err, "our own bugs leave a trace"


@pytest.mark.parametrize("how", ["sigterm", "shutdown"])
async def test_stopped_child_cleans_up(source: Path, tmp_path: Path, how: str) -> None:
    end = ServerEnd(tmp_path / "s")
    root = str(Path(__file__).parent.parent)
    real = (
        "from tests.test_builder import Plugins, build\n"
        "def run(request, send):\n"
        "    return build(request, send, load_plugin=Plugins(lambda: time.sleep(0.5)))\n"
    )
    without_torch = (
        "from pathlib import Path; from appliance.engines import EngineStore; from appliance.ipc import Progress\n"
        "def run(request, send):\n"
        "    store = EngineStore(Path(request.cache))\n"
        "    with store.build_lock('0'), store.staging('0') as directory:\n"
        "        (directory / 'rank-0.safetensors').touch()\n"
        "        while True: send(Progress(phase='build')); time.sleep(0.05)\n"
    )
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[3])\n"
        "from appliance.builder.process import main\n"
        + (real if how == "sigterm" else without_torch)
        + "sys.exit(main(['--ipc', sys.argv[1], '--request', sys.argv[2]], run))\n"
    )
    request = msgspec.json.encode(request_of(source, tmp_path)).decode()
    child = subprocess.Popen([sys.executable, "-c", code, end.address, request, root], cwd=root)
    staging = tmp_path / "engines" / ".staging"
    deadline = time.monotonic() + 20
    while not list(staging.glob("*/rank-0.safetensors")) and time.monotonic() < deadline:
        await end.receive()
    if how == "sigterm":
        child.terminate()
    else:
        await end.send(Shutdown())
    assert child.wait(10) == 128 + signal.SIGTERM
    end.close()
    assert list(staging.iterdir()) == []


# ---------------------------------------------------------------- loading


def _model(source: Path, dtype: torch.dtype, scheme: Any) -> nn.Module:
    with torch.device("meta"):
        return llama.Model(read_model_config(source), scheme, dtype)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("bf16", "float32"), ("fp8", "float32")])
def test_loading_equals_the_library(
    source: Path, tmp_path: Path, precision: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from appliance.runtime import weights

    monkeypatch.setattr(weights, "PIECE", 1000)  # so that tensors are made of many pieces
    rank_file = build(request_of(source, tmp_path, precision=precision)) / "rank-0.safetensors"
    scheme = (fp8 if precision == "fp8" else unquantized).Scheme()
    ours, theirs = (_model(source, getattr(torch, dtype), scheme) for _ in range(2))
    seen: list[tuple[int, int]] = []
    nbytes = load_weights(ours, rank_file, "cpu", progress=lambda done, total: seen.append((done, total)))
    load_weights_reference(theirs, rank_file, "cpu")
    expected = dict(theirs.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == expected[name].dtype and not parameter.requires_grad
        assert torch.equal(parameter.data.view(-1).view(torch.uint8), expected[name].data.view(-1).view(torch.uint8))
    assert seen[-1] == (nbytes, nbytes) and nbytes == sum(t.nbytes for t in load_file(rank_file).values())


def test_loading_refuses_another_models_file(source: Path, tmp_path: Path) -> None:
    rank_file = build(request_of(source, tmp_path)) / "rank-0.safetensors"
    with pytest.raises(EngineDamagedError, match=r"lacks layers\.0\.attention\.o\.weight_scale"):
        load_weights(_model(source, torch.bfloat16, fp8.Scheme()), rank_file, "cpu")
    smaller = msgspec.structs.replace(read_model_config(source), vocab_size=90)
    with torch.device("meta"):
        model = llama.Model(smaller, unquantized.Scheme(), torch.bfloat16)
    with pytest.raises(EngineDamagedError, match=r"bfloat16\[96, 64\], the model wants bfloat16\[90, 64\]"):
        load_weights(model, rank_file, "cpu")
    os.truncate(rank_file, 5000)
    with pytest.raises(EngineDamagedError, match="truncated"):
        load_weights(model, rank_file, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_gpu_conversion_and_loading_equal_the_cpus(source: Path, tmp_path: Path, precision: str) -> None:
    capability = torch.cuda.get_device_capability()
    changes = {"precision": precision, "backend": "cuda", "compute_capability": capability, "tactics": False}
    engines = [build(request_of(source, tmp_path / device, device=device, **changes)) for device in ("cpu", "cuda")]
    stored = [load_file(engine / "rank-0.safetensors") for engine in engines]
    for name, tensor in stored[0].items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), stored[1][name].view(-1).view(torch.uint8)), name
    scheme = (fp8 if precision == "fp8" else unquantized).Scheme()
    model = _model(source, torch.bfloat16, scheme)
    load_weights(model, engines[1] / "rank-0.safetensors", "cuda")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.cpu().view(-1).view(torch.uint8), stored[0][name].view(-1).view(torch.uint8))
