"""All-reduce kernels compile, waits included, for GPUs that are not here; loads are as wide as they can be."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_triton_compile import lines_of

from appliance.kernels._triton import HAS_TRITON

RELEASE, ACQUIRE = "st.release.sys.global.u32", "ld.acquire.sys.global.u32"


@pytest.mark.timeout(300)
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
@pytest.mark.parametrize("arch", [80, 90])
def test_all_reduce_kernels_compile(arch: int, tmp_path: Path) -> None:
    """A wait is: barrier, release, acquire, barrier. Nothing that peers write is read as if it were constant. Best
    tokens are few numbers, so their kernel has no wide loads."""
    compiled = lines_of("compile_all_reduce.py", tmp_path, str(arch))
    assert len(compiled) == 21
    for line in compiled:
        waits = 2 if line["two_shot"] else 1
        assert (line["releases"], line["acquires"]) == (waits, waits), line
        order = line["order"]
        for at in (at for at, name in enumerate(order) if name == RELEASE):
            assert order[at - 1 : at + 3] == ["bar.sync", RELEASE, ACQUIRE, "bar.sync"], line
        assert line["cached_loads"] == line["single_loads"] == line["stack"] == 0, line
        assert line["waits"] == (arch >= 90), line
        assert line["wide_loads"] >= line["ranks"] or line["kernel"] == "_best_tokens_kernel", line
