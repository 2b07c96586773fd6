"""Runs load against a server with several client processes, and gathers what they saw.

Knows processes and frames (`load_client.py`), neither the engine nor how results are shown.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec

from appliance.bench.load import ClientResult, Flow, Job, share_closed, share_open
from appliance.bench.load_client import read_frame, write_frame
from appliance.errors import ApplianceError, SettingsError

_LEAD_SECONDS = 0.2  # from when all are ready to the first request


@dataclass(frozen=True)
class Target:
    """A server of the OpenAI API."""

    url: str  # http://host:port
    model: str | None
    api_key: str | None
    vocab_size: int

    @property
    def address(self) -> tuple[str, int]:
        """SettingsError for what is no http URL."""
        parts = urlsplit(self.url)
        if parts.scheme != "http" or not parts.hostname:
            raise SettingsError(f"--url is {self.url!r}; it must be of the form http://HOST:PORT")
        return parts.hostname, parts.port or 80


def share(flows: Sequence[Flow], processes: int) -> list[tuple[Flow, ...]]:
    """The flows of each process; processes that would have nothing to do are left out."""
    shares: list[list[Flow]] = [[] for _ in range(processes)]
    for flow in flows:
        if flow.kind == "every":
            shares[0].append(flow)
            continue
        parts = share_closed(flow, processes) if flow.kind == "closed" else share_open(flow, processes)
        for own, part in zip(shares, parts):
            own.append(part)
    return [tuple(own) for own in shares if own]


def run_load(
    target: Target,
    flows: Sequence[Flow],
    *,
    processes: int,
    seed: str,
    timeout: float,
    temperature: float = 0.0,
    at_start: Callable[[], None] | None = None,
) -> list[ClientResult]:
    """Run flows to their end; results by process. `at_start` is called when everything is ready, just before the first
    request. ApplianceError if a client process fails."""
    host, port = target.address
    children = []
    try:
        for index, own in enumerate(share(flows, processes)):
            job = Job(
                host=host,
                port=port,
                path="/v1/completions",
                model=target.model,
                api_key=target.api_key,
                vocab_size=target.vocab_size,
                temperature=temperature,
                seed=seed,
                timeout=timeout,
                process=index,
                flows=own,
            )
            children.append(_Client(job))
        for child in children:
            child.read()
        if at_start is not None:
            at_start()
        begin = msgspec.msgpack.encode(time.monotonic() + _LEAD_SECONDS)
        for child in children:
            child.write(begin)
        return [msgspec.msgpack.decode(child.read(), type=ClientResult) for child in children]
    finally:
        for child in children:
            child.end()


class _Client:
    """A client process."""

    def __init__(self, job: Job) -> None:
        command = [sys.executable, "-m", "appliance.bench.load_client"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.write(msgspec.msgpack.encode(job))

    def write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        write_frame(self._process.stdin, data)

    def read(self) -> bytes:
        """ApplianceError if the process ended instead."""
        assert self._process.stdout is not None
        try:
            return read_frame(self._process.stdout)
        except EOFError:
            raise ApplianceError("a client process of the benchmark failed", hint="its traceback is above") from None

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
