"""The batching core over the real CPU backend: same tokens as `transformers`, whatever else is in the batch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from model_helpers import make_checkpoint
from runtime_helpers import greedy, make_core, run_all, tokens_of

from appliance.types import EngineOutput, SamplingParams

VOCAB = 199


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return path, make_checkpoint(path, config)


def prompt_of(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(length)]


def reference_tokens(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by `transformers`, float32."""
    out = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]), do_sample=False, max_new_tokens=count, min_new_tokens=count, eos_token_id=None
    )
    return [int(token) for token in out[0, len(prompt) :]]


def test_tokens_equal_transformers(checkpoint: tuple[Path, torch.nn.Module]) -> None:
    path, model = checkpoint
    rng = random.Random(1)
    prompts = {f"r{i}": prompt_of(rng, length) for i, length in enumerate([1, 3, 17, 50, 90])}
    outputs = run_all(make_core(path), [greedy(name, prompt, 20) for name, prompt in prompts.items()])
    for name, prompt in prompts.items():
        assert tokens_of(outputs[name]) == reference_tokens(model, prompt, 20), name
        assert [o.finish_reason for o in outputs[name] if o.finish_reason] == ["length"]


def test_alone_and_among_sixty_four(checkpoint: tuple[Path, torch.nn.Module]) -> None:
    """A prompt gives the same tokens alone and among 64 mixed ones, with chunked prefill, prefix hits, preemption for
    want of pages and cancellations going on."""
    path, _ = checkpoint
    rng = random.Random(2)
    shared = prompt_of(rng, 24)
    prompts = {
        f"r{i}": (shared if i % 3 == 0 else []) + prompt_of(rng, rng.choice([1, 5, 13, 40, 70])) for i in range(64)
    }
    requests = {name: greedy(name, prompt, 8 + len(prompt) % 17) for name, prompt in prompts.items()}
    alone = {}
    for name, request in requests.items():
        if int(name[1:]) % 4 == 0:  # enough to compare, and quick
            alone[name] = tokens_of(run_all(make_core(path, prefix_caching=False), [request])[name])

    core = make_core(path, max_num_seqs=24, max_num_batched_tokens=48)
    outputs: dict[str, list[EngineOutput]] = {name: [] for name in requests}
    waiting = list(requests.values())
    steps = 0
    while waiting or core.has_work:
        for request in [waiting.pop() for _ in range(min(len(waiting), rng.randrange(4)))]:
            core.add_request(request)
        for output in core.step():
            outputs[output.request_id].append(output)
        steps += 1
        if steps % 5 == 0:  # cancel one of those that are not compared
            core.abort([f"r{rng.choice([i for i in range(64) if i % 4])}"])
        core.check_integrity()
    stats = core.stats()
    assert stats.num_preemptions > 0, "the pool is small so that pages run out"
    assert stats.prefix_cache_hits > 0
    assert any(o[-1].finish_reason == "abort" for o in outputs.values() if o)
    for name, tokens in alone.items():
        assert tokens_of(outputs[name]) == tokens, name
    for name, collected in outputs.items():
        assert sum(o.finish_reason is not None for o in collected) == 1, name
    assert stats.num_running == stats.num_waiting == 0


def test_pipelining_changes_nothing(checkpoint: tuple[Path, torch.nn.Module]) -> None:
    """Seeded sampling with penalties reads tokens that only the device knows yet."""
    path, _ = checkpoint
    params = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.3}
    requests = [greedy(f"r{i}", [i, i + 1, i + 2], 20, seed=i, **params) for i in range(6)]
    together = run_all(make_core(path), requests)
    for request in requests:
        alone = run_all(make_core(path), [request])
        assert tokens_of(together[request.request_id]) == tokens_of(alone[request.request_id])
    assert len({tuple(tokens_of(o)) for o in together.values()}) == 6


def test_stop_tokens_end_a_request(checkpoint: tuple[Path, torch.nn.Module]) -> None:
    path, model = checkpoint
    prompt = prompt_of(random.Random(3), 9)
    expected = reference_tokens(model, prompt, 16)
    stop = expected[5]
    first = expected.index(stop)
    request = greedy("a", prompt, 16, stop_token_ids=(stop,))
    outputs = run_all(make_core(path), [request])["a"]
    assert tokens_of(outputs) == expected[: first + 1]
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].stop_token_id == stop
    held = greedy("b", prompt, 16, stop_token_ids=(stop,), min_tokens=first + 3)
    outputs = run_all(make_core(path), [held])["b"]
    assert stop not in tokens_of(outputs)[: first + 3]


def test_logprobs_equal_the_reference(checkpoint: tuple[Path, torch.nn.Module]) -> None:
    path, model = checkpoint
    prompt = prompt_of(random.Random(4), 50)  # longer than a chunk
    request = greedy("a", prompt, 5, logprobs=3, prompt_logprobs=2)
    outputs = run_all(make_core(path), [request, greedy("b", prompt[:7], 9)])["a"]
    tokens = tokens_of(outputs)
    with torch.no_grad():
        expected = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    entries = [entry for output in outputs for entry in output.logprobs or []]
    assert [entry.token_id for entry in entries] == tokens
    for at, entry in enumerate(entries, start=len(prompt) - 1):
        assert entry.logprob == pytest.approx(float(expected[at, entry.token_id]), abs=1e-4)
        assert entry.rank == 1
        assert [token for token, _ in entry.top] == expected[at].topk(3).indices.tolist()
    prompt_entries = next(o.prompt_logprobs for o in outputs if o.prompt_logprobs)
    assert prompt_entries[0] is None
    assert len(prompt_entries) == len(prompt)
    for at, entry in enumerate(prompt_entries[1:]):
        assert entry is not None
        assert entry.token_id == prompt[at + 1]
        assert entry.logprob == pytest.approx(float(expected[at, prompt[at + 1]]), abs=1e-4)
        assert entry.rank == 1 + int((expected[at] > expected[at, prompt[at + 1]]).sum())


def test_resumed_request_goes_on_as_if_nothing_happened(checkpoint: tuple[Path, torch.nn.Module]) -> None:
    """After an engine restart the server sends prompt + tokens so far: penalties, random stream and limits carry on."""
    path, _ = checkpoint
    params = SamplingParams(temperature=0.8, seed=5, frequency_penalty=0.5, max_tokens=20, ignore_eos=True)
    whole = greedy("a", [7, 8, 9], 20)
    whole = type(whole)("a", [7, 8, 9], params)
    tokens = tokens_of(run_all(make_core(path), [whole])["a"])
    resumed = type(whole)("b", [7, 8, 9, *tokens[:6]], params, num_resumed_tokens=6)
    assert tokens_of(run_all(make_core(path), [resumed])["b"]) == tokens[6:]


class _GraphsThatMustNotRun:
    """Stands where CUDA graphs do, with a bucket for everything."""

    def bucket(self, num_seqs: int) -> int:
        return num_seqs

    def replay(self, size: int) -> torch.Tensor:
        raise AssertionError("a step that scores prompt tokens was replayed from a graph, which keeps no hidden states")


def test_one_token_chunks_that_score_the_prompt_run_eagerly(checkpoint: tuple[Path, torch.nn.Module]) -> None:
    path, _ = checkpoint
    core = make_core(path, max_num_seqs=1, max_num_batched_tokens=1)  # every chunk is one token long
    core._executor._runner._graphs = _GraphsThatMustNotRun()  # type: ignore[attr-defined]
    prompt = prompt_of(random.Random(6), 5)
    request = greedy("a", prompt, 0, prompt_logprobs=0)
    outputs = run_all(core, [request])["a"]
    entries = next(o.prompt_logprobs for o in outputs if o.prompt_logprobs)
    assert [entry.token_id for entry in entries if entry is not None] == prompt[1:]
