"""The watchdog: a stuck event loop is said by 503 from outside of it, a busy or a frozen one is not, and it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.launch.watchdog import Watchdog

ROOT = Path(__file__).parent.parent


def ask(port: int, path: str, seconds: float = 5.0) -> tuple[int, dict[str, object]]:
    """Status and body; (0, {}) if nothing answers in time."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=seconds) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        assert error.headers["Retry-After"]
        return error.code, json.loads(error.read())
    except OSError:
        return 0, {}


async def with_watchdog(limit: float, block: Callable[[], None], reasons: list[str]) -> int:
    """Run `block` on the loop under a watchdog over a socket that the loop would serve. Returns the socket's port."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    watchdog = Watchdog(asyncio.get_running_loop(), [listener], limit, reasons.append)
    watchdog.start()
    try:
        ports.append(listener.getsockname()[1])
        block()
        await asyncio.sleep(0.05)
    finally:
        watchdog.stop()
        listener.close()
    return ports[-1]


ports: list[int] = []


def test_a_stuck_loop_fails_liveness_in_words_and_ends_the_process_later() -> None:
    answers: list[tuple[int, dict[str, object]]] = []
    reasons: list[str] = []
    release = threading.Event()

    def client() -> None:
        answers.append(ask(ports[-1], "/v1/health/live"))
        answers.append(ask(ports[-1], "/v1/chat/completions"))

    def block() -> None:
        asking = threading.Thread(target=client)
        asking.start()
        release.wait(10 if not reasons else 0)
        asking.join()

    class Ends(list[str]):
        def append(self, reason: str) -> None:
            super().append(reason)
            release.set()

    reasons = Ends()
    asyncio.run(with_watchdog(0.4, block, reasons))
    (live, body), (chat, error) = answers
    assert live == 503 and body["phase"] == "failed" and "the event loop has not turned for" in str(body["reason"])
    assert chat == 503 and isinstance(error["error"], dict) and error["error"]["code"] == "unavailable"
    assert len(reasons) == 1 and "has not turned for 1 s" in reasons[0]


def test_it_answers_tls_too(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(cert), "-keyout", str(key)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(cert, key)
    trusting = ssl.create_default_context(cafile=str(cert))
    answers: list[int] = []

    async def stuck() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        watchdog = Watchdog(asyncio.get_running_loop(), [listener], 0.3, lambda reason: None, lambda: served)
        watchdog.start()

        def client() -> None:
            url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1/health/live"
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(url, context=trusting, timeout=5)
            answers.append(caught.value.code)

        asking = threading.Thread(target=client)
        asking.start()
        asking.join()
        watchdog.stop()
        listener.close()

    asyncio.run(stuck())
    assert answers == [503]


def test_a_loop_that_turns_late_is_not_stuck() -> None:
    reasons: list[str] = []

    async def busy() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        watchdog = Watchdog(asyncio.get_running_loop(), [listener], 0.5, reasons.append)
        watchdog.start()
        for _ in range(8):
            time.sleep(0.2)  # always late, never still for long
            await asyncio.sleep(0)
        watchdog.stop()
        with socket.create_connection(listener.getsockname()):  # nobody took it from the listener's queue
            listener.settimeout(5)
            listener.accept()[0].close()
        listener.close()

    asyncio.run(busy())
    assert reasons == []


def test_a_frozen_process_is_not_taken_for_a_stuck_one() -> None:
    script = """
import asyncio, socket, sys
from appliance.launch.watchdog import Watchdog
async def main():
    listener = socket.create_server(("127.0.0.1", 0))
    watchdog = Watchdog(asyncio.get_running_loop(), [listener], 0.5, lambda reason: print("gave up", flush=True))
    watchdog.start()
    print("begun", flush=True)
    await asyncio.sleep(3)
    watchdog.stop()
    print("whole", flush=True)
asyncio.run(main())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "begun\n"
        child.send_signal(signal.SIGSTOP)
        time.sleep(2.0)
        child.send_signal(signal.SIGCONT)
        assert child.communicate(timeout=20)[0] == "whole\n"
