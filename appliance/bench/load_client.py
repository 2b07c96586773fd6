"""One client process of `bench serve`: takes a job on stdin, says it is ready, waits for the start, sends what it saw.

    python -m appliance.bench.load_client

Everything that costs time (prompts, connections) is made before it says that it is ready. Imports neither torch nor the
server. Frames on stdin and stdout are a length of 8 bytes, little-endian, and a msgpack value.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import resource
import sys
import time
from collections.abc import Awaitable
from typing import IO, Any

import msgspec
import uvloop

from appliance.bench.load import ClientResult, Flow, Job, Record
from appliance.bench.sse_connection import SseConnection

_LAG_SECONDS = 0.01
_MAX_FAILURES = 3  # in a row; then a client of a closed loop gives up
_WARM_CONNECTIONS = 32  # opened ahead for an open flow
_ID_BYTES = 7  # of one token id in a request, comma and padding included


def read_frame(stream: IO[bytes]) -> bytes:
    """EOFError where the other side is gone."""
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError("the other process ended")
    return stream.read(int.from_bytes(head, "little"))


def write_frame(stream: IO[bytes], data: bytes) -> None:
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


class Prompts:
    """Requests of one flow as bytes. Prompts are cut from one long list of random ids, each id padded to the same width
    (blanks are legal in JSON), behind three ids that count requests: prompts share no beginning, so no prefix cache
    helps, and making one is a copy."""

    def __init__(self, job: Job, flow: Flow, index: int) -> None:
        self._vocab_size = job.vocab_size
        self._rng = random.Random(f"prompts {job.seed} {job.process} {index}")
        longest = flow.input.high
        ids = self._rng.choices(range(job.vocab_size), k=2 * longest)
        self._ids = b"".join(b"%*d," % (_ID_BYTES - 1, token_id) for token_id in ids)
        self._longest = longest
        self._serial = (job.process * 64 + index) << 20
        self._job, self._flow = job, flow
        common = {"temperature": job.temperature, "stream": True, "stream_options": {"include_usage": True}}
        common |= {"ignore_eos": True, "skip_special_tokens": False}
        common |= {"model": job.model} if job.model else {}
        self._fields = json.dumps(common, separators=(",", ":")).encode()[:-1]  # left open
        authorization = f"Authorization: Bearer {job.api_key}\r\n" if job.api_key else ""
        self._head = (
            f"POST {job.path} HTTP/1.1\r\nHost: {job.host}:{job.port}\r\n{authorization}"
            "Content-Type: application/json\r\nAccept: text/event-stream\r\nContent-Length: "
        ).encode()

    def make(self) -> tuple[Record, bytes]:
        """The record of a new request, and the request."""
        input_len, output_len = self._flow.input.draw(self._rng), self._flow.output.draw(self._rng)
        body = b'%b,"max_tokens":%d,"prompt":[%b]}' % (
            self._fields,
            output_len,
            self._token_ids(input_len),
        )
        record = Record(self._flow.name, -1, input_len, output_len)
        return record, b"%b%d\r\n\r\n%b" % (self._head, len(body), body)

    def _token_ids(self, count: int) -> bytes:
        self._serial += 1
        own = min(count, 3)
        head, rest = [], self._serial
        for _ in range(own):
            rest, token_id = divmod(rest, self._vocab_size)
            head.append(b"%d" % token_id)
        begin = self._rng.randrange(self._longest) * _ID_BYTES
        tail = self._ids[begin : begin + (count - own) * _ID_BYTES]
        return b",".join(head) + (b"," + tail[:-1] if tail else b"")


class LoadClient:
    """Runs a job's flows on one event loop."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._idle: list[SseConnection] = []
        self._records: list[Record] = []
        self._lags: list[float] = []
        self._prompts = [Prompts(job, flow, index) for index, flow in enumerate(job.flows)]
        # The first request of each closed client is made ahead: they all leave at once.
        self._first = {
            index: [self._prompts[index].make() for _ in range(flow.concurrency)]
            for index, flow in enumerate(job.flows)
        }

    async def open_connections(self) -> None:
        """As many as are needed at once, as far as that is known. What fails here fails again, and is told, later."""
        wanted = sum(flow.concurrency or min(len(flow.arrivals), _WARM_CONNECTIONS) or 1 for flow in self._job.flows)
        opened = await asyncio.gather(*(self._connect() for _ in range(wanted)), return_exceptions=True)
        self._idle = [connection for connection in opened if isinstance(connection, SseConnection)]

    async def run(self, begin: float) -> ClientResult:
        """All flows from `begin` on, until the last request has ended."""
        await asyncio.sleep(max(0.0, begin - time.monotonic()))
        wall, cpu = time.monotonic(), time.process_time()
        lag = asyncio.create_task(self._watch_lag())
        main: list[Awaitable[None]] = []
        beside: list[asyncio.Task[None]] = []
        for index, flow in enumerate(self._job.flows):
            if flow.kind == "closed":
                main += [self._closed(index, flow, client, begin) for client in range(flow.concurrency)]
            elif flow.kind == "open":
                main += [self._arrival(index, begin + at) for at in flow.arrivals]
            else:
                beside.append(asyncio.create_task(self._every(index, flow, begin)))
        await asyncio.gather(*main)
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        lag.cancel()
        result = ClientResult(
            self._job.process, self._records, time.process_time() - cpu, time.monotonic() - wall, self._lags
        )
        for connection in self._idle:
            connection.close()
        return result

    # ------------------------------------------------------------ flows

    async def _closed(self, index: int, flow: Flow, client: int, begin: float) -> None:
        """One client: the next request when the last one has ended."""
        count = flow.requests // flow.concurrency + (client < flow.requests % flow.concurrency)
        done = failures = 0
        while (not flow.requests or done < count) and (not flow.duration or time.monotonic() < begin + flow.duration):
            record, request = self._first[index][client] if not done else self._prompts[index].make()
            record.client = client
            await self._request(record, request, time.monotonic())
            done += 1
            failures = failures + 1 if record.error else 0
            if failures >= _MAX_FAILURES:
                return

    async def _arrival(self, index: int, due: float) -> None:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        await self._request(*self._prompts[index].make(), due)

    async def _every(self, index: int, flow: Flow, begin: float) -> None:
        """One request each interval, whether the last one has ended or not. When this is cancelled, so are they."""
        running: set[asyncio.Task[None]] = set()
        due = begin + flow.interval
        try:
            while True:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                task = asyncio.create_task(self._request(*self._prompts[index].make(), due))
                running.add(task)
                task.add_done_callback(running.discard)
                due += flow.interval
        finally:
            for task in running:
                task.cancel()

    async def _request(self, record: Record, request: bytes, due: float) -> None:
        """Send one request and record what came. `due`: when it should leave, from where its times count."""
        record.start = due
        try:
            connection = await self._connection()
        except OSError as error:
            record.error, record.end = f"no connection: {error}", time.monotonic()
            self._records.append(record)
            return
        record.late = time.monotonic() - due
        try:
            response = await connection.post(request, self._job.timeout)
        except asyncio.CancelledError:
            connection.close()
            raise
        record.end, record.events, record.error = time.monotonic(), response.events, response.error
        record.output_tokens = int(response.usage.get("completion_tokens", 0))
        if not record.error and record.output_tokens != record.wanted:
            record.error = f"{record.output_tokens} tokens came where {record.wanted} were asked for"
        self._records.append(record)
        if connection.usable:
            self._idle.append(connection)

    async def _connection(self) -> SseConnection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return await self._connect()

    async def _connect(self) -> SseConnection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(SseConnection, self._job.host, self._job.port)
        return connection

    async def _watch_lag(self) -> None:
        while True:
            due = time.monotonic() + _LAG_SECONDS
            await asyncio.sleep(_LAG_SECONDS)
            self._lags.append(time.monotonic() - due)


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a file for each connection
    job = msgspec.msgpack.decode(read_frame(sys.stdin.buffer), type=Job)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        client = LoadClient(job)
        runner.run(client.open_connections())
        gc.collect()
        gc.freeze()
        gc.disable()  # a pause here would look like one of the server
        write_frame(sys.stdout.buffer, b"ready")
        begin: Any = msgspec.msgpack.decode(read_frame(sys.stdin.buffer))
        result = runner.run(client.run(float(begin)))
        write_frame(sys.stdout.buffer, msgspec.msgpack.encode(result))


if __name__ == "__main__":
    main()
