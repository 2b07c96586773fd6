"""A fake NVML: pynvml's functions over cards described in plain dictionaries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pynvml

GIB = 2**30


def card(uuid: str, **more: Any) -> dict[str, Any]:
    """An H100 as the fake driver knows it; `raises` maps a function name to an NVML error code."""
    return {
        "name": "NVIDIA H100 80GB HBM3",
        "uuid": uuid,
        "pci": 0x233010DE,
        "bus": f"00000000:{len(uuid):02X}:{uuid[-2:]}.0",
        "cc": (9, 0),
        "memory": (80 * GIB, 79 * GIB),
        "p2p": {},
        "nvlinks": [],
        "slices": [],
        "raises": {},
        **more,
    }


def _fill_fabric(info: Any, state: int, status: int) -> None:
    """As the C function does: through the pointer it was given."""
    info.state, info.status = state, status


class FakeNvml:
    """pynvml's functions over a list of cards. Handles are the cards; a MIG slice is a card of its own."""

    NVMLError = pynvml.NVMLError
    c_nvmlGpuFabricInfo_t = pynvml.c_nvmlGpuFabricInfo_t

    def __init__(
        self, cards: list[dict[str, Any]], *, init: int = 0, cuda: int = 13000, driver: str = "580.95"
    ) -> None:
        self.cards, self.init, self.cuda, self.driver = cards, init, cuda, driver
        self.open = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("NVML_"):
            return getattr(pynvml, name)
        answers = {
            "nvmlDeviceGetName": lambda c: c["name"],
            "nvmlDeviceGetUUID": lambda c: c["uuid"],
            "nvmlDeviceGetPciInfo": lambda c: SimpleNamespace(pciDeviceId=c["pci"], busId=c["bus"]),
            "nvmlDeviceGetCudaComputeCapability": lambda c: c["cc"],
            "nvmlDeviceGetMemoryInfo": lambda c: SimpleNamespace(total=c["memory"][0], free=c["memory"][1]),
            "nvmlDeviceGetUtilizationRates": lambda c: SimpleNamespace(gpu=c.get("utilization", 0)),
            "nvmlDeviceGetMigMode": lambda c: [c["mig"], c["mig"]],
            "nvmlDeviceGetMaxMigDeviceCount": lambda c: 7,
            "nvmlDeviceGetMigDeviceHandleByIndex": lambda c, i: c["slices"][i],
            "nvmlDeviceGetAttributes": lambda c: SimpleNamespace(gpuInstanceSliceCount=c["compute_slices"]),
            "nvmlDeviceGetFieldValues": lambda c, ids: [
                SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=c["recovery"]))
            ],
            "nvmlDeviceGetRemappedRows": lambda c: c["remapped"],
            "nvmlDeviceGetRetiredPagesPendingStatus": lambda c: c["retired"],
            "nvmlDeviceGetTotalEccErrors": lambda c, kind, counter: c["ecc"],
            "nvmlDeviceGetGpuFabricInfo": lambda c, info: _fill_fabric(info._obj, *c["fabric"]),
            "nvmlDeviceGetComputeMode": lambda c: c["compute_mode"],
            "nvmlDeviceGetP2PStatus": lambda a, b, capability: a["p2p"][b["uuid"], capability],
            "nvmlDeviceGetTopologyCommonAncestor": lambda a, b: a["ancestor"][b["uuid"]],
            "nvmlDeviceGetNvLinkState": lambda c, link: c["nvlinks"][link] is not None,
            "nvmlDeviceGetNvLinkRemoteDeviceType": lambda c, link: 2 if c["nvlinks"][link] == "switch" else 0,
            "nvmlDeviceGetNvLinkRemotePciInfo": lambda c, link: SimpleNamespace(busId=c["nvlinks"][link].encode()),
        }
        answer = answers[name]

        def ask(card: dict[str, Any], *rest: Any) -> Any:
            assert self.open == 1, f"{name} outside nvmlInit … nvmlShutdown"
            if name in card["raises"]:
                raise pynvml.NVMLError(card["raises"][name])
            try:
                return answer(card, *rest)
            except (KeyError, IndexError):
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED) from None

        return ask

    def nvmlInit(self) -> None:
        if self.init:
            raise pynvml.NVMLError(self.init)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return self.cuda

    def nvmlSystemGetDriverVersion(self) -> str:
        return self.driver

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        if "handle" in self.cards[index]["raises"]:
            raise pynvml.NVMLError(self.cards[index]["raises"]["handle"])
        return self.cards[index]
