"""Loading of own kernels, with cuda.core and the driver played by fakes, as they need a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from appliance.kernels import cuda_core
from appliance.kernels.cuda_core import load_kernel


class Driver:
    """`cuda.bindings.driver`: takes up to 227 KB, as an H100 does."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")
    CUresult = SimpleNamespace(CUDA_SUCCESS=0)

    def __init__(self) -> None:
        self.set: list[tuple[Any, ...]] = []

    def CUkernel(self, handle: int) -> tuple[str, int]:
        return "kernel", handle

    def CUdevice(self, index: int) -> tuple[str, int]:
        return "device", index

    def cuKernelSetAttribute(self, *given: Any) -> tuple[int]:
        self.set.append(given)
        return (0 if given[1] <= 227 << 10 else 1,)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    code = SimpleNamespace(get_kernel=lambda entry: SimpleNamespace(handle=7, entry=entry))
    core = SimpleNamespace(ObjectCode=SimpleNamespace(from_cubin=lambda cubin: code if cubin == b"code" else None))
    monkeypatch.setattr(cuda_core, "cuda_core", lambda: core)
    monkeypatch.setattr(cuda_core, "cuda_bindings", {"driver": driver}.__getitem__)
    return driver


def test_a_kernel_is_loaded_with_its_shared_memory_on_its_gpu(driver: Driver) -> None:
    assert load_kernel(b"code", "step", 200_000, 3).entry == "step"
    assert driver.set == [("shared", 200_000, ("kernel", 7), ("device", 3))]


def test_too_much_shared_memory_is_said(driver: Driver) -> None:
    with pytest.raises(RuntimeError, match="the kernel step cannot have 300000 bytes of shared memory"):
        load_kernel(b"code", "step", 300_000, 0)
