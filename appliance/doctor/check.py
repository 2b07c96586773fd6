"""What a check says, and all of them as text and as JSON."""

from __future__ import annotations

from typing import Literal

import msgspec

from appliance.types import Struct

Status = Literal["ok", "warning", "failed", "skipped"]


class Check(Struct, frozen=True):
    name: str
    status: Status
    message: str
    fix: str = ""  # what to do; never empty for a warning or a failure


def as_text(checks: list[Check]) -> str:
    marks = {"ok": "ok     ", "warning": "WARNING", "failed": "FAILED ", "skipped": "-      "}
    lines = []
    for check in checks:
        lines.append(f"{marks[check.status]} {check.name}: {check.message}")
        if check.fix and check.status in ("warning", "failed"):
            lines.append(f"        fix: {check.fix}")
    return "\n".join(lines)


def as_json(checks: list[Check]) -> str:
    body = {"ok": passed(checks), "checks": [msgspec.structs.asdict(check) for check in checks]}
    return msgspec.json.encode(body).decode()


def passed(checks: list[Check]) -> bool:
    return all(check.status != "failed" for check in checks)
