"""Health, models, metadata, tokenization, metrics against a scripted engine, and how light the server is."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import msgspec
from prometheus_client.parser import text_string_to_metric_families
from server_fakes import (
    CHAT,
    HELLO,
    TEXT,
    chat,
    client,
    engine_info,
    eventually,
    ready_state,
    server_tokenizer,
    text,
)

from appliance.server.app import create_app
from appliance.server.lifecycle import PHASES
from appliance.server.metrics import Distribution
from appliance.server.state import ServerState
from appliance.types import EngineStats


async def test_health_through_the_phases() -> None:
    state = ServerState(("tiny",))
    async with client(state) as http:
        for phase in PHASES:
            if phase in ("ready", "restarting", "draining", "failed"):
                continue
            state.lifecycle.enter(phase, "layers.3")  # type: ignore[arg-type]
            state.lifecycle.progress(percent=12.34, eta_seconds=7)
            assert (await http.get("/v1/health/live")).status_code == 200
            for path in ("/v1/health/ready", "/health", "/v1/health/startup"):
                response = await http.get(path)
                body = response.json()
                assert response.status_code == 503
                assert [body[k] for k in ("phase", "percent", "eta_seconds", "reason")] == [phase, 12.3, 7, "layers.3"]
        want = {"ready": (200, 200, 200), "restarting": (200, 503, 200), "failed": (503, 503, 200)}
        for phase, statuses in want.items():
            state.lifecycle.enter(phase)  # type: ignore[arg-type]
            got = [(await http.get(f"/v1/health/{x}")).status_code for x in ("live", "ready", "startup")]
            assert tuple(got) == statuses


async def test_models_metadata_and_the_rest(tmp_path: Path) -> None:
    license_path = tmp_path / "LICENSE"
    license_path.write_text("free")
    state, _engine = await ready_state(model_url="hf://org/tiny", license_path=license_path)
    state.selection = {"selected": {"name": "fp8-tp1"}}
    async with client(state) as http:
        models = (await http.get("/v1/models")).json()
        assert [m["id"] for m in models["data"]] == ["tiny", "alias"] and models["data"][0]["max_model_len"] == 512
        assert (await http.get("/v1/models/alias")).json()["id"] == "alias"
        assert (await http.get("/v1/models/x/y")).status_code == 404
        assert (await http.post(CHAT, json=chat(model="alias"))).json()["model"] == "alias"
        metadata = (await http.get("/v1/metadata")).json()
        assert metadata["selectedModelProfileId"] == "fp8-tp1" and metadata["version"] == "1.2.3"
        assert metadata["modelInfo"][0] == {"shortName": "tiny", "modelUrl": "hf://org/tiny"}
        assert metadata["licenseInfo"]["size"] == 4
        assert {"licenseInfo", "assetInfo", "repository_override"} <= set(metadata)
        assert (await http.get("/v1/version")).json()["release"] == "1.2.3"
        assert (await http.get("/v1/license")).text == "free"
        assert (await http.get("/v1/manifest")).status_code == 503
        state.manifest = {"schema": 1}
        assert (await http.get("/v1/manifest")).json() == {"schema": 1}
        schema = (await http.get("/openapi.json")).json()
        page = await http.get("/")
    assert "text/html" in page.headers["content-type"] and "v1/health/startup" in page.text
    reference = schema["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert "top_k" in schema["components"]["schemas"][reference.rsplit("/", 1)[1]]["properties"]
    assert schema["components"]["schemas"]["Message"]


async def test_tokenize_and_detokenize() -> None:
    state, _engine = await ready_state()
    tokenizer = server_tokenizer()
    long = "hello world " * 1000  # long enough for the thread
    async with client(state) as http:
        answer = (await http.post("/tokenize", json={"prompt": long, "return_token_strs": True})).json()
        assert answer["tokens"] == tokenizer.encode(long) and answer["count"] == len(answer["tokens"])
        assert answer["token_strs"][0] == tokenizer.token_name(answer["tokens"][0]) and answer["max_model_len"] == 512
        chatted = (await http.post("/tokenize", json={"messages": HELLO})).json()
        back = (await http.post("/detokenize", json={"tokens": chatted["tokens"]})).json()
    assert back == {"prompt": "<s><|user|>hello<|end|>\n<|assistant|>"}


def samples(text: str) -> dict[tuple[str, str], float]:
    """Metric values by name and the values of its other labels, by label name."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            extra = [v for k, v in sorted(sample.labels.items()) if k not in ("model_name", "le")]
            if "le" not in sample.labels:
                found[sample.name, ",".join(extra)] = sample.value
    return found


async def test_metrics_are_true() -> None:
    state, engine = await ready_state("hello world")
    said = len(server_tokenizer().encode("hello world")) + 1
    async with client(state) as http:
        for _ in range(2):
            await http.post(CHAT, json=chat(stream=True))
        await http.post(TEXT, json=text(max_tokens=2))
        engine.auto = False
        waiting = asyncio.create_task(http.post(TEXT, json=text(n=3, max_tokens=1)))
        await eventually(lambda: len(engine.running) == 3)
        before = samples((await http.get("/metrics")).text)
        engine.step()
        await waiting
        after = samples((await http.get("/v1/metrics")).text)
    prompt = len(engine.added[0][0].prompt_token_ids)
    short = len(engine.added[2][0].prompt_token_ids)
    generated, prompts = 2 * said + 2 + 3, 2 * prompt + short + 3 * short
    for prefix in ("vllm:", ""):
        assert before[f"{prefix}num_requests_waiting", ""] == 3 and before[f"{prefix}num_requests_running", ""] == 0
        assert after[f"{prefix}num_requests_waiting", ""] == after[f"{prefix}num_requests_running", ""] == 0
        assert after[f"{prefix}generation_tokens_total", ""] == generated
        assert after[f"{prefix}prompt_tokens_total", ""] == prompts
        assert after[f"{prefix}time_to_first_token_seconds_count", ""] == 6
        assert after[f"{prefix}e2e_request_latency_seconds_count", ""] == 6
        assert after[f"{prefix}time_per_output_token_seconds_count", ""] == generated - 6
        assert after[f"{prefix}request_generation_tokens_sum", ""] == generated
        assert after[f"{prefix}request_prompt_tokens_sum", ""] == prompts
    assert after["vllm:inter_token_latency_seconds_count", ""] == generated - 6
    assert after["vllm:request_success_total", "stop"] == 2 and after["vllm:request_success_total", "length"] == 4
    assert after["request_finish_total", "length"] == 4 and after["num_request_max", ""] == 8 + 4096
    assert after["vllm:kv_cache_usage_perc", ""] == after["gpu_cache_usage_perc", ""] == 0


async def test_metrics_of_start_and_engine() -> None:
    state, engine = await ready_state(before_seconds=0.25)
    state.engine = msgspec.structs.replace(engine_info(), startup_seconds={"load_weights": 1.5})
    state.metrics.profile = {"profile": "fp8-tp1", "precision": "fp8"}
    state.metrics.engine_cache_hit = True
    engine.auto = False
    async with client(state) as http:
        task = asyncio.create_task(http.post(TEXT, json=text(max_tokens=2)))
        await eventually(lambda: bool(engine.running))
        engine.step()
        found = samples((await http.get("/metrics")).text)
        assert found["vllm:num_requests_running", ""] == 1 and found["vllm:num_requests_waiting", ""] == 0
        assert found["gpu_cache_usage_perc", ""] == found["vllm:kv_cache_usage_perc", ""] == 0.01
        task.cancel()
    assert found["startup_phase_seconds", "starting"] >= 0 and found["engine_cache_hit", ""] == 1
    assert found["startup_phase_seconds", "engine.load_weights"] == 1.5, "of the engine process, by its own clock"
    assert found["startup_phase_seconds", "python"] == 0.25
    assert found["profile_info", "fp8,fp8-tp1"] == 1
    assert found["vllm:cache_config_info", "16,bf16,100"] == 1


def test_counters_survive_an_engine() -> None:
    metrics = ServerState(("tiny",)).metrics
    metrics.engine_stats(EngineStats(num_preemptions=2, prefix_cache_queries=10, prefix_cache_hits=4))
    metrics.engine_lost()
    metrics.engine_stats(EngineStats(num_preemptions=1, prefix_cache_queries=5, prefix_cache_hits=5))
    assert metrics.num_preemptions == 3 and metrics.prefix_cache == (15, 9)


def test_histogram_buckets() -> None:
    distribution = Distribution((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        distribution.observe(value)
    distribution.observe(2.0, count=3)
    assert distribution.buckets() == [("1.0", 2.0), ("2.0", 6.0), ("+Inf", 7.0)] and distribution.total == 18.0


def test_importing_the_server_stays_light() -> None:
    """No torch, and CPU time that leaves room in the two seconds in which /v1/health/live must answer."""
    code = (
        "import sys, time\n"
        "from appliance.server.app import create_app\nfrom appliance.server.state import ServerState\n"
        "import appliance.server.tokenizer\ncreate_app(ServerState(('m',)))\n"
        "print(sorted({'torch', 'triton', 'transformers'} & set(sys.modules)), time.process_time())"
    )
    best = 9.0
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        heavy, seconds = done.stdout.rsplit(" ", 1)
        assert heavy == "[]"
        best = min(best, float(seconds))
    assert best < 1.7, best


def test_create_app_needs_nothing() -> None:
    assert create_app(ServerState(("m",))).state.server.model_names == ("m",)
