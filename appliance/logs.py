"""Log lines of every process, on stderr: for people on a terminal, JSON lines elsewhere or by setting.

Knows formats, the id of the request being handled, and which texts are secret; knows nothing of what is logged.
uvicorn's loggers go the same way, minus the health probes, which would be most of the log.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable
from contextvars import ContextVar
from typing import TextIO

# Set by the server around each request; every line logged while it is handled carries it.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_PROBES = ("/v1/health", "/health", "/v2/health", "/metrics", "/v1/metrics")
_process_name = ""


class _Redactor:
    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = sorted((s for s in secrets if len(s) >= 4), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


class HumanFormatter(logging.Formatter):
    """`18:39:11 WARNING launch: text [request-id]`; the level only when it is not INFO."""

    def __init__(self, process: str, redact: _Redactor) -> None:
        super().__init__()
        self._process = process
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else record.levelname + " "
        request = request_id.get()
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {level}{self._process}: "
        line += record.getMessage() + (f" [{request}]" if request else "")
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return self._redact(line)


class JsonFormatter(logging.Formatter):
    """One object a line: time (ISO 8601, UTC), level, process, logger, message, and request_id and exception if any."""

    def __init__(self, process: str, redact: _Redactor) -> None:
        super().__init__()
        self._process = process
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": self._redact(record.getMessage()),
        }
        if request := request_id.get():
            entry["request_id"] = request
        if record.exc_info:
            entry["exception"] = self._redact(self.formatException(record.exc_info))
        return json.dumps(entry, ensure_ascii=False)


class _NoProbes(logging.Filter):
    """Drops uvicorn's access lines of probes and scrapes (args: client, method, path, version, status)."""

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args
        if not (record.name == "uvicorn.access" and isinstance(args, tuple) and len(args) == 5):
            return True
        return not str(args[2]).startswith(_PROBES)


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at the time: a progress bar puts itself in its place to keep lines whole."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def process_name() -> str:
    """What this process is called in its log lines; empty before `configure`."""
    return _process_name


def configure(
    level: str = "INFO", as_json: bool | None = None, *, process: str = "server", secrets: Iterable[str] = ()
) -> None:
    """Send this process's log to stderr. `as_json` None: JSON unless stderr is a terminal. Replaces earlier handlers.

    Texts in `secrets` (4 characters or more) are never written."""
    if as_json is None:
        as_json = not sys.stderr.isatty()
    global _process_name
    _process_name = process
    redact = _Redactor(secrets)
    handler = _Stderr()
    handler.setFormatter(JsonFormatter(process, redact) if as_json else HumanFormatter(process, redact))
    handler.addFilter(_NoProbes())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    quiet = logging.INFO if level == "DEBUG" else logging.WARNING
    for name in ("asyncio", "httpx", "httpcore", "huggingface_hub", "urllib3", "filelock", "fsspec", "uvicorn.error"):
        logging.getLogger(name).setLevel(quiet)


def say(message: str) -> None:
    """A line of a command that people wait for."""
    logging.getLogger("appliance").info("%s", message)
