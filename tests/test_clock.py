"""The age of a process, compared with what its parent measured around it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from appliance import clock

_CHILD = """
import sys, time
from appliance.clock import process_age_seconds
first = process_age_seconds()
began = time.monotonic()
time.sleep(0.3)
print(first, process_age_seconds() - first, time.monotonic() - began)
"""


def test_the_age_is_right_to_hundredths_and_not_to_whole_seconds() -> None:
    """Several, since an error of the machine's start in whole seconds would depend on when it was started."""
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, check=True)
        lived = time.monotonic() - began
        first, grown, slept = map(float, done.stdout.split())
        assert grown == pytest.approx(slept, abs=0.02)
        assert 0 < first <= lived - slept + 0.02, "no older than its parent knows"


def test_a_machine_that_says_nothing_is_asked_otherwise(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("1 (a) b) S 1 1\n")  # too short
    for stat in (tmp_path / "none", tmp_path / "stat"):
        assert clock.process_age_seconds(stat) == pytest.approx(clock.process_age_seconds(), abs=1.5)


def test_a_name_with_brackets_is_no_matter(tmp_path: Path) -> None:
    text = Path("/proc/self/stat").read_text()
    odd = text[: text.index("(")] + "(odd) (name " + text[text.rindex(")") :]
    (tmp_path / "stat").write_text(odd)
    assert clock.process_age_seconds(tmp_path / "stat") == pytest.approx(clock.process_age_seconds(), abs=0.05)
