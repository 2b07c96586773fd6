"""`prepare_engine`: the start-up sequence as one blocking call, for programs without a server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from appliance.engines import EngineStore
from appliance.errors import CheckpointError, ProfileError, SettingsError
from appliance.launch.prepare import prepare_engine


def test_builds_once_and_opens_what_it_built(tmp_path: Path) -> None:
    options = prepare_engine("builtin", precision="bf16", cache=tmp_path, overrides={"max_num_seqs": 3, "num_pages": 7})
    assert options.backend == "cpu" and (options.max_num_seqs, options.num_pages) == (3, 7)
    (stored,) = EngineStore(tmp_path).list_engines()
    assert Path(options.engine_dir) == stored.path

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
