"""What the two OpenAI routes have in common once a generation runs: the request's wishes, texts gathered, the response.

Knows no wire format; `routes_chat.py` and `routes_completions.py` derive from `Answer`.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from appliance.server.choice import Choice, Delta, Position, is_plain
from appliance.server.generation import Generation
from appliance.server.sse import EventStream, until_disconnect
from appliance.server.tokenizer import ServerTokenizer
from appliance.server.wire.requests import ChatRequest, CompletionRequest
from appliance.server.wire.responses import encode
from appliance.types import EngineOutput

Body = TypeVar("Body", ChatRequest, CompletionRequest)


@dataclass
class Gathered:
    """Everything one choice gave."""

    text: str = ""
    positions: list[Position] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Frame:
    """What is the same in all events of a choice that bring text and nothing else."""

    choice: Choice
    before: bytes  # the event up to its text
    after: bytes

    def event(self, token_ids: Sequence[int]) -> bytes:
        """Of these tokens; nothing while a character is incomplete."""
        text = self.choice.take_plain(token_ids)
        return self.before + text + self.after if text else b""


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
        self._begun: set[int] = set()  # choices that had an event
        self._frames: dict[str, _Frame] = {}  # by request id: of choices whose usual event is text and nothing else
        self._usage_sent = False

    @abstractmethod
    async def collect(self) -> Any:
        """The response as one wire object."""

    @abstractmethod
    def chunk(self, choice: Choice, delta: Delta, *, first: bool) -> bytes:
        """What the delta makes of a stream's events, possibly none; `first` of this choice."""

    @abstractmethod
    def usage_chunk(self) -> bytes:
        """The event with the usage, after all others."""

    # ------------------------------------------------------------ as server-sent events

    def listen(self, on_ready: Callable[[], None]) -> None:
        self.generation.listen(on_ready)

    def cancel(self) -> None:
        self.generation.cancel()

    @property
    def ended(self) -> bool:
        return self.generation.ended

    def events(self) -> bytes:
        """Events of all that is ready. The usual call finds one token of one choice."""
        outputs = self.generation.take()
        if len(outputs) == 1 and is_plain(outputs[0]):
            frame = self._frames.get(outputs[0].request_id)
            if frame is not None:
                return frame.event(outputs[0].token_ids)
        parts = [self._events_of(choice, of_choice) for choice, of_choice in self.generation.by_choice(outputs)]
        if self._usage_at_end and not self._usage_sent and self.generation.ended:
            self._usage_sent = True
            parts.append(self.usage_chunk())
        return b"".join(parts)

    def _events_of(self, choice: Choice, outputs: list[EngineOutput]) -> bytes:
        frame = self._frames.get(choice.request.request_id)
        if frame is not None and len(outputs) == 1 and is_plain(outputs[0]):
            return frame.event(outputs[0].token_ids)
        first = choice.index not in self._begun
        self._begun.add(choice.index)
        data = self.chunk(choice, self.generation.advance(choice, outputs), first=first)
        if first and choice.plain and not (self._token_ids or self._usage_each):
            self._frames[choice.request.request_id] = self._frame(choice)
        return data

    def _frame(self, choice: Choice) -> _Frame:
        """Cut out of a chunk that the slow way made, so that both ways write the same."""
        mark = secrets.token_hex(16)
        before, after = self.chunk(choice, Delta(text=mark), first=False).split(mark.encode())
        return _Frame(choice, before, after)

    # ------------------------------------------------------------ as a whole

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
            return EventStream(self, headers)
        whole = await until_disconnect(request, self.collect(), self.generation.cancel)
        return Response(encode(whole) if whole else b"", headers=headers, media_type="application/json")
