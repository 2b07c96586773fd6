"""`appliance bench serve`: the client against a scripted server, the figures against arithmetic, and the whole command
with the built-in model."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socketserver
import statistics
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from appliance.bench import offline, serve
from appliance.bench.load import ClientResult, Flow, Job, Lengths, Record, arrival_times, parse_lengths
from appliance.bench.load_client import Prompts
from appliance.bench.load_report import LONG, MAIN, Limits, client_load, summarize
from appliance.bench.load_run import Target, run_load, share
from appliance.bench.serve_engines import per_device
from appliance.bench.serve_table import show
from appliance.bench.sse_connection import Response, SseConnection
from appliance.cli import main
from appliance.errors import SettingsError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
TOKEN = b'data: {"choices":[{"text":" a","finish_reason":null}],"usage":null}\n\n'
DONE = b"data: [DONE]\n\n"


def usage(tokens: int) -> bytes:
    return b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":%d}}\n\n' % tokens


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Scripted(socketserver.ThreadingTCPServer):
    """Answers each request with the tokens that it asks for, one chunk each; notes the requests. Every `refuse`-th gets
    429."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, refuse: int = 0, pause: float = 0.0) -> None:
        self.requests: list[dict[str, Any]] = []
        self.refuse, self.pause, self.connections = refuse, pause, 0
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(socketserver.StreamRequestHandler):
    server: Scripted

    def handle(self) -> None:
        self.server.connections += 1
        while line := self.rfile.readline():
            headers = dict(header.lower().split(b": ", 1) for header in iter(self.rfile.readline, b"\r\n"))
            body = self.rfile.read(int(headers.get(b"content-length", b"0")))
            if line.startswith(b"GET"):
                listed = b'{"data": [{"id": "scripted"}]}' if b"/v1/models" in line else b"{}"
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(listed), listed))
                continue
            self.server.requests.append(json.loads(body))
            if self.server.refuse and len(self.server.requests) % self.server.refuse == 0:
                refusal = b'{"error": {"message": "too many"}}'
                self.wfile.write(b"HTTP/1.1 429 No\r\nContent-Length: %d\r\n\r\n%b" % (len(refusal), refusal))
                continue
            self.wfile.write(HEAD)
            wanted = self.server.requests[-1]["max_tokens"]
            for _ in range(wanted):
                self.wfile.write(chunk(TOKEN))
                time.sleep(self.server.pause)
            self.wfile.write(chunk(usage(wanted) + DONE) + b"0\r\n\r\n")


@pytest.fixture
def scripted(request: pytest.FixtureRequest) -> Iterator[Scripted]:
    with Scripted(**getattr(request, "param", {})) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


# ---------------------------------------------------------------- the connection


async def received(*parts: bytes, lost: bool = False) -> Response:
    """What the connection makes of a response that arrives in these parts."""
    connection = SseConnection()

    class Transport(asyncio.Transport):
        def write(self, data: bytes) -> None:
            pass

        def is_closing(self) -> bool:
            return False

        def close(self) -> None:
            pass

    connection.connection_made(Transport())
    waiting = asyncio.create_task(connection.post(b"", 5.0))
    await asyncio.sleep(0)
    for part in parts:
        connection.data_received(part)
    if lost:
        connection.connection_lost(None)
    return await waiting


WHOLE = HEAD + chunk(TOKEN) + chunk(TOKEN + TOKEN[:20]) + chunk(TOKEN[20:] + usage(3)) + chunk(DONE) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 2, 7, 100, 10_000])
async def test_a_stream_is_read_whatever_the_network_cuts_it_into(size: int) -> None:
    response = await received(*(WHOLE[at : at + size] for at in range(0, len(WHOLE), size)))
    assert (response.status, response.error, len(response.events)) == (200, "", 3)
    assert response.usage["completion_tokens"] == 3 and response.saw_done
    assert response.events == sorted(response.events)


async def test_what_goes_wrong_is_said() -> None:
    refused = await received(b'HTTP/1.1 429 Too Many\r\nContent-Length: 9\r\n\r\n{"a": 1}\n')
    assert refused.error == 'HTTP 429: {"a": 1}\n' and not refused.events
    failed = chunk(b'data: {"error":{"message":"engine lost"}}\n\n' + DONE) + b"0\r\n\r\n"
    assert (await received(HEAD, chunk(TOKEN), failed)).error == "engine lost"
    assert (await received(HEAD + chunk(TOKEN) + b"0\r\n\r\n")).error == "the stream ended without [DONE]"
    assert (await received(HEAD + chunk(TOKEN), lost=True)).error == "the connection was lost"
    assert "not HTTP" in (await received(HEAD + b"zz\r\n")).error
    assert "neither a length nor chunks" in (await received(b"HTTP/1.1 200 OK\r\n\r\n")).error


async def test_text_that_speaks_of_errors_and_usage_is_text() -> None:
    token = b'data: {"choices":[{"text":"\\"error\\": \\"usage\\":{"}]}\n\n'
    response = await received(HEAD + chunk(token) + chunk(usage(1) + DONE) + b"0\r\n\r\n")
    assert (len(response.events), response.error) == (1, "")


# ---------------------------------------------------------------- the load


def job(*flows: Flow, process: int = 0) -> Job:
    return Job("h", 1, "/v1/completions", "m", "key", 1024, 0.0, "seed", 5.0, process, flows)


def test_prompts_have_the_length_asked_for_and_share_no_beginning() -> None:
    flow = Flow(MAIN, "closed", Lengths(1, 40), Lengths(5, 9), concurrency=1)
    made = [Prompts(job(flow, process=p), flow, 0) for p in (0, 1)]
    prompts = []
    for _ in range(300):
        for source in made:
            record, request = source.make()
            head, _, body = request.partition(b"\r\n\r\n")
            assert b"Content-Length: %d" % len(body) in head and b"Authorization: Bearer key" in head
            value = json.loads(body)
            assert len(value["prompt"]) == record.input_len and value["max_tokens"] == record.wanted
            assert all(0 <= token_id < 1024 for token_id in value["prompt"])
            assert value["ignore_eos"] and value["stream"] and value["stream_options"] == {"include_usage": True}
            prompts.append(tuple(value["prompt"]))
    assert {len(prompt) for prompt in prompts} == set(range(1, 41))
    beginnings = [prompt[:3] for prompt in prompts if len(prompt) >= 3]
    assert len(set(beginnings)) == len(beginnings)


def test_arrivals() -> None:
    assert arrival_times(4.0, 3, "constant", 1.0, "s") == [0.0, 0.25, 0.5]
    poisson, bursty = (arrival_times(10.0, 4000, "poisson", shape, "s") for shape in (1.0, 0.25))
    for times, deviation in ((poisson, 0.1), (bursty, 0.2)):  # of a gamma distribution: mean / sqrt(shape)
        gaps = [after - before for before, after in pairwise(times)]
        assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.15)
        assert statistics.stdev(gaps) == pytest.approx(deviation, rel=0.15)
    assert poisson == arrival_times(10.0, 4000, "poisson", 1.0, "s") != arrival_times(10.0, 4000, "poisson", 1.0, "t")


def test_flows_are_shared_without_loss() -> None:
    lengths = (Lengths(1, 1), Lengths(1, 1))
    closed = Flow(MAIN, "closed", *lengths, concurrency=10, requests=33)
    long = Flow(LONG, "every", *lengths, interval=1.0)
    shares = share([closed, long], 4)
    assert [[flow.kind for flow in own] for own in shares] == [["closed", "every"], ["closed"], ["closed"], ["closed"]]
    own = [flow for flows in shares for flow in flows if flow.kind == "closed"]
    assert sum(flow.concurrency for flow in own) == 10 and sum(flow.requests for flow in own) == 33
    opened = Flow(MAIN, "open", *lengths, arrivals=(0.0, 1.0, 2.0))
    dealt = [flow.arrivals for flows in share([opened], 2) for flow in flows]
    assert dealt == [(0.0, 2.0), (1.0,)] and len(share([opened], 8)) == 3


@pytest.mark.parametrize(("text", "expected"), [("7", (7, 7)), ("3-9", (3, 9)), (" 4 ", (4, 4))])
def test_lengths(text: str, expected: tuple[int, int]) -> None:
    lengths = parse_lengths("--isl", text)
    rng = random.Random(0)
    assert (lengths.low, lengths.high) == expected
    drawn = {lengths.draw(rng) for _ in range(200)}
    assert drawn == set(range(expected[0], expected[1] + 1))


# ---------------------------------------------------------------- the figures


def record(start: float, events: list[float], client: int = 0, **more: Any) -> Record:
    fields = {"end": events[-1] if events else start, "output_tokens": len(events)} | more
    return Record(more.pop("flow", MAIN), client, 10, len(events), start=start, events=events, **fields)


def test_figures_of_two_clients() -> None:
    records = [
        record(0.0, [0.1, 0.2, 0.3, 0.4], client=0),
        record(0.4, [0.6, 0.7], client=0),
        record(0.0, [0.3, 0.5, 0.7, 0.9], client=1),
        record(0.0, [], client=1, error="HTTP 429"),
    ]
    result = summarize([ClientResult(0, records, 0.1, 1.0, [0.001])], Limits(ttft_ms=150, itl_ms=150))
    assert (result["requests"], result["completed"], result["errors"]) == (4, 3, 1)
    assert result["problems"] == ["HTTP 429"]
    assert result["seconds"] == 0.9 and result["output_tokens"] == 10 and result["input_tokens"] == 30
    assert result["output_tokens_per_second"] == pytest.approx(10 / 0.9, abs=0.01)
    assert result["ttft_ms"]["p50"] == pytest.approx(200) and result["ttft_ms"]["max"] == pytest.approx(300)
    assert result["itl_ms"]["p50"] == pytest.approx(100) and result["itl_ms"]["max"] == pytest.approx(200)
    assert result["tpot_ms"]["max"] == pytest.approx(200) and result["e2e_ms"]["max"] == pytest.approx(900)
    assert result["goodput"]["share"] == 0.25, "one of four: the first; the second is too late, the third too slow"
    # Whole from 0.3 (the second client's first token) to 0.7 (the first client's end).
    assert result["steady"]["seconds"] == pytest.approx(0.4)
    assert result["steady"]["output_tokens_per_second"] == pytest.approx(7 / 0.4)
    assert "long_prompts" not in result


def test_long_prompts_narrow_what_is_steady() -> None:
    ticks = [0.1 * i for i in range(1, 41)]
    slow = [at + (0.5 if at > 2.05 else 0.0) for at in ticks]  # one gap of 0.6 as a long prompt comes at 2.0
    long = Record(LONG, -1, 500, 1, start=2.0, end=2.7, events=[2.6], output_tokens=1)
    results = [ClientResult(0, [record(0.0, slow), long], 0.1, 5.0, [])]
    found = summarize(results, Limits())
    assert found["steady"]["seconds"] == pytest.approx(0.7) and found["steady"]["itl_ms"]["max"] == pytest.approx(600)
    assert found["long_prompts"]["ttft_ms"]["p50"] == pytest.approx(600)
    assert found["itl_p99_over_median"] > 3 and "goodput" not in found


def test_tokens_that_come_together_are_seen() -> None:
    together = record(0.0, [0.1, 0.2], output_tokens=8)
    found = summarize([ClientResult(0, [together], 0.5, 1.0, [0.0])], Limits())
    assert found["tokens_per_event"] == 4.0 and found["tpot_ms"]["p50"] == pytest.approx(100 / 7, abs=0.01)
    assert client_load([ClientResult(0, [together], 0.5, 1.0, [0.0])])["cpu_share_of_busiest"] == 0.5


def test_a_load_of_which_nothing_came_back_is_shown_too(capsys: pytest.CaptureFixture[str]) -> None:
    failed = Record(MAIN, 0, 4, 8, start=0.0, end=0.5, error="HTTP 500")
    facts = {"replicas": 1, "tp_size": 2, "pp_size": 1, "predicted_tokens_per_second": 100.0}
    result = summarize([ClientResult(0, [failed], 0.1, 1.0, [0.0])], Limits()) | facts
    result |= per_device(result) | {"client": client_load([ClientResult(0, [failed], 0.1, 1.0, [0.0])])}
    result["server_cpu_share"] = {}
    show(result)
    assert "0 requests completed, 1 failed" in capsys.readouterr().out


# ---------------------------------------------------------------- client processes


@pytest.mark.parametrize("scripted", [{"refuse": 5}], indirect=True)
def test_closed_loop_with_processes(scripted: Scripted) -> None:
    flow = Flow(MAIN, "closed", Lengths(4, 8), Lengths(3, 3), concurrency=4, requests=12)
    target = Target(scripted.url, "scripted", None, 100)
    results = run_load(target, [flow], processes=2, seed="s", timeout=5.0)
    records = [each for result in results for each in result.records]
    assert len(records) == 12 == len(scripted.requests) and len(results) == 2
    assert scripted.connections <= 4, "a client keeps its connection"
    refused = [each for each in records if each.error]
    assert len(refused) == 2 and all(each.error.startswith("HTTP 429") for each in refused)
    assert all(len(each.events) == each.output_tokens == 3 for each in records if not each.error)
    assert all(4 <= len(request["prompt"]) <= 8 for request in scripted.requests)


@pytest.mark.parametrize("scripted", [{"pause": 0.05}], indirect=True)
def test_open_loop_with_long_prompts(scripted: Scripted) -> None:
    flows = [
        Flow(MAIN, "open", Lengths(2, 2), Lengths(4, 4), arrivals=(0.0, 0.1, 0.4)),
        Flow(LONG, "every", Lengths(50, 50), Lengths(1, 1), interval=0.15),
    ]
    (result,) = run_load(Target(scripted.url, None, "key", 100), flows, processes=1, seed="s", timeout=5.0)
    main_ones = [each for each in result.records if each.flow == MAIN]
    long = [each for each in result.records if each.flow == LONG]
    assert len(main_ones) == 3 and len(long) >= 2 and not any(each.error for each in result.records)
    starts = sorted(each.start for each in main_ones)
    assert [at - starts[0] for at in starts] == pytest.approx([0.0, 0.1, 0.4])
    found = summarize([result], Limits())
    assert found["long_prompts"]["completed"] == len(long)
    assert 40 < found["itl_ms"]["p50"] < 200


def test_a_running_server(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--url", scripted.url, "--concurrency", "2", "--isl", "4", "--osl", "3", "--warmup", "1"]
    assert main(["bench", "serve", *arguments, "--ttft-limit-ms", "5000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert (result["url"], result["completed"], result["output_tokens"]) == (scripted.url, 2, 6)
    assert result["goodput"]["share"] == 1.0 and result["tokens_per_event"] == 1.0
    assert scripted.requests[0]["model"] == "scripted" and len(scripted.requests) == 3
    assert any("p99 gap over median" in line for line in lines)
    assert any("goodput within ttft 5000 ms" in line for line in lines)


# ---------------------------------------------------------------- the command


@pytest.mark.timeout(120)
def test_own_server_with_and_without_http(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = str(tmp_path_factory.mktemp("cache"))
    options = ["--model", "builtin", "--precision", "bf16", "--backend", "cpu", "--cache", cache, "--warmup", "2"]
    load = ["--concurrency", "4", "--requests", "8", "--isl", "16", "--osl", "12", "--max-num-seqs", "8"]
    assert main(["bench", "serve", *options, *load, "--compare-offline", "--start-timeout", "60"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert (result["completed"], result["errors"], result["output_tokens"]) == (8, 0, 96)
    assert result["offline"]["requests"] == 8
    rates = result["output_tokens_per_second"], result["offline"]["output_tokens_per_second"]
    assert result["http_over_offline"] == pytest.approx(rates[0] / rates[1], rel=1e-3)
    assert result["load"]["concurrency"] == 4 and result["ready_seconds"] > 0
    share = result["server_cpu_share"]  # in ticks of 10 ms, which the server may need less than
    assert share["engine"] > 0 and share["server"] >= 0
    assert 0 < result["client"]["cpu_share_of_busiest"] < 1
    assert any("through HTTP" in line for line in lines)


def test_the_engine_without_http_is_the_one_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that a server is told to do without are not in what it is compared with."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=0, stdout=json.dumps({"throughput": [{"seconds": 1.0}]}))

    monkeypatch.setattr(serve.subprocess, "run", run)
    switches = ["--no-cuda-graphs", "--no-persistent-decode", "--batch-invariant", "--no-tactics"]
    for given in ([], switches):
        args = parsed("--model", "builtin", "--requests", "4", *given)
        assert serve._offline(args, "builtin", None, serve.flows_of(args)[0], []) == {"seconds": 1.0}
    plain, without = commands
    assert [flag for flag in without if flag not in plain] == switches
    assert parsed_offline(without[4:]).no_persistent_decode


def parsed_offline(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    offline.add_arguments(parser)
    return parser.parse_args(arguments[1:])


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(arguments)


def test_how_many_requests() -> None:
    (each,) = serve.flows_of(parsed("--concurrency", "3"))
    assert (each.kind, each.concurrency, each.requests) == ("closed", 3, 3)
    (few,) = serve.flows_of(parsed("--concurrency", "8", "--requests", "2"))
    assert (few.concurrency, few.requests) == (2, 2)
    (endless,) = serve.flows_of(parsed("--concurrency", "8", "--duration", "5"))
    assert (endless.requests, endless.duration) == (0, 5.0)
    (opened,) = serve.flows_of(parsed("--rate", "10", "--duration", "2", "--arrivals", "constant"))
    assert len(opened.arrivals) == 20 and max(opened.arrivals) < 2
    (random_times,) = serve.flows_of(parsed("--rate", "50", "--duration", "20"))
    assert 800 < len(random_times.arrivals) < 1200 and 19 < max(random_times.arrivals) < 20
    (cut,) = serve.flows_of(parsed("--rate", "50", "--duration", "20", "--requests", "7"))
    assert cut.arrivals == random_times.arrivals[:7]
    _, long = serve.flows_of(parsed("--long-prompt-every", "2"))
    assert (long.kind, long.interval, long.input) == ("every", 2.0, Lengths(8192, 8192))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rate 0 --requests 4", "--rate is 0; it must be more than 0"),
        ("--rate 5", "--requests or --duration"),
        ("--rate 5 --requests 3 --arrivals steady", "--arrivals is 'steady'; allowed: poisson, constant"),
        ("--isl 9-3", "--input-len is '9-3'"),
        ("--osl 0", "--output-len is '0'"),
        ("--concurrency 0", "--concurrency is 0; it must be at least 1"),
        ("--duration -1", "--duration is -1; it cannot be negative"),
        ("--compare-offline --isl 5-9", "--compare-offline needs"),
        ("--compare-offline --url http://x", "--compare-offline needs"),
    ],
)
def test_loads_that_make_no_sense_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        serve.flows_of(parsed(*arguments.split()))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--url http://127.0.0.1:9", 1, "nothing answers at http://127.0.0.1:9"),
        ("--url https://localhost", 2, "it must be of the form http://HOST:PORT"),
        ("--url http://localhost --shape tiny", 2, "--shape is for one that is started"),
        ("--url http://localhost --tp-size 2", 2, "--tp-size is for one that is started"),
        ("--shape huge", 2, "--shape is 'huge'"),
        ("--kv-cache-dtype fp7", 2, "--kv-cache-dtype is 'fp7'"),
        ("--model ./nothing-here --start-timeout 50", 1, "nothing-here"),
    ],
)
def test_mistakes_are_one_clear_line(
    arguments: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *arguments.split()]) == code
    assert message in capsys.readouterr().err
