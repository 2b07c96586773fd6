"""CUDA_VISIBLE_DEVICES: which of the machine's GPUs and MIG slices are offered, and in which order.

Follows the CUDA programming guide ("CUDA environment variables"): entries are indices, GPU or MIG UUIDs or unambiguous
UUID prefixes; the first entry that names nothing ends the list, and a repeated one hides everything. Indices are NVML's
(PCI bus order); because engines are given UUIDs, CUDA's own "fastest first" numbering never matters.
"""

from __future__ import annotations

from appliance.sizes import counted
from appliance.types import Gpu


def _uuid_matches(token: str, gpu: Gpu) -> bool:
    token = token.lower()
    # "MIG-GPU-<gpu uuid>/<gi>/<ci>" is the name that drivers before 470 gave; such a slice has it as its UUID.
    return len(token) > len("gpu-") and gpu.uuid.lower().startswith(token)


def _named_by(token: str, devices: list[Gpu]) -> list[Gpu] | str:
    """The devices an entry names (a MIG-enabled GPU's index names all its slices), or why it names none."""
    index, _, mig = token.partition(":")
    if index.isdigit() and (not mig or mig.isdigit()):
        at_index = [d for d in devices if d.index == int(index)]
        if not at_index:
            return f"there is no GPU {index}"
        if not mig:
            return at_index
        if int(mig) >= len(at_index) or at_index[0].mig_profile is None:
            return f"GPU {index} has no MIG slice {mig}"
        return [at_index[int(mig)]]
    if token.lower().startswith(("gpu-", "mig-")):
        found = [d for d in devices if _uuid_matches(token, d)]
        if len(found) > 1:
            return f"the prefix {token} fits {len(found)} devices"
        return found or f"there is no device with UUID {token}"
    return f"{token!r} is neither an index nor a UUID (GPU-… or MIG-…)"


def apply_visible(devices: list[Gpu], value: str | None) -> tuple[list[Gpu], list[str]]:
    """The visible devices in their visible order, and plain lines about what was left out.

    `devices` are all of the machine, `index` being NVML's GPU index (slices of one GPU share it). None: all.
    """
    if value is None:
        return devices, []
    chosen: list[Gpu] = []
    notes: list[str] = []
    for token in (part.strip() for part in value.split(",")):
        if token in ("", "-1"):
            break
        named = _named_by(token, devices)
        if isinstance(named, str):
            notes.append(f"CUDA_VISIBLE_DEVICES={value}: {named}; it and what follows is ignored, as CUDA does")
            break
        if any(gpu in chosen for gpu in named):
            return [], [f"CUDA_VISIBLE_DEVICES={value}: {token} is named twice, so CUDA offers no device at all"]
        chosen.extend(named)
    if devices and not chosen and not notes:
        notes.append(f"CUDA_VISIBLE_DEVICES={value!r} hides all {counted(len(devices), 'device')}")
    elif len(chosen) < len(devices) and not notes:
        notes.append(
            f"{len(devices) - len(chosen)} of {counted(len(devices), 'device')} hidden by CUDA_VISIBLE_DEVICES={value}"
        )
    return chosen, notes
