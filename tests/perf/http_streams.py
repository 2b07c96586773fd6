"""How much CPU the server process takes for each streamed token, and how evenly tokens reach clients.

    python tests/perf/http_streams.py [--clients 256] [--tokens 200] [--step-ms 18] [--route chat] [--profile FILE]

A measurement and no test: figures depend on the machine. The server process is the real one (`launch.server.serve`,
uvicorn, tokenizer, journal) over loopback; the engine behind it is `steady_engine.py`, which gives each request a token
a step. Clients are bare sockets in this process, so that they take little of the machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import cast

import psutil
import uvloop

ROOT = Path(__file__).parent.parent.parent
SERVER = """
import cProfile, sys
from appliance.launch.server import serve
from appliance.settings import load
from appliance.types import EngineOptions
from server_fakes import server_tokenizer

class Start:
    def __init__(self, settings, state, directory):
        self.state = state
    async def prepare(self):
        self.state.tokenizer = server_tokenizer()
        return EngineOptions(engine_dir="/nowhere", backend="fake")
    async def repair(self, error):
        raise error

def main():
    return serve(
        load({"port": sys.argv[1], "host": "127.0.0.1", "served_model_name": "perf", "log_level": "WARNING"}),
        sequence=Start, engine_module="steady_engine",
    )

if sys.argv[2]:
    profile = cProfile.Profile()
    code = profile.runcall(main)
    profile.dump_stats(sys.argv[2])
else:
    code = main()
sys.exit(code)
"""


class Stream(asyncio.Protocol):
    """One request; notes when bytes came and counts the events in them."""

    def __init__(self, request: bytes, done: asyncio.Future[None]) -> None:
        self._request = request
        self._done = done
        self.arrivals: list[float] = []
        self.events = 0
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        data = self._tail + data
        count = data.count(b"data: {")
        if count:
            self.events += count
            self.arrivals.append(time.perf_counter())
        if b"data: [DONE]" in data:
            self._transport.close()
            self._finish()
        self._tail = data[-12:] if b"data: {" not in data[-12:] else b""

    def connection_lost(self, error: Exception | None) -> None:
        self._finish()

    def _finish(self) -> None:
        if not self._done.done():
            self._done.set_result(None)


def request_bytes(route: str, tokens: int) -> bytes:
    body: dict[str, object] = {"model": "perf", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    if route == "chat":
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": "hello"}]
    else:
        path, body["prompt"] = "/v1/completions", "hello"
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def sample(pid: int, streams: list[Stream], into: list[float]) -> None:
    """µs of the server's main thread for each event, in windows of half a second."""
    path = Path(f"/proc/{pid}/schedstat")
    while True:
        cpu, events = int(path.read_text().split()[0]), sum(stream.events for stream in streams)
        await asyncio.sleep(0.5)
        events = sum(stream.events for stream in streams) - events
        if events > 1000:
            into.append((int(path.read_text().split()[0]) - cpu) / events / 1e3)


async def load(port: int, route: str, clients: int, tokens: int, pid: int, windows: list[float]) -> list[Stream]:
    loop = asyncio.get_running_loop()
    streams: list[Stream] = []
    waits = []
    sampler = loop.create_task(sample(pid, streams, windows))
    for _ in range(clients):
        done = loop.create_future()
        stream = Stream(request_bytes(route, tokens), done)
        await loop.create_connection(lambda stream=stream: stream, "127.0.0.1", port)  # type: ignore[misc]
        streams.append(stream)
        waits.append(done)
    async with asyncio.timeout(120):
        await asyncio.gather(*waits)
    sampler.cancel()
    return streams


def wait_ready(port: int) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/health/ready", timeout=2).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit("the server did not get ready")


def percentile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))]


def measure(args: argparse.Namespace) -> dict[str, object]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests", ROOT / "tests" / "perf"])),
        "STEADY_STEP_MS": str(args.step_ms),
        "TMPDIR": tempfile.mkdtemp(),
    }
    command = [sys.executable, "-c", SERVER, str(args.port), str(args.profile or "")]
    with subprocess.Popen(command, env=environment) as process:
        try:
            wait_ready(args.port)
            server = psutil.Process(process.pid)
            windows: list[float] = []
            uvloop.run(load(args.port, args.route, 8, 20, process.pid, []))  # first use of everything
            cpu, begin = sum(server.cpu_times()[:2]), time.perf_counter()
            streams = uvloop.run(load(args.port, args.route, args.clients, args.tokens, process.pid, windows))
            seconds = time.perf_counter() - begin
            cpu = sum(server.cpu_times()[:2]) - cpu
        finally:
            process.terminate()
            process.wait(20)
    gaps = [0.0, *sorted(b - a for stream in streams for a, b in zip(stream.arrivals[1:], stream.arrivals[2:]))]
    tokens = args.clients * args.tokens
    return {
        "route": args.route,
        "clients": args.clients,
        "tokens": tokens,
        "events": sum(stream.events for stream in streams),
        "writes": sum(len(stream.arrivals) for stream in streams),
        "tokens_per_second": round(tokens / seconds),
        "server_cpu_us_per_token": round(cpu / tokens * 1e6, 1),
        "server_cpu_us_per_event": round(cpu / sum(stream.events for stream in streams) * 1e6, 1),
        "least_us_per_event": round(min(windows, default=0.0), 1),
        "server_cpu_share": round(cpu / seconds, 2),
        "gap_ms": {f"p{p}": round(percentile(gaps, p / 100) * 1e3, 1) for p in (50, 90, 99)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=18.0)
    parser.add_argument("--route", choices=("chat", "completions"), default="chat")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--profile", type=Path, help="run the server under cProfile; its times are then useless")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
