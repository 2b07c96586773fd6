"""Every error a user can meet, in one tree, with its exit code and HTTP status in one place.

    ApplianceError                      exit 1
    ├── SettingsError                   exit 2   a flag, variable or config file is wrong
    ├── HardwareError                   exit 3   no compatible GPU, or the driver fails
    ├── ProfileError                    exit 3   no profile can run, or the named one cannot
    ├── CheckpointError                 exit 4   missing, damaged or unsupported model files
    ├── CacheNotWritableError           exit 5   the cache directory cannot be written by this user
    ├── NoSpaceError                    exit 6   not enough disk space, checked before writing
    ├── EngineBuildError                exit 7   the builder failed
    │   └── EngineQualityError          exit 7   what was built answers too differently from its checkpoint
    ├── EngineDamagedError              exit 7   an engine file does not match its digest (normally: rebuilt)
    ├── EngineCrashedError              exit 8   the engine crashed more often than its restart budget
    ├── NodeError                       exit 9   another node is missing, or does not go with this one
    └── RequestError                    (never ends the process)
        ├── InvalidRequestError         400
        │   └── ContextLengthError      400      code context_length_exceeded
        ├── AuthenticationError         401
        ├── ModelNotFoundError          404
        ├── OverloadedError             429      the waiting queue is full
        ├── UnavailableError            503      not ready yet, draining, or the engine is restarting
        └── RequestFailedError          500      the engine failed on this request

A message says what was wrong, what is allowed, and what to do. `assert` is for our own bugs only.
"""

from __future__ import annotations


class ApplianceError(Exception):
    """Base of all errors raised on purpose. `hint` is one line on what to do."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class SettingsError(ApplianceError):
    exit_code = 2


class HardwareError(ApplianceError):
    exit_code = 3


class ProfileError(ApplianceError):
    exit_code = 3


class CheckpointError(ApplianceError):
    exit_code = 4


class CacheNotWritableError(ApplianceError):
    exit_code = 5


class NoSpaceError(ApplianceError):
    exit_code = 6


class EngineBuildError(ApplianceError):
    exit_code = 7


class EngineQualityError(EngineBuildError):
    """Beyond the limit that the profile sets; see engines/quality.py."""


class EngineDamagedError(ApplianceError):
    exit_code = 7


class EngineCrashedError(ApplianceError):
    exit_code = 8


class NodeError(ApplianceError):
    exit_code = 9


class RequestError(ApplianceError):
    """Ends one request, never the process. `param` names the offending field; `code` is OpenAI's error code."""

    code: str | None = None

    def __init__(
        self, message: str, *, hint: str | None = None, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequestError(RequestError):
    code = "invalid_request"


class ContextLengthError(InvalidRequestError):
    code = "context_length_exceeded"


class AuthenticationError(RequestError):
    code = "invalid_api_key"


class ModelNotFoundError(RequestError):
    code = "model_not_found"


class OverloadedError(RequestError):
    code = "overloaded"


class UnavailableError(RequestError):
    """`retry_after` is in seconds and becomes the Retry-After header."""

    code = "unavailable"

    def __init__(self, message: str, *, retry_after: int = 5, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class RequestFailedError(RequestError):
    code = "request_failed"


# error class -> (HTTP status, OpenAI error type); looked up along the class's bases.
HTTP_STATUS: dict[type[ApplianceError], tuple[int, str]] = {
    InvalidRequestError: (400, "invalid_request_error"),
    AuthenticationError: (401, "authentication_error"),
    ModelNotFoundError: (404, "invalid_request_error"),
    OverloadedError: (429, "rate_limit_error"),
    UnavailableError: (503, "service_unavailable_error"),
    RequestFailedError: (500, "server_error"),
    ApplianceError: (500, "server_error"),
}


def http_status(error: ApplianceError) -> tuple[int, str]:
    """The HTTP status and OpenAI error type of an error."""
    for cls in type(error).__mro__:
        if cls in HTTP_STATUS:
            return HTTP_STATUS[cls]
    return 500, "server_error"
