"""One accepted request in the journal: what was asked, what came so far, where it is.

Changed by `journal.RequestJournal` and `journal_lane.Lane` only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from appliance.server.engine_client import EngineLink
from appliance.server.request_group import RequestGroup
from appliance.server.request_times import RequestTimes
from appliance.types import EngineRequest, FinishReason

if TYPE_CHECKING:
    from appliance.server.journal_lane import Lane


@dataclass(slots=True, eq=False)
class Entry:
    """One accepted request without a terminal event."""

    request: EngineRequest  # as submitted
    group: RequestGroup
    arrival: float  # monotonic seconds
    internal: bool = False  # the server's own; not in the metrics
    home: Lane | None = None  # the only replica that it may run on; None: any
    output_ids: list[int] = field(default_factory=list)
    lane: Lane | None = None  # the replica that was chosen for it; None: it waits for one
    link: EngineLink | None = None  # the engine it was handed to; None: not yet, or that engine is lost
    moving_to: Lane | None = None  # its engine was told to give it up, so that this replica takes it
    closed: bool = False  # it had its terminal event
    losses: int = 0  # engines lost while they had it
    crashes: int = 0  # those of them that it may be the cause of
    prompt_logprobs_sent: bool = False
    digests: list[bytes] = field(default_factory=list)  # of its prompt's pages, where there are several replicas
    first_token: float = 0.0  # monotonic seconds
    last_token: float = 0.0
    queue_seconds: float = 0.0  # in the engine, before its first step
    context: Any = None  # of its trace

    @property
    def num_tokens(self) -> int:
        """Of prompt and output: its share of a replica's load."""
        return len(self.request.prompt_token_ids) + len(self.output_ids)

    def resumed(self) -> EngineRequest:
        """What to hand to an engine now: the tokens that exist already become part of the prompt."""
        if not self.output_ids:
            return self.request
        params = self.request.params
        if self.prompt_logprobs_sent:
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        return msgspec.structs.replace(
            self.request,
            prompt_token_ids=self.request.prompt_token_ids + self.output_ids,
            params=params,
            num_resumed_tokens=self.request.num_resumed_tokens + len(self.output_ids),
        )

    def times(self, reason: FinishReason, end: float) -> RequestTimes:
        return RequestTimes(
            request=self.request,
            context=self.context,
            reason=reason,
            arrival=self.arrival,
            queue_seconds=self.queue_seconds,
            first_token=self.first_token if self.output_ids else None,
            last_token=self.last_token,
            end=end,
            num_output_tokens=len(self.output_ids),
        )
