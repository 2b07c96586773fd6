"""Prompts over which a model's predictions are compared with another's: conversations of its own tasks for the built-in
model, which has never seen other text; for all others a page of text. Knows tokenizers, no models."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from appliance import builtin
from appliance.builtin import tasks
from appliance.runtime.sample_text import SAMPLE_TEXT

BUILTIN_TEXT = "conversations of the built-in tasks"
SHIPPED_TEXT = "the sample text"
_RECALL_TOKENS = 256  # of the shortest recall prompts
_RECALL_EVERY = 8  # rounds; one of its prompts is as long as a round of many others
_SEEDS = 1 << 20  # rounds apart that a seed's conversations begin from the next one's
_TOKENIZER = "tokenizer.json"


def is_builtin(tokenizer_dir: Path) -> bool:
    """Whether the tokenizer there is that of the built-in model, whose tasks a model with it was trained on."""
    file, own = tokenizer_dir / _TOKENIZER, builtin.checkpoint_dir() / _TOKENIZER
    return file.is_file() and own.is_file() and file.read_bytes() == own.read_bytes()


@dataclass(frozen=True)
class Prompt:
    """Token ids that a model runs over. Its predictions of the next token are compared at every position but the last,
    behind which nothing is known."""

    ids: list[int]
    answers: tuple[range, ...] = ()  # positions that predict answers of the assistant; none in running text

    @property
    def positions(self) -> int:
        """How many predictions are compared."""
        return len(self.ids) - 1


def default_prompts(
    tokenizer_dir: Path, vocab_size: int, count: int, window: int, seed: int = 0
) -> tuple[str, list[Prompt]]:
    """What the text is, and prompts of at most `window` tokens with about `count` positions to compare, or as many as
    there are. `seed`: which conversations, for the built-in model. Without a tokenizer.json (a tokenizer that only its
    own library reads): ids spread across the vocabulary, which no model predicts."""
    if is_builtin(tokenizer_dir):
        return BUILTIN_TEXT, _conversations(tokenizer_dir, count, window, seed)
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
    """A text cut into prompts."""
    parts = [ids[at : at + window] for at in range(0, len(ids), window)]
    return [Prompt(part) for part in parts if len(part) > 1]


def _conversations(tokenizer_dir: Path, count: int, window: int, seed: int) -> list[Prompt]:
    """Of the evaluation split, every task in turn, as the chat template writes them; recall every eighth round.

    Questions count as well as answers. The model knows its answers by heart: the mean over them hangs on a handful of
    positions and says little between one rounding and another. It was never trained to predict questions, so there its
    distributions are wide, and every position shows what rounding did to the hidden states."""
    from tokenizers import Tokenizer

    from appliance.builtin.tokenizer import ChatEncoder

    encoder = ChatEncoder(Tokenizer.from_file(str(tokenizer_dir / _TOKENIZER)))
    found: list[Prompt] = []
    for number in itertools.count():
        for task in tasks.TASKS:
            if task == "recall" and number % _RECALL_EVERY:
                continue
            length = _RECALL_TOKENS if task == "recall" else None
            (sample,) = tasks.evaluation_set(task, 1, seed * _SEEDS + number, length=length)
            ids, answers = encoder.conversation((*sample.messages, {"role": "assistant", "content": sample.answer}))
            if len(ids) <= window:
                found.append(Prompt(ids, tuple(range(start - 1, end - 1) for start, end in answers)))
        if sum(prompt.positions for prompt in found) >= count:
            break
    return found
