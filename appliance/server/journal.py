"""The request journal: owns every accepted request until its one terminal event, across engine restarts.

Knows requests, tokens and replicas, not text and not HTTP. All methods run on the event-loop thread; those that change
state are plain functions, so nothing can interleave with a half-made change. Which replica a request goes to, and when,
is decided in journal_dispatch.py; messages to a replica's engine go out through its lane, journal_lane.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from appliance.errors import InvalidRequestError, OverloadedError, RequestFailedError, UnavailableError
from appliance.server.engine_client import EngineLink
from appliance.server.journal_dispatch import Dispatcher
from appliance.server.journal_entry import Entry
from appliance.server.journal_lane import Lane
from appliance.server.lifecycle import Lifecycle
from appliance.server.metrics import ServerMetrics
from appliance.server.request_group import RequestGroup
from appliance.server.request_times import Tracer
from appliance.sizes import counted
from appliance.types import EngineOutput, EngineRequest, EngineStats, FinishReason, SamplingParams

log = logging.getLogger(__name__)


class RequestJournal:
    """`max_waiting` requests may be accepted beyond the engines' own `max_num_seqs`; `max_engine_crashes` is how many
    lost engines a request may have been in before it is taken for their cause and ended. There is one replica, number
    0, unless `set_replicas` says otherwise.
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
        self._entries: dict[str, Entry] = {}
        self.set_replicas(1)
        self._ready: list[RequestGroup] = []  # with outputs that their consumers do not know of
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.in_flight = lambda: self.in_flight
        metrics.max_requests = lambda: self.max_in_flight
        metrics.in_flight_on = self.in_flight_on

    def set_replicas(self, count: int, *, prefix_caching: bool = True) -> None:
        """Before anything is accepted and any engine is up."""
        self._dispatch = Dispatcher(
            count,
            self._metrics,
            max_engine_crashes=self._max_engine_crashes,
            on_unsendable=self._end_unsendable,
            prefix_caching=prefix_caching,
        )

    def of_replica(self, replica: int) -> ReplicaJournal:
        """The journal as the supervisor of one replica sees it."""
        return ReplicaJournal(self, replica)

    def in_flight_on(self, replica: int) -> int:
        return len(self._dispatch.lanes[replica].entries)

    # ------------------------------------------------------------ admission

    @property
    def in_flight(self) -> int:
        return len(self._entries)

    @property
    def max_in_flight(self) -> int:
        return self._max_waiting + sum(engine.max_num_seqs for engine in self._metrics.engines.values())

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
                f"this request asks for {counted(count, 'sequence')}; at most {self.max_in_flight} are taken at once",
                hint="lower n or send fewer prompts",
            )
        if self.in_flight + count > self.max_in_flight:
            raise OverloadedError(
                f"the server has {counted(self.in_flight, 'request')}, at most {self.max_in_flight} are accepted",
                hint="send it again later",
            )

    def submit(self, requests: Sequence[EngineRequest]) -> RequestGroup:
        """Accept all of these requests or none. Raises as `check_accepting`. While the engine restarts they wait."""
        self.check_accepting(len(requests))
        return self._accept(requests, internal=False)

    def _accept(self, requests: Sequence[EngineRequest], *, internal: bool, home: Lane | None = None) -> RequestGroup:
        group = RequestGroup([request.request_id for request in requests], self._end_early)
        now = self._clock()
        context = self._tracer.context() if self._tracer is not None and not internal else None
        entries = [Entry(request, group, now, internal, home, context=context) for request in requests]
        for entry in entries:
            assert entry.request.request_id not in self._entries, f"request id {entry.request.request_id} is in use"
            self._entries[entry.request.request_id] = entry
        self._idle.clear()
        self._dispatch.dispatch(entries)
        return group

    async def probe(self, token_ids: Sequence[int], timeout_seconds: float = 60.0, replica: int = 0) -> None:
        """Get one real token out of an engine, past admission: what readiness means. Raises RequestFailedError if
        none comes in time. The prompt may be any valid tokens."""
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        request = EngineRequest(f"probe-{time.monotonic_ns()}", list(token_ids), params, arrival_time=time.time())
        group = self._accept([request], internal=True, home=self._dispatch.lanes[replica])
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

    def on_outputs(self, outputs: Sequence[EngineOutput], stats: EngineStats, replica: int = 0) -> None:
        """One message of an engine. Outputs of requests that ended here meanwhile are dropped.

        The hot loop of the server: a step of 256 requests comes here as one message, every few milliseconds. Their
        consumers run afterwards (`_deliver`), so that a message that is waiting behind this one is taken in first and
        both go out together.
        """
        self._metrics.engine_stats(stats, replica)
        now = self._clock()
        dispatch, entries = self._dispatch, self._entries
        lane, suspect = dispatch.lanes[replica], dispatch.on_probation
        num_tokens = 0
        gaps: dict[float, int] = {}  # when the token before came -> tokens; requests that run together share it
        for output in outputs:
            entry = entries.get(output.request_id)
            if entry is None or entry.lane is not lane:
                continue
            token_ids = output.token_ids
            count = len(token_ids)
            num_tokens += count
            if count == 1 and entry.output_ids and not entry.internal:
                gaps[entry.last_token] = gaps.get(entry.last_token, 0) + 1
                entry.output_ids += token_ids
                entry.last_token = now
            elif token_ids:
                self._record_tokens(entry, output, now)
            if output.prompt_logprobs is not None:
                entry.prompt_logprobs_sent = True
            if entry is suspect:
                dispatch.next_suspect()
            if output.finish_reason is not None:
                if entry.moving_to is not None and output.finish_reason == "abort":
                    dispatch.moved(entry)
                    continue
                self._close(entry, output.finish_reason)
            self._give(entry.group, output)
        lane.tokens += num_tokens
        if num_tokens and not lane.proven:
            dispatch.proven(lane, self._entries.values())
        for last_token, count in gaps.items():
            self._metrics.tokens(now - last_token, count)

    def _record_tokens(self, entry: Entry, output: EngineOutput, now: float) -> None:
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

    def on_engine_lost(self, replica: int = 0, *, blame: bool = True) -> None:
        """A replica's engine process is gone. Its requests go to another that is up, or wait, except those that were in
        too many crashes. `blame`: it is a crash, which a request may be the cause of."""
        self._metrics.engine_lost(replica)
        for entry in self._dispatch.lost(replica, blame=blame):
            log.warning("giving up request %s after %d engine crashes", entry.request.request_id, entry.crashes)
            self._terminate(entry, "error", f"the engine crashed {entry.crashes} times while it ran this request")
        self._dispatch.resubmit(self._entries.values())

    async def on_engine_ready(self, link: EngineLink, replica: int = 0) -> None:
        """A replica's engine is up: hand it what waits for one, oldest first, suspects last. Returns after it was sent.
        Where other replicas serve, it takes part from its first token on."""
        lane = self._dispatch.lanes[replica]
        lane.link = link
        info = self._metrics.engines.get(replica)
        if info is not None:
            self._dispatch.set_capacity(replica, info.num_pages)
        self._dispatch.resubmit(self._entries.values())
        await lane.flush()

    def on_replica_given_up(self, replica: int) -> None:
        """No engine of it will come any more; the others go on."""
        self._dispatch.given_up(replica)

    # ------------------------------------------------------------ endings

    async def drain(self, timeout_seconds: float) -> int:
        """Accept nothing more, let what runs finish, end the rest after the timeout. Returns how many were ended so."""
        self._lifecycle.enter("draining", f"shutting down, {counted(self.in_flight, 'request')} in flight")
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()
        except TimeoutError:
            pass
        left = self.in_flight
        for entry in list(self._entries.values()):
            self._abort_in_engine(entry)
            self._terminate(entry, "abort", "the server shut down before this request was finished")
        for lane in self._dispatch.up:
            await lane.flush()
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
            assert not entry.closed
        self._dispatch.check_integrity(self._entries.values())

    def _end_early(self, request_id: str, reason: FinishReason) -> None:
        """End a request whose group needs no event for it."""
        entry = self._entries.get(request_id)
        if entry is not None:
            self._abort_in_engine(entry)
            self._close(entry, reason)

    def _terminate(self, entry: Entry, reason: FinishReason, message: str) -> None:
        self._close(entry, reason)
        self._give(entry.group, EngineOutput(entry.request.request_id, finish_reason=reason, error=message))

    def _close(self, entry: Entry, reason: FinishReason) -> None:
        del self._entries[entry.request.request_id]
        entry.closed = True
        if not self._entries:
            self._idle.set()
        self._dispatch.ended(entry)
        if not entry.internal:
            prompt, output = len(entry.request.prompt_token_ids), len(entry.output_ids)
            decode_seconds = entry.last_token - entry.first_token
            now = self._clock()
            self._metrics.request_finished(reason, prompt, output, now - entry.arrival, decode_seconds)
            if self._tracer is not None:
                self._tracer.finished(entry.times(reason, now))

    def _end_unsendable(self, entry: Entry, error: Exception) -> None:
        self._terminate(entry, "error", f"the request cannot be sent to the engine: {error}")

    def _abort_in_engine(self, entry: Entry) -> None:
        if entry.lane is not None:
            entry.lane.abort(entry)


class ReplicaJournal:
    """The journal as the supervisor of one replica sees it (`launch.engine.Journal`)."""

    def __init__(self, journal: RequestJournal, replica: int) -> None:
        self._journal = journal
        self._replica = replica

    @property
    def in_flight(self) -> int:
        """Requests on this replica."""
        return self._journal.in_flight_on(self._replica)

    def on_outputs(self, outputs: Sequence[EngineOutput], stats: EngineStats) -> None:
        self._journal.on_outputs(outputs, stats, self._replica)

    def on_engine_lost(self, *, blame: bool = True) -> None:
        self._journal.on_engine_lost(self._replica, blame=blame)

    async def on_engine_ready(self, link: EngineLink) -> None:
        await self._journal.on_engine_ready(link, self._replica)

    async def probe(self, token_ids: Sequence[int], timeout_seconds: float = 60.0) -> None:
        await self._journal.probe(token_ids, timeout_seconds, self._replica)
