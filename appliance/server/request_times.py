"""When what happened in the life of a request: what the journal hands to a tracer. Knows no tracing library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from appliance.types import EngineRequest, FinishReason


@dataclass(frozen=True)
class RequestTimes:
    """The life of an ended request, for whoever traces it; times in monotonic seconds."""

    request: EngineRequest
    context: Any  # what the tracer gave when it was accepted
    reason: FinishReason
    arrival: float
    queue_seconds: float
    first_token: float | None
    last_token: float
    end: float
    num_output_tokens: int


class Tracer(Protocol):
    """What the journal needs of `server.tracing.RequestTracer`."""

    def context(self) -> Any: ...
    def finished(self, times: RequestTimes) -> None: ...
