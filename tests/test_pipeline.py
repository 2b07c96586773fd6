"""Engines of several pipeline stages, as processes: they are built, give the tokens of one rank, and are lost together,
with the reason named."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from calibrated_models import SHAPE, make_source, request_of
from safetensors.torch import load_file
from test_ranks import BUILDS, Engine, _comparable, lose, no_group, one_rank
from transformers import LlamaConfig

from appliance import registry
from appliance.builder.build import build
from appliance.builder.shards import StoredEngine, stage_of
from appliance.engines import read_manifest
from appliance.errors import EngineBuildError, EngineCrashedError

__all__ = ["no_group"]

CONFIG = LlamaConfig(
    **SHAPE | {"vocab_size": 289, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 5},
    attention_bias=True,
    mlp_bias=True,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "m", CONFIG)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


# ---------------------------------------------------------------- builds


@pytest.mark.parametrize("name", BUILDS)
def test_stages_hold_the_numbers_that_one_rank_would(name: str, source: Path, cache: Path) -> None:
    precision = name.split()[0]
    one = load_file(build(request_of(source, cache, precision=precision, **BUILDS[name])) / "rank-0.safetensors")
    for tp, pp in ((1, 2), (2, 2), (1, 4)):
        engine = build(request_of(source, cache, precision=precision, tp_size=tp, pp_size=pp, **BUILDS[name]))
        manifest = read_manifest(engine)
        files = [engine / file for file in manifest.rank_files]
        assert (manifest.tp_size, manifest.pp_size, len(files)) == (tp, pp, tp * pp)
        for rank, file in enumerate(files):
            stages = {stage_of(tensor, manifest.model, pp) for tensor in load_file(file)}
            assert stages == {rank // tp}
        scheme = registry.load("quantization", manifest.scheme).Scheme(manifest.key_inputs.scheme_parameters)
        specs = registry.load("models", "llama").weight_specs(manifest.model)
        with StoredEngine(files, specs, scheme, getattr(torch, manifest.dtype)) as stored:
            assert set(stored.names) == set(one)
            for tensor_name, expected in one.items():
                got = stored.read(tensor_name)
                assert got.dtype == expected.dtype and got.shape == expected.shape
                same = torch.equal(_comparable(got), _comparable(expected))
                # Calibration runs anew for each build, and its sums are not always in the same order.
                assert same or name == "int4 in order", tensor_name


def test_more_stages_than_layers_are_refused(source: Path, cache: Path) -> None:
    with pytest.raises(EngineBuildError, match="pp_size=6 cannot be built: every stage needs one of 5 layers"):
        build(request_of(source, cache, precision="bf16", pp_size=6))


# ---------------------------------------------------------------- engines


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 2), (1, 4)])
def test_stages_give_the_tokens_of_one_rank(tp: int, pp: int, source: Path, cache: Path, no_group: None) -> None:
    engine = Engine(build(request_of(source, cache, precision="fp32", tp_size=tp, pp_size=pp)), tp * pp, pp_size=pp)
    assert engine.generate(20) == one_rank(source, cache)
    engine.leader.close()


def test_a_rank_of_the_last_stage_is_killed_and_named(source: Path, cache: Path, no_group: None) -> None:
    engine = Engine(build(request_of(source, cache, precision="fp32", tp_size=2, pp_size=2)), 4, pp_size=2)
    expected = engine.generate(4)
    assert expected == engine.generate(4), "a prefix that is cached is the same"
    error, seconds = lose(engine, lambda: os.kill(engine.leader.pids[2], signal.SIGKILL))
    assert isinstance(error, EngineCrashedError) and "rank 3 was killed by SIGKILL" in error.message
    assert seconds < 5
    engine.leader.close()
