"""Sizes in bytes as text, read and written; and counts. Knows nothing else."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def parse_size(value: int | str) -> int:
    """Bytes of 42949672960, "40 GiB", "40960MiB" or "40 GB". ValueError otherwise."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(value))
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{value!r} is not a size: write bytes, or a number with one of MiB, GiB, MB, GB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_size(size: int) -> str:
    """For people: "79.6 GiB", "512 MiB"."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def counted(count: int, noun: str) -> str:
    """For people: "1 request", "2 requests"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
