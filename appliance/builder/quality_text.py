"""Prompts over which a model's predictions are compared with another's: conversations of its own tasks for the built-in
model, which has never seen other text; for all others a page of text. Knows tokenizers, no models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from appliance import builtin
from appliance.builtin import tasks
from appliance.runtime.sample_text import SAMPLE_TEXT

BUILTIN_TEXT = "conversations of the built-in tasks"
SHIPPED_TEXT = "the sample text"
_RECALL_TOKENS = 256  # of the shortest recall prompts
_TOKENIZER = "tokenizer.json"


def is_builtin(tokenizer_dir: Path) -> bool:
    """Whether the tokenizer there is that of the built-in model, whose tasks a model with it was trained on."""
    file, own = tokenizer_dir / _TOKENIZER, builtin.checkpoint_dir() / _TOKENIZER
    return file.is_file() and own.is_file() and file.read_bytes() == own.read_bytes()


@dataclass(frozen=True)
class Prompt:
    """Token ids that a model runs over, and the positions at which its prediction of the next one counts."""

    ids: list[int]
    counted: list[int]


def default_prompts(tokenizer_dir: Path, vocab_size: int, count: int, window: int) -> tuple[str, list[Prompt]]:
    """What the text is, and prompts of at most `window` tokens with about `count` counted positions, or as many as
    there are. Without a tokenizer.json (a tokenizer that only its own library reads): ids spread across the vocabulary,
    which no model predicts."""
    if is_builtin(tokenizer_dir):
        return BUILTIN_TEXT, _conversations(tokenizer_dir, count, window)
    ids = _encoded(tokenizer_dir / _TOKENIZER, SAMPLE_TEXT)
    if not ids:
        return "token ids spread across the vocabulary", windows([i * 7919 % vocab_size for i in range(count)], window)
    known = [token for token in ids if token < vocab_size]
    return SHIPPED_TEXT, windows(known[: count + 1], window)


def _encoded(file: Path, text: str) -> list[int]:
    """Token ids; none where there is no tokenizer that the library reads: what serves then says so."""
    from tokenizers import Tokenizer

    if not file.is_file():
        return []
    try:
        return list(Tokenizer.from_file(str(file)).encode(text).ids)
    except Exception:  # the library raises nothing more exact
        return []


def windows(ids: list[int], window: int) -> list[Prompt]:
    """A text cut into prompts, all of whose positions count but the last, behind which nothing is known."""
    parts = [ids[at : at + window] for at in range(0, len(ids), window)]
    return [Prompt(part, list(range(len(part) - 1))) for part in parts if len(part) > 1]


def _conversations(tokenizer_dir: Path, count: int, window: int) -> list[Prompt]:
    """Of the evaluation split, every task in turn, as the chat template writes them. The answers count: questions are
    random, and the model was never trained to predict them. Recall, whose prompts are long, comes once only."""
    from tokenizers import Tokenizer

    from appliance.builtin.tokenizer import ChatEncoder

    encoder = ChatEncoder(Tokenizer.from_file(str(tokenizer_dir / _TOKENIZER)))
    found: list[Prompt] = []
    seed = 0
    while sum(len(prompt.counted) for prompt in found) < count:
        for task in tasks.TASKS:
            if task == "recall" and seed > 0:
                continue
            length = _RECALL_TOKENS if task == "recall" else None
            (sample,) = tasks.evaluation_set(task, 1, seed, length=length)
            ids, answers = encoder.conversation((*sample.messages, {"role": "assistant", "content": sample.answer}))
            if len(ids) <= window:
                found.append(Prompt(ids, [i for start, end in answers for i in range(start - 1, end - 1)]))
        seed += 1
    return found
