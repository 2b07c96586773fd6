"""Counts for people: one of a thing is no plural."""

from __future__ import annotations

import pytest

from appliance.sizes import counted


@pytest.mark.parametrize(("count", "text"), [(0, "0 requests"), (1, "1 request"), (2, "2 requests")])
def test_counts(count: int, text: str) -> None:
    assert counted(count, "request") == text
