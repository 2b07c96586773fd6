"""Tokens to text as they come: pieces of characters are held until whole, stop strings are cut across token borders.

Knows token bytes and text, neither requests nor HTTP. Both text streams give, put together, what decoding all tokens at
once gives.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence, Set
from typing import Protocol

import msgspec

_REPLACEMENT = "\ufffd"
_json_encoder = msgspec.json.Encoder()
_LONGEST_PIECE = 3  # an incomplete UTF-8 character is at most 3 bytes, so at most 3 tokens


class TextStream(Protocol):
    def push(self, token_ids: Sequence[int]) -> str:
        """The text these tokens complete; empty while a character is incomplete."""

    def push_json(self, token_ids: Sequence[int]) -> bytes:
        """As `push`, but written as the inside of a JSON string."""

    def flush(self) -> str:
        """What is still held, at the end: incomplete characters become replacement characters."""


def json_text(text: str) -> bytes:
    """Text as it stands between the quotes of a JSON string."""
    return _json_encoder.encode(text)[1:-1]


class ByteTextStream:
    """For byte-level BPE, where a text is the concatenation of its tokens' bytes: an incremental UTF-8 decoder is then
    all it takes, and it is exact for any tokens, invalid UTF-8 included."""

    __slots__ = ("_decode", "_decoder", "_skipped", "_token_bytes", "_token_json", "_whole")

    def __init__(
        self, token_bytes: Callable[[int], bytes], token_json: Callable[[int], bytes | None], skipped: Set[int]
    ) -> None:
        """`token_json`: a token's text as the inside of a JSON string; None if its bytes are not whole characters."""
        self._token_bytes = token_bytes
        self._token_json = token_json
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decode = self._decoder.decode
        self._whole = True  # no piece of a character is held, as far as `push_json` knows

    def push_json(self, token_ids: Sequence[int]) -> bytes:
        # The usual token is whole characters and follows whole ones: what it adds is known, and nothing is decoded.
        if self._whole and len(token_ids) == 1:
            token_id = token_ids[0]
            if token_id in self._skipped:
                return b""
            known = self._token_json(token_id)
            if known is not None:
                return known
        text = self.push(token_ids)
        self._whole = not self._decoder.getstate()[0]
        return json_text(text)

    def push(self, token_ids: Sequence[int]) -> str:
        self._whole = False
        skipped, token_bytes = self._skipped, self._token_bytes
        if len(token_ids) == 1:
            token_id = token_ids[0]
            return "" if token_id in skipped else self._decode(token_bytes(token_id))
        return self._decode(b"".join([token_bytes(token_id) for token_id in token_ids if token_id not in skipped]))

    def flush(self) -> str:
        self._whole = True
        return self._decode(b"", True)


class WindowTextStream:
    """For any tokenizer: decode a short window before and after each token and give the difference. The window starts
    before the last text given, since decoders treat the beginning of a sequence in a way of its own (leading spaces).

    `prompt_tail` are the last tokens before the first one pushed.
    """

    __slots__ = ("_decode", "_given", "_given_text", "_ids")

    def __init__(self, decode: Callable[[list[int]], str], prompt_tail: list[int]) -> None:
        self._decode = decode
        self._ids = prompt_tail  # the window: tokens whose text was given, then those that wait
        self._given = len(prompt_tail)  # how many of the window's tokens were given
        self._given_text = decode(prompt_tail) if prompt_tail else ""

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push_one(token_id) for token_id in token_ids])

    def push_json(self, token_ids: Sequence[int]) -> bytes:
        return json_text(self.push(token_ids))

    def _push_one(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if len(text) <= len(self._given_text) and len(self._ids) - self._given <= _LONGEST_PIECE:
            return ""
        if not text.endswith(_REPLACEMENT):
            return self._give(len(self._ids), text)
        if len(self._ids) - self._given <= _LONGEST_PIECE:
            return ""
        # More tokens wait than a character can have pieces: the oldest are no beginning of one.
        count = len(self._ids) - _LONGEST_PIECE
        return self._give(count, self._decode(self._ids[:count]))

    def _give(self, count: int, text: str) -> str:
        """Give the window's first `count` tokens, whose text is `text`; they become the next window's beginning."""
        new = text[len(self._given_text) :]
        self._ids = self._ids[self._given :]
        self._given = count - self._given
        self._given_text = self._decode(self._ids[: self._given])
        return new

    def flush(self) -> str:
        new = self._decode(self._ids)[len(self._given_text) :]
        self._given, self._given_text = len(self._ids), self._decode(self._ids)
        return new


class StopChecker:
    """Cuts text at the first stop string to be completed, wherever the pieces' borders are.

    What could be the beginning of a stop string is held back until it is decided. Of several stop strings the one
    completed first counts, and of those completed at the same character the longest: that does not depend on how the
    text was cut into pieces.
    """

    __slots__ = ("_held", "_include", "_lasts", "_stops", "matched")

    def __init__(self, stops: Sequence[str], include_in_output: bool) -> None:
        assert all(stops), "a stop string is not empty"
        self._stops = sorted(stops, key=len, reverse=True)
        self._include = include_in_output
        self._held = ""
        self._lasts = {character for stop in stops for character in stop[:-1]}
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that can be given now. After `matched` is set nothing more comes."""
        if self.matched is not None:
            return ""
        text = self._held + text
        best = -1  # end of the first match
        for stop in self._stops:
            start = text.find(stop)
            end = start + len(stop)
            if start >= 0 and (best < 0 or end < best):
                best, self.matched = end, stop
        if self.matched is not None:
            self._held = ""
            return text[: best if self._include else best - len(self.matched)]
        held = self._held_length(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _held_length(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        if not text or text[-1] not in self._lasts:
            return 0
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def flush(self) -> str:
        """What is held back, at the end of the text."""
        held, self._held = self._held, ""
        return held
