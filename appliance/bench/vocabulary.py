"""A tokenizer for models with random weights: every id has a text of its own, so that each token served costs what a
token of a real model costs. Knows no model."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from appliance.errors import SettingsError

_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_tokenizer(vocab_size: int, directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json of a byte-level vocabulary: the 256 bytes, then a blank and a word of
    letters for each further id. Nothing is merged, so a text is one token per byte. SettingsError below 256 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet):
        raise SettingsError(f"a vocabulary of {vocab_size} has no room for the {len(alphabet)} bytes")
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    blank = "Ġ"  # how byte-level vocabularies write it
    vocabulary |= {blank + _word(index): index for index in range(len(alphabet), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": _CHAT_TEMPLATE}) + "\n")


def _word(number: int) -> str:
    """The number in base 26, in letters."""
    word = ""
    while number:
        number, letter = divmod(number, len(_LETTERS))
        word = _LETTERS[letter] + word
    return word
