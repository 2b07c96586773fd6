"""The tokenizer of a served model: `tokenizer.json` through the tokenizers library, special tokens, chat template.

Knows text and token ids. Incremental decoding is in `detokenizer.py`, template rendering in `chat_template.py`. Imports
neither transformers nor torch: loading takes as long as parsing tokenizer.json.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders

from appliance.errors import CheckpointError
from appliance.server.chat_template import ChatTemplate, find_template_sources
from appliance.server.detokenizer import ByteTextStream, TextStream, WindowTextStream, json_text

_INLINE_CHARACTERS = 4096  # shorter texts are encoded in the event loop: the thread hop would cost more
_PROMPT_TAIL = 6  # prompt tokens that give the first output tokens their context (leading spaces)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def load_tokenizer(directory: Path, chat_template: Path | None = None) -> ServerTokenizer:
    """Load from an engine directory (files in `tokenizer/`), a checkpoint directory, or a `tokenizer/` itself.

    `chat_template` is a Jinja file that replaces the model's own. Raises CheckpointError for missing or damaged files.
    """
    files = directory / "tokenizer" if (directory / "tokenizer").is_dir() else directory
    path = files / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{files} has no tokenizer.json",
            hint="convert the tokenizer with transformers: tokenizer.save_pretrained(DIR)",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is not a readable tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    config = _read_json(files / "tokenizer_config.json")
    special = _named_tokens(_read_json(files / "special_tokens_map.json")) | _named_tokens(config)
    sources = find_template_sources(files, config, chat_template)
    roots = dict.fromkeys([files, directory, files.parent if files.name == "tokenizer" else directory])
    eos_ids: set[int] = set()
    vocab_size = 0
    for root in roots:
        model_config = _read_json(root / "config.json")
        vocab_size = max(vocab_size, int(model_config.get("vocab_size") or 0))
        for source in (model_config, _read_json(root / "generation_config.json")):
            value = source.get("eos_token_id")
            eos_ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return ServerTokenizer(tokenizer, special, sources, sorted(eos_ids), vocab_size)


class ServerTokenizer:
    """Immutable after construction, so threads may share it.

    `special_tokens` maps names such as "bos_token" to text, `templates` template names to Jinja source,
    `eos_token_ids` come from the model's configuration (the tokenizer's own end token is added), `vocab_size` is the
    model's if it is larger than the tokenizer's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        special_tokens: dict[str, str] | None = None,
        templates: dict[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        vocab_size: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self.special_tokens = special_tokens or {}
        self.chat_template = ChatTemplate(templates, self.special_tokens) if templates else None
        own_eos = tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        self.eos_token_ids = tuple(sorted({*eos_token_ids, *([] if own_eos is None else [own_eos])}))
        self.vocab_size = max(vocab_size, tokenizer.get_vocab_size(with_added_tokens=True))
        self._special_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._byte_level = _is_byte_level(tokenizer.decoder)
        self._replaces_underline = "▁" in repr(tokenizer.decoder)
        self._bytes: dict[int, bytes] = {}  # filled as tokens are seen
        self._json: dict[int, bytes | None] = {}  # likewise

    # ------------------------------------------------------------ text to tokens

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Blocking, about 1 µs per character; releases the interpreter lock."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """As `encode`, long texts in a thread so that the event loop goes on."""
        if len(text) <= _INLINE_CHARACTERS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens=add_special_tokens)

    # ------------------------------------------------------------ tokens to text

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, also when that is only a piece of a character. Empty for unknown ids."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_token_bytes(token_id)
        return known

    def token_json(self, token_id: int) -> bytes | None:
        """A token's text as the inside of a JSON string; None if its bytes are not whole characters."""
        try:
            return self._json[token_id]
        except KeyError:
            self._json[token_id] = found = self._find_token_json(token_id)
            return found

    def _find_token_json(self, token_id: int) -> bytes | None:
        try:
            return json_text(self.token_bytes(token_id).decode())
        except UnicodeDecodeError:
            return None

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text; a piece of a character becomes the replacement character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_name(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it; None for unknown ids."""
        return self._tokenizer.id_to_token(token_id)

    def _find_token_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return byte_level_bytes(token)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return (token.replace("▁", " ") if self._replaces_underline else token).encode()

    def text_stream(
        self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True, exact: bool = True
    ) -> TextStream:
        """A decoder for tokens that follow this prompt. With `exact` false the general method is used even where the
        tokenizer allows the faster one (they agree; tests compare them)."""
        if self._byte_level and exact:
            skipped = self._special_ids if skip_special_tokens else frozenset[int]()
            return ByteTextStream(self.token_bytes, self.token_json, skipped)

        def decode(token_ids: list[int]) -> str:
            return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

        # A tail that begins inside a character would spoil the run of byte tokens that it begins with.
        tail: list[int] = []
        for size in range(_PROMPT_TAIL, _PROMPT_TAIL + 4):
            tail = list(prompt_token_ids[-size:])
            if not decode(tail).startswith("\ufffd"):
                break
        return WindowTextStream(decode, tail)


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE vocabularies (GPT-2, section 2.2 of its paper
    and the encoder published with it): printable Latin-1 stands for itself, the other bytes follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level vocabulary entry. An added token not written in the byte alphabet is plain text."""
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()


def _is_byte_level(decoder: Any) -> bool:
    # A sequence that holds other steps beside ByteLevel may change text across token borders.
    return isinstance(decoder, decoders.ByteLevel)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by name; in the files each is a string or an object with "content"."""
    found: dict[str, str] = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found
