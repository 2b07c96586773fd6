"""The text that calibration runs through a model when nobody names another: written for this project, and the same in
every release until its digest here changes.

Passages of many kinds (prose, code, letters, tables, logs, several languages; calibration_passages.txt), each whole at
first, later sentence by sentence in new company, between generated pieces that are never twice the same: numbers,
records, dialogues and descriptions. Torch-free. Knows no tokenizer.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

from appliance.builtin import tasks, words

CHARACTERS = 640_000  # at least; some 130,000 tokens
DIGEST = "eebccd7a5c9057f49a1102490e544158706287c3b486e3fcdd65ae911a7f18eb"  # SHA-256 of `text()`; a test computes it

_ENDS = re.compile(r"(?<=[.!?。])\s*(?=[^\s.!?。a-z0-9])")  # of sentences
_WHOLE = 2  # how many times each passage appears as it is
_T = TypeVar("_T")
_VERBS = (
    *("carried", "painted", "repaired", "forgot", "measured", "followed", "described", "borrowed", "opened", "watched"),
    *("buried", "weighed", "sold", "photographed", "counted", "polished", "hid", "remembered", "examined", "moved"),
)
_REASONS = (
    "because the {n} was {a}",
    "although nobody in {c} had asked for it",
    "while {g} was still looking for the {n}",
    "as soon as the {a} {n} had been paid for",
    "before the {n} could be sent to {c}",
    "which {g} found rather {a}",
    "so that the {n} would be ready by {t}",
    "even if it took until {t}",
)
_SUBJECTS = ("{g} {f}", "the {a} {n}", "a {n} from {c}", "the owner of the {n}", "every second {n}", "{g} and {h}")
_QUESTIONS = (
    "How far is it from {c} to {d}?",
    "Who left the {a} {n} in {c}?",
    "What does a {n} cost in {k}?",
    "Can you lend me the {n} until {t}?",
    "Why is the {n} {a} and not {b}?",
)
_ANSWERS = (
    "About {x} kilometres, so plan on {y} hours with a break in {d}.",
    "I think it was {g} {f}, who came back from {k} on {t}.",
    "Between {x} and {z}, depending on whether it is {a} or {b}.",
    "Yes, but please bring it back {a}; the last {n} came back {b}.",
    "Nobody knows. {g} says that it has been like that since {w}.",
)


@cache
def text() -> str:
    """All of it, at least `CHARACTERS` long."""
    rng = random.Random(20261121)
    passages = _passages()
    prose = [passage for passage in passages if "\n" not in passage]
    sentences = [
        s for passage in prose for s in re.split(r"(?<=[.!?。])\s*(?=[^\s.!?。a-z0-9])", passage) if len(s) > 30
    ]
    waiting: list[str] = []
    for _ in range(_WHOLE):
        waiting += _shuffled(rng, passages)
    parts: list[str] = []
    size = 0
    while size < CHARACTERS:
        parts.append(waiting.pop(0) if waiting and rng.random() < 0.35 else _piece(rng, sentences))
        size += len(parts[-1]) + 2
    return "\n\n".join(parts)


def _passages() -> list[str]:
    file = Path(__file__).with_name("calibration_passages.txt")
    return [passage.strip("\n") for passage in file.read_text(encoding="utf-8").split("\n%\n")]


# Only `random()` is used of the generator: its sequence is the same in all versions of Python.


def _pick(rng: random.Random, options: Sequence[_T]) -> _T:
    return options[int(rng.random() * len(options))]


def _shuffled(rng: random.Random, items: Sequence[_T]) -> list[_T]:
    return [items[i] for _, i in sorted((rng.random(), i) for i in range(len(items)))]


def _number(rng: random.Random, low: int, high: int) -> int:
    return low + int(rng.random() * (high - low + 1))


def _filled(rng: random.Random, pattern: str) -> str:
    return pattern.format(
        a=_pick(rng, words.ADJECTIVES),
        b=_pick(rng, words.ADJECTIVES),
        n=_pick(rng, words.NOUNS),
        g=_pick(rng, words.GIVEN_NAMES),
        h=_pick(rng, words.GIVEN_NAMES),
        f=_pick(rng, words.FAMILY_NAMES),
        c=_pick(rng, words.CITIES),
        d=_pick(rng, words.CITIES),
        k=_pick(rng, words.COUNTRIES),
        t=f"{_number(rng, 1, 28)} {_pick(rng, ('January', 'March', 'April', 'June', 'August', 'October', 'November'))}",
        w=_number(rng, 1790, 2024),
        x=_number(rng, 12, 980),
        y=_number(rng, 2, 19),
        z=_number(rng, 990, 4000),
    )


def _description(rng: random.Random, sentences: list[str]) -> str:
    """A paragraph of made-up events."""
    made = []
    for _ in range(_number(rng, 3, 7)):
        subject, object_ = _filled(rng, _pick(rng, _SUBJECTS)), _filled(rng, "the {a} {n}")
        made.append(f"{subject} {_pick(rng, _VERBS)} {object_} {_filled(rng, _pick(rng, _REASONS))}.")
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in made)


def _mixture(rng: random.Random, sentences: list[str]) -> str:
    """Sentences of different passages side by side."""
    return " ".join(_pick(rng, sentences) for _ in range(_number(rng, 3, 8)))


def _dialogue(rng: random.Random, sentences: list[str]) -> str:
    names = (_pick(rng, words.GIVEN_NAMES), _pick(rng, words.GIVEN_NAMES))
    turns = [
        f"{names[i % 2]}: {_filled(rng, _pick(rng, _QUESTIONS if i % 2 == 0 else _ANSWERS))}"
        for i in range(2 * _number(rng, 1, 4))
    ]
    return "\n".join(turns)


def _questions(rng: random.Random, sentences: list[str]) -> str:
    """Exercises with their answers."""
    kinds = [task for task in tasks.TASKS if task not in ("recall", "small_talk")]
    drawn = [tasks.sample(_pick(rng, kinds), rng) for _ in range(_number(rng, 2, 5))]
    return "\n".join(f"Question: {one.messages[-1]['content']}\nAnswer: {one.answer}" for one in drawn)


def _records(rng: random.Random, sentences: list[str]) -> str:
    """A table in one of several notations."""
    rows = [
        {
            "name": _filled(rng, "{a}-{n}"),
            "city": _pick(rng, words.CITIES),
            "count": _number(rng, 0, 99999),
            "price": _number(rng, 10, 99999) / 100,
            "since": f"{_number(rng, 1960, 2025)}-{_number(rng, 1, 12):02}-{_number(rng, 1, 28):02}",
        }
        for _ in range(_number(rng, 2, 6))
    ]
    form = rng.random()
    if form < 0.3:
        return "\n".join(json.dumps(row) for row in rows)
    if form < 0.6:
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        return "\n".join(lines)
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row.values())) + " |" for row in rows)])


def _steps(rng: random.Random, sentences: list[str]) -> str:
    """A numbered list."""
    title = _filled(rng, "How to repair a {a} {n} in {y} steps:")
    lines = [f"{i}. {_pick(rng, sentences)}" for i in range(1, _number(rng, 3, 6))]
    return "\n".join([title, *lines])


def _code(rng: random.Random, sentences: list[str]) -> str:
    """A small function, with numbers and names of its own."""
    n, a, b = _pick(rng, words.NOUNS), _pick(rng, words.ADJECTIVES), _pick(rng, words.OTHERS)
    low, step, limit = _number(rng, 0, 9), _number(rng, 1, 12), _number(rng, 20, 5000)
    forms = (
        f"def {a}_{n}(values: list[int], {b}: int = {step}) -> int:\n"
        f'    """{_pick(rng, sentences)}"""\n    total = {low}\n    for i, value in enumerate(values):\n'
        f"        if value % {b} == {low % step} and total < {limit}:\n            total += value * (i + {step})\n"
        f"    return total",
        f"class {n.title()}:\n    {a}: bool = {rng.random() < 0.5}\n    limit = {limit}\n\n"
        f"    def {b}(self, other):\n        if other is None:\n"
        f'            raise ValueError(f"no {n} for {{self.limit}}")\n        return max(self.limit - {step}, other)',
        f"function {b}{n.title()}(items) {{\n  const {a} = items.filter((x) => x.size > {low}.{step});\n"
        f"  return {a}.map((x, i) => ({{ ...x, index: i * {step}, label: `{n}-${{i}}` }})).slice(0, {limit});\n}}",
        f"for (int i = {low}; i < {limit}; i += {step}) {{\n    {a}[i] = {n}[i] ^ (0x{limit:04x} >> (i & 7));\n"
        f"    if ({a}[i] == '\\0') break;  /* {b} */\n}}",
        f"SELECT {a}_{n}.id, {b}, price * {step}.{low} AS total FROM {a}_{n} WHERE {b} > {limit} ORDER BY total DESC;",
    )
    return _pick(rng, forms)


_PIECES: tuple[Callable[[random.Random, list[str]], str], ...] = (
    _mixture,
    _mixture,
    _mixture,
    _description,
    _description,
    _dialogue,
    _questions,
    _records,
    _steps,
    _code,
)


def _piece(rng: random.Random, sentences: list[str]) -> str:
    return _pick(rng, _PIECES)(rng, sentences)
