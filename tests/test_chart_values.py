"""The chart's values: what is refused and with which words, what is computed from them, what becomes of settings, and
that schema, README and values.yaml say the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import chart_tools
import pytest
import yaml
from chart_tools import CHART, OWN_SETTINGS, helm, manifests, matrix

import appliance
from appliance import registry
from appliance.cli import make_parser
from appliance.settings import load, specs

UPDATE = "run: .venv/bin/python tests/chart_tools.py update"


def refused(tmp_path: Path, values: str) -> str:
    """What helm says of values that it must not take."""
    file = tmp_path / "values.yaml"
    file.write_text(values, encoding="utf-8")
    done = helm("template", "demo", CHART, "-f", file)
    assert done.returncode != 0, f"was accepted: {values}"
    return done.stderr


def rendered(*sets: str, base: str = "default") -> list[dict[str, Any]]:
    """Numbers and booleans go through --set-json: --set takes a fraction for text."""
    typed = re.compile(r"=([\d.]+|true|false)$")
    flags = [part for value in sets for part in ("--set-json" if typed.search(value) else "--set", value)]
    return manifests(base, *flags)


def pod_of(items: list[dict[str, Any]]) -> dict[str, Any]:
    (workload,) = [item for item in items if item["kind"] in ("Deployment", "StatefulSet")]
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("replicas: 2", ["additional properties 'replicas' not allowed"]),
        ("model: {nmae: x}", ["at '/model'", "'nmae' not allowed"]),
        ("image: {tag: 1.5}", ["at '/image/tag'", "got number, want string"]),
        ("image: {digest: latest}", ["at '/image/digest'"]),
        ('replicaCount: "2"', ["at '/replicaCount'", "got string, want integer"]),
        ("drainSeconds: soon", ["at '/drainSeconds'", "got string, want number"]),
        ("service: {type: Loadbalancer}", ["at '/service/type'", "'LoadBalancer'"]),
        ("env: [{name: X, value: 5}]", ["at '/env/0/value'", "got number, want string"]),
        ("settings: {max_model_length: 4096}", ["at '/settings'", "'max_model_length' not allowed"]),
        ("settings: {precision: fp7}", ["at '/settings/precision'", "'fp8'"]),
        ("settings: {memory_fraction: 1.5}", ["at '/settings/memory_fraction'", "maximum"]),
        ("settings: {model: x}", ["at '/settings'", "'model' not allowed"]),
        ("persistence: {accessModes: [RWX]}", ["at '/persistence/accessModes/0'"]),
        ("persistence: {size: big}", ["at '/persistence/size'"]),
        ('resources: {limits: {nvidia.com/gpu: "two"}}', ["at '/resources/limits/nvidia.com~1gpu'"]),
        ("livenessProbe: {path: health}", ["at '/livenessProbe/path'"]),
        ("autoscaling: {targets: {queue: 3}}", ["at '/autoscaling/targets'", "'queue' not allowed"]),
        ("multiNode: {enabled: true, size: 1}", ["at '/multiNode/size'", "minimum"]),
        ("auth: {key: secret}", ["at '/auth'", "'key' not allowed"]),
    ],
)
def test_the_schema_names_what_is_wrong(tmp_path: Path, values: str, words: list[str]) -> None:
    said = refused(tmp_path, values)
    assert "values don't meet the specifications of the schema" in said
    for word in words:
        assert word in said, said


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("replicaCount: 2", "up to 2 pods would share one claim.*perPod: true"),
        ("multiNode: {enabled: true}", r"up to 2 pods would share one claim.*\[ReadWriteMany\]"),
        ("persistence: {perPod: true, existingClaim: x}", "choose one"),
        ("{persistence: {perPod: true}, multiNode: {enabled: true}}", "perPod is not for multi-node"),
        ("parallel: {tensor: 2}", 'sizes of 2 GPUs in a pod that has 1; raise resources.limits."nvidia.com/gpu"'),
        ("{parallel: {tensor: 2, pipeline: 2}, resources: {limits: {nvidia.com/gpu: 2}}}", "sizes of 4 GPUs"),
        (
            "{parallel: {pipeline: 3}, multiNode: {enabled: true}, persistence: {accessModes: [ReadWriteMany]}}",
            "3 pipeline stages cannot be shared by 2 pods; choose a multiple of multiNode.size",
        ),
        ("resources: {requests: {nvidia.com/gpu: 2}}", "the same among limits and requests"),
        ("env: [{name: APPLIANCE_MODEL, value: x}]", "APPLIANCE_MODEL is set by this chart; use the value model.name"),
        ('env: [{name: NIM_SERVER_PORT, value: "80"}]', "use the value service.port"),
        ("env: [{name: A, value: b}, {name: A, value: c}]", "A is set twice"),
        ("{settings: {seed: 1}, env: [{name: APPLIANCE_SEED, value: '2'}]}", "APPLIANCE_SEED is set twice"),
        ("terminationGracePeriodSeconds: 30", "is 30, but preStopSeconds and drainSeconds need 55"),
        ("autoscaling: {enabled: true, minReplicas: 5}", "minReplicas 5 is more than maxReplicas 4"),
        ("autoscaling: {enabled: true, maxReplicas: 1, targets: {num_requests_waiting: 0}}", "no metric has a target"),
        ("autoscaling: {enabled: true, maxReplicas: 1, minReplicas: 0}", "an HPA cannot go to zero"),
        ("autoscaling: {enabled: true, maxReplicas: 1, type: keda}", "set autoscaling.keda.prometheusAddress"),
        (
            "autoscaling: {enabled: true, maxReplicas: 1, minReplicas: 0, type: keda, keda: {prometheusAddress: http://p}}",
            "at zero pods no metric of theirs could wake them",
        ),
        ("{preCache: {enabled: true}, persistence: {enabled: false}}", "no claim that all pods share"),
        ("preCache: {enabled: true, hook: true}", "set persistence.existingClaim, or hook: false"),
        ("preCache: {enabled: true, all: true, profile: fp8-tp1}", "exclude each other"),
        ("ingress: {enabled: true}", "set ingress.hosts"),
        ("gateway: {enabled: true}", "name the Gateway"),
    ],
)
def test_values_that_are_wrong_together(tmp_path: Path, values: str, words: str) -> None:
    assert re.search(words, refused(tmp_path, values))


# ---------------------------------------------------------------- computed


@pytest.mark.parametrize(
    ("sets", "failures", "storage"),
    [
        ([], 180, "100Gi"),  # 1800 s where nobody said how large the model is
        (["model.sizeGiB=15"], 90, "48Gi"),  # 300 s + 15 × 40 s
        (["model.sizeGiB=131.5"], 556, "339Gi"),
        (["model.sizeGiB=131.5", "startup.secondsPerGiB=10", "startup.baseSeconds=95"], 141, "339Gi"),
        (["model.sizeGiB=15", "startupProbe.periodSeconds=7"], 129, "48Gi"),
        (["model.sizeGiB=15", "startupProbe.failureThreshold=7", "persistence.size=1Ti"], 7, "1Ti"),
    ],
)
def test_size_of_the_model_gives_time_and_space(sets: list[str], failures: int, storage: str) -> None:
    items = rendered(*sets)
    probe = pod_of(items)["containers"][0]["startupProbe"]
    assert probe["failureThreshold"] == failures
    (deployment,) = [item for item in items if item["kind"] == "Deployment"]
    assert deployment["spec"]["progressDeadlineSeconds"] > failures * probe["periodSeconds"]
    (claim,) = [item for item in items if item["kind"] == "PersistentVolumeClaim"]
    assert claim["spec"]["resources"]["requests"]["storage"] == storage


def test_the_grace_period_follows_the_drain() -> None:
    for sets, grace in (
        ([], 55),
        (["drainSeconds=600"], 625),
        (["drainSeconds=2.5", "preStopSeconds=0"], 23),
        (["terminationGracePeriodSeconds=900"], 900),
    ):
        pod = pod_of(rendered(*sets))
        (container,) = pod["containers"]
        environment = {item["name"]: item.get("value") for item in container["env"]}
        sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert pod["terminationGracePeriodSeconds"] == grace
        assert grace >= sleep + float(environment["APPLIANCE_DRAIN_SECONDS"]) + 20


@pytest.mark.parametrize(
    ("sets", "size"),
    [
        ([], None),
        ([r"resources.limits.nvidia\.com/gpu=2"], "2Gi"),
        ([r"resources.limits.nvidia\.com/gpu=8", "shm.size=20Gi"], "20Gi"),
        (["shm.size=512Mi"], "512Mi"),
    ],
)
def test_shared_memory_grows_with_the_gpus(sets: list[str], size: str | None) -> None:
    pod = pod_of(rendered(*sets))
    found = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
    assert found == ([{"medium": "Memory", "sizeLimit": size}] if size else [])
    paths = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
    assert ("/dev/shm" in paths) is (size is not None)


def test_liveness_waits_for_the_server_s_own_word() -> None:
    """A restart by timeouts comes no sooner than the watchdog's 503 for a stuck event loop, and before it gives up."""
    probe = pod_of(rendered())["containers"][0]["livenessProbe"]
    stuck_seconds = specs()["stuck_seconds"].default
    assert stuck_seconds <= probe["periodSeconds"] * probe["failureThreshold"] < 2 * stuck_seconds


def test_a_gpu_is_required_where_one_is_asked_for() -> None:
    for sets, required, tolerated in (
        ([], "true", True),
        ([r"resources.limits.nvidia\.com/gpu=0"], None, False),
        (["gpuToleration=false", "settings.require_gpu=false"], "false", False),
    ):
        pod = pod_of(rendered(*sets))
        environment = {item["name"]: item.get("value") for item in pod["containers"][0]["env"]}
        assert environment.get("APPLIANCE_REQUIRE_GPU") == required
        assert any(item["key"] == "nvidia.com/gpu" for item in pod.get("tolerations", [])) is tolerated


def test_pods_are_replaced_without_a_further_gpu() -> None:
    for sets, strategy in (
        ([], {"type": "Recreate"}),
        (
            ["persistence.accessModes={ReadWriteMany}"],
            {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
        ),
        (["updateStrategy.type=RollingUpdate"], {"type": "RollingUpdate"}),
    ):
        (deployment,) = [item for item in rendered(*sets) if item["kind"] == "Deployment"]
        assert deployment["spec"]["strategy"] == strategy


# ---------------------------------------------------------------- settings


def containers() -> list[tuple[str, dict[str, Any]]]:
    from test_chart import pods

    return [(f"{name}/{component}", pod["spec"]["containers"][0]) for name in matrix() for component, pod in pods(name)]


def test_every_variable_is_a_setting_that_the_appliance_takes(tmp_path: Path) -> None:
    """Names and values both: the appliance's own loader reads them, with no complaint."""
    pem = tmp_path / "pem"
    pem.touch()
    known = {name.lstrip("!") for spec in specs().values() for name in spec.variables}
    seen = set()
    for where, container in containers():
        environment = {}
        for item in container.get("env", []):
            assert item["name"] in known | {"AWS_REGION"}, f"{where}: {item['name']}"
            assert item["name"] not in environment, f"{where}: {item['name']} twice"
            value = item.get("value", "secret").replace("$(LWS_WORKER_INDEX)", "1")  # as its controller fills it in
            environment[item["name"]] = str(pem) if value.startswith("/etc/appliance/tls/") else value
        settings = load({}, environment)
        assert settings.warnings == (), where
        for name in set(environment) & known:
            (spec,) = [spec for spec in specs().values() if name in spec.variables]
            assert settings.origin(spec.name).source == "environment"
            seen.add(spec.name)
    # All values that stand for a setting are in the matrix.
    assert set(OWN_SETTINGS) - seen <= {"health_port", "ssl_ca_certs_path"}


def test_numbers_arrive_as_numbers() -> None:
    """Helm reads numbers of values files as floating point."""
    environment = dict(containers())["air-gapped/server"]["env"]
    values = {item["name"]: item.get("value") for item in environment}
    assert values["APPLIANCE_MAX_MODEL_LEN"] == "1048576" and values["APPLIANCE_MEMORY_FRACTION"] == "0.85"
    assert values["APPLIANCE_LOG_JSON"] == "true" and values["APPLIANCE_SERVED_MODEL_NAME"] == "llama,example/llama-8b"


def test_variables_of_the_chart_are_refused_by_all_their_names() -> None:
    text = (CHART / "templates" / "_checks.tpl").read_text(encoding="utf-8")
    block = re.search(r'define "appliance.ownVariables" -}}\n(.*?){{- end }}', text, re.S)
    assert block is not None
    by_value: dict[str, list[str]] = yaml.safe_load(block[1])
    values = {name for name, _, _ in chart_tools.documented_values()}
    assert all(value in values or any(name.startswith(f"{value}.") for name in values) for value in by_value)
    listed = {name for names in by_value.values() for name in names}
    assert listed == {name.lstrip("!") for own in OWN_SETTINGS for name in specs()[own].variables}


def test_commands_of_the_chart_are_the_appliance_s() -> None:
    commands = set()
    for where, container in containers():
        if "command" not in container:
            args = container["args"]
            make_parser(args[0]).parse_args(args)
            commands.add((where.partition("/")[2], *args))
    assert ("server", "serve") in commands and ("pre-cache", "download-to-cache") in commands
    assert ("pre-cache", "download-to-cache", "-p", "fp8-tp1") in commands


def test_the_pre_cache_job_changes_its_name_with_its_specification() -> None:
    """A Job is immutable: an upgrade that changed one in place would be refused by the cluster."""
    names = []
    for sets in ([], ["model.name=example/other"], ["preCache.backoffLimit=3"]):
        (job,) = [item for item in rendered(*sets, base="pre-cached-beside") if item["kind"] == "Job"]
        names.append(job["metadata"]["name"])
    assert names[0] != names[1] and names[0] == names[2]


# ---------------------------------------------------------------- documents


def test_versions() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == appliance.__version__
    done = helm("template", "demo", CHART, "--kube-version", "1.29.0")
    assert done.returncode != 0 and "1.30" in done.stderr


def test_the_image_is_what_the_chart_takes_it_for() -> None:
    """Port, cache, user and entry point; python3 on the path is the image's, whose test pod calls it."""
    dockerfile = (chart_tools.ROOT / "Dockerfile").read_text(encoding="utf-8")
    (container,) = pod_of(rendered())["containers"]
    assert f"EXPOSE {container['ports'][0]['containerPort']}\n" in dockerfile
    (cache,) = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "cache"]
    assert re.search(rf"^RUN mkdir -p {re.escape(cache)}\b", dockerfile, re.M)
    assert f"USER {pod_of(rendered())['securityContext']['runAsUser']}:0\n" in dockerfile
    assert "command" not in container
    assert re.search(r'^ENTRYPOINT \[.*/entrypoint.py"\]$', dockerfile, re.M)
    assert re.search(r"^ENV PATH=/opt/venv/bin:", dockerfile, re.M)


def test_the_schema_has_today_s_settings() -> None:
    assert chart_tools.SCHEMA.read_text(encoding="utf-8") == chart_tools.schema_text(), UPDATE


def test_the_schema_covers_every_value() -> None:
    schema = json.loads(chart_tools.SCHEMA.read_text(encoding="utf-8"))
    for name, _default, _comment in chart_tools.documented_values():
        node = schema
        for part in name.split("."):
            assert node.get("additionalProperties") is False, f"{name}: {part} is in an open object"
            node = node["properties"][part]
    documented = {name.partition(".")[0] for name, _, _ in chart_tools.documented_values()}
    assert set(schema["properties"]) == documented | {"global"}


def test_the_readme_has_every_value() -> None:
    assert chart_tools.README.read_text(encoding="utf-8") == chart_tools.readme_text(), UPDATE


def test_the_readme_s_commands_and_links() -> None:
    text = chart_tools.README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert (CHART / target).exists(), target
    used = set(re.findall(r"--set(?:-json)? '?([\w.]+)=", text))
    values = {name for name, _, _ in chart_tools.documented_values()}
    assert used and used <= values | {f"settings.{name}" for name in chart_tools.settings_schema()["properties"]}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("default", ["at most 1800 s", "API is open", "service/demo-appliance 8000:8000"]),
        ("minimal", ["persistence is off", "the CPU serves"]),
        ("autoscaled", ["Authorization: Bearer"]),
        ("scale-to-zero", ["curl -k https://"]),
    ],
)
def test_notes(name: str, said: list[str]) -> None:
    values = chart_tools.MATRIX / f"{name}.yaml"
    done = helm("install", "demo", CHART, "--namespace", "inference", "--dry-run=client", "-f", values)
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    for words in said:
        assert words in notes, notes
    assert "WARNING" not in notes


def notes_of(name: str, *flags: str) -> str:
    values = chart_tools.MATRIX / f"{name}.yaml"
    done = helm("install", "demo", CHART, "--namespace", "inference", "--dry-run=client", "-f", values, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("NOTES:")[2]


def test_notes_warn_of_sizes_that_the_image_does_not_have() -> None:
    """By what the backend says of itself: the same values serve once it can."""
    facts = registry.plugins("backends")["cuda"].facts
    tensor, pipeline = facts["max_tp"], facts["max_pp"]
    refusal = f"refuses tensor-parallel sizes over {tensor} and pipeline-parallel sizes over {pipeline}: the pods will"
    assert (refusal in notes_of("multi-gpu")) is (tensor < 4)
    assert (refusal in notes_of("multi-node")) is (pipeline < 4)
    gpus = f"nvidia\\.com/gpu={2 * tensor}"
    of_twice = [f"parallel.tensor={2 * tensor}", f"resources.limits.{gpus}", f"resources.requests.{gpus}"]
    assert refusal in notes_of("multi-gpu", *(word for value in of_twice for word in ("--set", value)))
    assert refusal not in notes_of("multi-gpu", "--set", "parallel.tensor=1")
    left_open = notes_of("multi-gpu", "--set", "parallel.tensor=0")
    assert ("serves a copy of the model on one GPU" in left_open) is (tensor == 1)
    assert ("the selection decides whether a copy" in left_open) is (tensor > 1)


def test_the_largest_sizes_are_the_backends() -> None:
    assert chart_tools.BUILD.read_text(encoding="utf-8") == chart_tools.build_text(), UPDATE
