"""What the request journal needs of an engine: a way to hand it requests and to take them back.

The supervisor (`launch.py`) implements it over `ipc.ServerEnd`, tests with a scripted engine. One link object stands
for one engine process: after a restart the supervisor makes a new one, and the journal tells the two apart by identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from appliance.types import EngineRequest


class EngineLink(Protocol):
    async def add(self, requests: Sequence[EngineRequest]) -> None:
        """Hand over requests in this order. May raise if the engine is gone; the requests are then not lost: the
        journal gives them to the next link."""

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Stop these requests and free their pages. Unknown and finished ids are ignored by the engine."""
