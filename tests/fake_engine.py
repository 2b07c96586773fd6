"""A child process that speaks ipc and can misbehave: what tests of `appliance.launch` supervise instead of an engine.

`python -m fake_engine --ipc ADDRESS [MODE] [FILE]`; without a mode it is that of FAKE_ENGINE_MODE. Token i of a request
is its prompt length + i, so a resumed request shows whether its tokens came with it. The modes that begin with "steps"
run requests together, a token each every ten milliseconds, and die of prompts that begin with POISON.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from appliance.ipc import (
    AbortRequests,
    AddRequests,
    ChildEnd,
    Failed,
    Outputs,
    Progress,
    Ready,
    Shutdown,
    StartEngine,
)
from appliance.types import EngineInfo, EngineOutput, EngineRequest, EngineStats

POISON = 666  # as the first token of a prompt; its third token kills, whichever engine makes it
STEP_SECONDS = 0.01

INFO = EngineInfo(
    engine_key="0" * 64,
    max_model_len=128,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    num_pages=8,
    page_size=16,
    kv_cache_dtype="fp32",
    attention="reference",
    device_name="fake",
    weight_bytes=1,
    kv_cache_bytes=1,
    startup_seconds={"load": 0.01},
)


def answer(end: ChildEnd, request: EngineRequest, delay: float, crash_at: int | None) -> None:
    total = (request.params.max_tokens or 4) - request.num_resumed_tokens
    for i in range(total):
        if crash_at is not None and i == crash_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(delay)
        token = len(request.prompt_token_ids) + i
        end.send(
            Outputs(
                outputs=[EngineOutput(request.request_id, [token], finish_reason="length" if i == total - 1 else None)],
                stats=EngineStats(),
            )
        )


def run_steps(end: ChildEnd) -> None:
    """Until Shutdown: `INFO.max_num_seqs` requests at a time, the others wait."""
    accepted: dict[str, tuple[EngineRequest, int]] = {}  # with the tokens given
    while True:
        outputs: list[EngineOutput] = []
        while (message := end.receive(0.0 if accepted else 1.0)) is not None:
            if isinstance(message, Shutdown):
                return
            if isinstance(message, AddRequests):
                accepted |= {request.request_id: (request, 0) for request in message.requests}
            if isinstance(message, AbortRequests):
                gone = [accepted.pop(request_id, None) for request_id in message.request_ids]
                outputs += [EngineOutput(had[0].request_id, finish_reason="abort") for had in gone if had]
            if outputs:
                break
        time.sleep(STEP_SECONDS)
        for request, given in list(accepted.values())[: INFO.max_num_seqs]:
            if request.prompt_token_ids[0] == POISON and request.num_resumed_tokens + given == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            last = given + 1 == (request.params.max_tokens or 4) - request.num_resumed_tokens
            token = len(request.prompt_token_ids) + given
            outputs.append(EngineOutput(request.request_id, [token], finish_reason="length" if last else None))
            accepted[request.request_id] = (request, given + 1)
            if last:
                del accepted[request.request_id]
        running = min(len(accepted), INFO.max_num_seqs)
        if outputs:
            end.send(Outputs(outputs, EngineStats(num_running=running, num_waiting=len(accepted) - running)))


def crashes_this_time(mode: str, marker: Path | None) -> bool:
    """Modes with "-once" misbehave only while their marker file does not exist."""
    if not mode.endswith("-once"):
        return True
    assert marker is not None
    if marker.exists():
        return False
    marker.touch()
    return True


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ipc", required=True)
    parser.add_argument("mode", nargs="?", default=os.environ.get("FAKE_ENGINE_MODE", "ok"))
    parser.add_argument("file", nargs="?", type=Path)
    args = parser.parse_args()
    mode = args.mode if crashes_this_time(args.mode, args.file) else "ok"
    end = ChildEnd(args.ipc)
    start = end.receive()
    if isinstance(start, Shutdown):
        return 0
    assert isinstance(start, StartEngine)
    end.send(Progress("load", detail="layers.0", percent=50.0))
    if mode.startswith("slow-load"):
        time.sleep(20)
    if mode.startswith("crash-in-load"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if mode.startswith("damaged"):
        end.send(Failed("EngineDamagedError", "rank-0 is damaged", "it is built anew"))
        end.close()
        return 7
    if mode.startswith("no-memory"):
        end.send(Failed("HardwareError", "GPU 0 has too little memory", "use a smaller model"))
        end.close()
        return 3
    if mode.startswith("grandchild"):
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        assert args.file is not None
        args.file.write_text(str(worker.pid))
    end.send(Ready(INFO))
    if mode.startswith("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if mode.startswith("steps"):
        run_steps(end)
        return 0
    seen = 0
    while not isinstance(message := end.receive(), Shutdown):
        for request in message.requests if isinstance(message, AddRequests) else []:
            seen += 1
            # The first request is the probe, or what is resumed.
            crash = mode.startswith("crash-in-request") and seen == 2
            if mode.startswith("hang-in-request") and seen == 2:
                time.sleep(600)
            answer(end, request, 0.01, 2 if crash else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
