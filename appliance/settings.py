"""Every setting, declared once: flags, environment variables and the keys of a `--config` file derive from `Settings`.

The only reader of os.environ. Knows names, types, ranges and where each value came from; does not know what the values
are used for. Precedence: command line > environment > --config YAML > profile > default.
"""

# ruff: noqa: RUF009 — the rows are made by a function on purpose

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from appliance import settings_children
from appliance.errors import SettingsError
from appliance.settings_rules import (
    agent_holds_port,
    check_together,
    environment_warnings,
    is_service_link,
    read_config,
)
from appliance.settings_table import Spec, row, specs_of
from appliance.settings_table import add_flags as add_table_flags
from appliance.types import KvCacheDtype, Objective, Precision

Source = Literal["command line", "environment", "config file", "profile", "default"]


@dataclass(frozen=True)
class Origin:
    """Where a value came from; `detail` is the flag, the variable, the file or the profile's name."""

    source: Source
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.source} ({self.detail})" if self.detail else self.source


DEFAULT = Origin("default")


_model = partial(row, group="model and storage")
_select = partial(row, group="profile selection")
_nodes = partial(row, group="several nodes")
_engine = partial(row, group="engine (changing these rebuilds nothing)")
_server = partial(row, group="server")


@dataclass(frozen=True)
class Settings:
    """All values of one start. Nobody writes to it after `load`; `with_profile` makes a new one."""

    model: str = _model(
        "builtin", "hub id (org/name, hf://org/name), directory, or 'builtin'", also="NIM_MODEL_PATH NIM_MODEL_NAME"
    )
    served_model_name: tuple[str, ...] = _model(
        (), "names of the model in the API, comma-separated; default: from the model", also="NIM_SERVED_MODEL_NAME"
    )
    chat_template: Path | None = _model(
        None, "Jinja file instead of the model's chat template", also="NIM_CHAT_TEMPLATE"
    )
    cache: Path | None = _model(
        None,
        "directory for engines and downloads; default /opt/nim/.cache if that exists, else ~/.cache/appliance",
        also="APPLIANCE_CACHE_PATH NIM_CACHE_PATH",
    )
    engine_source: str | None = _model(
        None, "where ready engines are fetched from before building: any fsspec URL (directory, s3://, hf://, https://)"
    )
    engine_source_timeout: float = _model(
        15.0, "seconds without a byte after which the engine is built, not fetched", limits=(0.1, 3600)
    )
    engine_publish: bool = _model(False, "copy engines that are built here to the engine source, after the start")
    tactics: bool = _model(True, "when an engine is built for a GPU, time the ways to compute each product there")
    calibration_data: str | None = _model(
        None,
        "text that INT4 and INT8 weights are quantized with: a text or jsonl file, a directory of such files, a hub "
        "data set (org/name), or 'none' to round to nearest; default: text that ships",
    )
    calibration_samples: int = _model(128, "how many samples of that text", limits=(1, 65536))
    calibration_length: int = _model(512, "tokens of a sample", limits=(16, 131_072))
    offline: bool = _model(False, "open no outside socket", also="NIM_DISABLE_MODEL_DOWNLOAD HF_HUB_OFFLINE")
    hf_token: str | None = _model(None, "Hugging Face token for private models", also="HF_TOKEN", secret=True)

    profile: str | None = _select(None, "profile to use, by name or id; default: chosen", also="NIM_MODEL_PROFILE")
    tags: str | None = _select(None, "choose among profiles by tags: precision=fp8,tp=1", also="NIM_TAGS_SELECTOR")
    objective: Objective = _select("throughput", "what to optimize for; auto: one request, at little cost for many")
    precision: Precision | None = _select(None, "precision of the weights; default: the profile's")
    kv_cache_dtype: KvCacheDtype = _select("auto", "precision of the KV cache")
    tp_size: int | None = _select(None, "tensor-parallel size", also="NIM_TENSOR_PARALLEL_SIZE", limits=(1, 64))
    pp_size: int | None = _select(None, "pipeline-parallel size", also="NIM_PIPELINE_PARALLEL_SIZE", limits=(1, 64))
    replicas: int | None = _select(
        None, "copies of the engine behind one endpoint, each on GPUs of its own; default: chosen", limits=(1, 64)
    )
    backend: str | None = _select(None, "what computes (cuda, cpu); default: the profile's")
    on_quality_failure: Literal["fallback", "fail", "ignore"] = _select(
        "fallback", "when quantization changes a model too much: serve another precision, end, or serve all the same"
    )
    require_gpu: bool = _select(False, "fail instead of serving on the CPU when no GPU can be used")

    nnodes: int = _nodes(
        1,
        "nodes (machines) that serve together, each with stages of the model; the same on all",
        also="NNODES GROUP_WORLD_SIZE NIM_NUM_COMPUTE_NODES",
        limits=(1, 64),
    )
    node_rank: int | None = _nodes(
        None,
        "this node's number, from 0; node 0 has the API",
        also="NODE_RANK GROUP_RANK NIM_NODE_RANK",
        limits=(0, 63),
    )
    master_addr: str | None = _nodes(None, "name or address of node 0, as the other nodes reach it", also="MASTER_ADDR")
    master_port: int = _nodes(29500, "port of node 0 at which the nodes meet", also="MASTER_PORT", limits=(1, 65534))
    node_timeout: float = _nodes(600.0, "seconds that a node may be missing before the others end", limits=(1, 86_400))

    max_model_len: int | None = _engine(
        None, "context limit in tokens; default: the model's", also="NIM_MAX_MODEL_LEN", limits=(16, 16_777_216)
    )
    max_num_seqs: int | None = _engine(None, "sequences running at once; default: the profile's", limits=(1, 4096))
    max_num_batched_tokens: int | None = _engine(
        None, "tokens computed in one step; default: the profile's", limits=(16, 1_048_576)
    )
    max_step_stretch: float = _engine(
        2.0, "how many times longer prompts may make a step that decodes; 0: no limit", limits=(0, 1000)
    )
    memory_fraction: float = _engine(
        0.9, "share of free GPU memory for weights and KV cache", also="NIM_KVCACHE_PERCENT", limits=(0.05, 1.0)
    )
    prefix_caching: bool = _engine(True, "reuse the KV cache of common prefixes", also="NIM_ENABLE_KV_CACHE_REUSE")
    cuda_graphs: bool = _engine(True, "replay decode steps as CUDA graphs", also="!NIM_DISABLE_CUDA_GRAPH")
    persistent_decode: bool = _engine(True, "one kernel per decode step of few sequences, where that is faster")
    batch_invariant: bool = _engine(False, "same bits for a request whatever else is in the batch; slower")
    attention: Literal["auto", "flashinfer", "triton", "reference"] = _engine("auto", "attention kernels")
    verify_digests: bool = _engine(True, "check every engine file against its digest at load")
    seed: int = _engine(0, "of requests that name no seed", limits=(0, 2**31 - 1))

    host: str = _server("0.0.0.0", "address to listen on")
    port: int = _server(8000, "port of the HTTP API", also="NIM_SERVER_PORT", limits=(1, 65535))
    health_port: int | None = _server(
        None, "further port with the same routes, for probes", also="NIM_HEALTH_PORT", limits=(1, 65535)
    )
    api_keys: tuple[str, ...] = _server((), "keys that clients must send, comma-separated; default: open", secret=True)
    max_waiting_requests: int = _server(1024, "waiting requests before new ones get 429", limits=(1, 1_000_000))
    drain_seconds: float = _server(30.0, "how long SIGTERM waits for running requests", limits=(0, 86_400))
    restart_budget: int = _server(3, "engine restarts allowed within 10 minutes", limits=(0, 1000))
    ssl_mode: Literal["DISABLED", "TLS", "MTLS"] = _server("DISABLED", "TLS for the API", also="NIM_SSL_MODE")
    ssl_certs_path: Path | None = _server(None, "server certificate (PEM)", also="NIM_SSL_CERTS_PATH")
    ssl_key_path: Path | None = _server(None, "server key (PEM)", also="NIM_SSL_KEY_PATH")
    ssl_ca_certs_path: Path | None = _server(
        None, "authorities that sign client certificates (MTLS)", also="NIM_SSL_CA_CERTS_PATH"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = _server("INFO", "least level", also="NIM_LOG_LEVEL")
    log_json: bool | None = _server(
        None, "log JSON lines; default: only where stderr is no terminal", also="NIM_JSONL_LOGGING"
    )
    termination_log: Path = _server(
        Path("/dev/termination-log"), "file for the reason of a failed exit, where there is one (Kubernetes makes it)"
    )
    stuck_seconds: float = _server(
        60.0, "time without a turn of the event loop after which liveness fails; 0: never", limits=(0, 86_400)
    )
    otel: bool = _server(False, "send a trace of each request (needs the otel extra)", also="NIM_ENABLE_OTEL")
    otel_endpoint: str | None = _server(
        None,
        "OTLP collector over HTTP; default http://localhost:4318",
        also="NIM_OTEL_EXPORTER_OTLP_ENDPOINT OTEL_EXPORTER_OTLP_ENDPOINT",
    )
    otel_service_name: str = _server(
        "appliance", "name of this service in traces", also="NIM_OTEL_SERVICE_NAME OTEL_SERVICE_NAME"
    )

    origins: Mapping[str, Origin] = field(default_factory=dict, repr=False, compare=False)
    warnings: tuple[str, ...] = field(default=(), repr=False, compare=False)  # one plain line each, for the log

    def origin(self, name: str) -> Origin:
        assert name in specs(), name
        return self.origins.get(name, DEFAULT)

    def with_profile(self, profile: str, values: Mapping[str, object]) -> Settings:
        """The profile's values where nobody chose one. Values are parsed like those of a config file."""
        origin = Origin("profile", profile)
        chosen = {
            name: specs()[name].parse(value, f"profile {profile}, {name}")
            for name, value in values.items()
            if self.origin(name).source == "default"
        }
        return replace(self, **chosen, origins={**self.origins, **dict.fromkeys(chosen, origin)})

    def shown(self, name: str) -> str:
        """The value as `serve --dry-run` and logs print it; secrets only as set or not."""
        value = getattr(self, name)
        if specs()[name].secret:
            return "(set)" if value else "(not set)"
        if isinstance(value, str):
            return re.sub(r"//[^/@]*@", "//***@", value)  # the name and password of a URL
        if value is None or value == ():
            return "-"
        if isinstance(value, bool):
            return str(value).lower()
        return ",".join(value) if isinstance(value, tuple) else str(value)

    @property
    def json_logging(self) -> bool:
        return not sys.stderr.isatty() if self.log_json is None else self.log_json

    @property
    def cache_dir(self) -> Path:
        return self.cache or default_cache_dir()


@cache
def specs() -> dict[str, Spec]:
    """The table by name, in order of declaration."""
    return specs_of(Settings)


def add_flags(parser: argparse.ArgumentParser, names: Iterable[str] | None = None) -> None:
    """A flag per setting (all, or the named ones), and --config."""
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file with settings by name")
    add_table_flags(parser, [specs()[name] for name in (specs() if names is None else names)])


# ---------------------------------------------------------------- loading


def load(flags: Mapping[str, object] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """All settings from flags (as argparse gives them), the environment and the config file.

    Raises SettingsError for a bad value, an unknown key of the config file, or a name that is not supported yet and
    would change results. Unknown variables are warnings: they may belong to something else in the container.
    """
    flags = flags or {}
    environ = {k: v for k, v in (os.environ if environ is None else environ).items() if not is_service_link(k, v)}
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    config = flags.get("config") or environ.get("APPLIANCE_CONFIG")
    for key, raw in (read_config(Path(str(config)), specs()) if config else {}).items():
        values[key] = specs()[key].parse(raw, f"{config}, {key}")
        origins[key] = Origin("config file", str(config))
    known = {name.lstrip("!") for spec in specs().values() for name in spec.variables} | {"APPLIANCE_CONFIG"}
    warnings = environment_warnings(environ, known)
    for spec in specs().values():
        given = [name for name in spec.variables if environ.get(name.lstrip("!"), "").strip()]
        if given:
            values[spec.name] = _from_variable(spec, given[0], environ)
            origins[spec.name] = Origin("environment", given[0].lstrip("!"))
        warnings += [
            f"{name.lstrip('!')} is overridden by {given[0].lstrip('!')}"
            for name in given[1:]
            if _from_variable(spec, name, environ) != values[spec.name]
        ]
        if spec.name in flags:
            values[spec.name] = spec.parse(flags[spec.name], spec.flag)
            origins[spec.name] = Origin("command line", spec.flag)
    if agent_holds_port(environ, origins["master_port"].detail if "master_port" in origins else ""):
        values["master_port"] += 1
        origins["master_port"] = Origin("environment", "the port behind MASTER_PORT, where torchrun itself listens")
    settings = Settings(**values, origins=origins, warnings=tuple(warnings))
    check_together(settings)
    return settings


def _from_variable(spec: Spec, name: str, environ: Mapping[str, str]) -> Any:
    bare = name.lstrip("!")
    value = spec.parse(environ[bare], bare)
    return not value if name.startswith("!") else value


# ---------------------------------------------------------------- the rest of the environment


def default_cache_dir() -> Path:
    """/opt/nim/.cache where it exists (the image), the user's cache directory otherwise. Also where it cannot be
    written: that a volume mounted there is not used would be noticed only at the next long start."""
    image = Path("/opt/nim/.cache")
    if image.is_dir():
        return image
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "appliance"
    except RuntimeError:
        raise SettingsError("no cache directory: this user has no home", hint="set APPLIANCE_CACHE") from None


def termination_log(flags: Mapping[str, object]) -> Path:
    """The setting of that name, also where other settings are wrong."""
    with contextlib.suppress(SettingsError):
        return load(flags).termination_log
    spec = specs()["termination_log"]
    given = flags.get(spec.name) or os.environ.get(spec.variable, "").strip()
    return Path(str(given)) if given else Path(spec.default)


def cuda_visible_devices() -> str | None:
    """As CUDA reads it: None is all, empty is none."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def words_to_complete() -> list[str] | None:
    """The line typed so far, if a shell asks for completions (argcomplete's protocol); None otherwise."""
    return os.environ.get("COMP_LINE", "").split()[1:] if "_ARGCOMPLETE" in os.environ else None


def yield_idle_threads() -> None:
    """Let waiting OpenMP threads sleep instead of spin, unless told otherwise; torch reads this when it is imported.

    Where other processes share the cores (a server beside its engine already does), spinning threads keep each other
    off the CPU: measured on two shared cores, the built-in model decodes 30 times faster with sleeping ones."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def child_environment(settings: Settings) -> dict[str, str]:
    """Of engine and builder processes: this one's, minus API keys, plus what libraries read at import."""
    return settings_children.child_environment(
        {k: v for k, v in os.environ.items() if k != specs()["api_keys"].variable},
        settings.cache_dir,
        offline=settings.offline,
        log_level=settings.log_level,
        log_json=settings.json_logging,
    )


def child_logging() -> tuple[str, bool]:
    """Level and JSON lines or not, for `logs.configure` in a child process: what the parent decided."""
    table = specs()
    level = os.environ.get("APPLIANCE_LOG_LEVEL", "INFO")
    as_json = os.environ.get("APPLIANCE_LOG_JSON", "false")
    return table["log_level"].parse(level, "APPLIANCE_LOG_LEVEL"), table["log_json"].parse(
        as_json, "APPLIANCE_LOG_JSON"
    )


def export_otel_environment(settings: Settings) -> None:
    """Let the OpenTelemetry SDK see these where it looks for all the other OTEL_* variables, the environment."""
    os.environ["OTEL_SERVICE_NAME"] = settings.otel_service_name
    if settings.otel_endpoint:
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = settings.otel_endpoint


def otel_exporters() -> tuple[str, ...]:
    """Where traces go, by the standard variable: names separated by commas."""
    given = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
    return tuple(name.strip() for name in given.split(",") if name.strip())


def secrets_of(settings: Settings) -> list[str]:
    """Texts that no log line may hold: keys, tokens, and passwords in URLs."""
    urls = [settings.engine_source or "", settings.otel_endpoint or "", settings.model]
    passwords = [match[1] for url in urls if (match := re.search(r"//[^/@:]*:([^/@]+)@", url))]
    return [*settings.api_keys, *filter(None, [settings.hf_token]), *passwords]


def inherited_secrets() -> list[str]:
    """The same for a child process, from what its environment holds."""
    names = ("HF_TOKEN", "APPLIANCE_HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    return [os.environ[name] for name in names if os.environ.get(name)]


def export_hub_environment(settings: Settings) -> None:
    """Let huggingface_hub see `offline` and `hf_token`, which it reads from the environment when it is imported."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if settings.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if settings.hf_token:
        os.environ["HF_TOKEN"] = settings.hf_token


def forbid_nvlink_multicast() -> None:
    """Let NCCL and torch's symmetric memory do without NVLink multicast, which they read from the environment."""
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"


def share_gpu(rank: int) -> None:
    """Let ranks be on one GPU, as in tests; NCCL takes them for ranks of different hosts then."""
    os.environ["NCCL_HOSTID"] = f"rank-{rank}"
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"


def gpus_shared() -> bool:
    """Whether `share_gpu` was called here."""
    return os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1"
