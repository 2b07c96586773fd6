"""Python time from an engine's message to `send` of the ASGI server, for each streamed token: no sockets, one process.

    python tests/perf/event_path.py [--streams 256] [--steps 200] [--route chat]

The least and the median over steps, so that it can be compared on a machine that others use too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from server_fakes import engine_info, server_tokenizer  # noqa: E402

from appliance.server.app import create_app  # noqa: E402
from appliance.server.state import ServerState  # noqa: E402
from appliance.types import EngineOutput, EngineRequest, EngineStats  # noqa: E402


class Link:
    def __init__(self) -> None:
        self.requests: list[EngineRequest] = []

    async def add(self, requests: list[EngineRequest]) -> None:
        self.requests += requests

    async def abort(self, request_ids: list[str]) -> None:
        return None


async def measure(args: argparse.Namespace) -> dict[str, object]:
    state = ServerState(model_names=("perf",))
    state.tokenizer = server_tokenizer()
    state.engine = engine_info(4096, 2048)
    link = Link()
    await state.journal.on_engine_ready(link)
    state.lifecycle.enter("ready")
    app = create_app(state)
    sent = 0

    async def one() -> None:
        body: dict[str, Any] = {"model": "perf", "max_tokens": 3000, "stream": True, "ignore_eos": True}
        if args.route == "chat":
            path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": "hello"}]
        else:
            path, body["prompt"] = "/v1/completions", "hello"
        messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> dict[str, Any]:
            return messages.pop() if messages else await asyncio.get_running_loop().create_future()

        async def send(message: dict[str, Any]) -> None:
            nonlocal sent
            sent += 1

        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"host", b"x")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "scheme": "http",
            "root_path": "",
        }
        await app(scope, receive, send)

    tasks = [asyncio.create_task(one()) for _ in range(args.streams)]
    while len(link.requests) < args.streams:
        await asyncio.sleep(0.01)
    ids = [request.request_id for request in link.requests]
    seconds = []
    gc.collect()
    gc.freeze()
    for step in range(args.steps):
        outputs = [EngineOutput(request_id, [97 + (step + i) % 25]) for i, request_id in enumerate(ids)]
        target = sent + args.streams
        begin = time.perf_counter()
        state.journal.on_outputs(outputs, EngineStats())
        while sent < target:
            await asyncio.sleep(0)
        seconds.append(time.perf_counter() - begin)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    scale = 1e6 / args.streams
    steady = seconds[10:]
    return {
        "route": args.route,
        "streams": args.streams,
        "us_per_token": {
            "least": round(min(steady) * scale, 2),
            "median": round(statistics.median(steady) * scale, 2),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--route", choices=("chat", "completions"), default="chat")
    import uvloop

    print(json.dumps(uvloop.run(measure(parser.parse_args()))))


if __name__ == "__main__":
    main()
