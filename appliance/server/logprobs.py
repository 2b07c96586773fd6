"""Log probabilities in the two forms of the OpenAI API. Knows tokens and wire types."""

from __future__ import annotations

from collections.abc import Sequence

from appliance.server.choice import Position
from appliance.server.tokenizer import ServerTokenizer
from appliance.server.wire.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from appliance.types import TokenLogprobs

_LOWEST = -9999.0  # JSON has no infinity; the value vLLM sends


def chat_logprobs(tokenizer: ServerTokenizer, positions: Sequence[Position], top: int) -> ChatLogprobs:
    """`top` most likely tokens per position."""
    content = []
    for position in positions:
        own = _top_logprob(tokenizer, position.logprobs.token_id, position.logprobs.logprob)
        likely = [_top_logprob(tokenizer, *pair) for pair in position.logprobs.top[:top]]
        content.append(TokenLogprob(own.token, own.logprob, own.bytes, likely))
    return ChatLogprobs(content)


def completion_logprobs(
    tokenizer: ServerTokenizer, positions: Sequence[Position], top: int, offset: int
) -> CompletionLogprobs:
    """`offset`, the length of an echoed prompt, is added to text offsets. `top_logprobs` has the token itself too."""
    result = CompletionLogprobs([], [], [], [])
    for position in positions:
        _append(result, tokenizer, position.logprobs, top, offset + position.start)
    return result


def echo_logprobs(
    tokenizer: ServerTokenizer,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    top: int,
    skip_special_tokens: bool,
) -> CompletionLogprobs:
    """Of an echoed prompt. `logprobs` is aligned with `token_ids`; the first token has none."""
    assert len(token_ids) == len(logprobs), (len(token_ids), len(logprobs))
    result = CompletionLogprobs([], [], [], [])
    stream = tokenizer.text_stream((), skip_special_tokens=skip_special_tokens)
    offset = 0
    for token_id, entry in zip(token_ids, logprobs):
        if entry is not None:
            _append(result, tokenizer, entry, top, offset)
        else:
            result.tokens.append(tokenizer.token_text(token_id))
            result.token_logprobs.append(None)
            result.text_offset.append(offset)
            assert result.top_logprobs is not None
            result.top_logprobs.append(None)
        offset += len(stream.push((token_id,)))
    return result


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        (first.top_logprobs or []) + (second.top_logprobs or []),
        first.text_offset + second.text_offset,
    )


def _append(
    result: CompletionLogprobs, tokenizer: ServerTokenizer, entry: TokenLogprobs, top: int, offset: int
) -> None:
    text = tokenizer.token_text(entry.token_id)
    result.tokens.append(text)
    result.token_logprobs.append(_finite(entry.logprob))
    result.text_offset.append(offset)
    likely: dict[str, float] = {}
    for token_id, logprob in (*entry.top[:top], (entry.token_id, entry.logprob)):
        # Two tokens may have the same text (pieces of characters): the more likely one came first and stays.
        likely.setdefault(tokenizer.token_text(token_id), _finite(logprob))
    assert result.top_logprobs is not None
    result.top_logprobs.append(likely)


def _top_logprob(tokenizer: ServerTokenizer, token_id: int, logprob: float) -> TopLogprob:
    raw = tokenizer.token_bytes(token_id)
    return TopLogprob(raw.decode("utf-8", "replace"), _finite(logprob), list(raw))


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
