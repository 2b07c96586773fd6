"""Host memory of a conversion: what the system counts, against what the build says beforehand; and several devices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from appliance.builder import job as job_module
from appliance.builder.build import build
from appliance.builder.memory import plan_memory
from appliance.builder.request import BuildRequest
from appliance.engines import read_manifest
from appliance.models import llama
from appliance.types import ModelConfig

CPU = torch.device("cpu")
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


def make_source(path: Path, **shape: int) -> Path:
    """A Llama whose weights took no time to make."""
    from appliance.checkpoint import read_model_config

    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA | shape))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    config: ModelConfig = read_model_config(path)
    few = torch.randn(1 << 12).to(torch.bfloat16) * 0.02
    tensors = {}
    for spec in llama.weight_specs(config):
        for name, size in zip(spec.sources, spec.shapes, strict=True):
            count = torch.Size(size).numel()
            tensors[name] = few.repeat(-(-count // len(few)))[:count].view(size).clone()
    save_file(tensors, path / "model.safetensors")
    return path


_CONVERT = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from appliance import registry
from appliance.builder import memory
from appliance.builder.convert import convert
from appliance.builder.job import Job
from appliance.builder.plain import PlainTensors
from appliance.builder.request import BuildRequest, key_inputs_of
from appliance.builder.shards import plan_tensors
from appliance.checkpoint import Checkpoint, SafetensorsWriter, read_model_config
from appliance.engines import ByteMeter

def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

source, most = Path(sys.argv[1]), int(sys.argv[2])
memory._MOST = most
said = []
plan = memory.plan_memory
from appliance.builder import convert as module
module.plan_memory = lambda *given: said.extend(plan(*given)) or said
request = BuildRequest(checkpoint=str(source), cache=str(source / "cache"), precision="fp8", backend="cpu")
with Checkpoint(source) as checkpoint:
    job = Job.start(request, key_inputs_of(request), read_model_config(source), checkpoint, registry.load)
    weights = PlainTensors(job)
    job.scheme.quantize(torch.zeros(16, 16))
    with SafetensorsWriter(source / "out", plan_tensors(job.specs, job.scheme, job.dtype)) as writer:
        before = kib("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")  # the highest so far is forgotten
        with ByteMeter(1, None) as meter:
            convert(weights, [writer], meter)
        peak = kib("VmHWM") - before
        size, _ = writer.finish()
print(json.dumps({"said": said[0].host_bytes, "peak": peak, "source": checkpoint.nbytes, "size": size}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_host_memory_stays_under_what_was_said(tmp_path: Path) -> None:
    shape = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20}
    source = make_source(tmp_path / "model", **shape)
    done = subprocess.run(
        [sys.executable, "-c", _CONVERT, str(source), str(64 << 20)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["source"] > 450 << 20 and found["size"] > 220 << 20
    assert 64 << 20 <= found["said"] < 160 << 20, "the largest tensor alone, and what quantizing it takes"
    assert 32 << 20 < found["peak"] < found["said"]


def test_a_gpus_part_does_not_depend_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 << 30, 80 << 30))
    gpus = [torch.device("cuda", index) for index in range(4)]
    monkeypatch.setattr("appliance.builder.memory.host", lambda: type("Host", (), {"cpu_cores": 64, "free_memory": 0}))
    small, large = plan_memory(gpus, 1 << 20), plan_memory(gpus, 12 << 30)
    assert [part.threads for part in small] == [8] * 4
    assert sum(part.host_bytes for part in small) == sum(part.host_bytes for part in large) == 4 * 640 << 20
    assert {part.limit for part in small} == {8 << 30} and {part.limit for part in large} == {12 << 30}
    monkeypatch.setattr("appliance.builder.memory.host", lambda: type("Host", (), {"cpu_cores": 4, "free_memory": 0}))
    assert [part.threads for part in plan_memory(gpus, 1)] == [2] * 4


@pytest.mark.parametrize("tp_size, pp_size", [(2, 1), (2, 2)])
def test_engines_of_several_ranks_are_the_same_however_many_devices_convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tp_size: int, pp_size: int
) -> None:
    shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    source = make_source(tmp_path / "model", **shape)
    files = []
    for count in (1, 3):
        monkeypatch.setattr(job_module, "_devices", lambda request, count=count: (CPU,) * count)
        engine = build(
            BuildRequest(
                checkpoint=str(source),
                cache=str(tmp_path / f"cache-{count}"),
                precision="fp8",
                backend="cpu",
                tp_size=tp_size,
                pp_size=pp_size,
            )
        )
        manifest = read_manifest(engine)
        assert manifest.build.device == ", ".join(["cpu"] * count)
        files.append([(engine / name).read_bytes() for name in manifest.rank_files])
    assert len(files[0]) == tp_size * pp_size and files[0] == files[1]
    assert len(set(files[0])) == len(files[0]), "every rank has a share of its own"
