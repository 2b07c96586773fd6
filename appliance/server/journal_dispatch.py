"""Which replica each request of the journal goes to, and when: routing, resubmission, suspects, shares.

Knows entries, lanes and the router's choice; not how requests end, which is the journal's. Plain functions on the
event-loop thread.

A request whose replica is lost goes on at once on another that is up, or waits for one. So that one bad request does
not take its neighbours with it, requests that could not survive another crash are *suspects*: they are handed over one
after the other, over all replicas, each after the one before gave a token (it resumed at the point where its engine
died, so that is past the danger). A crash of that replica meanwhile is blamed on that one alone. While a replica is
down, suspects wait for it, or for another that is idle, rather than endanger what runs on the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

from appliance.server.journal_entry import Entry
from appliance.server.journal_lane import Lane
from appliance.server.metrics import ServerMetrics
from appliance.server.routing import PrefixRouter
from appliance.sizes import counted

log = logging.getLogger(__name__)


class Dispatcher:
    """`num_replicas` lanes. `max_engine_crashes`: as of `RequestJournal`; `on_unsendable`: as of `Lane`."""

    def __init__(
        self,
        num_replicas: int,
        metrics: ServerMetrics,
        *,
        max_engine_crashes: int,
        on_unsendable: Callable[[Entry, Exception], None],
        prefix_caching: bool = True,
    ) -> None:
        self.lanes = [Lane(number, on_unsendable) for number in range(num_replicas)]
        self._metrics = metrics
        self._max_engine_crashes = max_engine_crashes
        self._router = PrefixRouter(num_replicas, prefix_caching=prefix_caching)
        self._suspects: list[Entry] = []  # waiting for their turn
        self.on_probation: Entry | None = None  # the suspect whose turn it is, and that gave no token yet

    @property
    def up(self) -> list[Lane]:
        """Replicas that may be given requests: those whose engine gave a token, or, if there is none, that are up."""
        up = [lane for lane in self.lanes if lane.is_up]
        return [lane for lane in up if lane.proven] or up

    # ------------------------------------------------------------ the usual path

    def dispatch(self, entries: Iterable[Entry]) -> None:
        """Choose a replica for requests that have none; all choices of a prompt go to the same. While none is up they
        stay as they are."""
        for prompt in _by_prompt(entries):
            lane = self._choose(prompt[0])
            if lane is not None:
                for entry in prompt:
                    lane.assign(entry)

    def _choose(self, entry: Entry) -> Lane | None:
        if entry.home is not None:
            return entry.home if entry.home.is_up else None
        if len(self.lanes) == 1:
            return self.lanes[0] if self.lanes[0].is_up else None
        loads = {lane.number: lane.tokens for lane in self.up}
        if not loads:
            return None
        # Replicas may have different context limits, as their devices had different memory left.
        length = len(entry.request.prompt_token_ids) + (entry.request.params.max_tokens or 1)
        infos = self._metrics.engines
        fitting = {n: load for n, load in loads.items() if n not in infos or length <= infos[n].max_model_len}
        entry.digests = self._digests(entry)
        replica = self._router.choose(entry.digests, fitting or loads)
        self._router.record(replica, entry.digests)
        return self.lanes[replica]

    def _digests(self, entry: Entry) -> list[bytes]:
        return self._router.digests(entry.request.prompt_token_ids + entry.output_ids, entry.digests)

    def ended(self, entry: Entry) -> None:
        """The entry is closed: it leaves its replica, whose cache keeps its pages."""
        lane = entry.lane
        if lane is not None:
            lane.release(entry)
            if len(self.lanes) > 1 and not entry.internal:
                self._router.record(lane.number, self._digests(entry))
        if entry is self.on_probation or (self._suspects and self.on_probation is None):
            self.next_suspect()

    # ------------------------------------------------------------ loss and return of a replica

    def lost(self, replica: int, *, blame: bool = True) -> list[Entry]:
        """A replica's engine is gone: releases its requests, and returns those that were in too many crashes. The
        journal ends these and then calls `resubmit`. Without `blame`, none of them is the cause."""
        lane, suspect = self.lanes[replica], self.on_probation
        self._router.forget(replica)
        self._suspects = []  # until `resubmit`: plain requests come first
        culprit = None
        if suspect is not None and suspect.lane is lane:
            self.on_probation = None
            culprit = suspect if suspect.link is not None else None  # else it was not sent yet
        given = lane.lose()
        for entry in given:
            entry.losses += 1
        blamed = [] if not blame else given if culprit is None else [culprit]
        for entry in blamed:
            entry.crashes += 1
        return [entry for entry in blamed if entry.crashes >= self._max_engine_crashes]

    def proven(self, lane: Lane, entries: Iterable[Entry]) -> None:
        """Its engine gave its first token: it takes part, with a share of what the others have not begun."""
        lane.proven = True
        if len(self.lanes) > 1:
            self.resubmit(entries)
            self._take_share(lane)

    def given_up(self, replica: int) -> None:
        """No engine of it will come any more."""
        self.lanes[replica].given_up = True
        if self.on_probation is None:
            self.next_suspect()

    def resubmit(self, entries: Iterable[Entry]) -> None:
        """Send those of these, all of the journal in order of arrival, that have no replica, as far as one is up."""
        waiting = [entry for entry in entries if entry.lane is None]
        self._suspects = [entry for entry in waiting if self._is_suspect(entry)]
        plain = [entry for entry in waiting if not self._is_suspect(entry)]
        self.dispatch(plain)
        resumed = [entry for entry in plain if entry.losses and entry.lane is not None]
        self._metrics.resubmitted += len(resumed)
        if resumed:
            crashed = any(entry.crashes for entry in resumed)
            log.log(logging.WARNING if crashed else logging.INFO, "resubmitting %s", counted(len(resumed), "request"))
        if self.on_probation is None:
            self.next_suspect()

    def _is_suspect(self, entry: Entry) -> bool:
        return entry.home is None and 0 < entry.crashes >= self._max_engine_crashes - 1

    def next_suspect(self) -> None:
        """The suspect on probation, if any, is cleared: hand over the next, to the replica with the least to lose."""
        self.on_probation = None
        up = self._for_suspects()
        while up and self._suspects and self.on_probation is None:
            entry = self._suspects.pop(0)
            if not entry.closed:
                log.warning("resubmitting request %s, after crash %d", entry.request.request_id, entry.crashes)
                self.on_probation = entry
                min(up, key=lambda lane: lane.tokens).assign(entry)
                self._metrics.resubmitted += 1

    def _for_suspects(self) -> list[Lane]:
        up = self.up
        if len(up) == sum(not lane.given_up for lane in self.lanes):
            return up
        return [lane for lane in up if not lane.entries]

    # ------------------------------------------------------------ shares

    def _take_share(self, lane: Lane) -> None:
        """The replica gets requests that wait in the queues of others, the newest first, while that evens the loads.
        Their engines are told to give them up; `moved` is called when they have."""
        expected = lane.tokens
        for other in self.up:
            waiting = self._metrics.stats_of(other.number).num_waiting
            load = other.tokens
            for prompt in reversed(list(_by_prompt(other.entries))):
                tokens = sum(entry.num_tokens for entry in prompt)
                if other is lane or len(prompt) > waiting or load - tokens < expected + tokens:
                    break
                if all(self._may_move(entry) for entry in prompt):
                    load, expected, waiting = load - tokens, expected + tokens, waiting - len(prompt)
                    for entry in prompt:
                        self._start_move(entry, other, lane)

    def _may_move(self, entry: Entry) -> bool:
        return not (entry.output_ids or entry.home or entry.moving_to or entry is self.on_probation)

    def _start_move(self, entry: Entry, source: Lane, target: Lane) -> None:
        entry.moving_to = target
        if entry.link is None:  # not sent yet
            self.moved(entry)
        else:
            source.abort(entry)

    def moved(self, entry: Entry) -> None:
        """Its engine has given it up: on to the replica that it was meant for."""
        target, source = entry.moving_to, entry.lane
        assert source is not None and target is not None
        source.release(entry)
        if target.is_up:
            self._router.record(target.number, entry.digests)
            target.assign(entry)
        else:
            self.dispatch([entry])

    # ------------------------------------------------------------ checks

    def set_capacity(self, replica: int, num_pages: int) -> None:
        self._router.set_capacity(replica, num_pages)

    def check_integrity(self, entries: Iterable[Entry]) -> None:
        """`entries`: all of the journal. Raises AssertionError if the parts disagree."""
        live = set(entries)
        for lane in self.lanes:
            lane.check_integrity()
            assert set(lane.entries) <= live
        probation, up, for_suspects = self.on_probation, self.up, self._for_suspects()
        assert probation is None or (probation in live and probation.lane is not None)
        for entry in live:
            assert entry.lane is None or entry in entry.lane.entries
            assert entry.crashes < self._max_engine_crashes
            if up and entry.lane is None and entry.home is None:
                assert entry in self._suspects, "it waits though a replica is up"
                assert probation is not None or not for_suspects, "a suspect waits, and for nobody"


def _by_prompt(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Neighbours that are choices of one prompt, which share its list of tokens."""
    for _, choices in groupby(entries, key=lambda entry: id(entry.request.prompt_token_ids)):
        yield list(choices)
