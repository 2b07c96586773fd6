"""Recorded hardware files (`--hardware FILE`): a machine in YAML, so that selection can be tried for any machine.

The fields are those of `types.Hardware` and `types.Gpu`, with these conveniences for people who write one by hand:
sizes are bytes or text ("80 GiB", "81559 MiB"); `compute_capability` is text ("9.0"); a GPU with `count: 8` stands for
eight in a row; `index` and `uuid` may be left out; `links: nvlink` stands for that link to every other GPU of the file;
`numa_nodes: [[0, 1], [2, 3]]` for paths inside a NUMA node among those GPUs and from socket to socket between them;
`cpu_cores`, `memory` and `free_memory` of the machine have modest defaults. Unknown keys are errors.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import msgspec
import yaml

from appliance.errors import SettingsError
from appliance.hardware.detect import expand_mig
from appliance.hardware.limits import REQUIRED_CUDA, apply_limits
from appliance.sizes import parse_size
from appliance.strict import check_keys, read_yaml
from appliance.types import Gpu, Hardware

_SIZES = ("total_memory", "free_memory", "memory")
_DEFAULTS: dict[str, Any] = {"cpu_cores": 16, "memory": "128 GiB", "free_memory": "120 GiB", "gpus": []}


def load(path: Path | str, *, cuda_build: str | None = REQUIRED_CUDA) -> Hardware:
    """Read a recorded machine and apply this build's limits to it. SettingsError says what is wrong with the file."""
    path = Path(path)
    raw = read_yaml(path, "hardware")
    try:
        return apply_limits(_decode(raw), cuda_build)
    except (ValueError, TypeError, AttributeError) as error:
        raise SettingsError(
            f"the hardware file {path} is wrong: {error}",
            hint="its format is described in appliance/hardware/record.py",
        ) from error


def dump(hardware: Hardware) -> str:
    """YAML text that `load` reads back to an equal value."""
    raw = msgspec.to_builtins(hardware)
    for gpu in raw.get("gpus", []):
        gpu["compute_capability"] = ".".join(map(str, gpu["compute_capability"]))
        _write_sizes(gpu)
        for part in gpu.get("mig_slices", []):
            _write_sizes(part)
    _write_sizes(raw)
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, width=120)


def _write_sizes(entry: dict[str, Any]) -> None:
    for key in _SIZES:
        if key in entry and entry[key] % 2**20 == 0:
            entry[key] = f"{entry[key] // 2**20} MiB"


def _read_sizes(entry: dict[str, Any]) -> None:
    for key in _SIZES:
        if key in entry:
            entry[key] = parse_size(entry[key])


def _decode(raw: Any) -> Hardware:
    check_keys(raw, [*Hardware.__struct_fields__, "links", "numa_nodes"], "the file")
    raw = {**_DEFAULTS, **raw}
    link, numa_nodes = raw.pop("links", None), raw.pop("numa_nodes", None)
    _read_sizes(raw)
    gpus: list[dict[str, Any]] = []
    for entry in raw.pop("gpus") or []:
        check_keys(entry, [*Gpu.__struct_fields__, "count"], "a GPU")
        gpus += _expand_count(dict(entry), len(gpus))
    if link is not None:
        if link not in ("nvlink", "pcie", "none"):
            raise ValueError(f"links is {link!r}, and may be nvlink, pcie or none")
        for gpu in gpus:
            gpu.setdefault("links", {o["index"]: link for o in gpus if o["index"] != gpu["index"]})
    if numa_nodes is not None:
        _set_paths(gpus, numa_nodes)
    decoded = [device for gpu in gpus for device in expand_mig(msgspec.convert(gpu, Gpu, strict=False))]
    return msgspec.convert({**raw, "gpus": decoded}, Hardware, from_attributes=True)


def _set_paths(gpus: list[dict[str, Any]], numa_nodes: list[list[int]]) -> None:
    node_of = {index: number for number, node in enumerate(numa_nodes) for index in node}
    indices = [gpu["index"] for gpu in gpus]
    if sorted(index for node in numa_nodes for index in node) != sorted(indices):
        raise ValueError(f"numa_nodes is {numa_nodes}, and must have each of the GPUs {indices} once")
    for gpu in gpus:
        here = gpu["index"]
        near = {index: node_of[index] == node_of[here] for index in indices if index != here}
        gpu.setdefault("paths", {index: "numa" if same else "system" for index, same in near.items()})


def _expand_count(entry: dict[str, Any], start: int) -> list[dict[str, Any]]:
    count = entry.pop("count", 1)
    if not isinstance(count, int) or count < 1 or (count > 1 and {"uuid", "index"} & entry.keys()):
        raise ValueError(f"count is {count!r}: it must be 1 or more, and with more than 1 no index or uuid is given")
    major, _, minor = str(entry.get("compute_capability", "")).partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise ValueError(f'compute_capability is {entry.get("compute_capability")!r}, write it as text: "9.0"')
    entry["compute_capability"] = (int(major), int(minor))
    entry["mig_slices"] = [dict(part) for part in entry.get("mig_slices", ())]
    for sized in (entry, *entry["mig_slices"]):
        _read_sizes(sized)
        sized.setdefault("free_memory", sized.get("total_memory"))
    gpus = []
    for index in range(start, start + count):
        name = f"{entry.get('name')}-{index}"
        made_up = f"GPU-{uuid.uuid5(uuid.NAMESPACE_OID, name)}"
        gpus.append({"index": index, "uuid": made_up, **entry})
    return gpus
