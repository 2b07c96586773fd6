"""Traces: a request's spans with their times, over a real loopback collector and in memory; off by default."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from server_fakes import CHAT, chat, client, eventually, ready_state, served

from appliance.errors import SettingsError
from appliance.server.tracing import RequestTracer, make_tracer
from appliance.settings import export_otel_environment, load

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    yield InMemorySpanExporter()


def tracer_to(exporter: InMemorySpanExporter) -> RequestTracer:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return RequestTracer(provider, "tiny")


def named(exporter: InMemorySpanExporter, name: str) -> ReadableSpan:
    found = [span for span in exporter.get_finished_spans() if span.name == name]
    assert len(found) == 1, [span.name for span in exporter.get_finished_spans()]
    return found[0]


async def test_a_request_has_its_stages_below_the_clients_span(spans: InMemorySpanExporter) -> None:
    state, _engine = await ready_state(tracer=tracer_to(spans))
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "my-request"}
    async with client(state) as http:
        assert (await http.post(CHAT, json=chat(temperature=0), headers=headers)).status_code == 200
        await http.get("/v1/health/live")
    server, request = named(spans, f"POST {CHAT}"), named(spans, "llm_request")
    assert server.kind == SpanKind.SERVER and server.context is not None and server.parent is not None
    assert f"{server.context.trace_id:032x}" == TRACE and f"{server.parent.span_id:016x}" == PARENT
    assert server.attributes["appliance.request_id"] == "my-request"
    assert server.attributes["http.response.status_code"] == 200
    assert request.parent.span_id == server.context.span_id
    assert request.attributes["gen_ai.usage.output_tokens"] > 0
    assert request.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    stages = [named(spans, name) for name in ("queue", "prefill", "decode")]
    assert all(stage.parent.span_id == request.context.span_id for stage in stages)
    assert stages[0].start_time == request.start_time
    assert stages[0].end_time == stages[1].start_time and stages[1].end_time == stages[2].start_time
    assert stages[2].end_time <= request.end_time
    assert len(spans.get_finished_spans()) == 5, "probes are not traced"


async def test_a_stream_is_traced_to_its_end(spans: InMemorySpanExporter) -> None:
    state, engine = await ready_state("one two three", tracer=tracer_to(spans))
    engine.auto = False
    async with served(state) as base, httpx.AsyncClient(base_url=base) as http:
        asking = asyncio.create_task(http.post(CHAT, json=chat(stream=True, n=2)))
        await eventually(lambda: len(engine.running) == 2)
        engine.step()
        await asyncio.sleep(0.1)
        assert spans.get_finished_spans() == (), "nothing is finished"
        while engine.running:
            engine.step()
        assert "[DONE]" in (await asking).text
        await eventually(lambda: len(spans.get_finished_spans()) == 9)
    server = named(spans, f"POST {CHAT}")
    requests = [span for span in spans.get_finished_spans() if span.name == "llm_request"]
    assert len(requests) == 2, "one per choice"
    for request in requests:
        assert request.parent.span_id == server.context.span_id
        assert server.start_time <= request.start_time and request.end_time <= server.end_time + int(5e6)


async def test_a_failed_and_a_refused_request_are_marked(spans: InMemorySpanExporter) -> None:
    state, engine = await ready_state(tracer=tracer_to(spans))
    engine.error = "it fell over"
    async with client(state) as http:
        assert (await http.post(CHAT, json=chat())).status_code == 500
        assert named(spans, "llm_request").status.status_code == StatusCode.ERROR
        assert named(spans, f"POST {CHAT}").status.status_code == StatusCode.ERROR
        assert named(spans, "queue").parent is not None, "it never left the queue"
        spans.clear()
        assert (await http.post(CHAT, json=chat(model="nope"))).status_code == 404
        assert named(spans, f"POST {CHAT}").attributes["http.response.status_code"] == 404


async def test_the_queue_time_is_the_engines(spans: InMemorySpanExporter) -> None:
    from appliance.types import EngineOutput, EngineRequest, EngineStats, SamplingParams

    state, engine = await ready_state(tracer=tracer_to(spans))
    engine.auto = False
    state.journal.submit([EngineRequest("a", [1, 2], SamplingParams(max_tokens=1), arrival_time=0.0)])
    await asyncio.sleep(0.2)
    first = EngineOutput("a", [5], finish_reason="length", queue_seconds=0.15)
    state.journal.on_outputs([first], EngineStats())
    queue = named(spans, "queue")
    assert (queue.end_time - queue.start_time) / 1e9 == pytest.approx(0.15, abs=1e-3)
    assert named(spans, "llm_request").attributes["gen_ai.latency.time_in_model_prefill"] >= 0.04
    text = state.metrics.render().decode()
    assert 'vllm:request_queue_time_seconds_sum{model_name="tiny"} 0.15' in text


def test_spans_reach_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """OTLP over HTTP to a loopback server, by the standard variables that `settings` passes on."""
    bodies: list[tuple[str, str | None, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            bodies.append((self.path, self.headers["x-tenant"], body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}"
        for name in ("OTEL_SERVICE_NAME", "OTEL_EXPORTER_OTLP_ENDPOINT"):
            monkeypatch.setenv(name, "to be put back")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=blue")
        settings = load({}, {"NIM_ENABLE_OTEL": "1", "NIM_OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
        assert settings.otel and settings.otel_endpoint == endpoint
        export_otel_environment(settings)
        tracer = make_tracer("tiny", ("otlp",))
        assert tracer is not None
        with tracer.http({"method": "POST", "path": CHAT, "headers": []}, "r1"):
            pass
        tracer.shutdown()
        collector.shutdown()
    ((path, tenant, body),) = bodies
    assert path == "/v1/traces" and tenant == "blue"
    assert b"appliance" in body and CHAT.encode() in body


def test_a_collector_that_is_down_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    tracer = make_tracer("tiny", ("otlp",))
    assert tracer is not None
    began = time.monotonic()
    with tracer.http({"method": "POST", "path": CHAT, "headers": []}, "r1"):
        pass
    assert time.monotonic() - began < 1.0
    tracer.shutdown()
    assert time.monotonic() - began < 5.0


def test_off_by_default_and_wrong_exporters_are_named() -> None:
    assert not load({}, {}).otel
    assert make_tracer("tiny", ("none",)) is None
    with pytest.raises(SettingsError, match=r"'zipkin' is not supported \(allowed: otlp, console, none"):
        make_tracer("tiny", ("zipkin",))
