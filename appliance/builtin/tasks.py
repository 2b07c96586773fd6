"""The tasks of the built-in model: seeded generators whose right answer is computed, and the exact-match score.

Standard library only: no torch, no tokenizer. The ranges of every task are in the docstring of its generator.

Training and evaluation never share a sample: each sample has a `key` (what is asked, without its wording), and a hash
of the key decides its split. A generator draws until the split is the wanted one; the same seed gives the same samples.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from appliance.builtin import words
from appliance.builtin.small_talk import sample_question

Split = Literal["train", "evaluation"]
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

EVALUATION_SHARE = 16  # one key in so many belongs to evaluation
RECALL_LENGTHS = (256, 3800)  # smallest and largest prompt of the recall task, in tokens of the built-in tokenizer
TOKENS_PER_ENTRY = 6  # "amber-falcon: above\n": word, dash, word, colon, word, line end
_RECALL_OVERHEAD = 40  # tokens of the chat template, the instruction and the question


@dataclass(frozen=True)
class Sample:
    """One question. `messages` end with the user's; `answer` is the only right reply; `key` decides the split."""

    task: str
    messages: tuple[Message, ...]
    answer: str
    key: str


def split_of(key: str) -> Split:
    """The split that a key belongs to: a fixed function of its text."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "evaluation" if digest[0] % EVALUATION_SHARE == 0 else "train"


def _user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def _pick(rng: random.Random, options: tuple[str, ...]) -> str:
    return options[int(rng.random() * len(options))]


def _number(rng: random.Random, max_digits: int) -> int:
    """A number of 1..max_digits digits, each length equally likely."""
    digits = 1 + int(rng.random() * max_digits)
    low = 0 if digits == 1 else 10 ** (digits - 1)
    return low + int(rng.random() * (10**digits - low))


_ADD = ("What is {} + {}?", "{} + {} =", "Add {} and {}.", "Compute {} + {}.", "What is the sum of {} and {}?")
_SUBTRACT = ("What is {} - {}?", "{} - {} =", "Compute {} - {}.", "What is {} minus {}?", "Calculate {} - {}.")
_MULTIPLY = ("What is {} * {}?", "{} * {} =", "Compute {} * {}.", "What is {} times {}?", "Multiply {} by {}.")


def addition(rng: random.Random) -> Sample:
    """Sum of two numbers of 1 to 4 digits; the answer is the sum alone."""
    a, b = _number(rng, 4), _number(rng, 4)
    return Sample("addition", _user(_pick(rng, _ADD).format(a, b)), str(a + b), f"add {min(a, b)} {max(a, b)}")


def subtraction(rng: random.Random) -> Sample:
    """Difference of two numbers of 1 to 4 digits, the larger first; the answer is the difference alone."""
    a, b = _number(rng, 4), _number(rng, 4)
    a, b = max(a, b), min(a, b)
    return Sample("subtraction", _user(_pick(rng, _SUBTRACT).format(a, b)), str(a - b), f"subtract {a} {b}")


def worked_product(a: int, b: int) -> str:
    """`a * b` with its partial products: at most one factor is split, at its leading digit.

    >>> worked_product(47, 36), worked_product(347, 6), worked_product(47, 6)
    ('47 * 36 = 1410 + 282 = 1692', '347 * 6 = 1800 + 282 = 2082', '47 * 6 = 282')
    """
    parts = [a * b]
    if b >= 10 and b % 10:
        parts = [a * (b - b % 10), a * (b % 10)]
    elif b < 10 and a >= 100 and a % 100:
        parts = [(a - a % 100) * b, (a % 100) * b]
    work = f" = {parts[0]} + {parts[1]}" if len(parts) == 2 else ""
    return f"{a} * {b}{work} = {a * b}"


def multiplication(rng: random.Random) -> Sample:
    """Two factors of two digits, or one of 2 to 3 digits and one of 2..9; the answer shows its partial products."""
    if rng.random() < 0.6:
        a, b = 10 + int(rng.random() * 90), 10 + int(rng.random() * 90)
    else:
        a, b = 10 + int(rng.random() * (90 if rng.random() < 0.4 else 990)), 2 + int(rng.random() * 8)
    key = f"multiply {min(a, b)} {max(a, b)}"
    return Sample("multiplication", _user(_pick(rng, _MULTIPLY).format(a, b)), worked_product(a, b), key)


_SORT_UP = (
    "Sort in ascending order: {}",
    "Sort these numbers from smallest to largest: {}",
    "Put in ascending order: {}",
)
_SORT_DOWN = (
    "Sort in descending order: {}",
    "Sort these numbers from largest to smallest: {}",
    "Put in descending order: {}",
)


def sorting(rng: random.Random) -> Sample:
    """3 to 10 different numbers, all below 100 or all below 1000, ascending or descending."""
    count = 3 + int(rng.random() * 8)
    numbers = rng.sample(range(100 if rng.random() < 0.4 else 1000), count)
    down = rng.random() < 0.4
    listed, answer = (" ".join(map(str, n)) for n in (numbers, sorted(numbers, reverse=down)))
    text = _pick(rng, _SORT_DOWN if down else _SORT_UP).format(listed)
    return Sample("sorting", _user(text), answer, f"sort {down} {listed}")


_COPY = ("Repeat exactly: {}", "Copy this text: {}", "Say exactly this: {}", "Write these words again: {}")


def copying(rng: random.Random) -> Sample:
    """4 to 64 different random words, to be repeated."""
    listed = " ".join(rng.sample(words.COPY_WORDS, 4 + int(rng.random() * 61)))
    return Sample("copying", _user(_pick(rng, _COPY).format(listed)), listed, f"copy {listed}")


_RECALL_INTRODUCTION = (
    "Remember these entries.\n",
    "Here is a table of codes.\n",
    "Read this list.\n",
    "These are the stored values.\n",
)
_RECALL_QUESTION = ("What is the value of {}?", "Look up {}.", "Which value belongs to {}?", "Give me the value of {}.")


def recall_table(rng: random.Random, length: int) -> tuple[str, dict[str, str]]:
    """A table whose chat prompt with one question is about `length` tokens long (within 15), and its content.

    Keys are different random word pairs ("amber-falcon"), values are random words.
    """
    count = max(2, (length - _RECALL_OVERHEAD) // TOKENS_PER_ENTRY)
    nouns, adjectives = words.NOUNS, words.ADJECTIVES
    pairs = rng.sample(range(len(nouns) * len(adjectives)), count)
    values = rng.choices(words.OTHERS, k=count)
    table = {
        f"{adjectives[pair // len(nouns)]}-{nouns[pair % len(nouns)]}": value for pair, value in zip(pairs, values)
    }
    return "\n".join([f"{key}: {value}" for key, value in table.items()]), table


def _recall_messages(rng: random.Random, text: str, question: str) -> tuple[Message, ...]:
    """The table in the system message (one time in four) or before the question in the user's."""
    introduction = _pick(rng, _RECALL_INTRODUCTION)
    if rng.random() < 0.25:
        return ({"role": "system", "content": introduction + text}, {"role": "user", "content": question})
    return _user(f"{introduction}{text}\n{question}")


def recall_question(rng: random.Random, table: dict[str, str], keys: list[str]) -> tuple[str, str]:
    """A (question, answer) on one of `keys`; the answer is the entry as it stands in the table."""
    key = keys[int(rng.random() * len(keys))]
    return _pick(rng, _RECALL_QUESTION).format(key), f"{key}: {table[key]}"


def recall(rng: random.Random, length: int | None = None) -> Sample:
    """The entry of one key in a table of 36 to 626; `length` of the prompt in tokens, 256..3800, random if None."""
    if length is None:
        length = RECALL_LENGTHS[0] + int(rng.random() * (RECALL_LENGTHS[1] - RECALL_LENGTHS[0] + 1))
    text, table = recall_table(rng, length)
    question, answer = recall_question(rng, table, list(table))
    return Sample("recall", _recall_messages(rng, text, question), answer, f"recall {text}")


def recall_conversation(rng: random.Random, length: int, questions: int) -> tuple[Message, ...]:
    """For training: one table asked about `questions` times, with the answers; never a table of the evaluation."""
    while True:
        text, table = recall_table(rng, length)
        if split_of(f"recall {text}") == "train":
            break
    keys = list(table)
    question, answer = recall_question(rng, table, keys)
    messages = [*_recall_messages(rng, text, question), {"role": "assistant", "content": answer}]
    for _ in range(questions - 1):
        question, answer = recall_question(rng, table, keys)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return tuple(messages)


def _person(rng: random.Random) -> str:
    return f"{_pick(rng, words.GIVEN_NAMES)} {_pick(rng, words.FAMILY_NAMES)}"


def _words_list(rng: random.Random) -> list[str]:
    return rng.sample(words.COLORS, 2 + int(rng.random() * 2))


# Field name as described -> what draws its value. Keys in JSON have underscores for spaces.
_FIELDS: dict[str, Callable[[random.Random], object]] = {
    "name": _person,
    "age": lambda rng: 18 + int(rng.random() * 80),
    "city": lambda rng: _pick(rng, words.CITIES),
    "country": lambda rng: _pick(rng, words.COUNTRIES),
    "active": lambda rng: rng.random() < 0.5,
    "favorite colors": _words_list,
    "room number": lambda rng: 100 + int(rng.random() * 900),
    "project": lambda rng: f"{_pick(rng, words.ADJECTIVES)} {_pick(rng, words.NOUNS)}",
    "manager": lambda rng: None if rng.random() < 0.3 else _person(rng),
    "hourly rate": lambda rng: (40 + int(rng.random() * 400)) / 4,
    "start year": lambda rng: 1980 + int(rng.random() * 47),
    "remote": lambda rng: rng.random() < 0.5,
}
_FIELD_NAMES = tuple(_FIELDS)
_JSON = ("Write this record as JSON: {}", "Turn this into JSON: {}", "Give me JSON for this record: {}", "As JSON: {}")


def _described(value: object) -> str:
    """A field's value as the prompt says it."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " and ".join(value)
    return str(value)


def json_record(rng: random.Random) -> Sample:
    """A record of 3 to 6 fields (text, numbers, yes/no, unknown, lists) in words; the answer is one line of JSON."""
    names = rng.sample(_FIELD_NAMES, 3 + int(rng.random() * 4))
    record = {name: _FIELDS[name](rng) for name in names}
    if rng.random() < 0.5:
        text = "; ".join([f"{name}: {_described(value)}" for name, value in record.items()])
    else:
        text = ", ".join([f"the {name} is {_described(value)}" for name, value in record.items()])
    answer = json.dumps({name.replace(" ", "_"): value for name, value in record.items()})
    return Sample("json", _user(_pick(rng, _JSON).format(text) + "."), answer, f"json {answer}")


# (from, to, power of ten): whole values up to 9999; a negative power gives decimals without trailing zeros.
_DECIMAL_UNITS = (
    ("km", "m", 3), ("m", "cm", 2), ("cm", "mm", 1), ("kg", "g", 3), ("liters", "ml", 3), ("m", "mm", 3),
    ("tons", "kg", 3), ("m", "km", -3), ("cm", "m", -2), ("mm", "cm", -1), ("g", "kg", -3), ("ml", "liters", -3),
    ("mm", "m", -3), ("kg", "tons", -3),
)  # fmt: skip
# (from, to, factor): whole values of 2..99, answered with the worked product.
_FACTOR_UNITS = (
    ("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7),
    ("years", "months", 12), ("feet", "inches", 12), ("yards", "feet", 3), ("pounds", "ounces", 16),
    ("gallons", "pints", 8), ("bytes", "bits", 8),
)  # fmt: skip
_UNITS = ("Convert {v} {a} to {b}.", "How many {b} are {v} {a}?", "What is {v} {a} in {b}?", "{v} {a} in {b}?")


def shift_decimal(value: int, power: int) -> str:
    """`value * 10**power`, exactly, without an exponent or trailing zeros after the point.

    >>> shift_decimal(37, 3), shift_decimal(3250, -3), shift_decimal(5, -2), shift_decimal(4000, -3)
    ('37000', '3.25', '0.05', '4')
    """
    if power >= 0:
        return str(value * 10**power)
    digits = str(value).rjust(1 - power, "0")
    fraction = digits[power:].rstrip("0")
    return digits[:power] + ("." + fraction if fraction else "")


def units(rng: random.Random) -> Sample:
    """Metric units by powers of ten (values to 9999, exact decimals), other units by whole factors (values 2..99)."""
    if rng.random() < 0.6:
        a, b, power = _DECIMAL_UNITS[int(rng.random() * len(_DECIMAL_UNITS))]
        value = max(1, _number(rng, 4))
        answer = f"{shift_decimal(value, power)} {b}"
    else:
        a, b, factor = _FACTOR_UNITS[int(rng.random() * len(_FACTOR_UNITS))]
        value = 2 + int(rng.random() * 98)
        answer = f"{worked_product(value, factor)} {b}"
    return Sample("units", _user(_pick(rng, _UNITS).format(v=value, a=a, b=b)), answer, f"units {value} {a} {b}")


_OPENINGS = ("", "", "", "A question: ", "Please tell me: ", "Quick question: ", "Tell me, ")


def small_talk(rng: random.Random) -> Sample:
    """A question about the appliance; what is held out are wordings, whatever opening comes before them."""
    question, answer = sample_question(rng)
    opening = _pick(rng, _OPENINGS)
    text = opening + question if opening else question[0].upper() + question[1:]
    return Sample("small_talk", _user(text), answer, f"small talk {question.lower()}")


_GENERATORS: dict[str, Callable[[random.Random], Sample]] = {
    "addition": addition,
    "subtraction": subtraction,
    "multiplication": multiplication,
    "sorting": sorting,
    "copying": copying,
    "recall": recall,
    "json": json_record,
    "units": units,
    "small_talk": small_talk,
}
TASKS: tuple[str, ...] = tuple(_GENERATORS)


def sample(task: str, rng: random.Random, split: Split = "train", *, length: int | None = None) -> Sample:
    """Draw one sample of a split. `length` (tokens) is for recall only.

    Raises KeyError for an unknown task, ValueError for a length that the task does not take.
    """
    generate = _GENERATORS[task]
    if length is not None:
        if task != "recall":
            raise ValueError(f"only the recall task has a length, not {task}")
        if not RECALL_LENGTHS[0] <= length <= RECALL_LENGTHS[1]:
            raise ValueError(f"recall length {length} is outside {RECALL_LENGTHS[0]}..{RECALL_LENGTHS[1]} tokens")
    while True:
        drawn = recall(rng, length) if length is not None else generate(rng)
        if split_of(drawn.key) == split:
            return drawn


def stream(task: str, seed: int, split: Split = "train", *, length: int | None = None) -> Iterator[Sample]:
    """Endless samples of one task, fixed by the seed."""
    rng = random.Random(f"{split}/{task}/{length}/{seed}")
    while True:
        yield sample(task, rng, split, length=length)


def evaluation_set(task: str, n: int, seed: int = 0, *, length: int | None = None) -> list[Sample]:
    """`n` samples never trained on, with different prompts, fixed by the seed.

    Raises ValueError if the task has fewer.
    """
    found: dict[str, Sample] = {}
    repeated = 0  # draws in a row that were known already
    for drawn in stream(task, seed, "evaluation", length=length):
        prompt = json.dumps(drawn.messages)
        repeated = repeated + 1 if prompt in found else 0
        found.setdefault(prompt, drawn)
        if len(found) == n:
            return list(found.values())
        if repeated > 1000:
            break
    raise ValueError(f"task {task} has only about {len(found)} different evaluation samples, {n} were asked for")


def score(expected: Sample, text: str) -> bool:
    """Exact match, ignoring white space at both ends."""
    return text.strip() == expected.answer
