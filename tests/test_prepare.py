"""`prepare_engine`: the start-up sequence as one blocking call, for programs without a server."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from appliance import builtin
from appliance.builder import BuildRequest
from appliance.checkpoint import digest
from appliance.engines import EngineStore
from appliance.engines.disk import not_writable
from appliance.errors import CacheNotWritableError, CheckpointError, EngineBuildError, ProfileError, SettingsError
from appliance.launch.prepare import prepare_engine
from appliance.launch.startup import Startup
from appliance.server.state import ServerState
from appliance.settings import load


def test_builds_once_and_opens_what_it_built(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = prepare_engine("builtin", precision="bf16", cache=tmp_path, overrides={"max_num_seqs": 3, "num_pages": 7})
    assert options.backend == "cpu" and (options.max_num_seqs, options.num_pages) == (3, 7)
    (stored,) = EngineStore(tmp_path).list_engines()
    assert Path(options.engine_dir) == stored.path
    assert "SERVING" not in caplog.text, "nothing is served"

    async def inside_a_loop() -> str:
        return prepare_engine("builtin", precision="bf16", cache=tmp_path).engine_dir

    assert asyncio.run(inside_a_loop()) == options.engine_dir
    (again,) = EngineStore(tmp_path).list_engines()
    assert again.manifest == stored.manifest, "found, and not built a second time"
    opened = prepare_engine(options.engine_dir, overrides={"max_model_len": 64})
    assert opened.engine_dir == options.engine_dir and opened.max_model_len == 64 and opened.backend == "cpu"


def test_wrong_options_are_errors_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no option 'num_page', did you mean 'num_pages'"):
        prepare_engine("builtin", cache=tmp_path, overrides={"num_page": 1})
    with pytest.raises(SettingsError, match="--precision: 'fp7' is not allowed"):
        prepare_engine("builtin", cache=tmp_path, precision="fp7")
    with pytest.raises(ProfileError):
        prepare_engine("builtin", cache=tmp_path, profile="int8")
    with pytest.raises(CheckpointError):
        prepare_engine("./nothing-here", cache=tmp_path)
    assert not (tmp_path / "engines").exists()


def test_what_cannot_work_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"'flashinfer' is not supported by the cpu backend.*allowed: auto, ref"):
        prepare_engine("builtin", backend="cpu", cache=tmp_path, overrides={"attention": "flashinfer"})
    assert not (tmp_path / "engines").exists() and not (tmp_path / "digests").exists()
    monkeypatch.setattr("appliance.hardware.detect", lambda *_: pytest.fail("the machine was looked at first"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheNotWritableError, match=r"cannot be written by user .*sudo chown"):
        prepare_engine("builtin", cache=tmp_path / "file" / "cache")


def test_a_read_only_cache_serves_the_engines_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    built = prepare_engine("builtin", precision="bf16", cache=tmp_path).engine_dir

    def refuse(path: Path) -> None:
        raise not_writable(path, PermissionError(13, "Permission denied"))

    monkeypatch.setattr("appliance.engines.disk.ensure_writable", refuse)
    monkeypatch.setattr("appliance.launch.obtain.ensure_writable", refuse)
    assert prepare_engine("builtin", precision="bf16", cache=tmp_path).engine_dir == built
    assert "only engines that are in the cache already can be served" in caplog.text
    monkeypatch.setattr("appliance.launch.obtain.run_builder", lambda *_: pytest.fail("a builder was started"))
    with pytest.raises(CacheNotWritableError):
        prepare_engine("builtin", precision="fp32", cache=tmp_path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the built-in checkpoint, to be damaged."""
    return Path(shutil.copytree(builtin.checkpoint_dir(), tmp_path / "model"))


def test_a_truncated_shard_is_named_before_anything_is_hashed_or_built(checkpoint: Path, tmp_path: Path) -> None:
    shard = checkpoint / "model.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        prepare_engine(str(checkpoint), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("**/*.json")) and not EngineStore(tmp_path / "cache").list_engines()


def test_a_checkpoint_without_tokenizer_is_refused_before_it_is_built(checkpoint: Path, tmp_path: Path) -> None:
    for file in (*checkpoint.glob("*token*"), *checkpoint.glob("chat_template*")):
        file.unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        prepare_engine(str(checkpoint), cache=tmp_path / "cache")
    assert not EngineStore(tmp_path / "cache").list_engines()


def test_a_tokenizer_that_cannot_be_read_is_named_before_anything_is_built(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"model/tokenizer\.json is not a readable tokenizer"):
        prepare_engine(str(checkpoint), cache=tmp_path / "cache")
    assert not EngineStore(tmp_path / "cache").list_engines()


def test_the_builder_does_not_hash_the_checkpoint_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[BuildRequest] = []

    async def build_nothing(request: BuildRequest, *_: object) -> None:
        asked.append(request)
        raise EngineBuildError("not today")

    monkeypatch.setattr("appliance.launch.obtain.run_builder", build_nothing)
    with pytest.raises(EngineBuildError, match="not today"):
        prepare_engine("builtin", cache=tmp_path)
    assert asked[0].checkpoint_digest == digest(builtin.checkpoint_dir()).value


def test_the_license_is_the_models_else_the_appliances(checkpoint: Path, tmp_path: Path) -> None:
    settings = load({"model": str(checkpoint), "cache": str(tmp_path / "cache")})

    def license_path() -> Path | None:
        state = ServerState(("m",))
        asyncio.run(Startup(settings, state, tmp_path)._find_checkpoint())
        return state.license_path

    for file in checkpoint.glob("LICENSE*"):
        file.unlink()
    own = license_path()
    assert own is not None and own.name == "LICENSE" and "Apache" in own.read_text()
    (checkpoint / "LICENSE.txt").write_text("the model's terms")
    assert license_path() == checkpoint / "LICENSE.txt"
