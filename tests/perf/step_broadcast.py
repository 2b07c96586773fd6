"""Microseconds from rank 0's `send` to the moment when the last of its readers has a step's plan in hand.

`python tests/perf/step_broadcast.py [--ranks 4] [--sequences 256]`. Prints one JSON object a line: decodes of so many
sequences, paced as steps are (readers sleep) and back to back (readers do not), and a prompt of 100,000 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

from appliance.batching.step import NewSequence, ScheduledSequence, StepPlan
from appliance.runtime.ranks import RunStep, decode, encode
from appliance.runtime.step_ring import RingReader, RingWriter, SharedSteps
from appliance.types import SamplingParams

_STEPS = 500


def decodes(count: int) -> StepPlan:
    return StepPlan(1, [], [ScheduledSequence(slot, 1000 + slot, 1, [], samples=True) for slot in range(count)])


def prompt(tokens: int) -> StepPlan:
    new = NewSequence(0, list(range(tokens)), tokens, SamplingParams(), 0, (), list(range(tokens // 16)))
    return StepPlan(1, [new], [ScheduledSequence(0, 0, 8192, [], samples=False)])


def follow(shared: SharedSteps, rank: int, wake: int, answers: int) -> None:
    """Another rank, which answers with the clock each time that it has a plan."""
    reader = RingReader(SharedSteps(shared.fd, shared.ranks), rank, wake, spin_seconds=0.0)
    while (data := reader.receive(10)) is not None:
        decode(data)
        os.write(answers, time.monotonic_ns().to_bytes(8, "little"))


def measure(ranks: int, plan: StepPlan, pause: float, steps: int) -> dict[str, float]:
    shared = SharedSteps.create(ranks)
    wakes, answers, children = [], [], []
    for rank in range(1, ranks):
        (sleeps, wake), (answer, says) = os.pipe(), os.pipe()
        os.set_blocking(wake, False)
        if (child := os.fork()) == 0:
            follow(shared, rank, sleeps, says)
            os._exit(0)
        wakes.append(wake)
        answers.append(answer)
        children.append(child)
    writer = RingWriter(shared, dict(enumerate(wakes, 1)))
    latencies, sending = [], []
    for _ in range(steps):
        time.sleep(pause)
        begin = time.monotonic_ns()
        message = encode(RunStep(plan))
        writer.send(message)
        sending.append(time.monotonic_ns() - begin)
        arrived = max(int.from_bytes(os.read(answer, 8), "little") for answer in answers)
        latencies.append(arrived - begin)
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)
    latencies.sort()
    sending.sort()
    at: Callable[[list[int], float], float] = lambda values, q: round(values[int(q * (len(values) - 1))] / 1000, 1)  # noqa: E731
    return {
        "bytes": len(message),
        "send_us": at(sending, 0.5),
        "p50_us": at(latencies, 0.5),
        "p99_us": at(latencies, 0.99),
        "max_us": at(latencies, 1.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=256)
    args = parser.parse_args()
    for what, plan, pause, steps in (
        ("1 decode, paced", decodes(1), 0.005, _STEPS),
        (f"{args.sequences} decodes, paced", decodes(args.sequences), 0.005, _STEPS),
        (f"{args.sequences} decodes, back to back", decodes(args.sequences), 0.0, _STEPS),
        ("prompt of 100,000 tokens", prompt(100_000), 0.0, 20),
    ):
        print(json.dumps({"what": what, "ranks": args.ranks, **measure(args.ranks, plan, pause, steps)}))


if __name__ == "__main__":
    main()
