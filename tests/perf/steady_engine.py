"""An engine process that computes nothing: every running request gets one token each STEADY_STEP_MS milliseconds.

What `http_streams.py` puts behind the server, to load it as a fast GPU does. A step that is late is not made up for,
so the rate shows whether the channel held the engine up. Its own figures (CPU of making and sending a step's message)
go to the log when it ends.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass

from appliance.ipc import AbortRequests, AddRequests, ChildEnd, Outputs, Ready, Shutdown, StartEngine
from appliance.types import EngineInfo, EngineOutput, EngineRequest, EngineStats

STEP_SECONDS = float(os.environ.get("STEADY_STEP_MS", "18")) / 1000
INFO = EngineInfo(
    engine_key="0" * 64,
    max_model_len=8192,
    max_num_seqs=1024,
    max_num_batched_tokens=8192,
    num_pages=65536,
    page_size=16,
    kv_cache_dtype="bf16",
    attention="none",
    device_name="none",
    weight_bytes=1,
    kv_cache_bytes=1,
    startup_seconds={},
)


@dataclass
class Running:
    request: EngineRequest
    done: int = 0


class SteadyEngine:
    def __init__(self, end: ChildEnd) -> None:
        self._end = end
        self._running: dict[str, Running] = {}
        self._steps = self._tokens = 0
        self._cpu = 0.0

    def run(self) -> None:
        next_step = time.perf_counter()
        while True:
            idle = not self._running
            message = self._end.receive(1.0 if idle else max(0.0, next_step - time.perf_counter()))
            match message:
                case Shutdown():
                    break
                case AddRequests(requests=requests):
                    self._running.update({request.request_id: Running(request) for request in requests})
                case AbortRequests(request_ids=request_ids):
                    for request_id in request_ids:
                        self._running.pop(request_id, None)
            if self._running and time.perf_counter() >= next_step:
                next_step = max(time.perf_counter(), next_step + STEP_SECONDS)
                self._step()
        if self._steps:
            print(
                f"engine: {self._steps} steps, {self._tokens} tokens, "
                f"{self._cpu / self._steps * 1e3:.2f} ms CPU a step, {self._cpu / self._tokens * 1e6:.2f} µs a token",
                file=sys.stderr,
            )

    def _step(self) -> None:
        begin = time.thread_time()
        outputs = []
        for request_id, running in list(self._running.items()):
            running.done += 1
            last = running.done >= (running.request.params.max_tokens or 16)
            token = 97 + (running.done + len(request_id)) % 200
            outputs.append(EngineOutput(request_id, [token], finish_reason="length" if last else None))
            if last:
                del self._running[request_id]
        self._end.send(Outputs(outputs=outputs, stats=EngineStats(num_running=len(self._running))))
        self._cpu += time.thread_time() - begin
        self._steps += 1
        self._tokens += len(outputs)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ipc", required=True)
    end = ChildEnd(parser.parse_args().ipc)
    start = end.receive()
    if isinstance(start, StartEngine):
        end.send(Ready(INFO))
        SteadyEngine(end).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
