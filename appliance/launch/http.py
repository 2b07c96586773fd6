"""The HTTP side of a server process: its sockets, uvicorn over an application, and the watchdog of the event loop.

Knows sockets and settings; what the application answers, and when the process ends, is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import ssl
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from appliance import termination
from appliance.errors import SettingsError
from appliance.launch.child import kill_all
from appliance.launch.watchdog import Watchdog
from appliance.settings import Settings

log = logging.getLogger("appliance.launch")

# Of idle connections. More than the pools of clients (httpx: 5 s) and load balancers (60 s) keep them, as else these
# send requests into connections that are being closed.
_KEEP_ALIVE_SECONDS = 75
SHUTDOWN_SECONDS = 5  # for responses whose last bytes are on their way


def open_sockets(settings: Settings) -> list[socket.socket]:
    """Listening sockets of the API and health ports. Connections wait in them until HTTP is up. SettingsError."""
    ports = [settings.port]
    if settings.health_port not in (None, settings.port):
        ports.append(int(settings.health_port or 0))
    return [_listen(settings.host, port) for port in ports]


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
        opened.listen(2048)
    except OSError as error:
        opened.close()
        raise SettingsError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            hint="stop what uses it, or choose another with --port",
        ) from error
    return opened


def leave_at_once(directory: Path, code: int) -> None:
    """End this process and its children without a further word. `directory`: of its sockets."""
    kill_all()
    shutil.rmtree(directory, ignore_errors=True)
    sys.stderr.flush()
    os._exit(code)


class HttpServer:
    """`directory` is removed if the watchdog ends the process."""

    def __init__(self, settings: Settings, sockets: Sequence[socket.socket], directory: Path) -> None:
        self._settings = settings
        self._sockets = list(sockets)
        self._directory = directory
        self._http: Any = None  # uvicorn.Server
        self._watchdog: Watchdog | None = None

    @property
    def scheme(self) -> str:
        return "http" if self._settings.ssl_mode == "DISABLED" else "https"

    async def serve(self, app: Any) -> None:
        """Until `stop`."""
        import uvicorn

        class Http(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield  # signals are ours

        tls: dict[str, Any] = {}
        if self._settings.ssl_mode != "DISABLED":
            tls = {"ssl_certfile": self._settings.ssl_certs_path, "ssl_keyfile": self._settings.ssl_key_path}
        if self._settings.ssl_mode == "MTLS":
            tls |= {"ssl_ca_certs": self._settings.ssl_ca_certs_path, "ssl_cert_reqs": ssl.CERT_REQUIRED}
        config = uvicorn.Config(
            app,
            log_config=None,
            server_header=False,
            ws="none",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            **tls,
        )
        self._http = Http(config)
        self._watchdog = self._make_watchdog()
        if self._watchdog is not None:
            self._watchdog.start()  # only now: imports in the loop may take long where files come over a network
        await self._http.serve(sockets=self._sockets)

    def stop(self) -> None:
        """Take no more connections, and let `serve` return. Idempotent."""
        if self._http is not None:
            self._http.should_exit = True

    def stop_watching(self) -> None:
        """Or the watchdog's copies of the sockets would keep connections that nobody takes. Idempotent."""
        if self._watchdog is not None:
            self._watchdog.stop()

    def _make_watchdog(self) -> Watchdog | None:
        if not self._settings.stuck_seconds:
            return None
        return Watchdog(
            asyncio.get_running_loop(),
            self._sockets,
            self._settings.stuck_seconds,
            self._give_up,
            lambda: getattr(self._http.config, "ssl", None),  # from when it serves
        )

    def _give_up(self, reason: str) -> None:
        """From the watchdog's thread: the loop will not end this process."""
        log.error("%s: leaving", reason)
        termination.write(reason, self._settings.termination_log)
        leave_at_once(self._directory, 1)
