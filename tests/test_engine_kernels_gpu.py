"""On a GPU: an engine that was built carries its kernels and tactics, and starts where nothing can be compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from model_helpers import make_checkpoint
from runtime_helpers import greedy, make_core, run_all, tokens_of

from appliance.builder import BuildRequest
from appliance.engines import read_manifest, verify_engine

pytestmark = pytest.mark.gpu

# Loads an engine as a start does, takes every kind of step, and says where kernels came from.
_START = """
import json, sys
from appliance import registry
from appliance.batching.core import EngineCore
from appliance.builder.warmup import run_steps
from appliance.kernels.compiled import KERNELS
from appliance.kernels.tactics import TABLE
from appliance.runtime.loading import PhaseTimer
from appliance.types import EngineOptions

options = EngineOptions(engine_dir=sys.argv[1], backend="cuda", max_num_seqs=32, max_num_batched_tokens=512)
backend, timer = registry.load("backends", "cuda"), PhaseTimer()
loaded = backend.load(options, lambda *args: None, timer)
executor, info = backend.assemble(loaded, options, lambda *args: None, timer)
while executor.prepare_more():
    pass
core = EngineCore(executor)
run_steps(core, loaded.config)
core.check_integrity()
print(json.dumps({"compiled": KERNELS.compiled, "cache": KERNELS.from_cache, "engine": KERNELS.from_engine,
                  "unknown": sorted(TABLE.unknown), "attention": info.attention, "seconds": info.startup_seconds}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    make_checkpoint(path, LlamaConfig(vocab_size=512, num_key_value_heads=2, max_position_embeddings=1024, **sizes))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    return path


@pytest.fixture(scope="module", params=["bf16", "fp8", "int8", "int4"])
def engine(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a process of its own, as by a server."""
    import msgspec
    import torch

    capability = torch.cuda.get_device_capability()
    if request.param == "fp8" and capability < (8, 9):
        pytest.skip("no FP8 products on this GPU")
    cache = tmp_path_factory.mktemp("cache")
    wanted = BuildRequest(
        checkpoint=str(checkpoint),
        cache=str(cache),
        precision=request.param,
        backend="cuda",
        compute_capability=capability,
        max_num_seqs=32,
        max_num_batched_tokens=512,
        calibration_data="none",
    )
    command = [sys.executable, "-m", "appliance.builder", "--request", msgspec.json.encode(wanted).decode()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    (built,) = [path for path in (cache / "engines").iterdir() if not path.name.startswith(".")]
    return built


def test_an_engine_carries_kernels_and_tactics(engine: Path) -> None:
    import torch

    manifest = read_manifest(engine)
    verify_engine(engine, "full")
    assert manifest.build.gpu == torch.cuda.get_device_name(), manifest.build.notes
    assert "triton" in manifest.kernels
    names = {file.name for file in manifest.files}
    assert any(name.startswith("kernels/triton/") and name.endswith(".cubin") for name in names)
    products = {(choice.product, choice.rows) for choice in manifest.tactics}
    assert {("qkv", 1), ("down", 64), ("lm_head", 256), ("gate_up", 4096)} <= products
    assert all(0 < choice.microseconds < 1e5 for choice in manifest.tactics)
    (timings,) = (engine.parent.parent / "timings").iterdir()
    assert json.loads(timings.read_bytes())["gpu"] == manifest.build.gpu


def test_a_start_compiles_nothing(engine: Path, tmp_path: Path) -> None:
    """Caches empty, no compiler on the path: all kernels are those of the engine."""
    (tmp_path / "bin").mkdir()
    hidden = ("CUDA_HOME", "CUDA_PATH", "CUDACXX", "NVCC", "FLASHINFER_NVCC", "CXX")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {
        "PATH": str(tmp_path / "bin"),
        "CC": "/nonexistent/cc",
        "TRITON_CACHE_DIR": str(tmp_path / "kernels" / "triton"),
        "FLASHINFER_WORKSPACE_BASE": str(tmp_path / "kernels"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    before = read_manifest(engine)
    command = [sys.executable, "-c", _START, str(engine)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    names = sorted(path.name for path in (tmp_path / "kernels").rglob("*.cubin"))
    print(said, names)
    assert (said["compiled"], said["cache"]) == (0, 0) and said["engine"] > 0 and not said["unknown"]
    assert not list((tmp_path / "kernels").rglob("*.so")) and not list((tmp_path / "kernels").rglob("*.cubin"))
    assert said["attention"] == "flashinfer" if "flashinfer" in before.kernels else said["attention"] == "triton"
    verify_engine(engine, "full")


def test_sizes_captured_between_steps_change_no_token(checkpoint: Path) -> None:
    """Captures between the steps of running requests read and write what belongs to nobody: in float32, tokens are
    those of the CPU, also of a prompt whose K/V another request left in page 0."""
    import torch

    prompts = [[(7 * i + j * j) % 512 for j in range(length)] for i, length in enumerate((40, 17, 64, 5, 33, 40))]
    requests = [greedy(f"r{i}", prompt, 24) for i, prompt in enumerate(prompts)]
    again = [greedy(f"again{i}", prompt, 24) for i, prompt in enumerate(prompts)]
    options: dict[str, Any] = {
        "num_pages": 128,
        "page_size": 16,
        "max_num_seqs": 48,
        "max_num_batched_tokens": 128,
        "max_model_len": 512,
    }
    expected = run_all(make_core(checkpoint, **options), requests)
    core = make_core(checkpoint, backend="cuda", dtype=torch.float32, attention="triton", **options)
    executor: Any = core._executor
    captured = 0
    step = core.step

    def step_and_capture() -> Any:
        nonlocal captured
        captured += executor.prepare_more()
        return step()

    core.step = step_and_capture  # type: ignore[method-assign]
    got = run_all(core, requests)
    repeated = run_all(core, again)
    assert captured > 5 and not executor.prepare_more()
    for i in range(len(prompts)):
        assert tokens_of(got[f"r{i}"]) == tokens_of(expected[f"r{i}"]), i
        assert tokens_of(repeated[f"again{i}"]) == tokens_of(expected[f"r{i}"]), i
    core.check_integrity()


def test_timed_products_are_the_same_products(checkpoint: Path) -> None:
    """Whatever is chosen: rounding apart, layers compute what they computed before."""
    import torch
    from model_helpers import load_model

    from appliance.builder.tactics import Tuner, describe
    from appliance.builder.timings import Timings
    from appliance.kernels.deferred_scale import as_float
    from appliance.kernels.tactics import TABLE
    from appliance.layers.linear import Linear

    device = torch.device("cuda", torch.cuda.current_device())
    for name in ("none", "fp8", "int8_smoothquant", "int4_awq"):
        if name == "fp8" and torch.cuda.get_device_capability() < (8, 9):
            continue
        model = load_model(checkpoint, dtype=torch.bfloat16, device="cuda", scheme=name)
        model.prepare(64)
        layers = [module for module in model.modules() if isinstance(module, Linear)]
        inputs = {
            (rows, layer): torch.randn(rows, layer.in_features, device=device, dtype=torch.bfloat16)
            for rows in (1, 5, 64, 100)
            for layer in layers
        }
        TABLE.clear()
        try:
            with torch.inference_mode():
                before = {key: as_float(key[1](x)).clone() for key, x in inputs.items()}
                chosen = Tuner(torch.bfloat16, device, Timings(None, "")).tune(model)
                print(*(describe(choice) for choice in chosen), sep="\n")
                assert len({choice.product for choice in chosen}) == 5
                for key, x in inputs.items():
                    after = as_float(key[1](x))
                    assert ((after - before[key]).norm() / before[key].norm()) < 2e-2, key
            assert not TABLE.unknown
        finally:
            TABLE.clear()


def test_graphs_of_many_sizes_take_the_memory_of_the_largest() -> None:
    import torch

    from appliance.runtime.cuda_graphs import DecodeGraphs

    sizes, vocab = (64, 48, 32, 16, 8), 1 << 16  # the largest result: 16 MiB
    weight = torch.randn(64, vocab, device="cuda")
    x = torch.randn(64, 64, device="cuda")
    graphs = DecodeGraphs(lambda size: x[:size] @ weight, lambda size: size)  # type: ignore[arg-type,return-value,index]
    graphs.capture(64)
    before = torch.cuda.memory_allocated()
    for size in sizes[1:]:
        graphs.capture(size)
    assert torch.cuda.memory_allocated() - before < 1 << 20, "nothing is held beside what the pool has"
    for size in (8, 64, 32):
        x.normal_()
        torch.testing.assert_close(graphs.replay(size), x[:size] @ weight, rtol=1e-4, atol=1e-3)
