"""Tokenizer, incremental decoding, stop strings, chat templates."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_fakes import SPECIAL, TEMPLATE, byte_fallback_tokenizer, byte_level_tokenizer, server_tokenizer

from appliance.errors import CheckpointError, InvalidRequestError
from appliance.server.chat_template import ChatTemplate
from appliance.server.choice import Choice
from appliance.server.detokenizer import StopChecker
from appliance.server.tokenizer import ServerTokenizer, load_tokenizer
from appliance.types import EngineOutput, EngineRequest, SamplingParams, TokenLogprobs

BYTE_LEVEL = ServerTokenizer(byte_level_tokenizer(), SPECIAL, {"default": TEMPLATE})
BYTE_FALLBACK = ServerTokenizer(byte_fallback_tokenizer(), {"bos_token": "<s>", "eos_token": "</s>"})
TEXTS = st.text(st.sampled_from("helo wrdtis é你😀\n0"), max_size=30)


# ---------------------------------------------------------------- incremental decoding


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 3), max_size=40), st.booleans(), st.data())
@settings(max_examples=150, deadline=None)
def test_byte_stream_equals_full_decode_for_any_tokens(ids: list[int], skip: bool, data: st.DataObject) -> None:
    stream = BYTE_LEVEL.text_stream((), skip_special_tokens=skip)
    cut = data.draw(st.integers(0, len(ids)))
    text = stream.push(ids[:cut]) + "".join(stream.push([i]) for i in ids[cut:]) + stream.flush()
    assert text == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])
@given(TEXTS, TEXTS)
@settings(max_examples=100, deadline=None)
def test_window_stream_continues_a_prompt_seamlessly(tokenizer: ServerTokenizer, prompt: str, answer: str) -> None:
    ids = tokenizer.encode("wo" + prompt + answer + " end")
    for cut in range(1, len(ids)):
        whole, head = tokenizer.decode(ids), tokenizer.decode(ids[:cut])
        if not whole.startswith(head):
            continue  # the prompt ends inside a character: what follows it is not defined
        stream = tokenizer.text_stream(ids[:cut], exact=False)
        assert head + "".join(stream.push([i]) for i in ids[cut:]) + stream.flush() == whole


@given(TEXTS)
@settings(max_examples=100, deadline=None)
def test_window_stream_agrees_with_byte_stream(text: str) -> None:
    ids = BYTE_LEVEL.encode(text)
    fast, general = BYTE_LEVEL.text_stream(()), BYTE_LEVEL.text_stream((), exact=False)
    assert [fast.push([i]) for i in ids] == [general.push([i]) for i in ids]


def test_streams_hold_pieces_of_characters() -> None:
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK):
        ids = tokenizer.encode("a😀b")
        pieces = [tokenizer.text_stream((), exact=False)]
        texts = [pieces[0].push([i]) for i in ids]
        assert "".join(texts) == "a😀b"
        assert not any("\ufffd" in text for text in texts)


def test_window_stays_short_on_endless_invalid_bytes() -> None:
    byte = BYTE_FALLBACK.encode("\u00ff")[-1]  # a continuation byte: never a character alone
    stream = BYTE_FALLBACK.text_stream((), exact=False)
    text = "".join(stream.push([byte]) for _ in range(200))
    assert len(text) >= 190 and set(text) == {"\ufffd"}
    assert len(stream._ids) < 12  # type: ignore[attr-defined]


def test_token_bytes() -> None:
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK):
        ids = tokenizer.encode("hello world 😀é")
        joined = b"".join(tokenizer.token_bytes(i) for i in ids).decode().strip()
        assert joined == "hello world 😀é"
    assert BYTE_LEVEL.token_bytes(10**6) == b""


def test_detokenizing_is_cheap() -> None:
    """256 streams at 100 tokens/s leave 39 µs of CPU time a token; the budget is 30 µs, with stop strings."""
    ids = BYTE_LEVEL.encode("hello world, this is a small text about numbers 12 34 你好 " * 60)
    request = EngineRequest("r", [5], SamplingParams(stop=("\n\nUser:", "<stop>")))
    best = float("inf")
    for _ in range(5):
        choice = Choice(0, request, BYTE_LEVEL)
        started = time.process_time()
        for token_id in ids:
            choice.take([EngineOutput("r", [token_id])])
        best = min(best, (time.process_time() - started) / len(ids))
    assert best < 30e-6, f"{best * 1e6:.1f} µs per token"


# ---------------------------------------------------------------- stop strings


def first_completed(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Reference: (start, end) of the match that is complete first, the longest of those."""
    found = [(text.find(s) + len(s), -len(s)) for s in stops if s in text]
    return (min(found)[0] + min(found)[1], min(found)[0]) if found else None


@given(
    st.text("ab<", max_size=40),
    st.lists(st.text("ab<", min_size=1, max_size=5), min_size=1, max_size=4),
    st.lists(st.integers(0, 40), max_size=12),
    st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_do_not_depend_on_borders(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    borders = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    checker = StopChecker(stops, include)
    given_text = ""
    for start, end in itertools.pairwise(borders):
        given_text += checker.push(text[start:end])
        match = first_completed(text, stops)
        if match is not None:
            assert given_text == text[: len(given_text)]
            assert len(given_text) <= (match[1] if include else match[0])
    given_text += checker.flush()
    match = first_completed(text, stops)
    if match is None:
        assert (given_text, checker.matched) == (text, None)
    else:
        assert given_text == text[: match[1] if include else match[0]]
        assert checker.matched is not None


@given(st.text("ab<", max_size=30), st.text("ab<", min_size=1, max_size=5))
def test_one_stop_string_is_str_find(text: str, stop: str) -> None:
    checker = StopChecker([stop], False)
    out = "".join(checker.push(c) for c in text) + checker.flush()
    assert out == (text[: text.find(stop)] if stop in text else text)


def run_choice(ids: list[int], params: SamplingParams, chunks: list[int], tokenizer: ServerTokenizer) -> Choice:
    """Feed tokens in chunks; the texts, positions and ids land in attributes of the choice for the test to read."""
    choice = Choice(0, EngineRequest("r", [5], params), tokenizer)
    choice.text, choice.positions = "", []  # type: ignore[attr-defined]
    at = 0
    while at < len(ids) and choice.finish_reason is None:
        size = chunks.pop(0) if chunks else 1
        part = ids[at : at + size]
        at += size
        logprobs = [TokenLogprobs(i, -0.5, 1) for i in part] if params.logprobs is not None else None
        reason = "length" if at >= len(ids) else None
        delta = choice.take([EngineOutput("r", part, logprobs, finish_reason=reason)])
        choice.text += delta.text  # type: ignore[attr-defined]
        choice.positions += delta.positions  # type: ignore[attr-defined]
        assert all(p.end <= len(choice.text) or reason or choice.matched_stop for p in delta.positions)  # type: ignore[attr-defined]
    return choice


@given(TEXTS, st.lists(st.integers(1, 5), max_size=10), st.integers(0, 6))
@settings(max_examples=150, deadline=None)
def test_choice_is_independent_of_chunks(text: str, chunks: list[int], min_tokens: int) -> None:
    ids = BYTE_LEVEL.encode(text + "lo 你")
    params = SamplingParams(stop=("lo", "你"), logprobs=1, min_tokens=min_tokens)
    one = run_choice(ids, params, [], BYTE_LEVEL)
    many = run_choice(ids, params, list(chunks), BYTE_LEVEL)
    for name in ("text", "positions", "num_tokens", "finish_reason", "matched_stop"):
        assert getattr(one, name) == getattr(many, name), name
    if min_tokens == 0:
        whole = text + "lo 你"
        assert one.text == whole[: min(whole.find(s) for s in ("lo", "你"))]  # type: ignore[attr-defined]


def test_choice_drops_the_stop_token_but_counts_it() -> None:
    ids = BYTE_LEVEL.encode("hello")
    for include, want in ((False, "hello"), (True, "helloX")):
        x = BYTE_LEVEL.encode("X")[0]
        params = SamplingParams(include_stop_str_in_output=include, logprobs=0)
        choice = Choice(0, EngineRequest("r", [5], params), BYTE_LEVEL)
        scored = [TokenLogprobs(i, -0.1, 1) for i in [*ids, x]]
        delta = choice.take([EngineOutput("r", [*ids, x], scored, finish_reason="stop", stop_token_id=x)])
        assert (delta.text, delta.finish_reason, choice.num_tokens) == (want, "stop", len(ids) + 1)
        assert "".join(BYTE_LEVEL.token_text(p.logprobs.token_id) for p in delta.positions) == want
        assert delta.token_ids == [*ids, x]


# ---------------------------------------------------------------- loading and templates


def write_tokenizer(directory: Path, **config: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    byte_level_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}, **config}))


def test_load_from_checkpoint_and_engine(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", bos_token="<s>", chat_template="{{ bos_token }}x")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7, "vocab_size": 512}))
    (tmp_path / "tokenizer" / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    for directory in (tmp_path, tmp_path / "tokenizer"):
        tokenizer = load_tokenizer(directory)
        assert tokenizer.eos_token_ids == (1, 7, 8, 9)
        assert tokenizer.vocab_size == 512
        assert tokenizer.chat_template is not None
        assert tokenizer.chat_template.render([{"role": "user", "content": "a"}]) == "<s>x"


def test_template_sources(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "a"}]
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    write_tokenizer(tmp_path, chat_template=named)
    template = load_tokenizer(tmp_path).chat_template
    assert template is not None
    assert (template.render(message), template.render(message, tools=[{"x": 1}])) == ("D", "T")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).chat_template.render(message) == "file"  # type: ignore[union-attr]
    override = tmp_path / "own.jinja"
    override.write_text("own")
    assert load_tokenizer(tmp_path, override).chat_template.render(message) == "own"  # type: ignore[union-attr]


def test_load_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a readable tokenizer"):
        load_tokenizer(tmp_path)
    write_tokenizer(tmp_path, chat_template="{% if %}")
    with pytest.raises(CheckpointError, match="not valid Jinja"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_tokenizer(tmp_path, tmp_path / "missing.jinja")


def test_template_features() -> None:
    source = (
        "{%- for m in messages %}\n"
        "    {%- if m.role == 'system' %}{% continue %}{% endif %}\n"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}\n"
        "{%- endfor %}\n{{ strftime_now('%Y') }}"
    )
    template = ChatTemplate({"default": source}, {})
    text = template.render([{"role": "developer", "content": "x"}, {"role": "user", "content": "<é>"}])
    assert text == '"<é>"' + time.strftime("%Y")


def test_template_refusal_and_sandbox() -> None:
    message = [{"role": "user", "content": "a"}]
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        ChatTemplate({"default": "{{ raise_exception('roles must alternate') }}"}, {}).render(message)
    with pytest.raises(InvalidRequestError, match="does not take"):
        ChatTemplate({"default": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}, {}).render(message)


def test_continue_final_message() -> None:
    template = server_tokenizer().chat_template
    assert template is not None
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "I will "}]
    text = template.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == "<s><|user|>go<|end|>\n<|assistant|>I will "


LOOPING = (
    "{{ bos_token }}{% set first = messages[0] %}\n{%- for m in messages %}\n"
    "  {% if not m.content %}{% continue %}{% endif %}\n"
    "[{{ m['role'] }}]{{ m['content'] | trim }} {{ {'b': '<é>', 'a': [1, loop.index0]} | tojson(indent=2) }}"
    "{{ eos_token }}\n"
    "{% endfor %}\n{% if add_generation_prompt %}[assistant]{{ extra | default('') }}{% endif %}"
)


@pytest.mark.parametrize("source", [TEMPLATE, LOOPING], ids=["plain", "looping"])
def test_templates_render_as_in_transformers(source: str) -> None:
    """transformers is the reference: the same text for whole conversations and for a last message to continue."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), **SPECIAL)
    reference.chat_template = source
    ours = ChatTemplate({"default": source}, SPECIAL)
    talk = [{"role": "user", "content": "<b> hé"}, {"role": "assistant", "content": " well,  "}]
    for generate in (True, False):
        want = reference.apply_chat_template(talk, tokenize=False, add_generation_prompt=generate, extra="x")
        assert ours.render(talk, add_generation_prompt=generate, variables={"extra": "x"}) == want
    want = reference.apply_chat_template(talk, tokenize=False, continue_final_message=True)
    assert ours.render(talk, add_generation_prompt=False, continue_final_message=True) == want
