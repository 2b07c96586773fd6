"""OpenTelemetry traces of requests, where they are asked for: a span per HTTP request, below it one per sequence, and
below that its time in the queue, in prefill and in decode.

    POST /v1/chat/completions        server span; its parent is the client's `traceparent`
      └─ llm_request                 one per choice: tokens, finish reason, times as attributes too
           ├─ queue                  from acceptance to its first step
           ├─ prefill                to its first token
           └─ decode                 to its last token

Attribute names are those of OpenTelemetry's conventions for generative models, and vLLM's for times. The SDK is an
optional dependency, imported here only; it reads the standard OTEL_* variables itself. Knows nothing of engines.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from appliance.errors import SettingsError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from appliance.server.request_times import RequestTimes

_FLUSH_SECONDS = 3.0  # of spans that are not sent yet, at the end


@dataclass
class HttpSpan:
    """The open span of one HTTP request."""

    span: Span

    def status(self, code: int) -> None:
        from opentelemetry.trace import StatusCode

        self.span.set_attribute("http.response.status_code", code)
        if code >= 500:
            self.span.set_status(StatusCode.ERROR)


class RequestTracer:
    """Makes the spans of one server with `provider`, which is shut down at the end."""

    def __init__(self, provider: TracerProvider, model_name: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("appliance")
        self._model_name = model_name

    @contextmanager
    def http(self, scope: Scope, request_id: str) -> Iterator[HttpSpan]:
        """Around the handling of one request, in its task: what is accepted inside of it belongs to its trace."""
        from opentelemetry import propagate
        from opentelemetry.trace import SpanKind

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes = {
            "http.request.method": scope["method"],
            "url.path": scope["path"],
            "appliance.request_id": request_id,
        }
        with self._tracer.start_as_current_span(
            f"{scope['method']} {scope['path']}",
            context=propagate.extract(headers),
            kind=SpanKind.SERVER,
            attributes=attributes,
        ) as span:
            yield HttpSpan(span)

    def context(self) -> Context:
        """What a sequence accepted now belongs to."""
        from opentelemetry import context

        return context.get_current()

    def finished(self, times: RequestTimes) -> None:
        """The spans of a sequence that has ended, from the times of its life."""
        from opentelemetry.trace import StatusCode, set_span_in_context

        wall = time.time() - time.monotonic()

        def at(monotonic: float) -> int:
            return int((wall + monotonic) * 1e9)

        span = self._tracer.start_span("llm_request", context=times.context, start_time=at(times.arrival))
        span.set_attributes(_attributes(times, self._model_name))
        if times.reason == "error":
            span.set_status(StatusCode.ERROR)
        inside = set_span_in_context(span)
        for name, begin, end in _stages(times):
            self._tracer.start_span(name, context=inside, start_time=at(begin)).end(at(end))
        span.end(at(times.end))

    def shutdown(self) -> None:
        """Send what is left. Blocks for `_FLUSH_SECONDS` at most: the SDK itself tries a dead collector for longer
        than the timeout that it is given."""
        last = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        last.start()
        last.join(_FLUSH_SECONDS)


def _stages(times: RequestTimes) -> Iterable[tuple[str, float, float]]:
    """Name, begin and end of each stage that the sequence came to."""
    if times.first_token is None:
        yield "queue", times.arrival, times.end
        return
    scheduled = min(times.arrival + times.queue_seconds, times.first_token)
    yield "queue", times.arrival, scheduled
    yield "prefill", scheduled, times.first_token
    yield "decode", times.first_token, max(times.last_token, times.first_token)


def _attributes(times: RequestTimes, model_name: str) -> dict[str, Any]:
    params = times.request.params
    found: dict[str, Any] = {
        "gen_ai.request.id": times.request.request_id,
        "gen_ai.response.model": model_name,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.usage.input_tokens": len(times.request.prompt_token_ids),
        "gen_ai.usage.output_tokens": times.num_output_tokens,
        "gen_ai.response.finish_reasons": [times.reason],
        "gen_ai.latency.e2e": times.end - times.arrival,
    }
    if params.max_tokens is not None:
        found["gen_ai.request.max_tokens"] = params.max_tokens
    if times.first_token is not None:
        found["gen_ai.latency.time_to_first_token"] = times.first_token - times.arrival
        lengths = {name: end - begin for name, begin, end in _stages(times)}
        found["gen_ai.latency.time_in_queue"] = lengths["queue"]
        found["gen_ai.latency.time_in_model_prefill"] = lengths["prefill"]
        found["gen_ai.latency.time_in_model_decode"] = lengths["decode"]
    return found


def make_tracer(model_name: str, exporters: Iterable[str]) -> RequestTracer | None:
    """A tracer that sends to `exporters` ("otlp", "console"; "none" or nothing: no tracer). Endpoint, headers, sampler
    and resource come from the OTEL_* variables. SettingsError if the SDK is not installed or an exporter is unknown."""
    names = [name for name in exporters if name != "none"]
    if not names:
        return None
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise SettingsError(
            "tracing is on, but the OpenTelemetry SDK is not installed", hint="pip install 'appliance[otel]'"
        ) from None
    provider = TracerProvider(shutdown_on_exit=False)  # `RequestTracer.shutdown` does, and in bounded time
    for name in names:
        if name not in _EXPORTERS:
            raise SettingsError(
                f"OTEL_TRACES_EXPORTER: {name!r} is not supported", hint=f"allowed: {', '.join([*_EXPORTERS, 'none'])}"
            )
        provider.add_span_processor(BatchSpanProcessor(_EXPORTERS[name]()))
    return RequestTracer(provider, model_name)


def _otlp() -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise SettingsError("the OTLP exporter is not installed", hint="pip install 'appliance[otel]'") from None
    return OTLPSpanExporter()


def _console() -> Any:
    import sys

    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    return ConsoleSpanExporter(out=sys.stderr)


_EXPORTERS: dict[str, Callable[[], Any]] = {"otlp": _otlp, "console": _console}
