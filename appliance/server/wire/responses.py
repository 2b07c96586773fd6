"""Response bodies of the OpenAI routes, field for field. `UNSET` fields are left out, None is sent as null."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType


class Wire(msgspec.Struct):
    pass


class PromptTokensDetails(Wire):
    cached_tokens: int = 0


class Usage(Wire):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails


# ---------------------------------------------------------------- chat completions


class TopLogprob(Wire):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Wire):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Wire):
    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(Wire):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(Wire):
    index: int
    message: ChatMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Wire):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None
    object: str = "chat.completion"
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatDelta(Wire):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Wire):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Wire):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str | None
    object: str = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


# ---------------------------------------------------------------- text completions


class CompletionLogprobs(Wire):
    """Aligned lists, one entry per token; the first prompt token has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]  # characters from the beginning of the choice's text


class CompletionChoice(Wire):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(Wire):
    """Also a streamed chunk: `usage` is then unset, null or given as the stream options say."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str | None
    object: str = "text_completion"
    usage: Usage | UnsetType | None = UNSET


# ---------------------------------------------------------------- errors


class ErrorBody(Wire):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Wire):
    error: ErrorBody


_encoder = msgspec.json.Encoder()


def encode(value: Wire) -> bytes:
    """As JSON."""
    return _encoder.encode(value)
