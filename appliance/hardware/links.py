"""How two GPUs reach each other's memory (over NVLink, peer to peer over PCIe, or not at all), and how far apart they
are on PCIe."""

from __future__ import annotations

from typing import Any

# pynvml's NVML_P2P_CAPS_INDEX_READ is a tuple by a slip of the pen, so the numbers of nvml.h stand here.
_P2P_READ, _P2P_NVLINK = 0, 2


def _p2p(nvml: Any, a: Any, b: Any, capability: int) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetP2PStatus(a, b, capability) == nvml.NVML_P2P_STATUS_OK)
    except nvml.NVMLError:
        return False


def _nvlink_ends(nvml: Any, handle: Any) -> set[str]:
    """What the active NVLinks of a GPU lead to: PCI bus ids of GPUs, or "switch"."""
    ends = set()
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            if not nvml.nvmlDeviceGetNvLinkState(handle, link):
                continue
            if nvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link) == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
                ends.add("switch")
            else:
                ends.add(_bus_id(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link)))
        except nvml.NVMLError:
            continue
    return ends


def _bus_id(pci_info: Any) -> str:
    bus_id = pci_info.busId
    return str(bus_id.decode() if isinstance(bus_id, bytes) else bus_id).lower()


def link_between(nvml: Any, a: Any, b: Any) -> str:
    """ "nvlink", "pcie" (peer-to-peer reads work) or "none"."""
    if _p2p(nvml, a, b, _P2P_NVLINK):
        return "nvlink"
    # Inside some virtual machines the peer-to-peer question has no answer, while the links themselves are visible.
    ends = _nvlink_ends(nvml, a)
    if ends:
        try:
            if _bus_id(nvml.nvmlDeviceGetPciInfo(b)) in ends:
                return "nvlink"
        except nvml.NVMLError:
            return "none"
        if "switch" in ends and "switch" in _nvlink_ends(nvml, b):
            return "nvlink"
    return "pcie" if _p2p(nvml, a, b, _P2P_READ) else "none"


def path_between(nvml: Any, a: Any, b: Any) -> str | None:
    """What lies between them on PCIe: "switch", "switches", "host", "numa" or "system"; None: NVML does not say."""
    try:
        level = nvml.nvmlDeviceGetTopologyCommonAncestor(a, b)
    except nvml.NVMLError:
        return None
    names = {
        nvml.NVML_TOPOLOGY_INTERNAL: "switch",  # two GPUs of one card
        nvml.NVML_TOPOLOGY_SINGLE: "switch",
        nvml.NVML_TOPOLOGY_MULTIPLE: "switches",
        nvml.NVML_TOPOLOGY_HOSTBRIDGE: "host",
        nvml.NVML_TOPOLOGY_NODE: "numa",
        nvml.NVML_TOPOLOGY_SYSTEM: "system",
    }
    return names.get(level)
