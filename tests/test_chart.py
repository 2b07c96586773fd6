"""What the chart renders, by the real helm: lint, snapshots, Kubernetes' schemas, and how the objects fit together.

Values that are refused are in test_chart_values.py, a running server in test_chart_live.py.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import chart_tools
import jsonschema
import kubernetes_validate
import pytest
import yaml
from chart_tools import CHART, MATRIX, SNAPSHOTS, helm, manifests, matrix, template
from kubernetes_validate import utils
from kubernetes_validate.utils import all_versions, major_minor
from server_fakes import ready_state

from appliance.settings import load
from appliance.settings_rules import check_place_of_node

MINORS = sorted({major_minor(version) for version in all_versions()}, key=lambda v: int(v.partition(".")[2]))[-3:]
CUSTOM = yaml.safe_load((MATRIX.parent / "custom-resources.yaml").read_text(encoding="utf-8"))

# The library reads 1 MB of definitions for every object; once is enough.
utils.schema_contents = functools.cache(utils.schema_contents)


def pods(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(component, {metadata, spec}) of every pod that a values file makes."""
    for item in manifests(name):
        spec = item.get("spec", {})
        group = spec.get("leaderWorkerTemplate", {})
        if item["kind"] == "Pod":
            found = [item]
        else:
            found = [spec[key] for key in ("template",) if key in spec]
            found += [group[key] for key in ("leaderTemplate", "workerTemplate") if key in group]
        for pod in found:
            yield pod["metadata"]["labels"]["app.kubernetes.io/component"], pod


def of_kind(name: str, kind: str) -> dict[str, Any]:
    (found,) = [item for item in manifests(name) if item["kind"] == kind]
    return found


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a Kubernetes selector (of Service, or with matchLabels and matchExpressions) takes an object."""
    wanted = selector.get("matchLabels", {} if "matchExpressions" in selector else selector)
    chosen = all(labels.get(key) == value for key, value in wanted.items())
    return chosen and all(
        rule["operator"] == "In" and labels.get(rule["key"]) in rule["values"]
        for rule in selector.get("matchExpressions", ())
    )


# ---------------------------------------------------------------- helm's and Kubernetes' own checks


def test_helm_is_the_real_one() -> None:
    version = helm("version", "--short").stdout
    assert version.startswith(chart_tools.HELM_VERSION) and version.startswith("v4.")


@pytest.mark.parametrize("name", matrix())
def test_lint_strict(name: str) -> None:
    done = helm("lint", "--strict", CHART, "-f", MATRIX / f"{name}.yaml")
    assert done.returncode == 0 and "0 chart(s) failed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("name", matrix())
def test_snapshot(name: str) -> None:
    path = SNAPSHOTS / f"{name}.yaml"
    rendered = template(name)
    assert path.is_file() and rendered == path.read_text(encoding="utf-8"), (
        f"{path.name} is not what the chart renders; if that is meant: .venv/bin/python tests/chart_tools.py update"
    )


def test_no_snapshot_is_left_over() -> None:
    assert sorted(path.stem for path in SNAPSHOTS.glob("*.yaml")) == matrix()


@functools.cache
def _check(text: str, minor: str) -> None:
    """Against Kubernetes' schema, unknown fields refused. Cached, as many objects are the same in several files."""
    kubernetes_validate.validate(json.loads(text), minor, strict=True)


@pytest.mark.parametrize("minor", MINORS)
@pytest.mark.parametrize("name", matrix())
def test_manifests_are_valid(name: str, minor: str) -> None:
    for item in manifests(name):
        assert item["metadata"]["namespace"] == "inference"
        custom = CUSTOM.get(item["kind"])
        if custom is None:
            _check(json.dumps(item), minor)
            continue
        assert item["apiVersion"] == custom["apiVersion"]
        jsonschema.validate(item["spec"], custom["spec"])
    for _component, pod in pods(name):
        metadata = {"name": "pod", **pod["metadata"]}
        _check(json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}), minor)


def test_kubernetes_schemas_do_refuse() -> None:
    """The checks above can fail."""
    deployment = json.loads(json.dumps(of_kind("default", "Deployment")))
    deployment["spec"]["template"]["spec"]["containers"][0]["port"] = 8000
    with pytest.raises(kubernetes_validate.ValidationError, match="port"):
        kubernetes_validate.validate(deployment, MINORS[-1], strict=True)


def test_the_matrix_renders_every_template() -> None:
    rendered = {line for name in matrix() for line in template(name).splitlines() if line.startswith("# Source: ")}
    files = {path.relative_to(CHART).as_posix() for path in (CHART / "templates").rglob("*.yaml")}
    assert {f"# Source: appliance/{file}" for file in files} == rendered


# ---------------------------------------------------------------- objects that fit together


@pytest.mark.parametrize("name", matrix())
def test_selectors_find_what_they_are_for(name: str) -> None:
    found = list(pods(name))
    for item in manifests(name):
        spec = item.get("spec", {})
        if item["kind"] == "Service":
            assert {component for component, pod in found if matches(spec["selector"], pod["metadata"]["labels"])} == {
                "server"
            }
        elif item["kind"] in ("Deployment", "StatefulSet"):
            assert matches(spec["selector"], spec["template"]["metadata"]["labels"])
        elif item["kind"] in ("PodDisruptionBudget", "NetworkPolicy"):
            selector = spec.get("selector") or spec["podSelector"]
            chosen = {component for component, pod in found if matches(selector, pod["metadata"]["labels"])}
            assert chosen == {component for component, _ in found} & {"server", "worker"}
        elif item["kind"] == "ServiceMonitor":
            services = [other for other in manifests(name) if other["kind"] == "Service"]
            scraped = [other for other in services if matches(spec["selector"], other["metadata"]["labels"])]
            assert [other["metadata"]["name"] for other in scraped] == [item["metadata"]["name"]]
            assert spec["endpoints"][0]["port"] in [port["name"] for port in scraped[0]["spec"]["ports"]]
        elif item["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"):
            target = spec["scaleTargetRef"]
            (workload,) = [other for other in manifests(name) if other["kind"] == target["kind"]]
            assert workload["apiVersion"] == target["apiVersion"]
            assert workload["metadata"]["name"] == target["name"]
            assert "replicas" not in workload["spec"], "or each upgrade would undo the scaling"


@pytest.mark.parametrize("name", matrix())
def test_pods_are_locked_down_and_their_volumes_exist(name: str) -> None:
    claims = {item["metadata"]["name"] for item in manifests(name) if item["kind"] == "PersistentVolumeClaim"}
    existing = yaml.safe_load((MATRIX / f"{name}.yaml").read_text()).get("persistence", {}).get("existingClaim")
    accounts = {item["metadata"]["name"] for item in manifests(name) if item["kind"] == "ServiceAccount"}
    made = [item for item in manifests(name) if item["kind"] == "StatefulSet"]
    per_pod = {claim["metadata"]["name"] for item in made for claim in item["spec"]["volumeClaimTemplates"]}
    for component, pod in pods(name):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["serviceAccountName"] in accounts | {"default"}
        (container,) = spec["containers"]
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True and security["allowPrivilegeEscalation"] is False
        assert security["capabilities"]["drop"] == ["ALL"]
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", [])}
        assert set(mounts) == set(volumes) | per_pod or component == "test"
        if component != "test":
            assert mounts["cache"] == "/opt/nim/.cache" and mounts["tmp"] == "/tmp"
        for volume in volumes.values():
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in claims | {existing}


def test_a_platform_may_choose_the_user() -> None:
    for _component, pod in pods("openshift"):
        assert {"runAsUser", "runAsGroup", "fsGroup"}.isdisjoint(pod["spec"]["securityContext"])
    for _component, pod in pods("default"):
        assert (
            pod["spec"]["securityContext"] | {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000}
            == (pod["spec"]["securityContext"])
        )


def test_names_stay_short_enough() -> None:
    done = helm("template", "a" * 53, CHART, "-f", MATRIX / "autoscaled.yaml", "--set", "fullnameOverride=")
    assert done.returncode == 0, done.stderr
    done_job = helm("template", "b" * 53, CHART, "-f", MATRIX / "pre-cached.yaml")
    for item in yaml.safe_load_all(done.stdout + done_job.stdout):
        assert len(item["metadata"]["name"]) <= 63
        assert all(len(value) <= 63 for value in item["metadata"]["labels"].values())


# ---------------------------------------------------------------- metrics


async def exported() -> dict[str, set[str]]:
    """Names of the series that the server exports, with their labels."""
    state, _engine = await ready_state()
    state.metrics.profile, state.metrics.engine_cache_hit = {"name": "bf16-tp1"}, True
    state.metrics.rejected["overloaded"] += 1
    state.metrics.finished["stop"] += 1
    series: dict[str, set[str]] = {}
    for line in state.metrics.render().decode().splitlines():
        if match := re.match(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? ", line):
            series.setdefault(match[1], set()).update(re.findall(r'(\w+)="', match[2] or ""))
    return series


def used(expression: str) -> list[tuple[str, set[str]]]:
    """(series, labels it is filtered by) of a PromQL expression whose every series has a selector."""
    found = re.findall(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}", expression)
    return [(name, set(re.findall(r"(\w+)=", selector))) for name, selector in found]


SCRAPED = {"namespace", "pod", "service"}  # labels that Prometheus adds to what it scrapes in a cluster


async def test_the_dashboard_asks_for_what_the_server_exports() -> None:
    series = await exported()
    data = of_kind("autoscaled", "ConfigMap")["data"]["appliance.json"]
    assert data + "\n" == (CHART / "dashboards" / "appliance.json").read_text(encoding="utf-8")
    board = json.loads(data)
    asked = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            found = used(target["expr"])
            assert found and target["expr"].count("(") == target["expr"].count(")"), target["expr"]
            grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            for name, labels in found:
                assert name in series, f"{panel['title']}: {name} is not exported"
                assert labels | grouped | shown <= series[name] | SCRAPED, f"{panel['title']}: {name}"
                asked.add(name)
    for variable in board["templating"]["list"][1:]:
        name, label = re.match(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
        assert name in series and label in series[name] | SCRAPED
    assert len(asked) >= 20 and len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


async def test_autoscalers_look_at_what_the_server_exports() -> None:
    series = await exported()
    schema = json.loads(chart_tools.SCHEMA.read_text(encoding="utf-8"))
    targets = schema["properties"]["autoscaling"]["properties"]["targets"]["properties"]
    assert set(targets) <= set(series)
    hpa = of_kind("autoscaled", "HorizontalPodAutoscaler")["spec"]["metrics"]
    by_name = {metric["pods"]["metric"]["name"]: metric["pods"]["target"]["averageValue"] for metric in hpa}
    assert by_name == {"num_requests_waiting": "2500m", "gpu_cache_usage_perc": "800m"}
    triggers = of_kind("scale-to-zero", "ScaledObject")["spec"]["triggers"]
    queries = [trigger["metadata"]["query"] for trigger in triggers if "authenticationRef" in trigger]
    assert [used(query) for query in queries] == [
        [("num_requests_running", {"namespace", "service"})],
        [("num_requests_waiting", {"namespace", "service"})],
    ]
    assert [trigger["metadata"]["threshold"] for trigger in triggers] == ["48", "4", "10"]


def test_pods_of_a_group_are_told_which_node_they_are() -> None:
    """As the LeaderWorkerSet controller completes it, on the second of two nodes."""
    by_component = dict(pods("multi-node"))
    assert set(by_component) == {"server", "worker", "test"}
    containers = [by_component[component]["spec"]["containers"][0] for component in ("server", "worker")]
    leader, worker = ({item["name"]: item.get("value", "") for item in container["env"]} for container in containers)
    assert leader == worker
    given = {"LWS_LEADER_ADDRESS": "demo-0.demo.inference", "LWS_WORKER_INDEX": "1"}
    filled = {name: re.sub(r"\$\((\w+)\)", lambda match: given[match[1]], text) for name, text in worker.items()}
    settings = load({}, filled)
    check_place_of_node(settings)
    assert (settings.nnodes, settings.node_rank, settings.tp_size, settings.pp_size) == (2, 1, 4, 4)
    assert (settings.master_addr, settings.master_port) == ("demo-0.demo.inference", 29500)
    assert not settings.warnings
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert containers[0][probe] == containers[1][probe]
    group = of_kind("multi-node", "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    assert group["size"] == 2 and group["restartPolicy"] == "None"
