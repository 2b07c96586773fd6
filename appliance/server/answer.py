"""What the two OpenAI routes have in common once a generation runs: the request's wishes, texts gathered, the response.

Knows no wire format; `routes_chat.py` and `routes_completions.py` derive from `Answer`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from appliance.server.choice import Position
from appliance.server.generation import Generation
from appliance.server.sse import EventStream, until_disconnect
from appliance.server.tokenizer import ServerTokenizer
from appliance.server.wire.requests import ChatRequest, CompletionRequest
from appliance.server.wire.responses import encode

Body = TypeVar("Body", ChatRequest, CompletionRequest)


@dataclass
class Gathered:
    """Everything one choice gave."""

    text: str = ""
    positions: list[Position] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


@dataclass
class Answer(ABC, Generic[Body]):
    """One response being made, in either form: `collect` for the whole, `stream` for events."""

    body: Body
    generation: Generation
    tokenizer: ServerTokenizer
    id: str
    model: str
    fingerprint: str | None

    def __post_init__(self) -> None:
        self.created = int(time.time())
        options = self.body.stream_options
        self._usage_each = bool(options and options.continuous_usage_stats)
        self._usage_at_end = bool(options and (options.include_usage or options.continuous_usage_stats))
        self._token_ids = bool(self.body.return_token_ids)

    @abstractmethod
    async def collect(self) -> Any:
        """The response as one wire object."""

    @abstractmethod
    def stream(self) -> AsyncIterator[bytes]:
        """The response as server-sent events."""

    async def gather(self) -> list[Gathered]:
        """Run the generation to its end; what each choice gave, by index."""
        gathered = [Gathered() for _ in self.generation.choices]
        texts: list[list[str]] = [[] for _ in gathered]
        async for batch in self.generation.deltas():
            for choice, delta in batch:
                texts[choice.index].append(delta.text)
                gathered[choice.index].positions += delta.positions
                gathered[choice.index].token_ids += delta.token_ids
        for item, parts in zip(gathered, texts, strict=True):
            item.text = "".join(parts)
        return gathered

    async def respond(self, request: Request, headers: dict[str, str]) -> Response:
        """In the form that the request asks for. A client that leaves cancels the generation."""
        if self.body.stream:
            return EventStream(self.stream(), self.generation.cancel, headers)
        whole = await until_disconnect(request, self.collect(), self.generation.cancel)
        return Response(encode(whole) if whole else b"", headers=headers, media_type="application/json")
