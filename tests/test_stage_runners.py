"""Pipeline stages in one process, behind one batching core: what a request can ask for gives what one stage gives, also
where steps are padded as CUDA graphs pad them."""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import engine_tensors, make_checkpoint
from runtime_helpers import make_core, run_all
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

from appliance import registry
from appliance.batching.core import EngineCore
from appliance.batching.step import StepPlan, StepResult
from appliance.builder.shards import stage_of
from appliance.checkpoint import read_model_config
from appliance.distributed import PipelineStage, TensorParallel
from appliance.kernels.attention import Attention
from appliance.runtime.executor import LocalExecutor
from appliance.runtime.input_batch import StepInputs
from appliance.runtime.loading import LoadedModel, PhaseTimer
from appliance.runtime.model_runner import ModelRunner
from appliance.runtime.results import PendingStep
from appliance.types import EngineOptions, EngineOutput, EngineRequest, SamplingParams

OPTIONS: dict[str, Any] = {"num_pages": 40, "page_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 32}


class Line:
    """Hidden states between two stages of this process; sees to it that what was sent is not written over."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, Tensor]] = deque()

    def send(self, x: Tensor) -> None:
        self._waiting.append((x, x.clone()))

    def receive(self, into: Tensor) -> None:
        sent, copy = self._waiting.popleft()
        assert torch.equal(sent, copy), "hidden states were written over before they were received"
        into.copy_(sent)


class Ends:
    """A stage's two neighbours, and what all stages agree on."""

    def __init__(self, before: Line | None, behind: Line | None) -> None:
        self._before, self._behind = before, behind

    def send(self, x: Tensor) -> None:
        assert self._behind is not None
        self._behind.send(x)

    def receive(self, into: Tensor) -> None:
        assert self._before is not None
        self._before.receive(into)

    def progress(self) -> None:
        pass

    def minimum(self, value: int) -> int:
        return value


class Stages:
    """The executor: every stage runs each plan; the last one's result counts. Steps are collected late."""

    def __init__(self, runners: list[ModelRunner], first: LocalExecutor) -> None:
        self._runners = runners
        self._steps: deque[PendingStep] = deque()
        self.num_pages, self.page_size, self.max_model_len = first.num_pages, first.page_size, first.max_model_len
        self.max_num_seqs, self.max_num_batched_tokens = first.max_num_seqs, first.max_num_batched_tokens
        self.step_sizes, self.num_stages = first.step_sizes, first.num_stages
        self.most_in_flight = 0

    def submit(self, plan: StepPlan) -> None:
        self._steps.append([runner.execute(plan) for runner in self._runners][-1])
        self.most_in_flight = max(self.most_in_flight, len(self._steps))

    def collect(self) -> StepResult:
        return self._steps.popleft().result()


class PaddedSteps:
    """Stands where CUDA graphs of both kinds do: pads, and leaves its result where the next one goes."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._inputs: StepInputs | None = None
        self._outputs: dict[int, Tensor] = {}
        self.runs = 0
        upload = runner._batch.step_inputs

        def remember(*args: Any) -> StepInputs:
            self._inputs = upload(*args)
            return self._inputs

        runner._batch.step_inputs = remember  # type: ignore[assignment]

    def bucket(self, count: int) -> int | None:
        return count + 2 if count + 2 <= 32 else None

    def replay(self, size: int) -> Tensor:
        assert self._inputs is not None
        return self._keep(self._runner._logits(self._inputs))  # type: ignore[arg-type]

    def run(self, size: int, inputs: StepInputs, attention: Attention) -> Tensor:
        return self._keep(self._runner._forward(inputs, attention))

    def _keep(self, out: Tensor) -> Tensor:
        self.runs += 1
        kept = self._outputs.setdefault(out.shape[1], torch.empty(64, out.shape[1]))
        kept[: len(out)] = out
        return kept[: len(out)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(
        path,
        LlamaConfig(
            vocab_size=101,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        ),
    )
    return path


def stages_of(checkpoint: Path, count: int, **options: Any) -> tuple[Stages, list[ModelRunner]]:
    config = read_model_config(checkpoint)
    plugin, scheme = registry.load("models", "llama"), registry.load("quantization", "none").Scheme()
    weights = load_file(checkpoint / "model.safetensors")
    lines = [Line() for _ in range(count - 1)]
    settings = EngineOptions(engine_dir="", backend="cpu", **{"max_model_len": 128, **OPTIONS, **options})
    executors: list[LocalExecutor] = []
    for index in range(count):
        ends = Ends(lines[index - 1] if index else None, lines[index] if index < count - 1 else None)
        with torch.device("meta"):
            model = plugin.Model(
                config,
                scheme,
                torch.float32,
                TensorParallel(),
                PipelineStage(index, count, ends, ends),  # type: ignore[arg-type]
            )
        specs = [spec for spec in plugin.weight_specs(config) if stage_of(spec.name, config, count) == index]
        model.load(engine_tensors(specs, weights, scheme, torch.float32), "cpu")
        loaded = LoadedModel(model, config, "test")
        executors.append(registry.load("backends", "cpu").assemble(loaded, settings, lambda *_: None, PhaseTimer())[0])
    runners = [executor._runner for executor in executors]
    return Stages(runners, executors[0]), runners


def requests() -> list[EngineRequest]:
    """Of every kind, more than fit at once."""
    rng = random.Random(3)
    shared = [rng.randrange(101) for _ in range(21)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "seed": 4, "frequency_penalty": 0.6, "presence_penalty": 0.3},
        {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2},
        {"temperature": 1.0, "seed": 9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
        {"temperature": 0.0, "min_tokens": 6, "logit_bias": {5: 3.0}},
        {"temperature": 0.7, "seed": 1, "min_p": 0.05, "logprobs": 1},
    ]
    made = []
    for i in range(14):
        prompt = (shared if i % 3 else [])[: rng.randrange(22)] + [
            rng.randrange(101) for _ in range(rng.randrange(1, 30))
        ]
        params = SamplingParams(max_tokens=rng.randrange(1, 30), ignore_eos=True, **kinds[i % len(kinds)])
        made.append(EngineRequest(f"r{i}", prompt, params))
    return made


def flat(outputs: dict[str, list[EngineOutput]]) -> tuple[dict[str, Any], list[float]]:
    """Tokens, reasons and ranks; and all log probabilities."""
    values: list[float] = []

    def take(entries: Any) -> list[Any]:
        values.extend(entry.logprob for entry in entries or [] if entry)
        return [entry and (entry.token_id, entry.rank, [token for token, _ in entry.top]) for entry in entries or []]

    found = {
        name: (
            [token for output in given for token in output.token_ids],
            given[-1].finish_reason,
            [entry for output in given for entry in take(output.logprobs)],
            [entry for output in given for entry in take(output.prompt_logprobs)],
        )
        for name, given in outputs.items()
    }
    return found, values


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_stages_serve_every_kind_of_request_as_one_does(count: int, padded: bool, checkpoint: Path) -> None:
    alone = make_core(checkpoint, **OPTIONS)
    expected, values = flat(run_all(alone, requests()))
    assert alone.stats().num_preemptions > 0 and alone.stats().prefix_cache_hits > 0
    executor, runners = stages_of(checkpoint, count)
    stands = [PaddedSteps(runner) for runner in runners if padded]
    for runner, stand in zip(runners, stands):
        runner._graphs = runner._pieces = stand  # type: ignore[assignment]
    core = EngineCore(executor)
    got, got_values = flat(run_all(core, requests()))
    assert got == expected and got_values == pytest.approx(values, abs=1e-4)
    assert executor.most_in_flight == count
    assert core.stats().num_preemptions > 0 and core.stats().prefix_cache_hits > 0
    assert all(stand.runs > 20 for stand in stands)


def test_every_stage_measures_the_scales_of_its_fp8_cache(checkpoint: Path) -> None:
    options = {**OPTIONS, "kv_cache_dtype": "fp8"}
    expected, _ = flat(run_all(make_core(checkpoint, **options), requests()))
    executor, runners = stages_of(checkpoint, 2, **options)
    got, _ = flat(run_all(EngineCore(executor), requests()))
    assert {name: tokens for name, (tokens, *_) in got.items()} == {name: t for name, (t, *_) in expected.items()}
    whole = make_core(checkpoint, **options)._executor._runner._model.layers  # type: ignore[attr-defined]
    for runner in runners:
        for index in runner._model.own_layers:  # type: ignore[attr-defined]
            layer = runner._model.layers[index]  # type: ignore[attr-defined]
            assert layer.attention.kv_scales == whole[index].attention.kv_scales


def test_a_stage_has_pages_for_its_own_layers_only(checkpoint: Path) -> None:
    _, runners = stages_of(checkpoint, 2)
    pages = [[len(cache) for cache in runner._kv_caches] for runner in runners]
    own = [list(runner._model.own_layers) for runner in runners]  # type: ignore[attr-defined]
    assert sorted(layer for mine in own for layer in mine) == [0, 1, 2, 3] and own[0][0] == 0
    assert pages == [[40 if layer in mine else 0 for layer in range(4)] for mine in own]


def test_layers_are_shared_by_what_a_step_reads() -> None:
    from appliance.types import ModelConfig

    def layers(stages: int, vocab_size: int) -> list[int]:
        config = ModelConfig("x", vocab_size, 4096, 14336, 32, 32, 8, 128, 8192)
        ranges = [config.layers_of_stage(stage, stages) for stage in range(stages)]
        assert [layer for some in ranges for layer in some] == list(range(32))
        return [len(some) for some in ranges]

    assert layers(1, 128256) == [32]
    assert layers(2, 1000) == [16, 16]
    assert layers(2, 128256) == [17, 15], "Llama 3 8B: the head has the weights of 2.4 layers"
    assert layers(4, 128256) == [8, 9, 9, 6]
    assert layers(32, 128256) == [1] * 32
