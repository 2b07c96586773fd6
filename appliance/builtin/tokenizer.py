"""The tokenizer of the built-in model: byte-level BPE trained on generated text, its chat template, and a fast encoder.

Words, single digits, punctuation and white space are separate pieces, so a word is the same token wherever it stands
and numbers are read digit by digit. Knows no torch.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from appliance.builtin import small_talk, tasks, words

VOCAB_SIZE = 2048
MAX_LENGTH = 4096
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BEGIN, END, SYSTEM, USER, ASSISTANT)  # ids 0..5

# One piece: a word, a digit, punctuation with at most one space after it, or white space.
_PIECES = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+ ?|\s+"
_PIECES_ASCII = re.compile(r"[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]+ ?|\s+")  # the same for ASCII text

CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def training_text(seed: int, samples_per_task: int) -> Iterator[str]:
    """What the tokenizer learns from: every listed word, all of the small talk, samples of every task."""
    lists = (words.COPY_WORDS, words.GIVEN_NAMES, words.FAMILY_NAMES, words.CITIES, words.COUNTRIES, words.COLORS)
    for vocabulary in lists:
        yield from [" ".join(vocabulary)] * 50
    for fact in small_talk.FACTS:
        yield from [fact.answer] * 40
        yield from fact.questions
    rng = random.Random(seed)
    for task in tasks.TASKS:
        if task == "recall":
            continue  # its words and digits are all above
        for _ in range(samples_per_task):
            drawn = tasks.sample(task, rng)
            yield drawn.messages[-1]["content"]
            yield drawn.answer


def train_tokenizer(seed: int = 0, samples_per_task: int = 2000) -> Tokenizer:
    """Train the BPE. Takes seconds on one core; the same seed gives the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(seed, samples_per_task), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the files that `AutoTokenizer.from_pretrained` and servers read."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "model_max_length": MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    special = {
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


class ChatEncoder:
    """Encodes conversations by the chat template, several times faster than the tokenizer itself.

    Splits ASCII text into the tokenizer's pieces and looks each one up; a piece not met before goes through the
    tokenizer once. Other text goes through the tokenizer as a whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[str, list[int]] = {}
        ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        self.begin, self.end, self.pad = ids[BEGIN], ids[END], ids[PAD]
        self._role = {"system": ids[SYSTEM], "user": ids[USER], "assistant": ids[ASSISTANT]}

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens."""
        if not text.isascii():
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        out: list[int] = []
        known = self._pieces
        for piece in _PIECES_ASCII.findall(text):
            ids = known.get(piece)
            if ids is None:
                ids = known[piece] = list(self._tokenizer.encode(piece, add_special_tokens=False).ids)
            out += ids
        return out

    def prompt(self, messages: Iterable[tasks.Message]) -> list[int]:
        """Ids of the messages and the start of the assistant's turn."""
        out = [self.begin]
        for message in messages:
            out += [self._role[message["role"]], *self.encode(message["content"]), self.end]
        out.append(self._role["assistant"])
        return out

    def conversation(self, messages: Iterable[tasks.Message]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a finished conversation, and the [start, end) of each assistant's answer with its end token."""
        out = [self.begin]
        answers = []
        for message in messages:
            out.append(self._role[message["role"]])
            start = len(out)
            out += self.encode(message["content"])
            out.append(self.end)
            if message["role"] == "assistant":
                answers.append((start, len(out)))
        return out, answers

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
