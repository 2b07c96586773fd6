"""`health`: is the server of this machine or container ready? For HEALTHCHECK, which has neither curl nor a shell.

Asks over loopback, as the settings say where. In a container the flags of the server are those of process 1.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
from pathlib import Path
from typing import Any

from appliance.settings import Settings, add_flags, load

_NAMES = ("host", "port", "health_port", "ssl_mode", "ssl_certs_path", "ssl_key_path", "ssl_ca_certs_path")
_SECONDS = 5.0
_PATH = "/v1/health/ready"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="what the server answers, as it is")
    add_flags(parser, _NAMES)


def run_health(args: argparse.Namespace, first_process: Path = Path("/proc/1/cmdline")) -> int:
    """0 when ready; 1 when not, or nobody answers."""
    settings = load({**flags_of(first_process), **vars(args)})
    try:
        status, body = ask(settings)
    except OSError as error:
        print(f"nobody answers on port {port_of(settings)}: {error}")
        return 1
    print(body.decode(errors="replace").strip() if args.json else describe(status, body))
    return 0 if status == 200 else 1


def flags_of(command_line: Path) -> dict[str, Any]:
    """The flags that a server was started with, from its command line in /proc; none if that is no server of ours."""
    try:
        words = command_line.read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return {}
    ours = [index for index, word in enumerate(words) if Path(word).name in ("entrypoint.py", "appliance")]
    if not ours:
        return {}
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    add_flags(parser)
    try:
        return vars(parser.parse_known_args(words[ours[0] + 1 :])[0])
    except (argparse.ArgumentError, SystemExit):
        return {}


def port_of(settings: Settings) -> int:
    return settings.health_port or settings.port


def ask(settings: Settings) -> tuple[int, bytes]:
    """Status and body of the readiness route. Raises OSError (also for what is no HTTP).

    TLS certificates are not checked: it is this machine. A server that wants a client's is shown its own."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    connection: http.client.HTTPConnection
    if settings.ssl_mode == "DISABLED":
        connection = http.client.HTTPConnection(host, port_of(settings), timeout=_SECONDS)
    else:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if settings.ssl_mode == "MTLS" and settings.ssl_certs_path is not None:
            context.load_cert_chain(settings.ssl_certs_path, settings.ssl_key_path)
        connection = http.client.HTTPSConnection(host, port_of(settings), timeout=_SECONDS, context=context)
    try:
        connection.request("GET", _PATH)
        answer = connection.getresponse()
        return answer.status, answer.read(1 << 16)
    except (http.client.HTTPException, socket.gaierror) as error:
        raise OSError(f"{type(error).__name__} {error}".strip()) from error
    finally:
        connection.close()


def describe(status: int, body: bytes) -> str:
    """`ready`, or `not ready: building, 43%, 20 s left: 503`."""
    if status == 200:
        return "ready"
    try:
        found = json.loads(body)
    except ValueError:
        found = {}
    facts = found if isinstance(found, dict) else {}
    words = [str(facts[name]) for name in ("phase", "reason") if facts.get(name)]
    if facts.get("percent") is not None:
        words.append(f"{facts['percent']:.0f}%")
    if facts.get("eta_seconds") is not None:
        words.append(f"{facts['eta_seconds']:.0f} s left")
    return f"not ready: {', '.join(words) or 'no reason given'} (status {status})"
