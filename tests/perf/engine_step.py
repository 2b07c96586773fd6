"""What the engine process spends in Python on a step of pure decodes, without its executor: planning, page accounting,
outputs, their message.

    python tests/perf/engine_step.py [--sequences 1 64 256 1024] [--steps 400]

The executor returns at once. `submit` and `collect` of the real one come on top (the GPU runs beside all of it). Every
sixteenth token of a sequence needs a page; arrivals are spread, so that a step has its share of them. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import zmq

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from appliance import garbage  # noqa: E402
from appliance.batching.core import EngineCore  # noqa: E402
from appliance.batching.step import StepPlan, StepResult  # noqa: E402
from appliance.engine_process import EngineLoop  # noqa: E402
from appliance.ipc import ChildEnd  # noqa: E402
from appliance.types import EngineRequest, SamplingParams  # noqa: E402


class InstantExecutor:
    num_pages = 1 << 17
    page_size = 16
    max_model_len = 8192
    max_num_seqs = 1024
    max_num_batched_tokens = 16_384
    step_sizes = ()
    num_stages = 1

    def __init__(self) -> None:
        self._queue: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> None:
        self._queue.append(plan)

    def collect(self) -> StepResult:
        plan = self._queue.popleft()
        rows = len(plan.scheduled)
        token_ids = [1234 if row.samples else -1 for row in plan.scheduled]
        return StepResult(plan.step_id, token_ids, [None] * rows, [None] * rows)


class Stepper(EngineLoop):
    """The engine process's loop, one turn at a time."""

    def turn(self) -> float:
        begin = time.perf_counter()
        self._take_messages()
        self._step()
        return time.perf_counter() - begin


def measure(sequences: int, steps: int) -> dict[str, Any]:
    core = EngineCore(InstantExecutor(), max_step_stretch=2.0)
    for i in range(sequences):
        prompt = list(range(i, i + 100 + i % 16))
        params = SamplingParams(max_tokens=steps + 100, ignore_eos=True)
        core.add_request(EngineRequest(f"chatcmpl-{i:032x}-0", prompt, params, arrival_time=float(i)))
    with tempfile.TemporaryDirectory() as directory:
        address = f"ipc://{directory}/s"
        server = zmq.Context.instance().socket(zmq.PAIR)
        server.set_hwm(0)
        server.bind(address)
        end = ChildEnd(address)
        loop = Stepper(core, end)
        seconds = []
        for step in range(steps):
            took = loop.turn()
            if step > 30:
                seconds.append(took)
            while server.poll(0):
                server.recv()
        end.close()
        server.close(0)
    seconds.sort()
    share = {name: seconds[int(len(seconds) * at)] for name, at in (("least", 0.0), ("p90", 0.9), ("p99", 0.99))}
    share["median"] = statistics.median(seconds)
    return {"sequences": sequences, "us": {name: round(value * 1e6, 1) for name, value in share.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    garbage.settle()
    print(json.dumps([measure(count, args.steps) for count in args.sequences]))


if __name__ == "__main__":
    main()
