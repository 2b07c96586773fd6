"""Rules of settings beyond single values: names that are not supported or not ours, config files, and what
several settings must be together.

Knows names and values handed to it; which settings there are, and the environment, are settings.py's.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from appliance.errors import SettingsError

# Names that users of such appliances set and that do nothing here yet. True: the results would differ from what was
# asked for, so it is fatal; False: said loudly, and the start goes on.
NOT_SUPPORTED: dict[str, tuple[bool, str]] = {
    "NIM_PEFT_SOURCE": (True, "LoRA adapters are not supported yet"),
    "NIM_PEFT_REFRESH_INTERVAL": (True, "LoRA adapters are not supported yet"),
    "NIM_MAX_GPU_LORAS": (False, "LoRA adapters are not supported yet"),
    "NIM_MAX_CPU_LORAS": (False, "LoRA adapters are not supported yet"),
    "NIM_MAX_LORA_RANK": (False, "LoRA adapters are not supported yet"),
    "NIM_ENABLE_AUTO_TOOL_CHOICE": (True, "tool calls are not supported yet"),
    "NIM_TOOL_CALL_PARSER": (True, "tool calls are not supported yet"),
    "NIM_TOOL_PARSER_PLUGIN": (True, "tool calls are not supported yet"),
    "NIM_GUIDED_DECODING_BACKEND": (True, "guided decoding is not supported yet"),
    "NIM_FORCE_TRUST_REMOTE_CODE": (True, "code of a checkpoint is never run here"),
    "NIM_OTEL_TRACES_EXPORTER": (False, "traces go out over OTLP only: NIM_ENABLE_OTEL, OTEL_EXPORTER_OTLP_ENDPOINT"),
    "NIM_OTEL_METRICS_EXPORTER": (False, "metrics are at /metrics only"),
}
# What Kubernetes sets in every pod for a Service whose name starts with "appliance" or "nim".
_SERVICE_LINK = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_[A-Z0-9_]+)?$|_PORT_\d+_(TCP|UDP|SCTP)(_[A-Z]+)?$")


def is_service_link(name: str, value: str) -> bool:
    if not name.startswith(("APPLIANCE_", "NIM_")):
        return False
    return bool(_SERVICE_LINK.search(name)) or (name.endswith("_PORT") and "://" in value)


def environment_warnings(environ: Mapping[str, str], known: set[str]) -> list[str]:
    """One line per variable that is not `known` as ours, or not supported yet. SettingsError for what would change
    results."""
    warnings = []
    for name in sorted(environ):
        if not name.startswith(("APPLIANCE_", "NIM_")) or name in known or not environ[name].strip():
            continue
        if name not in NOT_SUPPORTED:
            warnings.append(f"{name} is not a setting and does nothing{_nearest(name, known)}")
        elif environ[name].strip().lower() not in ("0", "false", "no", "off"):
            fatal, reason = NOT_SUPPORTED[name]
            if fatal:
                raise SettingsError(f"{name} is set, but {reason}", hint=f"unset {name}")
            warnings.append(f"{name} is set, but {reason}")
    return warnings


def agent_holds_port(environ: Mapping[str, str], source: str) -> bool:
    """Whether torchrun's own store listens at MASTER_PORT, which is where the setting comes from (`source`): the nodes
    then meet at the port behind it. SettingsError if torchrun started several processes on this node."""
    if "TORCHELASTIC_RUN_ID" not in environ:
        return False
    count = environ.get("LOCAL_WORLD_SIZE", "1")
    if count != "1":
        raise SettingsError(
            f"torchrun starts {count} processes on this node, and may start one",
            hint="use --nproc-per-node 1: the appliance starts a process for each GPU itself",
        )
    return source == "MASTER_PORT" and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" or nothing. The prefix is left out of the comparison: all names share it."""
    prefix = re.match(r"APPLIANCE_|NIM_|", name)
    assert prefix is not None
    bare = {re.sub(r"^(APPLIANCE_|NIM_)", "", other): other for other in sorted(known)}
    bare |= {other.removeprefix(prefix[0]): other for other in known if prefix[0] and other.startswith(prefix[0])}
    match = difflib.get_close_matches(name.removeprefix(prefix[0]), list(bare), n=1, cutoff=0.6)
    return f"; did you mean {bare[match[0]]}?" if match else ""


def read_config(path: Path, known: Iterable[str]) -> dict[str, object]:
    """The mapping in a config file of `known` settings, keys in underscore form, nulls left out. SettingsError if it is
    not one."""
    import yaml

    from appliance.strict import parse_yaml

    known = list(known)
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"--config {path} cannot be read: {reason}", hint="give a YAML file of settings") from None
    if not isinstance(content, dict | None):
        raise SettingsError(f"--config {path}: expected settings by name, found a {type(content).__name__}")
    found = {}
    for key, value in (content or {}).items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise SettingsError(
                f"--config {path}: unknown setting {str(key)!r}{_nearest(name, known)}",
                hint="`serve --dry-run` lists all settings",
            )
        if name in found:
            raise SettingsError(
                f"--config {path}: {name} is given twice, as {name} and {name.replace('_', '-')}", hint="say it once"
            )
        found[name] = value
    return {name: value for name, value in found.items() if value is not None}


def check_together(settings: Any) -> None:
    """Rules over several fields of a `Settings`, which is above this file. Raises SettingsError."""
    needed = {"DISABLED": (), "TLS": ("certs", "key"), "MTLS": ("certs", "key", "ca_certs")}[settings.ssl_mode]
    for part in needed:
        name = f"ssl_{part}_path"
        path = getattr(settings, name)
        if path is None:
            raise SettingsError(f"ssl_mode {settings.ssl_mode} needs {name}", hint=f"set APPLIANCE_{name.upper()}")
        if not path.is_file():
            raise SettingsError(f"{name}: there is no file {path}")
    if settings.engine_publish:
        if settings.engine_source is None:
            raise SettingsError("engine_publish needs engine_source", hint="set APPLIANCE_ENGINE_SOURCE")
        if settings.engine_source.startswith(("http://", "https://")):
            raise SettingsError(
                "engine_publish: an engine source on http is only for fetching",
                hint="name a directory, s3:// or hf:// as engine source, or leave engine_publish out",
            )
    if 0 < settings.max_step_stretch <= 1:
        raise SettingsError(
            f"max_step_stretch is {settings.max_step_stretch:g}; at 1 or less prompts would never run beside decodes",
            hint="set more than 1, or 0 for no limit",
        )
    if settings.chat_template is not None and not settings.chat_template.is_file():
        raise SettingsError(f"chat_template: there is no file {settings.chat_template}")
    _check_nodes(settings)


def _check_nodes(settings: Any) -> None:
    if settings.node_rank is not None and settings.node_rank >= settings.nnodes:
        hint = "ranks of nodes begin with 0" if settings.nnodes > 1 else "say with --nnodes how many nodes there are"
        raise SettingsError(f"node_rank {settings.node_rank} is not below nnodes, {settings.nnodes}", hint=hint)
    if settings.nnodes > 1 and (settings.replicas or 1) > 1:
        raise SettingsError(
            f"{settings.replicas} replicas on {settings.nnodes} nodes are not supported",
            hint="leave --replicas out; start several groups of nodes instead",
        )
    if settings.nnodes > 1 and settings.pp_size is not None and settings.pp_size % settings.nnodes:
        raise SettingsError(
            f"pp_size {settings.pp_size} is no multiple of {settings.nnodes} nodes: a node has whole stages",
            hint=f"leave --pp-size out, or choose {settings.nnodes} or a multiple of it",
        )


def check_place_of_node(settings: Any) -> None:
    """What a server on one of several nodes needs beyond `check_together`. Raises SettingsError."""
    if settings.nnodes == 1:
        return
    if settings.node_rank is None:
        raise SettingsError(
            f"nnodes is {settings.nnodes}, and node_rank is not set", hint="give each node its --node-rank, from 0"
        )
    if settings.node_rank and settings.master_addr is None:
        raise SettingsError(
            f"node {settings.node_rank} needs master_addr", hint="give --master-addr, the name or address of node 0"
        )
