"""The journal's way to one replica: its link while it is up, what waits to be sent, and what it has to do.

Knows entries and one engine at a time; does not choose who goes where. All methods run on the event-loop thread.
Messages go out through one flush task, which packs what came in the same loop iteration into one message each.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import msgspec

from appliance.server.engine_client import EngineLink
from appliance.server.journal_entry import Entry
from appliance.sizes import counted

log = logging.getLogger(__name__)

# What encoding a message raises. Validation should have refused such a request; it is no sign of a dead engine.
_UNSENDABLE = (OverflowError, TypeError, ValueError, msgspec.MsgspecError)


class Lane:
    """Replica `number`. `on_unsendable` ends an entry that cannot be put into a message."""

    def __init__(self, number: int, on_unsendable: Callable[[Entry, Exception], None]) -> None:
        self.number = number
        self.link: EngineLink | None = None
        self.proven = False  # its engine gave a token
        self.given_up = False  # no engine will come any more
        self.entries: dict[Entry, None] = {}  # assigned to it, in the order in which they were
        self.tokens = 0  # of all these, prompts and outputs: its load
        self._on_unsendable = on_unsendable
        self._outbox: list[Entry] = []
        self._aborts: list[str] = []
        self._flush_lock = asyncio.Lock()
        self._flusher: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        return self.link is not None

    def assign(self, entry: Entry) -> None:
        """Send it with the next message. The lane is up."""
        entry.lane, entry.link = self, None
        self.entries[entry] = None
        self.tokens += entry.num_tokens
        self._outbox.append(entry)
        self._schedule_flush()

    def release(self, entry: Entry) -> None:
        """It has ended, or goes elsewhere."""
        del self.entries[entry]
        self.tokens -= entry.num_tokens
        entry.lane = entry.link = None
        entry.moving_to = None

    def abort(self, entry: Entry) -> None:
        """Tell the engine to stop it, if it was handed over."""
        if entry.link is not None and entry.link is self.link:
            self._aborts.append(entry.request.request_id)
            self._schedule_flush()

    def lose(self) -> list[Entry]:
        """The engine is gone. Releases all entries and returns those that it had been given."""
        self.link, self.proven = None, False
        self._outbox.clear()
        self._aborts.clear()
        given = [entry for entry in self.entries if entry.link is not None]
        for entry in list(self.entries):
            self.release(entry)
        return given

    def _schedule_flush(self) -> None:
        if self.link is not None and (self._flusher is None or self._flusher.done()):
            self._flusher = asyncio.get_running_loop().create_task(self.flush())

    async def flush(self) -> None:
        """Send what is waiting."""
        async with self._flush_lock:
            while (link := self.link) is not None and (self._outbox or self._aborts):
                waiting, self._outbox = self._outbox, []
                aborts, self._aborts = self._aborts, []
                add = []
                for entry in waiting:
                    if entry.lane is self and entry.link is None:
                        entry.link = link
                        add.append(entry)
                unsent = add
                try:
                    if add:
                        await self._add(link, add)
                        unsent = []
                    if aborts:
                        await link.abort(aborts)
                except ConnectionError as error:
                    # The supervisor notices the dead engine and the journal is told, or was; then they may be
                    # elsewhere. Those that are still here have no part in this crash.
                    unsent = [entry for entry in unsent if entry.lane is self and entry.link is link]
                    log.warning("%s; %s did not reach it", error, counted(len(unsent), "request"))
                    for entry in unsent:
                        entry.link = None
                    self._outbox = unsent + self._outbox
                    return
                except Exception:
                    log.exception(
                        "the engine took no message; waiting for its restart: %s", counted(len(add), "request")
                    )
                    return

    async def _add(self, link: EngineLink, entries: Sequence[Entry]) -> None:
        """Hand these over. One that cannot be put into a message ends alone: it must not hold its neighbours."""
        try:
            await link.add([entry.resumed() for entry in entries])
        except _UNSENDABLE as error:
            if len(entries) > 1:
                for entry in entries:
                    await self._add(link, [entry])
                return
            log.exception("request %s cannot be sent to the engine", entries[0].request.request_id)
            if not entries[0].closed:
                self._on_unsendable(entries[0], error)

    def check_integrity(self) -> None:
        """Raises AssertionError if its parts disagree."""
        queued = set(self._outbox)
        for entry in self.entries:
            assert entry.lane is self and not entry.closed
            assert entry.link is None or entry.link is self.link
            assert entry.link is not None or entry in queued, "assigned and never sent"
            assert self.link is not None, "a replica that is down has no requests"
        assert self.tokens == sum(entry.num_tokens for entry in self.entries)
