"""`LLM`: the built-in model on the CPU, in process. One engine and one LLM serve all tests of the file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance import LLM, SamplingParams, builtin
from appliance.errors import (
    ContextLengthError,
    EngineCrashedError,
    InvalidRequestError,
    SettingsError,
    UnavailableError,
)
from appliance.server.tokenizer import load_tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    cache = tmp_path_factory.mktemp("cache")
    with LLM("builtin", precision="fp32", backend="cpu", cache=cache, num_pages=256, max_num_seqs=4) as llm:
        yield llm


@pytest.fixture
def llm(opened: LLM) -> Iterator[LLM]:
    """Every test leaves the engine whole and idle."""
    yield opened
    assert idle(opened)


def idle(llm: LLM) -> bool:
    llm.core.check_integrity()
    return not llm.core.has_work and llm.core.stats().kv_cache_usage == 0


# ---------------------------------------------------------------- answers


def test_answers_conversations_in_their_order(llm: LLM) -> None:
    answers = llm.chat([ask("What is 12 + 30?"), ask("What is 7 - 5?")], GREEDY)
    assert [(answer.index, answer.text, answer.finish_reason) for answer in answers] == [
        (0, "42", "stop"),
        (1, "2", "stop"),
    ]
    assert answers[0].token_ids[-1] in llm.tokenizer.eos_token_ids
    (single,) = llm.chat(ask("What is 12 + 30?"), GREEDY)
    assert single.text == "42" and single.token_ids == answers[0].token_ids


def test_prompts_and_texts_are_the_tokenizers(llm: LLM) -> None:
    from transformers import AutoTokenizer

    (answer,) = llm.chat(ask("Sort in ascending order: 31 7 92 15"), GREEDY)
    reference = AutoTokenizer.from_pretrained(builtin.checkpoint_dir())
    messages = ask("Sort in ascending order: 31 7 92 15")
    prompt = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert answer.prompt_token_ids == prompt
    assert answer.text == "7 15 31 92" == reference.decode(answer.token_ids, skip_special_tokens=True)
    served = load_tokenizer(builtin.checkpoint_dir())
    assert served.chat_template is not None
    assert served.encode(served.chat_template.render(messages), add_special_tokens=False) == prompt
    # The same prompt as text and as token ids.
    by_text, by_ids = llm.generate([served.chat_template.render(messages), prompt], GREEDY)
    assert by_text.prompt_token_ids[-len(prompt) :] == prompt
    assert by_ids.text == answer.text


def test_a_list_of_token_ids_is_one_prompt(llm: LLM) -> None:
    ids = llm.tokenizer.encode("Say")
    one, several = llm.generate(ids, GREEDY), llm.generate([ids, "Say"], GREEDY)
    assert len(one) == 1 and len(several) == 2
    assert one[0].token_ids == several[0].token_ids == several[1].token_ids


@pytest.mark.parametrize("method", ["generate", "chat"])
def test_streams_give_the_same_text_in_pieces(llm: LLM, method: str) -> None:
    given: list[Any] = ["What is", "Copy this"] if method == "generate" else [ask("What is 4 * 5?"), ask("Hello")]
    call: Callable[..., Any] = getattr(llm, method)
    whole = call(given, GREEDY)
    chunks = list(call(given, GREEDY, stream=True))
    assert len(chunks) > 4
    for expected in whole:
        own = [chunk for chunk in chunks if chunk.index == expected.index]
        assert "".join(chunk.text for chunk in own) == expected.text
        assert [token for chunk in own for token in chunk.token_ids] == expected.token_ids
        assert [chunk.finish_reason for chunk in own] == [None] * (len(own) - 1) + [expected.finish_reason]


def test_each_prompt_has_its_own_parameters(llm: LLM) -> None:
    each = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (1, 5, 3)]
    answers = llm.generate(["One", "Two", "Three"], each)
    assert [len(answer.token_ids) for answer in answers] == [1, 5, 3]
    assert {answer.finish_reason for answer in answers} == {"length"}
    with pytest.raises(InvalidRequestError, match="3 prompts but 2 sampling parameter sets"):
        llm.generate(["One", "Two", "Three"], each[:2])


def test_seeds_decide_samples(llm: LLM) -> None:
    def draw(seed: int) -> list[int]:
        return llm.generate("The", SamplingParams(temperature=2.0, seed=seed, max_tokens=16))[0].token_ids

    assert draw(1) == draw(1) != draw(2)


def test_stop_strings_cut_text_and_free_the_request(llm: LLM) -> None:
    question = ask("Sort in ascending order: 31 7 92 15")
    params = SamplingParams(temperature=0.0, max_tokens=24, stop=(" 31", "never"))
    (answer,) = llm.chat(question, params)
    assert answer.text == "7 15" and answer.finish_reason == "stop"
    assert answer.token_ids[-1] not in llm.tokenizer.eos_token_ids
    assert "".join(chunk.text for chunk in llm.chat(question, params, stream=True)) == "7 15"
    kept = SamplingParams(temperature=0.0, max_tokens=24, stop=(" 31",), include_stop_str_in_output=True)
    assert llm.chat(question, kept)[0].text == "7 15 31"


def test_logprobs_of_output_and_prompt(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=3, prompt_logprobs=0)
    (answer,) = llm.generate("What is the sum", params)
    assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
    for entry in answer.logprobs:
        assert entry.rank == 1 and len(entry.top) == 3
        assert entry.top[0] == (entry.token_id, pytest.approx(entry.logprob)) and entry.logprob <= 0
    assert answer.prompt_logprobs is not None and len(answer.prompt_logprobs) == len(answer.prompt_token_ids)
    assert answer.prompt_logprobs[0] is None
    assert [e.token_id for e in answer.prompt_logprobs[1:] if e] == answer.prompt_token_ids[1:]
    assert llm.generate("What is the sum", GREEDY)[0].logprobs == []


def test_a_common_prefix_is_counted(llm: LLM) -> None:
    text = "zebra quartz " * 20
    assert llm.generate(text, GREEDY)[0].num_cached_tokens == 0
    (again,) = llm.generate(text, GREEDY)
    assert 0 < again.num_cached_tokens < len(again.prompt_token_ids)


# ---------------------------------------------------------------- streams that end early


def test_a_stream_left_early_frees_everything(llm: LLM) -> None:
    for chunk in llm.generate(["One", "Two"], LONG, stream=True):
        assert chunk.finish_reason is None
        break
    assert idle(llm), "dropped"
    with llm.generate(["One", "Two"], LONG, stream=True) as stream:
        next(stream)
        assert llm.core.has_work
    assert idle(llm), "left"
    assert len(list(stream)) <= 1, "what the same step gave the other prompt"
    never_read = llm.generate("One", LONG, stream=True)
    assert llm.core.has_work
    never_read.close()
    assert idle(llm), "closed before it was read"
    assert list(never_read) == []


def test_streams_read_in_turns_lose_nothing(llm: LLM) -> None:
    short = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    alone = [llm.generate(text, short)[0] for text in ("First", "Second", "Third")]
    first, second = (llm.generate(text, short, stream=True) for text in ("First", "Second"))
    tokens: dict[str, list[int]] = {"first": [], "second": []}
    tokens["first"] += next(first).token_ids
    (between,) = llm.generate("Third", short)
    for one, other in zip(first, second, strict=False):
        tokens["first"] += one.token_ids
        tokens["second"] += other.token_ids
    tokens["second"] += [token for chunk in second for token in chunk.token_ids]
    assert between.token_ids == alone[2].token_ids
    assert tokens == {"first": alone[0].token_ids, "second": alone[1].token_ids}


def test_one_stream_closed_leaves_the_other(llm: LLM) -> None:
    first, second = llm.generate("First", LONG, stream=True), llm.generate("Second", GREEDY, stream=True)
    next(first)
    first.close()
    assert "".join(chunk.text for chunk in second) == llm.generate("Second", GREEDY)[0].text


def test_ctrl_c_waits_for_the_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = llm.core.step, 0

    def interrupted() -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(llm.core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["One", "Two"], LONG)
    assert idle(llm) and steps < 20
    assert llm.chat(ask("What is 12 + 30?"), GREEDY)[0].text == "42"


# ---------------------------------------------------------------- what is refused


def test_a_refused_prompt_takes_the_others_back(llm: LLM) -> None:
    for wrong, error in (("word " * 5000, ContextLengthError), ([], InvalidRequestError)):
        with pytest.raises(error):
            llm.generate(["fine", wrong, "fine"], GREEDY)
        assert idle(llm)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([[0, 10**6]], "prompt 0 has token id 1000000, allowed are 0 to"),
        ([[-1]], "prompt 0 has token id -1"),
        (["fine", None], "prompt 1 is 'None'; allowed are text and a list of token ids"),
    ],
)
def test_wrong_prompts(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(prompt, GREEDY)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be at least 0 and at most 100"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be at least 0 and at most 1"),
        ({"top_k": -2}, "top_k is -2; it must be at least -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"stop": "text"}, "stop is 'text'; it must be a tuple of texts"),
        ({"stop": ("",)}, "none empty"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias has token id 1000000"),
        ({"stop_token_ids": (-3,)}, "stop_token_ids has token id -3"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens is 3"),
    ],
)
def test_wrong_parameters(llm: LLM, params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(["fine", "also"], [SamplingParams(), SamplingParams(**params)])


def test_what_is_no_sampling_parameters(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="must be SamplingParams"):
        llm.generate("fine", {"temperature": 0})  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ("Hello", "must be a list of messages"),
        ([[]], "must be a list of messages"),
        ([{"content": "no role"}], "must be a list of messages"),
        ([{"role": "tool", "content": "x"}], "roles are system, user and assistant, not tool"),
        ([{"role": "user", "content": None}], "does not take these messages"),
    ],
)
def test_wrong_conversations(llm: LLM, conversation: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.chat(conversation, GREEDY)


def test_options_of_the_chat_template(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="'add_generation_promt'; did you mean 'add_generation_prompt'"):
        llm.chat(ask("Hello"), GREEDY, add_generation_promt=False)
    begun = [*ask("What is 12 + 30?"), {"role": "assistant", "content": "4"}]
    (answer,) = llm.chat(begun, GREEDY, continue_final_message=True)
    assert answer.text == "2"


# ---------------------------------------------------------------- opening and closing


def test_an_engine_directory_is_opened_as_it_is(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> None:
    (engine,) = (path.parent for path in tmp_path_factory.getbasetemp().glob(f"**/{llm.info.engine_key}/engine.json"))
    with LLM(engine, max_model_len=128, num_pages=16, max_num_seqs=1) as other:
        assert other.info.max_model_len == 128 and other.info.engine_key == llm.info.engine_key
        assert other.chat(ask("What is 12 + 30?"), GREEDY)[0].text == "42"
        left = other.generate("One", LONG, stream=True)
        next(left)
    with pytest.raises(UnavailableError, match="this LLM is closed"):
        other.generate("One", GREEDY)
    with pytest.raises(UnavailableError, match="this LLM is closed"):
        list(left)
    other.close()


def test_a_failed_step_loses_the_engine_and_says_so(
    llm: LLM, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (engine,) = (path.parent for path in tmp_path_factory.getbasetemp().glob(f"**/{llm.info.engine_key}/engine.json"))
    other = LLM(engine, num_pages=16, max_num_seqs=1)

    def fail() -> Any:
        raise RuntimeError("out of something")

    monkeypatch.setattr(other.core, "step", fail)
    with pytest.raises(EngineCrashedError, match="RuntimeError: out of something"):
        other.generate("One", GREEDY)
    with pytest.raises(UnavailableError, match="out of something"):
        other.generate("One", GREEDY)


def test_an_unknown_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no option 'max_model_length', did you mean 'max_model_len'"):
        LLM("builtin", cache=tmp_path, max_model_length=5)


def test_idle_threads_sleep_when_the_program_has_not_imported_torch(tmp_path: Path) -> None:
    program = """
import os, sys
from appliance.llm import LLM
assert "torch" not in sys.modules
try:
    LLM("./nothing-here", cache=sys.argv[1])
except Exception as error:
    assert type(error).__name__ == "CheckpointError", error
assert "torch" not in sys.modules
print(os.environ["OMP_WAIT_POLICY"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "PASSIVE", done.stderr
