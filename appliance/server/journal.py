"""The request journal: owns every accepted request until its one terminal event, across engine restarts.

Knows requests and tokens, not text and not HTTP. All methods run on the event-loop thread; those that change state are
plain functions, so nothing can interleave with a half-made change. Messages to the engine go out through one flush
task, which also packs what was submitted or cancelled in the same loop iteration into one message each.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from appliance.errors import InvalidRequestError, OverloadedError, RequestFailedError, UnavailableError
from appliance.server.engine_client import EngineLink
from appliance.server.lifecycle import Lifecycle
from appliance.server.metrics import ServerMetrics
from appliance.server.request_group import RequestGroup
from appliance.server.request_times import RequestTimes, Tracer
from appliance.types import EngineOutput, EngineRequest, EngineStats, FinishReason, SamplingParams

log = logging.getLogger(__name__)

# What encoding a message raises. Validation should have refused such a request; it is no sign of a dead engine.
_UNSENDABLE = (OverflowError, TypeError, ValueError, msgspec.MsgspecError)


@dataclass(slots=True)
class _Entry:
    """One accepted request without a terminal event."""

    request: EngineRequest  # as submitted
    group: RequestGroup
    arrival: float  # monotonic seconds
    internal: bool = False  # the server's own; not in the metrics
    output_ids: list[int] = field(default_factory=list)
    link: EngineLink | None = None  # the engine it was handed to; None: not yet, or that engine is lost
    crashes: int = 0  # engines lost while they had it
    prompt_logprobs_sent: bool = False
    first_token: float = 0.0  # monotonic seconds
    last_token: float = 0.0
    queue_seconds: float = 0.0  # in the engine, before its first step
    context: Any = None  # of its trace

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


class RequestJournal:
    """`max_waiting` requests may be accepted beyond the engine's own `max_num_seqs`; `max_engine_crashes` is how many
    lost engines a request may have been in before it is taken for their cause and ended.

    So that one bad request does not take its neighbours with it, requests that could not survive another crash are
    *suspects*: they go to the new engine one after the other, each after the one before gave a token (it resumed at the
    point where the engine died, so that is past the danger). A crash meanwhile is blamed on that one alone.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        metrics: ServerMetrics,
        *,
        max_waiting: int = 4096,
        max_engine_crashes: int = 3,
        tracer: Tracer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._max_engine_crashes = max_engine_crashes
        self._tracer = tracer
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._link: EngineLink | None = None
        self._outbox: list[_Entry] = []
        self._aborts: list[str] = []
        self._ready: list[RequestGroup] = []  # with outputs that their consumers do not know of
        self._suspects: list[_Entry] = []  # not yet handed to this engine
        self._on_probation: _Entry | None = None  # the suspect that was, and gave no token yet
        self._flush_lock = asyncio.Lock()
        self._flusher: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.in_flight = lambda: self.in_flight
        metrics.max_requests = lambda: self.max_in_flight

    # ------------------------------------------------------------ admission

    @property
    def in_flight(self) -> int:
        return len(self._entries)

    @property
    def max_in_flight(self) -> int:
        engine = self._metrics.engine
        return self._max_waiting + (engine.max_num_seqs if engine is not None else 0)

    def check_accepting(self, count: int = 1) -> None:
        """Whether `count` requests would be accepted now.

        Raises UnavailableError before the first readiness, while draining and after failure; OverloadedError when the
        queue is full; InvalidRequestError if so many never fit.
        """
        life = self._lifecycle
        if not life.accepts_requests:
            why = "shutting down" if life.draining else f"not ready: {life.reason or life.phase}"
            raise UnavailableError(f"the server is {why}", retry_after=life.retry_after)
        if count > self.max_in_flight:
            raise InvalidRequestError(
                f"this request asks for {count} sequences, at most {self.max_in_flight} are accepted at a time",
                hint="lower n or send fewer prompts",
            )
        if self.in_flight + count > self.max_in_flight:
            raise OverloadedError(
                f"{self.in_flight} requests are in the server, at most {self.max_in_flight} are accepted",
                hint="send it again later",
            )

    def submit(self, requests: Sequence[EngineRequest]) -> RequestGroup:
        """Accept all of these requests or none. Raises as `check_accepting`. While the engine restarts they wait."""
        self.check_accepting(len(requests))
        return self._accept(requests, internal=False)

    def _accept(self, requests: Sequence[EngineRequest], *, internal: bool) -> RequestGroup:
        group = RequestGroup([request.request_id for request in requests], self._end_early)
        now = self._clock()
        context = self._tracer.context() if self._tracer is not None and not internal else None
        for request in requests:
            assert request.request_id not in self._entries, f"request id {request.request_id} is in use"
            entry = _Entry(request, group, now, internal, context=context)
            self._entries[request.request_id] = entry
            self._outbox.append(entry)
        self._idle.clear()
        self._schedule_flush()
        return group

    async def probe(self, token_ids: Sequence[int], timeout_seconds: float = 60.0) -> None:
        """Get one real token out of the engine, past admission: what readiness means. Raises RequestFailedError if
        none comes in time. The prompt may be any valid tokens."""
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        request = EngineRequest(f"probe-{time.monotonic_ns()}", list(token_ids), params, arrival_time=time.time())
        group = self._accept([request], internal=True)
        try:
            async with asyncio.timeout(timeout_seconds):
                async for outputs in group:
                    if any(output.token_ids for output in outputs):
                        return
                    raise RequestFailedError(f"the engine gave no token: {outputs[-1].error or 'no reason given'}")
        except TimeoutError:
            raise RequestFailedError(f"the engine gave no token within {timeout_seconds:g} s") from None
        finally:
            group.cancel()

    # ------------------------------------------------------------ from the engine

    def on_outputs(self, outputs: Sequence[EngineOutput], stats: EngineStats) -> None:
        """One message of the engine. Outputs of requests that ended here meanwhile are dropped.

        The hot loop of the server: a step of 256 requests comes here as one message, every few milliseconds. Their
        consumers run afterwards (`_deliver`), so that a message that is waiting behind this one is taken in first and
        both go out together.
        """
        self._metrics.engine_stats(stats)
        now = self._clock()
        entries = self._entries
        gaps: dict[float, int] = {}  # when the token before came -> tokens; requests that run together share it
        for output in outputs:
            entry = entries.get(output.request_id)
            if entry is None:
                continue
            token_ids = output.token_ids
            if len(token_ids) == 1 and entry.output_ids and not entry.internal:
                gaps[entry.last_token] = gaps.get(entry.last_token, 0) + 1
                entry.output_ids += token_ids
                entry.last_token = now
            elif token_ids:
                self._record_tokens(entry, output, now)
            if output.prompt_logprobs is not None:
                entry.prompt_logprobs_sent = True
            if entry is self._on_probation:
                self._next_suspect()
            if output.finish_reason is not None:
                self._close(entry, output.finish_reason)
            self._give(entry.group, output)
        for last_token, count in gaps.items():
            self._metrics.tokens(now - last_token, count)

    def _record_tokens(self, entry: _Entry, output: EngineOutput, now: float) -> None:
        """The first tokens of a request, or several at once."""
        count = len(output.token_ids)
        if not entry.internal:
            if entry.output_ids:
                self._metrics.tokens((now - entry.last_token) / count, count)
            else:
                entry.queue_seconds = output.queue_seconds
                self._metrics.request_started(
                    len(entry.request.prompt_token_ids),
                    output.num_cached_tokens,
                    now - entry.arrival,
                    output.queue_seconds,
                )
                self._metrics.tokens(0.0, count - 1)
        if not entry.output_ids:
            entry.first_token = now
        entry.last_token = now
        entry.output_ids += output.token_ids

    def _give(self, group: RequestGroup, output: EngineOutput) -> None:
        """Add an output to a group, whose consumer is woken in the loop's next turn."""
        if group.push(output):
            if not self._ready:
                asyncio.get_running_loop().call_soon(self._deliver)
            self._ready.append(group)

    def _deliver(self) -> None:
        ready, self._ready = self._ready, []
        for group in ready:
            group.wake()

    def on_engine_lost(self) -> None:
        """The engine process is gone. Its requests are kept for the next one, except those that were in too many."""
        self._link = None
        self._metrics.engine_lost()
        self._aborts.clear()
        culprit, self._on_probation = self._on_probation, None
        if culprit is not None and culprit.link is None:
            culprit = None  # it was not sent yet
        for entry in list(self._entries.values()):
            if entry.link is None:
                continue
            entry.link = None
            if culprit is not None and entry is not culprit:
                continue
            entry.crashes += 1
            if entry.crashes >= self._max_engine_crashes:
                log.warning("giving up request %s after %d engine crashes", entry.request.request_id, entry.crashes)
                self._terminate(entry, "error", f"the engine crashed {entry.crashes} times while it ran this request")

    async def on_engine_ready(self, link: EngineLink) -> None:
        """An engine is up: hand it everything unfinished, oldest first, suspects last. Returns after it was sent."""
        self._link = link
        self._outbox, self._suspects = [], []
        for entry in self._entries.values():
            suspect = 0 < entry.crashes >= self._max_engine_crashes - 1
            (self._suspects if suspect else self._outbox).append(entry)
        resumed = sum(1 for entry in self._entries.values() if entry.crashes)
        self._metrics.resubmitted += resumed
        if resumed:
            log.warning("resubmitting %d requests to the restarted engine", resumed)
        self._next_suspect()
        await self._flush()

    def _next_suspect(self) -> None:
        """The suspect on probation, if any, is cleared: hand over the next."""
        self._on_probation = None
        while self._suspects and self._on_probation is None:
            entry = self._suspects.pop(0)
            if self._entries.get(entry.request.request_id) is entry:
                self._on_probation = entry
                self._outbox.append(entry)
                self._schedule_flush()

    # ------------------------------------------------------------ endings

    async def drain(self, timeout_seconds: float) -> int:
        """Accept nothing more, let what runs finish, end the rest after the timeout. Returns how many were ended so."""
        self._lifecycle.enter("draining", f"shutting down, {self.in_flight} requests in flight")
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()
        except TimeoutError:
            pass
        left = self.in_flight
        for entry in list(self._entries.values()):
            self._abort_in_engine(entry)
            self._terminate(entry, "abort", "the server shut down before this request was finished")
        await self._flush()
        return left

    def fail_all(self, message: str) -> None:
        """The engine will not come back: end every request with an error."""
        for entry in list(self._entries.values()):
            self._terminate(entry, "error", message)

    def check_integrity(self) -> None:
        """Raises AssertionError if the journal's parts disagree."""
        assert self._idle.is_set() == (not self._entries)
        for request_id, entry in self._entries.items():
            assert entry.request.request_id == request_id and request_id in entry.group.open
            assert entry.link is None or entry.link is self._link
            assert entry.crashes < self._max_engine_crashes
        live = {id(entry) for entry in self._entries.values()}
        if self._link is not None:
            unsent = {id(entry) for entry in self._entries.values() if entry.link is None}
            queued = {id(entry) for entry in self._outbox} | {id(entry) for entry in self._suspects}
            assert unsent <= queued & live
            assert self._on_probation is not None or not any(id(entry) in live for entry in self._suspects)

    def _end_early(self, request_id: str, reason: FinishReason) -> None:
        """End a request whose group needs no event for it."""
        entry = self._entries.get(request_id)
        if entry is not None:
            self._abort_in_engine(entry)
            self._close(entry, reason)

    def _terminate(self, entry: _Entry, reason: FinishReason, message: str) -> None:
        self._close(entry, reason)
        self._give(entry.group, EngineOutput(entry.request.request_id, finish_reason=reason, error=message))

    def _close(self, entry: _Entry, reason: FinishReason) -> None:
        del self._entries[entry.request.request_id]
        if not self._entries:
            self._idle.set()
        if entry is self._on_probation:
            self._next_suspect()
        if not entry.internal:
            prompt, output = len(entry.request.prompt_token_ids), len(entry.output_ids)
            decode_seconds = entry.last_token - entry.first_token
            now = self._clock()
            self._metrics.request_finished(reason, prompt, output, now - entry.arrival, decode_seconds)
            if self._tracer is not None:
                self._tracer.finished(_times_of(entry, reason, now))

    # ------------------------------------------------------------ to the engine

    def _abort_in_engine(self, entry: _Entry) -> None:
        if entry.link is not None and entry.link is self._link:
            self._aborts.append(entry.request.request_id)
            self._schedule_flush()

    def _schedule_flush(self) -> None:
        if self._link is not None and (self._flusher is None or self._flusher.done()):
            self._flusher = asyncio.get_running_loop().create_task(self._flush())

    async def _flush(self) -> None:
        """Send what is waiting. Without an engine it stays in the entries, which `on_engine_ready` reads."""
        async with self._flush_lock:
            while (link := self._link) is not None and (self._outbox or self._aborts):
                waiting, self._outbox = self._outbox, []
                add = [e for e in waiting if e.link is None and self._entries.get(e.request.request_id) is e]
                aborts, self._aborts = self._aborts, []
                for entry in add:
                    entry.link = link
                try:
                    if add:
                        await self._add(link, add)
                    if aborts:
                        await link.abort(aborts)
                except ConnectionError as error:
                    # The supervisor notices the dead engine and calls on_engine_lost; the entries are still here.
                    log.warning("%s; %d requests wait for its restart", error, len(add))
                    return
                except Exception:
                    log.exception("the engine took no message; %d requests wait for its restart", len(add))
                    return

    async def _add(self, link: EngineLink, entries: Sequence[_Entry]) -> None:
        """Hand these over. One that cannot be put into a message ends alone: it must not hold its neighbours."""
        try:
            await link.add([entry.resumed() for entry in entries])
        except _UNSENDABLE as error:
            if len(entries) > 1:
                for entry in entries:
                    await self._add(link, [entry])
                return
            log.exception("request %s cannot be sent to the engine", entries[0].request.request_id)
            if self._entries.get(entries[0].request.request_id) is entries[0]:
                self._terminate(entries[0], "error", f"the request cannot be sent to the engine: {error}")


def _times_of(entry: _Entry, reason: FinishReason, end: float) -> RequestTimes:
    return RequestTimes(
        request=entry.request,
        context=entry.context,
        reason=reason,
        arrival=entry.arrival,
        queue_seconds=entry.queue_seconds,
        first_token=entry.first_token if entry.output_ids else None,
        last_token=entry.last_token,
        end=end,
        num_output_tokens=len(entry.output_ids),
    )
