"""The two pages for people: complete without any other host, and true to what the server serves."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from server_fakes import client, ready_state

import appliance.server

STATIC = Path(appliance.server.__file__).parent / "static"


async def test_pages_need_no_other_host_and_no_key() -> None:
    state, _engine = await ready_state(api_keys=("secret",))
    async with client(state) as http:
        for path in ("/", "/docs"):
            page = await http.get(path)
            assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
            assert not re.search(r"""https?:|src=|@import|url\(|["']//""", page.text), path
            for target in re.findall(r"""(?:href="|fetch\(")([^"]+)""", page.text):
                if not target.startswith("data:") and target != "./":
                    assert (await http.get("/" + target)).status_code == 200, (path, target)
        assert (await http.get("/redoc")).status_code == 401  # a key is asked for first, then there is none
        headers = {"Authorization": "Bearer secret"}
        assert (await http.get("/redoc", headers=headers)).status_code == 404
        assert (await http.get("/v1/models")).status_code == 401


async def test_dashboard_reads_metrics_that_exist() -> None:
    state, _engine = await ready_state()
    state.metrics.profile = {"name": "bf16-cpu-tp1"}
    state.metrics.engine_cache_hit = True
    read = re.findall(r"""(?:read|labels)\(text, "([a-z_]+)"\)""", (STATIC / "index.html").read_text())
    async with client(state) as http:
        families = text_string_to_metric_families((await http.get("/metrics")).text)
        known = {sample.name: sample.labels for family in families for sample in family.samples}
    assert len(set(read)) >= 9
    assert set(read) <= known.keys()
    assert known["num_request_max"]["model_name"] == "tiny"


async def test_every_body_of_the_docs_page_has_its_schema() -> None:
    state, _engine = await ready_state()
    async with client(state) as http:
        api = (await http.get("/openapi.json")).json()
    bodies = {path: post["post"]["requestBody"] for path, post in api["paths"].items() if "post" in post}
    assert set(bodies) == {"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"}
    for body in bodies.values():
        name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        assert api["components"]["schemas"][name]["properties"]
