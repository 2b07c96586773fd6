"""Engines of several pipeline stages, as processes: they are built, give the tokens of one rank, and are lost together,
with the reason named."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from calibrated_models import SHAPE, make_source, request_of
from safetensors.torch import load_file
from test_ranks import BUILDS, Engine, _comparable, lose, no_group, one_rank, pipes, pipes_to_ranks
from transformers import LlamaConfig

from appliance import registry
from appliance.batching.step import StepResult
from appliance.builder.build import build
from appliance.builder.shards import StoredEngine, stage_of
from appliance.engines import read_manifest
from appliance.errors import EngineBuildError, EngineCrashedError, HardwareError
from appliance.runtime.rank_watch import RankWatch
from appliance.runtime.step_results import ResultReader, ResultWriter
from appliance.runtime.step_ring import SharedSteps, Word
from appliance.types import TokenLogprobs

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
    for tp, pp in ((2, 2), (1, 4)):
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


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (1, 4)])
def test_stages_give_the_tokens_of_one_rank(tp: int, pp: int, source: Path, cache: Path, no_group: None) -> None:
    path = build(request_of(source, cache, precision="fp32", tp_size=tp, pp_size=pp))
    engine = Engine(path, tp * pp, pp_size=pp)
    assert engine.generate(20) == one_rank(source, cache)
    shared = engine.leader._shared
    for rank in range(tp * pp):  # whoever watches sees every layer begin, as a step may take long
        layers = read_manifest(path).model.layers_of_stage(rank // tp, pp)
        assert shared.get(rank, Word.CALLS) >= (shared.get(rank, Word.TAKEN) - 1) * (len(layers) + 1)
    opened = pipes_to_ranks(engine.leader)
    engine.leader.close()
    assert len(opened) == 2 * (tp * pp - 1) + 1 and not opened & pipes(), "this process may open other engines"
    engine.leader.close()


def test_stages_of_two_ranks_until_one_of_the_last_is_killed(source: Path, cache: Path, no_group: None) -> None:
    engine = Engine(build(request_of(source, cache, precision="fp32", tp_size=2, pp_size=2)), 4, pp_size=2)
    expected = one_rank(source, cache)
    assert engine.generate(20) == expected
    assert engine.generate(20) == expected, "also from cached prefixes"
    error, seconds = lose(engine, lambda: os.kill(engine.leader.pids[2], signal.SIGKILL))
    assert isinstance(error, EngineCrashedError) and "rank 3 was killed by SIGKILL" in error.message
    assert seconds < 5
    engine.leader.close()


@pytest.mark.parametrize(
    ("counters", "message"),
    [
        ({2: (7, 6, 40), 3: (7, 6, 40)}, "each of ranks 2, 3 cannot finish step 7"),
        ({0: (7, 6, 35), 2: (7, 6, 40), 3: (7, 6, 40)}, "rank 0 does not join the others"),
        ({1: (7, 6, 40), 2: (7, 6, 41), 3: (7, 6, 41)}, "rank 1 cannot finish step 7"),
        ({2: (7, 6, 41), 3: (7, 6, 41), 0: (7, 7, 50), 1: (7, 7, 50)}, "each of ranks 2, 3 cannot finish step 7"),
    ],
)
def test_the_first_stage_that_is_behind_holds_a_step_up(
    counters: dict[int, tuple[int, int, int]], message: str
) -> None:
    """(messages taken, finished, operations begun), of two stages of two ranks."""
    shared = SharedSteps.create(4)
    for rank in range(4):
        for word, value in zip((Word.TAKEN, Word.FINISHED, Word.CALLS), counters.get(rank, (7, 7, 40)), strict=True):
            shared.put(rank, word, value)
    found: list[str] = []
    ended = threading.Event()
    watch = RankWatch(
        [], shared, lambda error: (found.append(error.message), ended.set())[0], pp_size=2, stuck_seconds=0.5
    )
    watch.operation = 1
    watch.start()
    assert ended.wait(10)
    assert found[0].startswith(message)


# ---------------------------------------------------------------- results on their way


def test_results_of_any_length_arrive_in_order() -> None:
    reads, writes = os.pipe()
    top = tuple((i, -float(i)) for i in range(20))
    results = [
        StepResult(i, [5, -1] * i, [TokenLogprobs(7, -0.5, 1, top), None], [[TokenLogprobs(i, -1.0, 2)] * 1000, None])
        for i in (0, 1, 500, 2)
    ]
    writer, reader = ResultWriter(writes), ResultReader(reads)
    thread = threading.Thread(target=lambda: [writer.send(result) for result in results])
    thread.start()
    assert [reader.receive() for _ in results] == results
    thread.join()
    with pytest.raises(HardwareError, match="in vain"):
        reader.receive(lambda: _raise(HardwareError("in vain")))
    os.close(writes)
    with pytest.raises(EngineCrashedError, match="gives no results"):
        reader.receive()
    reader.close()


def _raise(error: Exception) -> None:
    raise error
