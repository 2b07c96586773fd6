"""Checkpoints: finding and downloading, config.json, what is wrong with damaged ones, digest, reading and writing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from appliance import checkpoint
from appliance.checkpoint import Checkpoint, SafetensorsWriter, TensorPlan, planned_file_size, read_model_config
from appliance.checkpoint.hub import HubRepository
from appliance.engines import Snapshot
from appliance.engines.digest import hash_file
from appliance.errors import CheckpointError, NoSpaceError
from appliance.types import RopeScaling, WeightSpec

torch.set_num_threads(1)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


def write_config(directory: Path, **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(LLAMA | changes))
    return directory


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama saved by transformers in several shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(**{k: v for k, v in LLAMA.items() if k not in ("architectures", "torch_dtype")})
    LlamaForCausalLM(config).save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    return path


@pytest.fixture
def copied(sharded: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for file in sharded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


# ---------------------------------------------------------------- config.json


def test_config_of_llama_with_defaults(tmp_path: Path) -> None:
    config = read_model_config(write_config(tmp_path, eos_token_id=2, bos_token_id=1))
    assert (config.architecture, config.head_dim, config.num_key_value_heads) == ("LlamaForCausalLM", 8, 2)
    assert (config.rope_theta, config.rope_scaling, config.sliding_window) == (10000.0, None, None)
    assert (config.dtype, config.eos_token_ids, config.bos_token_id) == ("bfloat16", (2,), 1)
    assert not (config.attention_bias or config.output_bias or config.mlp_bias or config.tie_word_embeddings)
    biased = read_model_config(write_config(tmp_path, attention_bias=True, num_key_value_heads=None, head_dim=16))
    assert biased.attention_bias and biased.output_bias
    assert (biased.num_key_value_heads, biased.head_dim) == (4, 16)


def test_config_equals_what_transformers_saves(sharded: Path) -> None:
    """The form of transformers 5: `rope_parameters`, `dtype`."""
    config = read_model_config(sharded)
    assert (config.hidden_size, config.dtype, config.rope_theta) == (32, "float32", 10000.0)


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0}
            | {"original_max_position_embeddings": 32},
            RopeScaling("llama3", 8.0, 2.0, 3.0, 32),
        ),
        ({"type": "linear", "factor": 4}, RopeScaling("linear", 4.0, original_max_position_embeddings=128)),
        ({"rope_type": "dynamic", "factor": 2.0}, RopeScaling("dynamic", 2.0, original_max_position_embeddings=128)),
        (
            {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "attention_factor": 1.5}
            | {"original_max_position_embeddings": 32},
            RopeScaling("yarn", 4.0, 1.0, 4.0, 32, 1.5, 16.0, 1.0),
        ),
        ({"rope_type": "default"}, None),
    ],
)
def test_rope_scaling_in_both_forms(
    tmp_path: Path, form: str, given: dict[str, Any], expected: RopeScaling | None
) -> None:
    if form == "rope_parameters":
        config = read_model_config(write_config(tmp_path, rope_parameters=given | {"rope_theta": 5e5}))
    else:
        config = read_model_config(write_config(tmp_path, rope_scaling=given, rope_theta=5e5))
    assert (config.rope_theta, config.rope_scaling) == (5e5, expected)


@pytest.mark.parametrize(
    ("changes", "window", "layers"),
    [
        ({"sliding_window": 16}, 16, None),
        ({"sliding_window": None}, None, None),
        ({"sliding_window": 16, "use_sliding_window": False, "max_window_layers": 2}, None, None),
        ({"sliding_window": 16, "max_window_layers": 2}, None, None),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}, 16, (2, 3)),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}, 16, None),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 4}, None, None),
        (
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 4}
            | {"layer_types": ["full_attention", "sliding_attention"] * 2},
            16,
            (1, 3),
        ),
        ({"sliding_window": 16, "layer_types": ["full_attention"] * 4}, None, None),
    ],
)
def test_sliding_window(
    tmp_path: Path, changes: dict[str, Any], window: int | None, layers: tuple[int, ...] | None
) -> None:
    config = read_model_config(write_config(tmp_path, **changes))
    assert (config.sliding_window, config.sliding_window_layers) == (window, layers)


def test_eos_ids_of_both_files_and_dtype_of_weights(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    save_file({"w": torch.zeros(2, dtype=torch.float16)}, tmp_path / "model.safetensors")
    config = read_model_config(write_config(tmp_path, eos_token_id=[6, 2], torch_dtype=None))
    assert (config.eos_token_ids, config.dtype, config.quantization) == ((5, 6, 2), "float16", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel is not supported; known: .*LlamaForCausalLM"),
        ({"architectures": None, "model_type": "x"}, r"none named \(model_type 'x'\)"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "own code"),
        ({"hidden_size": None}, "hidden_size is None, allowed: a positive whole number"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers is '4'"),
        ({"num_key_value_heads": 3}, "a divisor of num_attention_heads=4"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "'longrope', allowed: default, llama3, linear"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 0.7}}, "yarn with mscale"),
        ({"rope_scaling": {"type": "linear"}}, "factor of the rotary scaling is None"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ by layer"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types is 'linear_attention'"),
        ({"layer_types": ["full_attention"]}, "layer_types is '1 entries'"),
    ],
)
def test_config_errors_say_what_is_allowed(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_model_config(write_config(tmp_path, **changes))


def test_config_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        read_model_config(tmp_path)


# ---------------------------------------------------------------- damaged weights


def spec(name: str, *shape: int) -> WeightSpec:
    return WeightSpec(name="x", kind="plain", sources=(name,), shapes=(shape,))


def test_missing_shard_is_named(copied: Path) -> None:
    shard = sorted(copied.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        Checkpoint(copied)
    (copied / "model.safetensors.index.json").unlink()  # now only the names say how many there are
    with pytest.raises(CheckpointError, match=shard.name):
        Checkpoint(copied)


@pytest.mark.parametrize("keep", [-1, 100, 4])
def test_truncated_shard_is_named(copied: Path, keep: int) -> None:
    shard = sorted(copied.glob("model-*.safetensors"))[1]
    os.truncate(shard, keep if keep > 0 else shard.stat().st_size + keep)
    with pytest.raises(CheckpointError, match=rf"{shard.name} is truncated"):
        Checkpoint(copied)


def test_damaged_headers(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    def write(header: object, data: bytes = b"") -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    for header in (b"{broken", [], {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, {"w": 1}):
        write(header, bytes(4))
        with pytest.raises(CheckpointError, match="damaged safetensors header"):
            Checkpoint(tmp_path)
    write({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"1")
    with pytest.raises(CheckpointError, match="dtype F4, allowed: F64"):
        Checkpoint(tmp_path)
    write({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"12")
    with pytest.raises(CheckpointError, match="too long"):
        Checkpoint(tmp_path)


def test_wrong_shape_missing_tensor_and_dtype(sharded: Path, tmp_path: Path) -> None:
    opened = Checkpoint(sharded)
    opened.check([spec("model.embed_tokens.weight", 64, 32)])
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight in .* \[64, 32\], expected \[65, 32\]"):
        opened.check([spec("model.embed_tokens.weight", 65, 32)])
    with pytest.raises(CheckpointError, match=r"no tensor model\.nothing\.weight"):
        opened.check([spec("model.nothing.weight", 1)])
    biased = WeightSpec("x", "linear", ("lm_head.weight",), ((64, 32),), bias_sources=("model.norm.weight",))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .* \[32\], expected \[64\]"):
        opened.check([biased])
    save_file({"w": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="dtype int8, expected a floating-point one"):
        Checkpoint(tmp_path).check([spec("w", 2)])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", r"pickle files \(pytorch_model\.bin\).*convert to safetensors"),
        ("model.pt", "pickle"),
        ("model.Q4.gguf", "GGUF"),
        ("consolidated.safetensors", "not named as transformers names"),
        ("readme.txt", r"no \*\.safetensors files"),
    ],
)
def test_other_kinds_of_weights(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


# ---------------------------------------------------------------- digest


def test_digest_is_of_the_content(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for file in copied.iterdir():
        (elsewhere / file.name).write_bytes(file.read_bytes())
    (elsewhere / "README.md").write_text("no part of it")
    value = checkpoint.digest(copied).value
    assert checkpoint.digest(elsewhere).value == value
    for name in ("config.json", sorted(copied.glob("*.safetensors"))[0].name):
        data = bytearray((elsewhere / name).read_bytes())
        data[-1] ^= 1
        (elsewhere / name).write_bytes(data)
        assert checkpoint.digest(elsewhere).value != value
        data[-1] ^= 1
        (elsewhere / name).write_bytes(data)
    assert checkpoint.digest(elsewhere).value == value
    (elsewhere / "tokenizer.json").write_text("{}")
    assert checkpoint.digest(elsewhere).value != value


def test_second_digest_reads_nothing_until_a_file_changes(copied: Path, tmp_path: Path) -> None:
    time.sleep(0.05)
    cache = tmp_path / "cache"
    seen: list[Snapshot] = []
    first = checkpoint.digest(copied, cache=cache, progress=seen.append)
    assert first.remembered_bytes == 0 and seen[-1].bytes_done == first.hashed_bytes > 0
    second = checkpoint.digest(copied, cache=cache)
    assert (second.value, second.hashed_bytes, second.remembered_bytes) == (first.value, 0, first.hashed_bytes)
    assert checkpoint.digest(copied, cache=cache, full=True).hashed_bytes == first.hashed_bytes
    shard = sorted(copied.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes())
    time.sleep(0.05)
    third = checkpoint.digest(copied, cache=cache)
    assert (third.value, third.hashed_bytes) == (first.value, shard.stat().st_size)


# ---------------------------------------------------------------- reading and writing


def test_reader_equals_the_library(sharded: Path) -> None:
    with Checkpoint(sharded) as opened:
        expected = {k: v for file in opened.files for k, v in load_file(file).items()}
        assert opened.tensors.keys() == expected.keys()
        assert opened.nbytes == sum(t.nbytes for t in expected.values())
        for name, tensor in expected.items():
            assert torch.equal(opened.read(name), tensor)
        name = "model.layers.0.mlp.down_proj.weight"
        assert torch.equal(opened.read(name, 0, 3, 7), expected[name][3:7])
        assert torch.equal(opened.read(name, 1, 40), expected[name][:, 40:])
        view = opened.read(name)
        opened.release(name)
        assert torch.equal(view, expected[name])


TENSORS = {
    "a": torch.randn(3, 5),
    "odd": torch.randint(0, 255, (7,), dtype=torch.uint8),
    "b": torch.randn(4, 2).to(torch.bfloat16),
    "f8": torch.randn(2, 3).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(1.5),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
}


def plan_of(tensors: dict[str, torch.Tensor]) -> list[TensorPlan]:
    return [TensorPlan(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()]


def test_written_file_is_read_by_the_library_and_by_us(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with SafetensorsWriter(path, plan_of(TENSORS), {"made": "here"}) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
        size, digest = writer.finish()
    assert size == path.stat().st_size == planned_file_size(plan_of(TENSORS), {"made": "here"})
    assert digest == hash_file(path)
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 64 == 56, "data begins at a multiple of 64"
    read = load_file(path)
    opened = Checkpoint(path)
    for name, tensor in TENSORS.items():
        for got in (read[name], opened.read(name)):  # "b" lies at an odd offset
            assert got.dtype == tensor.dtype and got.shape == tensor.shape
            assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_writer_takes_tensors_in_any_order_from_any_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.engines.digest.CHUNK", 1000)  # tensors share chunks, and have several
    monkeypatch.setattr("appliance.checkpoint.writer._FLUSHED", 2000)
    tensors = {f"t{i}": torch.randn(i % 7 + 1, 33).to(torch.float16) for i in range(40)}
    with SafetensorsWriter(tmp_path / "x", plan_of(tensors)) as writer:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda name: writer.write(name, tensors[name]), sorted(tensors, reverse=True)))
        size, digest = writer.finish()
    assert size == (tmp_path / "x").stat().st_size > 5000
    assert digest == hash_file(tmp_path / "x")
    assert all(torch.equal(load_file(tmp_path / "x")[name], tensor) for name, tensor in tensors.items())


def test_writer_refuses_another_shape_a_second_time_or_an_early_end(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "x", plan_of({"a": TENSORS["a"], "b": TENSORS["b"]})) as writer:
        with pytest.raises(AssertionError, match="planned"):
            writer.write("a", TENSORS["a"].t())
        with pytest.raises(AssertionError, match="not planned"):
            writer.write("c", TENSORS["a"])
        writer.write("b", TENSORS["b"])
        with pytest.raises(AssertionError, match="written before"):
            writer.write("b", TENSORS["b"])
        with pytest.raises(AssertionError, match="1 planned tensors were not written"):
            writer.finish()


def test_a_disk_that_is_full_when_it_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fdatasync", full)
    writer = SafetensorsWriter(tmp_path / "x", plan_of(TENSORS))
    for name, tensor in TENSORS.items():
        writer.write(name, tensor)
    assert writer.finish()[0] > 0, "told when the file is closed"
    with pytest.raises(NoSpaceError, match="x could not be written"), writer:
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_while_writing(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "x", plan_of(TENSORS)) as writer:
        with Path("/dev/full").open("wb", buffering=0) as full:
            os.dup2(full.fileno(), writer._file.fileno())
        with pytest.raises(NoSpaceError, match="the rest of x"):
            writer.write("a", TENSORS["a"])


# ---------------------------------------------------------------- resolve


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that a download uses."""

    SHA = "a" * 40

    def __init__(self, state: dict[str, Any], *args: Any) -> None:
        self.state = state
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.state["requests"] = self.state.get("requests", 0) + 1
        error = self.state.get("error")
        path, files = self.path.partition("?")[0], self.state["files"]
        if error:
            self._send(b"{}", error[0], {"X-Error-Code": error[1], "X-Error-Message": error[1]})
        elif path == "/api/models/org/tiny/revision/main":
            self._send(json.dumps({"id": "org/tiny", "sha": self.SHA, "siblings": []}).encode())
        elif path == f"/api/models/org/tiny/tree/{self.SHA}":
            listed = [{"type": "file", "oid": f"{i:040d}", "size": len(d), "path": n} for i, (n, d) in enumerate(files)]
            self._send(json.dumps(listed).encode())
        elif path.startswith("/org/tiny/resolve/") and body and self.state.get("refuse") and ".safetensors" in path:
            self.state.setdefault("refused", []).append(path)
            self._send(b"{}", 403, {"X-Error-Message": "not for you"})
        elif path.startswith("/org/tiny/resolve/"):
            names = [name for name, _ in files]
            index = names.index(path.split("/", 5)[-1])
            self._file(names[index], files[index][1], index, body)
        else:
            self._send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def _file(self, name: str, data: bytes, index: int, body: bool) -> None:
        etag = hashlib.sha256(self.state.get("promised", data)).hexdigest() if "model-" in name else f"{index:040d}"
        head = {"ETag": f'"{etag}"', "X-Repo-Commit": self.SHA, "Accept-Ranges": "bytes"}
        asked, status = self.headers.get("Range"), 200
        if asked and body:
            begin = int(asked.removeprefix("bytes=").split("-")[0])
            head["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            data, status = data[begin:], 206
            self.state.setdefault("resumed_at", begin)
        cut = self.state.get("cut") if body and name.endswith(".safetensors") else None
        if cut is not None:
            self.state["cuts"] -= 1
            cut = cut if self.state["cuts"] >= 0 else 0
        self._send(data, status, head, body=body, cut=cut)

    def _send(
        self, data: bytes, status: int = 200, head: dict[str, str] | None = None, *, body: bool = True, cut: Any = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(head or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data if cut is None else data[:cut])
        self.close_connection = cut is not None

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, Any]]]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # read from the environment on import
    files = [(p.name, p.read_bytes()) for p in sorted(sharded.iterdir())]
    extra = [("pytorch_model.bin", b"x"), ("original/consolidated.safetensors", b"x"), ("README.md", b"x")]
    state: dict[str, Any] = {"files": files + extra}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, state))
    threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.02}).start()
    yield f"http://127.0.0.1:{server.server_port}", state
    server.shutdown()
    server.server_close()


def test_download_takes_what_is_needed_and_then_works_offline(
    hub: tuple[str, dict[str, Any]], sharded: Path, tmp_path: Path
) -> None:
    endpoint, state = hub
    seen: list[Snapshot] = []
    path = checkpoint.resolve("hf://org/tiny", tmp_path, endpoint=endpoint, progress=seen.append)
    assert {p.name for p in path.iterdir()} == {p.name for p in sharded.iterdir()}
    assert checkpoint.digest(path).value == checkpoint.digest(sharded).value
    assert seen[-1].bytes_done == seen[-1].bytes_total == sum(p.stat().st_size for p in sharded.iterdir())
    before = state["requests"]
    assert checkpoint.resolve("org/tiny@main", tmp_path, endpoint=endpoint, offline=True) == path
    assert state["requests"] == before


def test_offline_opens_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(CheckpointError, match=r"org/tiny \(revision main\) is not .* downloading is off"):
        checkpoint.resolve("org/tiny", tmp_path, offline=True)


def test_interrupted_download_is_not_complete_and_goes_on(
    hub: tuple[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, state = hub
    monkeypatch.setattr("appliance.checkpoint.hub.time.sleep", lambda seconds: None)
    state["cut"] = 1000
    state["cuts"] = 3  # then the server answers nothing more: as if the process were killed
    with pytest.raises(CheckpointError, match=r"downloading org/tiny failed.*start again and it goes on"):
        checkpoint.resolve("org/tiny", tmp_path, endpoint=endpoint, resumable_from=1000)
    parts = list(tmp_path.rglob("*.part"))
    assert parts and {p.stat().st_size for p in parts} <= {0, 1000, 2000, 3000}
    with pytest.raises(CheckpointError, match="downloading is off"):
        checkpoint.resolve("org/tiny", tmp_path, endpoint=endpoint, offline=True)
    del state["cut"], state["cuts"], state["resumed_at"]
    path = checkpoint.resolve("org/tiny", tmp_path, endpoint=endpoint, resumable_from=1000)
    Checkpoint(path)
    assert state["resumed_at"] >= 1000
    assert not list(tmp_path.rglob("*.part"))


def test_download_that_arrives_damaged_is_removed(hub: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    endpoint, state = hub
    state["promised"] = b"other content"
    with pytest.raises(CheckpointError, match=r"org/tiny/model-.* does not match its SHA-256"):
        checkpoint.resolve("org/tiny", tmp_path, endpoint=endpoint, resumable_from=1000)
    del state["promised"]
    Checkpoint(checkpoint.resolve("org/tiny", tmp_path, endpoint=endpoint, resumable_from=1000))


def test_refusal_of_a_file_is_not_tried_again(hub: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    endpoint, state = hub
    state["refuse"] = True
    with pytest.raises(CheckpointError, match=r"the hub refuses access to org/tiny \(status 403\)"):
        checkpoint.resolve("org/tiny", tmp_path, endpoint=endpoint, resumable_from=1000)
    assert len(set(state["refused"])) == len(state["refused"]) > 0


def test_a_disk_that_fills_up_during_a_download_is_said_at_once(
    hub: tuple[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, _ = hub
    tried: list[str] = []

    def full(self: HubRepository, url: str, *_: Any) -> None:
        tried.append(url)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HubRepository, "_append", full)
    with pytest.raises(NoSpaceError, match="the download of org/tiny could not be written: no space is left"):
        checkpoint.resolve("org/tiny", tmp_path, endpoint=endpoint, resumable_from=1)
    assert len(tried) == len(set(tried)), "no file was tried twice"


def test_without_a_network_what_is_there_serves(hub: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    path = checkpoint.resolve("org/tiny", tmp_path, endpoint=hub[0])
    assert checkpoint.resolve("org/tiny", tmp_path, endpoint="http://127.0.0.1:9") == path


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ((403, "GatedRepo"), r"org/tiny is gated.*set HF_TOKEN"),
        ((401, "RepoNotFound"), r"does not exist on the hub, or is private and no token"),
        ((404, "RepoNotFound"), "does not exist on the hub"),
        ((404, "RevisionNotFound"), "has no revision 'main'"),
    ],
)
def test_hub_errors_in_words(
    hub: tuple[str, dict[str, Any]], tmp_path: Path, error: tuple[int, str], message: str
) -> None:
    endpoint, state = hub
    state["error"] = error
    with pytest.raises(CheckpointError, match=message):
        checkpoint.resolve("org/tiny", tmp_path, endpoint=endpoint)


def test_no_network_no_space_and_no_such_model(hub: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="check the network"):
        checkpoint.resolve("org/tiny", tmp_path, endpoint="http://127.0.0.1:9")
    with pytest.raises(NoSpaceError, match="downloading org/tiny needs"):
        checkpoint.resolve("org/tiny", tmp_path, endpoint=hub[0], free=lambda path: 1 << 20)
    assert not list(tmp_path.rglob("*.safetensors")), "checked before writing"
    for wrong in ("nonsense", "./not/here", "/not/here", "a/b/c", "hf://x"):
        with pytest.raises(CheckpointError, match="neither a directory here nor a hub id"):
            checkpoint.resolve(wrong, tmp_path)
    assert checkpoint.resolve(str(tmp_path), tmp_path / "cache", offline=True) == tmp_path


def test_what_people_call_a_checkpoint(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--some-model" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    assert checkpoint.model_name_of(snapshot) == "org/some-model"
    assert checkpoint.model_name_of(tmp_path / "mine") == "mine"
    assert checkpoint.model_name_of(checkpoint.resolve("builtin", tmp_path)) == "appliance-builtin"
